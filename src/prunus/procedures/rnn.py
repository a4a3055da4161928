"""Pruning recurrent networks by their gate matrices: input-to-hidden, hidden-to-hidden, or both.

Source: Darji, Investigating Sparsity in Recurrent Neural Networks, master's thesis, University of Passau, 2024
(arXiv 2407.20601).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from prunus.budget.allocate import check_fraction
from prunus.errors import NothingPrunable, unknown
from prunus.masks import Masks
from prunus.parameters import prunable
from prunus.procedures.common import (
    Outcome,
    cut,
    dense,
    held_out,
    length,
    retrain_rates,
    shorter,
    steps_per_epoch,
    whole_epochs,
)
from prunus.run.stages import Run, State

TARGETS = ("both", "input-hidden", "hidden-hidden")


def gate_matrices(run: Run, target: str) -> tuple[str, ...]:
    """Return the names of the targeted weight matrices of all recurrent layers.

    Raises:
        UnknownName: `target` is not "both", "input-hidden" or "hidden-hidden".
        NothingPrunable: the model has no recurrent layer.
    """
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    families = TARGETS[1:] if target == "both" else (target,)
    addresses = prunable(run.model, include=run.include, exclude=run.exclude)
    names = tuple(n for n, a in addresses.items() if a.kind == "recurrent" and a.family in families)
    if not names:
        raise NothingPrunable(
            f"{type(run.model).__name__} has no {target} matrices of recurrent layers; this method prunes the gate "
            "matrices of RNN, GRU and LSTM layers (models rnn, gru, lstm, random-graph-rnn)."
        )
    return names


def epochs_to_regain(accuracies: Sequence[float], dense_accuracy: float, tolerance: float = 0.0) -> int | None:
    """Return after how many epochs of retraining the dense accuracy is reached, or None when it never is.

    Args:
        accuracies: right after pruning, then after each epoch.
        dense_accuracy: before pruning.
        tolerance: how far below it counts as reached.
    """
    # Accuracies are ratios of whole numbers: the last bit of a difference of them must not decide.
    return next((n for n, a in enumerate(accuracies) if a >= dense_accuracy - tolerance - 1e-12), None)


def rnn_sparsity(
    run: Run,
    *,
    sparsity: float = 0.9,
    target: str = "both",
    dense_epochs: int | None = None,
    epochs: int | None = None,
    retrain: str = "LLR",
    tolerance: float = 0.01,
) -> Outcome:
    """Train a recurrent network, prune gate matrices by one magnitude threshold, measure, retrain.

    Args:
        run: stages, data, model and training choices. The thesis trains with Adam at 0.001 and clip_norm 5, without
            which tanh networks are unstable.
        sparsity: share of zeros among the targeted weights, in [0, 1]. 1 cuts the targeted matrices altogether: without
            hidden-hidden weights gated cells can still learn, without input-hidden weights nothing is seen.
        target: "both", "input-hidden" or "hidden-hidden" matrices, of all layers and gates together. Embedding,
            output layer and biases stay dense and are not part of the masks.
        dense_epochs: length of dense training; default the run's.
        epochs: length of retraining; default a fifth of the run's (10 of 50 in the thesis).
        retrain: learning-rate schedule of retraining, see `prunus.train.rates`.
        tolerance: accuracy may stay this far below the dense one to count as regained.

    The details hold the accuracy before pruning, right after it, and after every epoch of retraining.
    """
    check_fraction("sparsity", sparsity)
    names = gate_matrices(run, target)
    whole = whole_epochs(run)
    first = shorter(run.training, whole if dense_epochs is None else dense_epochs)
    second = shorter(run.training, max(1, round(whole / 5)) if epochs is None else epochs)
    trained = dense(run, first)
    masks = _gate_masks(run, trained, sparsity, names)
    rates = retrain_rates(run, retrain, first, second, trained, masks)
    split = held_out(run)
    pruned = _pruned(run, trained, masks)
    accuracies = [run.evaluate(pruned, split)["accuracy"]]
    per_epoch, total = steps_per_epoch(run, second), length(run, second)
    state = replace(pruned, step=0)
    for number in range(1, total // per_epoch + 1):
        # One stage per epoch, each going on bit for bit where the one before stopped, so that each can be measured.
        state = run.train(
            f"retrain/epoch-{number}",
            start=state,
            masks=masks,
            training=second,
            rates=rates,
            start_step=state.step,
            until=number * per_epoch,
            continue_optimizer=number > 1,
        )
        accuracies.append(run.evaluate(state, split)["accuracy"])
    before = run.evaluate(trained, split)["accuracy"]
    details: dict[str, Any] = {
        "target": target,
        "targeted_weights": masks.total,
        "densities": {row.name: row.density for row in masks.table()},
        "measured_on": split,
        "dense_accuracy": before,
        "pruned_accuracy": accuracies[0],
        "retraining_accuracy": accuracies[1:],
        "epochs_to_regain": epochs_to_regain(accuracies, before, tolerance),
    }
    return Outcome(state, length(run, first) + total, details)


def _gate_masks(run: Run, trained: State, sparsity: float, names: tuple[str, ...]) -> Masks:
    """Return masks over the targeted matrices alone."""
    if sparsity == 1:
        return Masks({n: torch.zeros(trained.weights[n].shape, dtype=torch.bool) for n in names})
    every = prunable(run.model, include=run.include, exclude=run.exclude)
    others = tuple(n for n in every if n not in names)
    return cut(run, "prune", trained, sparsity, exclude=others)


def _pruned(run: Run, state: State, masks: Masks) -> State:
    """Return `state` under the masks, before any retraining."""
    model = state.model(run)
    masks.apply(model)
    return State.of(model.state_dict(), masks, metrics={"kept": masks.kept, "total": masks.total})
