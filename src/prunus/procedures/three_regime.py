"""Should the dense training be hotter or colder before pruning? Read off pairs of retrained copies, not test labels.

Source: Zhou, Yang, Chang and Mahoney, A three-regime model of network pruning, ICML 2023 (arXiv 2305.18383);
sharpness-aware minimisation: Foret, Kleiner, Mobahi and Neyshabur, ICLR 2021.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, unknown
from prunus.masks import Masks
from prunus.measure.accuracy import evaluate
from prunus.measure.forwarding import evaluating, logits_of
from prunus.measure.recalibrate import recalibrate
from prunus.measure.similarity import advice, choose_checkpoint, connectivity_path, linear_cka, regime
from prunus.procedures.common import (
    Outcome,
    check_sparsity,
    cut,
    dense,
    diagnose,
    in_order,
    length,
    measure,
    shorter,
    spread_over,
    whole_epochs,
)
from prunus.randomness import key
from prunus.run.stages import Run, State
from prunus.train.callback import Callback
from prunus.train.objectives import cross_entropy
from prunus.train.training import Training

KNOBS = ("epochs", "batch-size", "lr", "weight-decay", "sam")
# For a single network, without others to compare with: between what the paper's figures show as low and as high.
ALIKE = 0.95


class SAM(Callback):
    """Sharpness-aware minimisation: the gradient of each step is taken at w + rho g / (||g|| + 1e-12).

    The norm runs over all parameters together. The weights are back at w before the optimizer step, which uses the
    gradient of the perturbed point; running statistics of BatchNorm are those of w, and dropout draws the same in both
    passes. With rho = 0 training is what it is without. A step costs two forward and backward passes.

    Args:
        rho: radius, 0 or more.
        label_smoothing: as in `Training`; the ascent uses cross-entropy.
        masks: entries that must stay at zero while weights are perturbed, or None.
    """

    def __init__(self, rho: float, label_smoothing: float = 0.0, masks: Masks | None = None):
        if not 0 <= rho < float("inf"):
            raise InvalidValue(f"rho={rho!r} must be a finite radius from 0 up; the usual value is 0.05.")
        self.rho = rho
        self.label_smoothing = label_smoothing
        self._masks = masks
        self._batch: tuple[Tensor, Tensor] | None = None
        self._weights: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def describe(self) -> dict[str, Any]:
        """Return radius, label smoothing and the digest of the masks."""
        masks = None if self._masks is None else self._masks.digest()
        return {"type": "SAM", "rho": self.rho, "label_smoothing": self.label_smoothing, "masks": masks}

    def batch(self, step: int, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the batch."""
        self._batch = (x, y)
        return x, y

    def perturb(self, step: int, model: nn.Module) -> None:
        """Ascend."""
        assert self._batch is not None
        x, y = self._batch
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            loss = cross_entropy(model(x), y, self.label_smoothing)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        self._buffers = {n: b.clone() for n, b in model.named_buffers()}
        self._weights = {n: p.detach().clone() for n, p in parameters.items()}
        ascent = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
        for name, mask in (self._masks or {}).items():
            if name in ascent:
                ascent[name] = ascent[name].masked_fill(~mask.to(x.device), 0.0)
        norm = torch.stack([g.norm() for g in ascent.values()]).norm()
        with torch.no_grad():
            for name, gradient in ascent.items():
                parameters[name].add_(gradient * (self.rho / (norm + 1e-12)))

    def gradients(self, step: int, model: nn.Module) -> None:
        """Go back to w, with the gradient of the perturbed point."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self._weights:
                    parameter.copy_(self._weights[name])
            for name, buffer in model.named_buffers():
                buffer.copy_(self._buffers[name])
        self._weights, self._buffers, self._batch = {}, {}, None


def label(
    cells: Sequence[tuple[float, float]], *, lmc_threshold: float = -0.05, cka_threshold: float | None = None
) -> list[str]:
    """Return the regime of each (connectivity, CKA): "I", "II-A" or "II-B".

    Args:
        cells: measurements of one task.
        lmc_threshold: below it two networks count as badly connected.
        cka_threshold: from it on two networks count as alike; default the median CKA of the well-connected cells when
            there are two or more of them, else 0.95.
    """
    connected = [cka for lmc, cka in cells if lmc >= lmc_threshold]
    if cka_threshold is None:
        cka_threshold = statistics.median(connected) if len(connected) > 1 else ALIKE
    return [regime(lmc, cka, lmc_threshold=lmc_threshold, cka_threshold=cka_threshold) for lmc, cka in cells]


def turned(training: Training, knob: str, value: float) -> tuple[Training, tuple[Callback, ...]]:
    """Return the choices and callbacks of a dense training with a temperature-like knob set to `value`.

    Hotter: fewer epochs, smaller batches, larger learning rate, larger SAM radius.

    Raises:
        UnknownName: no such knob.
        InvalidValue: a value the knob cannot have.
    """
    if knob not in KNOBS:
        raise unknown("knob", knob, KNOBS)
    if knob in ("epochs", "batch-size") and value != int(value):
        raise InvalidValue(f"{knob}={value} must be a whole number.")
    if knob == "epochs":
        return shorter(training, int(value)), ()
    if knob == "batch-size":
        return replace(training, batch_size=int(value)), ()
    if knob == "lr":
        return replace(training, lr=value), ()
    if knob == "weight-decay":
        return replace(training, weight_decay=value), ()
    return training, (SAM(value, training.label_smoothing),)


def compare(run: Run, first: State, second: State, *, points: int = 11, examples: int = 6400) -> dict[str, Any]:
    """Measure two networks against each other on training examples.

    Returns:
        "connectivity" and the "errors" it is read off (shares of training examples at evenly spaced points of the
        segment, BatchNorm statistics measured anew at each), and "cka" of the softmax outputs on `examples` training
        inputs without augmentation, 0 where it is undefined because a network answers the same to all. JSON-ready.
    """
    train = run.splits.train

    def error(model: nn.Module) -> float:
        return evaluate(model, in_order(run, train)).error

    path = connectivity_path(
        run.model,
        first.weights,
        second.weights,
        error,
        points,
        recalibrate=lambda model: recalibrate(model, in_order(run, train)),
        masks_a=first.masks,
        masks_b=second.masks,
    )
    shown = spread_over(train, examples)

    def outputs(state: State) -> Tensor:
        model = state.model(run)
        with evaluating(model), torch.inference_mode():
            parts = [logits_of(model(x)).softmax(dim=1).cpu() for x, _, _ in in_order(run, shown)]
        return torch.cat(parts)

    answers = outputs(first), outputs(second)
    collapsed = any(torch.equal(a, a[:1].expand_as(a)) for a in answers)
    cka = 0.0 if collapsed else linear_cka(*answers)
    return {"connectivity": path.connectivity, "errors": list(path.errors), "cka": cka}


def three_regime(
    run: Run,
    *,
    sparsity: float = 0.9,
    knob: str = "epochs",
    values: Sequence[float] = (),
    retrains: int = 2,
    score: str = "magnitude",
    budget: str | Mapping[str, Any] = "uniform",
    epochs: int | None = None,
    retrain_epochs: int | None = None,
    points: int = 11,
    lmc_threshold: float = -0.05,
    cka_threshold: float | None = None,
) -> Outcome:
    """Train dense at each value of a knob, prune once, retrain in pairs, and say which way to turn the knob.

    Args:
        run: stages, data, model and training choices.
        sparsity: share of zeros.
        knob, values: what is varied in the dense training ("epochs", "batch-size", "lr", "weight-decay", "sam"), and
            its values; empty: the run's own training alone.
        retrains: retrainings of each pruned network, which differ in the seed of data order and augmentation; at
            least 2. Connectivity and CKA are means over their pairs.
        score, budget: as in `prunus.prune`; the authors' experiment prunes all layers alike.
        epochs: length of the dense training; default the run's.
        retrain_epochs: default `epochs`.
        points: points of the segment between two networks, ends included.
        lmc_threshold, cka_threshold: borders of the regimes, see `label`.

    Returns:
        A retrained network of the value that is best connected and, among connected ones, most alike. The details
        hold measurements, regime and advice for each value. Borders between regimes are phenomenological: with few
        values read the numbers, not the label.
    """
    check_sparsity(sparsity)
    if retrains < 2:
        raise InvalidValue(f"retrains={retrains}: pairs are compared, so it must be 2 or more.")
    if knob not in KNOBS:
        raise unknown("knob", knob, KNOBS)
    if len(set(values)) < len(values):
        raise InvalidValue(f"values={list(values)} name one value twice.")
    base = shorter(run.training, whole_epochs(run) if epochs is None else epochs)
    second = base if retrain_epochs is None else shorter(base, retrain_epochs)
    steps = 0
    cells: dict[str, dict[str, Any]] = {}
    kept: dict[str, list[State]] = {}
    for value in values or (None,):
        name = "own" if value is None else f"{knob}-{value:g}"
        training, callbacks = (base, ()) if value is None else turned(base, knob, value)
        if value is None:
            trained = dense(run, training)
        else:
            trained = run.train(f"{name}/dense", training=training, callbacks=callbacks)
        masks = cut(run, f"{name}/prune", trained, sparsity, score=score, budget=budget)
        again = [
            run.train(
                f"{name}/retrain-{number}",
                start=replace(trained, step=0),
                masks=masks,
                training=second,
                seed=key(run.seed, "retrain", number) if number else None,
            )
            for number in range(retrains)
        ]
        steps += length(run, training) + retrains * length(run, second)
        pairs = []
        for i, j in itertools.combinations(range(retrains), 2):
            inputs = {"first": again[i], "second": again[j], "data": run.splits.train, "points": points}
            work = partial(compare, run, again[i], again[j], points=points)
            planned = {"connectivity": 0.0, "errors": [0.0] * points, "cka": 1.0}
            pairs.append(diagnose(run, f"{name}/pair-{i}-{j}", inputs, work, planned))
        kept[name] = again
        cells[name] = {
            "value": value,
            "connectivity": statistics.fmean(p["connectivity"] for p in pairs),
            "cka": statistics.fmean(p["cka"] for p in pairs),
            "pairs": pairs,
            "dense": measure(run, trained),
            "retrained": [measure(run, s) for s in again],
        }
    measured = {name: (cell["connectivity"], cell["cka"]) for name, cell in cells.items()}
    regimes = label(list(measured.values()), lmc_threshold=lmc_threshold, cka_threshold=cka_threshold)
    for cell, where in zip(cells.values(), regimes, strict=True):
        told = advice(where, 1 - sparsity)  # type: ignore[arg-type]
        cell.update(regime=where, direction=told.direction, advice=told.reason)
    best = choose_checkpoint(measured, lmc_threshold=lmc_threshold)
    return Outcome(kept[best][0], steps, {"knob": knob, "chosen": best, "cells": cells})
