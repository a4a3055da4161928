"""Pruning at initialisation: score the untrained net once (or in rounds), then train only what is left.

Sources: SNIP (Lee et al., ICLR 2019), GraSP (Wang et al., ICLR 2020), SynFlow (Tanaka et al., NeurIPS 2020); sanity
checks: Frankle et al., ICLR 2021, and Su et al., NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunus.errors import unknown
from prunus.procedures.common import Outcome, check_sparsity, cut, fresh, length
from prunus.procedures.imp import rewound, shuffle_all, shuffle_layers
from prunus.run.stages import Run

CHECKS = ("none", "shuffle-layers", "shuffle-all", "reinit")


def at_init(
    run: Run,
    *,
    sparsity: float = 0.9,
    score: str = "snip",
    budget: str | Mapping[str, Any] = "global",
    unit: str = "weight",
    check: str = "none",
) -> Outcome:
    """Prune the untrained network to `sparsity`, then train it with the run's recipe.

    Args:
        run: stages, data, model and training choices.
        sparsity: share of zeros.
        score: "snip", "snip-iterative", "grasp", "synflow", "magnitude", "random"...; scores that need data see ten
            examples per class.
        budget, unit: as in `prunus.prune`; {"name": "like", "score": "snip"} with score "random" gives SNIP ratios.
        check: sanity check on the mask: "shuffle-layers", "shuffle-all", or "reinit" (train other initial weights).
    """
    check_sparsity(sparsity)
    if check not in CHECKS:
        raise unknown("sanity check", check, CHECKS)
    masks = cut(run, "prune", run.initial, sparsity, score=score, budget=budget, unit=unit)
    start = run.initial
    if check == "shuffle-layers":
        masks = shuffle_layers(masks, run.seed)
    elif check == "shuffle-all":
        masks = shuffle_all(masks, run.seed)
    elif check == "reinit":
        start = fresh(run)
    state = run.train("train", start=rewound(start, masks, run), masks=masks)
    return Outcome(state, length(run), {"smallest_layer": min(r.kept for r in masks.table())})


def snip(
    run: Run,
    *,
    sparsity: float = 0.9,
    budget: str | Mapping[str, Any] = "global",
    unit: str = "weight",
    check: str = "none",
) -> Outcome:
    """Prune by connection sensitivity (see `at_init`)."""
    return at_init(run, sparsity=sparsity, score="snip", budget=budget, unit=unit, check=check)


def grasp(
    run: Run,
    *,
    sparsity: float = 0.9,
    budget: str | Mapping[str, Any] = "global",
    unit: str = "weight",
    check: str = "none",
) -> Outcome:
    """Prune by preserved gradient flow (see `at_init`)."""
    return at_init(run, sparsity=sparsity, score="grasp", budget=budget, unit=unit, check=check)


def synflow(
    run: Run,
    *,
    sparsity: float = 0.9,
    budget: str | Mapping[str, Any] = "global",
    unit: str = "weight",
    check: str = "none",
) -> Outcome:
    """Prune by synaptic flow in 100 rounds (see `at_init`)."""
    return at_init(run, sparsity=sparsity, score="synflow", budget=budget, unit=unit, check=check)
