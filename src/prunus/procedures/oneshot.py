"""One-shot pruning: train dense, prune once, fine-tune with the mask fixed.

The baseline every other method is measured against (Han et al., NeurIPS 2015; Renda et al., ICLR 2020 for retraining).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunus.procedures.common import Outcome, check_sparsity, cut, dense, length, retrain_rates, shorter, whole_epochs
from prunus.run.stages import Run


def oneshot(
    run: Run,
    *,
    sparsity: float = 0.9,
    score: str = "magnitude",
    budget: str | Mapping[str, Any] = "global",
    unit: str = "weight",
    dense_epochs: int | None = None,
    epochs: int | None = None,
    retrain: str = "LLR",
) -> Outcome:
    """Train dense, prune to `sparsity` in one cut, retrain.

    Args:
        run: stages, data, model and training choices.
        sparsity: final share of zeros.
        score, budget, unit: as in `prunus.prune`; scores that need data see one class-balanced batch.
        dense_epochs: length of dense training; default two thirds of the run's epochs when `epochs` is None too, so
            that the whole costs as much as the other methods; the run's own length otherwise.
        epochs: length of retraining; default one third of the run's epochs.
        retrain: learning-rate schedule of retraining: FT, LRW, SLR, CLR, LLR or ALLR (see `prunus.train.rates`).
    """
    check_sparsity(sparsity)
    whole = whole_epochs(run)
    dense_epochs = dense_epochs or (max(1, round(whole * 2 / 3)) if epochs is None else whole)
    epochs = max(1, whole - dense_epochs) if epochs is None else epochs
    first, second = shorter(run.training, dense_epochs), shorter(run.training, epochs)
    trained = dense(run, first)
    masks = cut(run, "prune", trained, sparsity, score=score, budget=budget, unit=unit)
    rates = retrain_rates(run, retrain, first, second, trained, masks)
    state = run.train("retrain", start=trained, masks=masks, training=second, rates=rates)
    return Outcome(state, length(run, first) + length(run, second), {"dense": trained.metrics})
