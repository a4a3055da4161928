"""Widths and depths found by gradients: do they meet the budget, and are they and distillation worth anything?"""

from __future__ import annotations

from dataclasses import replace

from claims.bench import Bench, world
from claims.claim import Claim, Experiment
from claims.rules import Inside, NotBelow
from prunus.procedures.common import dense
from prunus.procedures.cutting import Cut
from prunus.procedures.tas import new_weights, space_of, tas
from prunus.structured.tas.space import Found, SearchSpace
from prunus.train.training import Training

SOURCE = "Dong and Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019"
SPARSITY = 0.5


def uniform(space: SearchSpace, macs: int) -> Found:
    """Return the architecture of full depth whose families all take the same choice, nearest in cost to `macs`."""
    ranks = range(max(len(w.choices) for w in space.widths))
    found = [Found(tuple(min(r, len(w.choices) - 1) for w in space.widths), space.whole.depths) for r in ranks]
    return min(found, key=lambda f: abs(space.macs(f) - macs))


def architectures(bench: Bench) -> dict[str, float]:
    """Search, then train what was found with and without a teacher, and a network of uniform widths with one."""
    outcome = tas(bench, sparsity=SPARSITY)
    assert outcome.state.shape is not None
    space = space_of(bench)
    plain = uniform(space, outcome.details["macs"])
    teacher = dense(bench)
    taught = replace(bench.training, distill_weight=0.9, distill_temperature=4.0)
    alone = bench.train("alone", start=new_weights(bench, outcome.state.shape))
    even = bench.train("uniform", start=new_weights(bench, Cut(space.plan(plain))), training=taught, teacher=teacher)
    return {
        "dense": bench.accuracy(teacher),
        "found": bench.accuracy(outcome.state),
        "found, no teacher": bench.accuracy(alone),
        "uniform": bench.accuracy(even),
        "arithmetic": outcome.details["macs_share"],
        "arithmetic, uniform": space.macs(plain) / space.macs(space.whole),
    }


DIGITS = Experiment(
    name="architecture-search",
    setup="digits, ResNet-20 of 8, 16 and 32 channels, projections as shortcuts; 30 epochs for teacher, search and "
    "final training each, Nesterov momentum; half of the multiply-accumulates",
    world=world("digits", "resnet20", Training(epochs=30, nesterov=True), model_options={"width": 8, "shortcut": "B"}),
    measure=architectures,
    cost=240,
    seeds=3,
)
FASHION = Experiment(
    name="architecture-search-fashion",
    setup="4,000 images of Fashion-MNIST, ResNet-20 of 8, 16 and 32 channels, projections as shortcuts; 10 epochs for "
    "teacher, search and final training each, Nesterov momentum; half of the multiply-accumulates",
    world=world(
        "fashion-mnist",
        "resnet20",
        Training(epochs=10, nesterov=True),
        limit=4000,
        model_options={"width": 8, "shortcut": "B"},
    ),
    measure=architectures,
    cost=900,
    needs="fashion-mnist",
    seeds=3,
)

CLAIMS = [
    claim
    for experiment, prefix, where in ((DIGITS, "", ""), (FASHION, "fashion-", " (Fashion-MNIST)"))
    for claim in (
        Claim(
            name=f"{prefix}search-meets-its-budget",
            method="transformable-architecture-search",
            source=SOURCE,
            statement=f"The architecture found costs within 5 points of half the multiply-accumulates{where}.",
            experiment=experiment,
            rule=Inside("arithmetic", 0.45, 0.500001),
        ),
        Claim(
            name=f"{prefix}search-not-below-uniform",
            method="transformable-architecture-search",
            source=SOURCE,
            statement=f"Trained alike, the architecture found is as accurate as uniform widths of its cost{where}.",
            experiment=experiment,
            rule=NotBelow("found", "uniform", 0.01),
        ),
        Claim(
            name=f"{prefix}search-teacher-not-below-none",
            method="transformable-architecture-search",
            source=SOURCE,
            statement=f"With the whole network as teacher the architecture found is as accurate as without{where}.",
            experiment=experiment,
            rule=NotBelow("found", "found, no teacher", 0.005),
        ),
    )
]
