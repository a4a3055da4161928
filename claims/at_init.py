"""Pruning at initialisation: how good it is, what survives shuffling and reinitialising, and who loses layers."""

from __future__ import annotations

import math

from claims.bench import Bench, digits, mlp, percent
from claims.claim import Claim, Experiment
from claims.rules import Above, Alike, Every, Inside, NotBelow
from prunus.procedures.at_init import at_init
from prunus.procedures.common import cut
from prunus.procedures.imp import imp

MISSING = "Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?, ICLR 2021"
SYNFLOW = "Tanaka et al., Pruning neural networks without any data, NeurIPS 2020"
METHODS = {"random": "random", "magnitude": "magnitude", "SNIP": "snip", "GraSP": "grasp", "SynFlow": "synflow"}
CHECKS = {"": "none", ", shuffled": "shuffle-layers", ", reinitialised": "reinit"}
COMPRESSIONS = (10, 31.6, 100, 316)


def sanity(bench: Bench) -> dict[str, float]:
    """Prune at initialisation and train: as chosen, with shuffled layers, with other initial weights.

    "after training" is the comparison: the global magnitude mask of the trained network, from the same initial weights.
    """
    found = {}
    for density in (0.1, 0.03, 0.01):
        after = imp(bench.within(f"after-{density}"), sparsity=1 - density, rate=1 - density, branch="oneshot").state
        found[f"after training {percent(density)}"] = bench.accuracy(after)
        for arm, score in METHODS.items():
            for label, check in CHECKS.items():
                inner = bench.within(f"{score}-{density}-{check}")
                budget = "uniform" if score == "random" else "global"
                state = at_init(inner, sparsity=1 - density, score=score, budget=budget, check=check).state
                found[f"{arm} {percent(density)}{label}"] = bench.accuracy(state)
    return found


def collapse(bench: Bench) -> dict[str, float]:
    """Count the weights left in the emptiest of seven layers, without training."""
    deep = bench.variant("deep", make_model=mlp(*[64] * 6))
    found = {}
    for compression in COMPRESSIONS:
        for arm, score in METHODS.items():
            if score != "random":
                masks = cut(deep, f"{score}-{compression:g}", deep.initial, 1 - 1 / compression, score=score)
                found[f"{arm} at {compression:g}"] = float(min(row.kept for row in masks.table()))
    return found


SANITY = Experiment(
    name="at-initialisation",
    setup="digits, 30 epochs, scores on ten training images per class, global budget (random: uniform), SynFlow in "
    "100 rounds; after training: 30 epochs dense, one global cut by magnitude, 30 epochs from the same initial weights",
    world=digits(30),
    measure=sanity,
    cost=45,
)
COLLAPSE = Experiment(
    name="layer-collapse",
    setup="seven linear layers of width 64, untrained; weights left in the emptiest layer",
    world=digits(1),
    measure=collapse,
    cost=3,
    quick=True,
)

CLAIMS = [
    *(
        Claim(
            name=f"all-trail-pruning-after-training-{density}",
            method="pai-baselines",
            source=MISSING,
            statement=f"At {density}% density SNIP, GraSP and SynFlow trail magnitude pruning after training.",
            experiment=SANITY,
            rule=Every(
                tuple(Above(f"after training {density}%", f"{arm} {density}%") for arm in ("SNIP", "GraSP", "SynFlow"))
            ),
        )
        for density in (10, 3)
    ),
    *(
        Claim(
            name=f"shuffling-is-harmless-10-{arm}".lower(),
            method="pai-baselines",
            source=MISSING,
            statement=f"At 10% density shuffling each layer's mask, or other initial weights, change {arm} by less "
            "than 1.5 points.",
            experiment=SANITY,
            rule=Every(
                (
                    Alike(f"{arm} 10%", f"{arm} 10%, shuffled", 0.015),
                    Alike(f"{arm} 10%", f"{arm} 10%, reinitialised", 0.015),
                )
            ),
        )
        for arm in METHODS
    ),
    *(
        Claim(
            name=f"shuffling-is-harmless-{density}-{arm}".lower(),
            method="pai-baselines",
            source=MISSING,
            statement=f"At {density}% density shuffling each layer's mask costs {arm} at most 1.5 points.",
            experiment=SANITY,
            rule=NotBelow(f"{arm} {density}%, shuffled", f"{arm} {density}%", 0.015),
        )
        for density in (3, 1)
        for arm in ("SNIP", "GraSP", "SynFlow")
    ),
    *(
        Claim(
            name=f"reinitialising-is-harmless-{density}-{arm}".lower(),
            method="pai-baselines",
            source=MISSING,
            statement=f"At {density}% density other initial weights cost {arm} at most 1.5 points.",
            experiment=SANITY,
            rule=NotBelow(f"{arm} {density}%, reinitialised", f"{arm} {density}%", 0.015),
        )
        for density in (3, 1)
        for arm in ("SNIP", "GraSP", "SynFlow")
    ),
    *(
        Claim(
            name=f"{high}-beats-{low}-1".lower(),
            method="pai-baselines",
            source=SYNFLOW if high == "SynFlow" else MISSING,
            statement=f"At 1% density {high} beats {low}.",
            experiment=SANITY,
            rule=Above(f"{high} 1%", f"{low} 1%"),
        )
        for high, low in (("SynFlow", "SNIP"), ("SynFlow", "GraSP"), ("SNIP", "random"), ("GraSP", "random"))
    ),
    Claim(
        name="magnitude-at-init-dies",
        method="pai-baselines",
        source=SYNFLOW,
        statement="At 1% density global magnitude at initialisation collapses: accuracy is near chance.",
        experiment=SANITY,
        rule=Inside("magnitude 1%", 0.0, 0.15),
    ),
    *(
        Claim(
            name=f"synflow-spares-layers-{other}".lower(),
            method="pai-baselines",
            source=SYNFLOW,
            statement=f"At compression 100 the emptiest layer keeps more weights under SynFlow than under {other}.",
            experiment=COLLAPSE,
            rule=Above("SynFlow at 100", f"{other} at 100"),
            unit="count",
        )
        for other in ("SNIP", "GraSP", "magnitude")
    ),
    Claim(
        name="synflow-keeps-every-layer",
        method="pai-baselines",
        source=SYNFLOW,
        statement="At compression 316 SynFlow still leaves weights in every layer.",
        experiment=COLLAPSE,
        rule=Inside("SynFlow at 316", 0.0, math.inf),
        unit="count",
    ),
]
