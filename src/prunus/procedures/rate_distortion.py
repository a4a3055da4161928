"""Layer sparsities by rate-distortion curves, at once or in rounds, on unlabelled inputs or on noise.

Source: Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks, ICCV 2023
(arXiv 2308.10438). The curves and the dynamic program are in `prunus.budget.rate_distortion`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.errors import InvalidValue, unknown
from prunus.procedures.common import (
    Outcome,
    calibration_inputs,
    check_sparsity,
    cut,
    dense,
    length,
    retrain_rates,
    shorter,
    whole_epochs,
)
from prunus.procedures.imp import rounds_for
from prunus.randomness import generator
from prunus.run.stages import Run

INPUTS = ("train", "noise")


def noise_inputs(run: Run, count: int) -> Tensor:
    """Return `count` inputs drawn from N(0, 1), of the shape of the run's (normalised) inputs, on its device."""
    shape = (count, *run.splits.train.input_shape)
    return torch.randn(shape, generator=generator(run.seed, "calibration noise")).to(run.device)


def rd(
    run: Run,
    *,
    sparsity: float = 0.9,
    rate: float | None = None,
    inputs: str = "train",
    calibration: int = 256,
    points: int = 50,
    resolution: int = 5000,
    dense_epochs: int | None = None,
    epochs: int | None = None,
    retrain: str = "LLR",
) -> Outcome:
    """Train dense; then divide the sparsity over layers by least summed output distortion, prune, retrain.

    Args:
        run: stages, data, model and training choices.
        sparsity: final share of zeros.
        rate: None prunes once. Otherwise the largest share of the remaining weights removed per round; equal rounds
            end exactly on `sparsity`, s_r = 1 - (1 - p)^r, with new curves in each. (The paper: p = 0.2, 0.6 for
            VGG-16 on ImageNet.)
        inputs: "train" compares outputs on training inputs, whose labels are not used; "noise" on Gaussian noise,
            which needs no data at all.
        calibration: how many inputs (1,024 for CIFAR and 256 for ImageNet in the authors' code).
        points, resolution: see `prunus.budget.rate_distortion.RateDistortion`.
        dense_epochs: length of dense training; default the run's.
        epochs: length of each retraining; default a third of the run's.
        retrain: learning-rate schedule of retraining, see `prunus.train.rates`.

    The details hold the density of every layer after each round.
    """
    check_sparsity(sparsity)
    if rate is not None and check_fraction("rate", rate, one_allowed=False) == 0:
        raise InvalidValue("rate 0 never prunes; the usual share per round is 0.2, and None prunes once.")
    if inputs not in INPUTS:
        raise unknown("kind of calibration inputs", inputs, INPUTS)
    if calibration < 1:
        raise InvalidValue(f"calibration={calibration} must be 1 or more inputs.")
    whole = whole_epochs(run)
    first = shorter(run.training, whole if dense_epochs is None else dense_epochs)
    second = shorter(run.training, max(1, round(whole / 3)) if epochs is None else epochs)
    x = calibration_inputs(run, calibration) if inputs == "train" else noise_inputs(run, calibration)
    budget = {"name": "rate-distortion", "points": points, "resolution": resolution}
    state = dense(run, first)
    steps, masks = length(run, first), None
    history: list[dict[str, Any]] = []
    targets = rounds_for(sparsity, rate) if rate is not None else [sparsity]
    for number, target in enumerate(targets, start=1):
        masks = cut(run, f"masks-{number}", state, target, budget=budget, masks=masks, data=x.split(256))
        rates = retrain_rates(run, retrain, first, second, state, masks)
        start = state
        state = run.train(f"round-{number}", start=start, masks=masks, training=second, rates=rates)
        steps += length(run, second)
        densities = {row.name: row.density for row in masks.table()}
        history.append({"round": number, "sparsity": masks.sparsity, "densities": densities} | state.metrics)
    return Outcome(state, steps, {"rounds": history, "inputs": inputs, "calibration": len(x)})
