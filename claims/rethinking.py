"""Inherited weights against training the pruned architecture from scratch."""

from __future__ import annotations

from claims.bench import Bench, digits, percent, tuned
from claims.claim import Claim, Experiment
from claims.rules import Above, NotBelow
from prunus.procedures.common import cut, dense
from prunus.procedures.rethinking import rethinking

SOURCE = "Liu et al., Rethinking the Value of Network Pruning, ICLR 2019"


def scratch(bench: Bench) -> dict[str, float]:
    """Tune the pruned network; train its mask from new weights for 30 epochs (E) and for 60 (B)."""
    trained = dense(bench)
    found = {"dense": bench.accuracy(trained)}
    for density in (0.05, 0.02, 0.01):
        inner = bench.within(f"density-{density}")
        for arm, label in (("scratch-E", "E"), ("scratch-B", "B")):
            # Half the weights would double the epochs; at these densities the whole budget would be 600 and more.
            state = rethinking(inner, sparsity=1 - density, arm=arm, budget="lamp", cap=2).state
            found[f"{label} {percent(density)}"] = bench.accuracy(state)
        masks = cut(inner, "prune", trained, 1 - density, budget="lamp")
        found[f"tuned {percent(density)}"] = bench.accuracy(tuned(inner, "tuned", trained, masks))
    return found


SCRATCH = Experiment(
    name="from-scratch",
    setup="digits, 30 epochs dense, LAMP masks; tuned: 15 epochs from half the rate; E: 30 epochs from new weights; B: "
    "60 epochs from new weights (the paper's cap of twice the dense length)",
    world=digits(30),
    measure=scratch,
    cost=9,
)

CLAIMS = [
    *(
        Claim(
            name=f"scratch-b-beats-e-{density}",
            method="rethinking-pruning",
            source=SOURCE,
            statement=f"At {density}% density training from scratch gains from the longer budget.",
            experiment=SCRATCH,
            rule=Above(f"B {density}%", f"E {density}%"),
        )
        for density in (2, 1)
    ),
    *(
        Claim(
            name=f"scratch-b-catches-tuning-{density}",
            method="rethinking-pruning",
            source=SOURCE,
            statement=f"At {density}% density training from scratch for the longer budget keeps up with tuning.",
            experiment=SCRATCH,
            rule=NotBelow(f"B {density}%", f"tuned {density}%", 0.01),
        )
        for density in (5, 2)
    ),
    Claim(
        name="tuning-beats-scratch-1",
        method="rethinking-pruning",
        source=SOURCE,
        statement="At the extreme sparsity of 99% inherited weights beat training from scratch.",
        experiment=SCRATCH,
        rule=Above("tuned 1%", "B 1%"),
    ),
]
