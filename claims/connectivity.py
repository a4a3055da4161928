"""Are retrained copies of one pruned network linearly connected, and trainings from other initial weights not?"""

from __future__ import annotations

from claims.bench import Bench, digits, percent
from claims.claim import Claim, Experiment
from claims.rules import Above, Inside, Ordered
from prunus.procedures.common import cut, dense
from prunus.procedures.imp import rewound
from prunus.procedures.three_regime import compare
from prunus.randomness import key
from prunus.run.stages import State

SOURCE = "Zhou et al., A Three-regime Model of Network Pruning, ICML 2023"
DENSITIES = (0.2, 0.05, 0.02)


def pairs(bench: Bench) -> dict[str, float]:
    """Compare two retrainings of the same pruned weights, and two trainings of the mask from other weights."""
    trained = dense(bench)
    found = {}
    for density in DENSITIES:
        masks = cut(bench, f"masks-{density}", trained, 1 - density, budget="lamp")
        start = rewound(State.of(trained.weights), masks, bench)
        ends: dict[str, list[State]] = {"same": [], "other": []}
        for number in range(2):
            seed = key(bench.seed, "pair", number)
            same = bench.train(f"same-{number}-{density}", start=start, masks=masks, seed=seed)
            new = State.of(bench.make_model(seed).state_dict())
            other = bench.train(f"other-{number}-{density}", start=rewound(new, masks, bench), masks=masks, seed=seed)
            ends["same"].append(same)
            ends["other"].append(other)
        for arm, (first, second) in ends.items():
            result = compare(bench, first, second)
            found[f"connectivity, {arm} start {percent(density)}"] = result["connectivity"]
            found[f"CKA, {arm} start {percent(density)}"] = result["cka"]
    return found


PAIRS = Experiment(
    name="connectivity",
    setup="digits, 30 epochs dense, LAMP mask, two trainings of 30 epochs from the same pruned weights, and two from "
    "different initial weights; connectivity and CKA on the training images",
    world=digits(30),
    measure=pairs,
    cost=11,
)

CLAIMS = [
    *(
        Claim(
            name=f"same-start-is-connected-{density * 100:g}",
            method="three-regime",
            source=SOURCE,
            statement=f"At {percent(density)} density two retrainings of the same pruned weights are connected.",
            experiment=PAIRS,
            rule=Inside(f"connectivity, same start {percent(density)}", -0.02, 0.02),
            unit="number",
        )
        for density in DENSITIES
    ),
    *(
        Claim(
            name=f"other-start-has-barrier-{density * 100:g}",
            method="three-regime",
            source=SOURCE,
            statement=f"At {percent(density)} density trainings of one mask from different weights are not connected.",
            experiment=PAIRS,
            rule=Inside(f"connectivity, other start {percent(density)}", float("-inf"), -0.05),
            unit="number",
        )
        for density in DENSITIES
    ),
    Claim(
        name="barrier-grows-with-sparsity",
        method="three-regime",
        source=SOURCE,
        statement="The barrier between trainings from different weights grows as density falls.",
        experiment=PAIRS,
        rule=Ordered(tuple(f"connectivity, other start {percent(d)}" for d in DENSITIES)),
        unit="number",
    ),
    *(
        Claim(
            name=f"same-start-is-more-alike-{density * 100:g}",
            method="three-regime",
            source=SOURCE,
            statement=f"At {percent(density)} density retrainings of the same weights answer more alike than others.",
            experiment=PAIRS,
            rule=Above(f"CKA, same start {percent(density)}", f"CKA, other start {percent(density)}"),
            unit="number",
        )
        for density in DENSITIES
    ),
]
