"""Random masks chosen before training: layer ratios matter, and wide networks mind less."""

from __future__ import annotations

from claims.bench import Bench, digits, mlp, percent
from claims.claim import Claim, Experiment
from claims.rules import Above
from prunus.methods.static import Static

SOURCE = "Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022"


def random_masks(bench: Bench) -> dict[str, float]:
    """Train under random masks with uniform and with ERK layer ratios, and the dense network."""
    found = {"dense": bench.accuracy(bench.train("dense"))}
    for density in (0.05, 0.02):
        for budget in ("erk", "uniform"):
            method = Static(sparsity=1 - density, budget=budget)
            state = bench.train(f"{budget}-{density}", method=method)
            found[f"{'ERK' if budget == 'erk' else budget} {percent(density)}"] = bench.accuracy(state)
    return found


def random_width(bench: Bench) -> dict[str, float]:
    """Measure how much a random ERK mask costs at two widths."""
    found = {}
    for factor in (1, 2):
        widths = (256 * factor, 128 * factor)
        wider = bench.variant(f"width-{factor}", make_model=mlp(*widths))
        sparse = wider.train("sparse", method=Static(sparsity=0.95))
        loss = wider.accuracy(wider.train("dense")) - wider.accuracy(sparse)
        found[f"lost at {widths[0]}-{widths[1]}"] = loss
    return found


MASKS = Experiment(
    name="random-masks",
    setup="digits, 30 epochs, fixed random masks with ERK or uniform layer ratios",
    world=digits(30),
    measure=random_masks,
    cost=4,
    quick=True,
)
WIDTH = Experiment(
    name="random-width",
    setup="digits, 30 epochs, random ERK masks at 5% density, hidden layers 256-128 and 512-256",
    world=digits(30),
    measure=random_width,
    cost=4,
)

CLAIMS = [
    Claim(
        name="erk-beats-uniform-5",
        method="random-pruning",
        source=SOURCE,
        statement="At 5% density random masks train better with ERK layer ratios than with uniform ones.",
        experiment=MASKS,
        rule=Above("ERK 5%", "uniform 5%"),
    ),
    Claim(
        name="erk-beats-uniform-2",
        method="random-pruning",
        source=SOURCE,
        statement="At 2% density random masks train better with ERK layer ratios than with uniform ones.",
        experiment=MASKS,
        rule=Above("ERK 2%", "uniform 2%"),
    ),
    Claim(
        name="width-closes-random-gap",
        method="random-pruning",
        source=SOURCE,
        statement="Twice the width loses less accuracy to a random mask of the same density.",
        experiment=WIDTH,
        rule=Above("lost at 256-128", "lost at 512-256"),
    ),
]
