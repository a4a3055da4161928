"""Who competes with whom: minimum per layer, LAMP, rate-distortion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claims.bench import Bench, digits, outputs, percent, prune_and_tune
from claims.claim import Claim, Experiment
from claims.rules import Above, NotBelow, Rule
from prunus.procedures.common import cut, dense
from prunus.procedures.imp import rewound
from prunus.run.stages import State

GLOBAL_MP = "Gupta et al., Is Complexity Required for Neural Network Pruning?, 2022"
LAMP = "Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021"
RATE_DISTORTION = "Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning, ICCV 2023"
MIDDLE = "layers.2.weight"


def one_shot(bench: Bench) -> dict[str, float]:
    """Prune a trained network once under several budgets, and tune it."""
    trained = dense(bench)
    found = {"dense": bench.accuracy(trained)}
    common: dict[str, str | Mapping[str, Any]] = {
        "global": "global",
        "LAMP": "lamp",
        "ERK": "erk",
        "uniform": "uniform",
    }
    minimum: dict[str, str | Mapping[str, Any]] = {
        f"minimum {share * 100:g}%": {"name": "global", "minimum_share": share} for share in (0.0005, 0.002, 0.005)
    }
    for density, budgets in ((0.02, common | minimum), (0.01, common)):
        for arm, budget in budgets.items():
            name = f"{density}/{arm}".replace(" ", "-").replace("%", "")
            state = prune_and_tune(bench, name, trained, density, budget)
            found[f"{arm} {percent(density)}"] = bench.accuracy(state)
            assert state.masks is not None
            found[f"middle layer, {arm} {percent(density)}"] = state.masks.count(MIDDLE) / state.masks[MIDDLE].numel()
        state = prune_and_tune(bench, f"{density}/random", trained, density, "erk", score="random")
        found[f"random ERK {percent(density)}"] = bench.accuracy(state)
    return found


def rate_distortion(bench: Bench) -> dict[str, float]:
    """Prune a trained network once without retraining; measure how far its outputs move, and its accuracy."""
    trained = dense(bench)
    reference = outputs(bench, trained)
    found = {}
    for density in (0.2, 0.1, 0.05):
        for arm, budget in (("RD", "rate-distortion"), ("uniform", "uniform"), ("global", "global"), ("LAMP", "lamp")):
            masks = cut(bench, f"{budget}-{density}", trained, 1 - density, budget=budget)
            state = rewound(State.of(trained.weights), masks, bench)
            moved = (outputs(bench, state) - reference).double().square().mean()
            found[f"distortion of {arm} {percent(density)}"] = float(moved)
            found[f"{arm} {percent(density)}"] = bench.accuracy(state)
    return found


ONE_SHOT = Experiment(
    name="one-shot-budgets",
    setup="digits, 30 epochs dense, one cut by magnitude, 15 epochs of tuning from half the rate",
    world=digits(30),
    measure=one_shot,
    cost=6,
    quick=True,
)
DISTORTION = Experiment(
    name="rate-distortion",
    setup="digits, 30 epochs dense, one cut by magnitude, no retraining; mean squared change of the test logits; "
    "curves from 256 training inputs",
    world=digits(30),
    measure=rate_distortion,
    cost=2,
    quick=True,
)


def _claim(name: str, method: str, source: str, statement: str, rule: Rule, **more: Any) -> Claim:
    experiment = DISTORTION if method == "rd-layer-adaptive" else ONE_SHOT
    return Claim(name=name, method=method, source=source, statement=statement, rule=rule, experiment=experiment, **more)


CLAIMS = [
    *(
        _claim(
            f"minimum-{label}-beats-global",
            "global-mp",
            GLOBAL_MP,
            f"At 2% density a minimum of {share} of all weights per layer repairs the collapse of global pruning.",
            Above(f"minimum {share} 2%", "global 2%"),
        )
        for label, share in (("0.05", "0.05%"), ("0.2", "0.2%"), ("0.5", "0.5%"))
    ),
    _claim(
        "minimum-refills-middle-layer",
        "global-mp",
        GLOBAL_MP,
        "The minimum brings the nearly emptied middle layer back to life.",
        Above("middle layer, minimum 0.5% 2%", "middle layer, global 2%"),
    ),
    *(
        _claim(
            f"lamp-beats-{other}-{density}",
            "lamp",
            LAMP,
            f"At {density}% density LAMP beats {other} magnitude pruning.",
            Above(f"LAMP {density}%", f"{other} {density}%"),
        )
        for density in (2, 1)
        for other in ("uniform", "global")
    ),
    _claim(
        "lamp-not-below-erk-2",
        "lamp",
        LAMP,
        "At 2% density LAMP is at least as good as magnitude pruning with ERK ratios.",
        NotBelow("LAMP 2%", "ERK 2%", 0.01),
    ),
    _claim(
        "lamp-not-below-erk-1",
        "lamp",
        LAMP,
        "At 1% density LAMP is at least as good as magnitude pruning with ERK ratios.",
        NotBelow("LAMP 1%", "ERK 1%", 0.01),
    ),
    _claim(
        "magnitude-beats-random-erk",
        "lamp",
        LAMP,
        "After training, magnitudes choose better than chance at the same ERK ratios.",
        Above("ERK 2%", "random ERK 2%"),
    ),
    *(
        _claim(
            f"rd-distorts-less-than-{other}-{density}".lower(),
            "rd-layer-adaptive",
            RATE_DISTORTION,
            f"At {density}% density rate-distortion ratios move the outputs less than {other} pruning does.",
            Above(f"distortion of {other} {density}%", f"distortion of RD {density}%"),
            unit="number",
        )
        for other in ("uniform", "global", "LAMP")
        for density in (20, 10, 5)
    ),
    *(
        _claim(
            f"rd-more-accurate-than-uniform-{density}",
            "rd-layer-adaptive",
            RATE_DISTORTION,
            f"At {density}% density rate-distortion ratios keep more accuracy than uniform ones, without retraining.",
            Above(f"RD {density}%", f"uniform {density}%"),
        )
        for density in (20, 10, 5)
    ),
]
