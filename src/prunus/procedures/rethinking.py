"""Is a pruned architecture worth more than the weights it inherits? Fine-tuning against training from scratch.

Source: Liu, Sun, Zhou, Huang and Darrell, Rethinking the Value of Network Pruning, ICLR 2019 (arXiv 1810.05270), for
single weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunus.errors import InvalidValue, unknown
from prunus.masks import Masks
from prunus.measure.cost import effective_macs, layer_costs
from prunus.parameters import prunable
from prunus.procedures.common import Outcome, check_sparsity, cut, dense, fresh, length, measure, shorter, whole_epochs
from prunus.randomness import generator
from prunus.run.stages import Run, State

ARMS = ("finetune", "scratch-E", "scratch-B")


def scratch_epochs(epochs: int, dense_macs: int, pruned_macs: int, cap: float | None = None) -> int:
    """Return how long a pruned network trains for the arithmetic of the dense training: epochs * dense / pruned.

    Args:
        epochs: length of the dense training.
        dense_macs, pruned_macs: multiply-accumulates of one example, the pruned ones counted under the masks.
        cap: at most this many times `epochs` (the authors' ImageNet runs with pruned channels: 2).

    Raises:
        InvalidValue: nothing is left of the network, or a cap below 1.
    """
    if not 0 < pruned_macs <= dense_macs:
        raise InvalidValue(f"pruned_macs={pruned_macs} must lie between 1 and dense_macs={dense_macs}.")
    if cap is not None and cap < 1:
        raise InvalidValue(f"cap={cap} is a multiple of the dense training and must be 1 or more.")
    longer = epochs * dense_macs // pruned_macs
    return longer if cap is None else min(longer, int(cap * epochs + 1e-9))


def sparse_std(kept: int, in_channels: int) -> float:
    """Return sqrt(2 / n) with n = kept / in_channels, the kept weights per input channel (0 when nothing is kept)."""
    return math.sqrt(2 * in_channels / kept) if kept else 0.0


def sparse_init(state: State, masks: Masks, run: Run, seed: int) -> State:
    """Return `state` with masked weights of convolution and linear layers drawn anew for their sparse fan, then masked.

    Kept weights come from N(0, 2 / n), n the number of kept weights per input channel or feature (see `sparse_std`).
    Other masked tensors, such as those of recurrent layers, keep their own values where they are kept.
    """
    weights: dict[str, Tensor] = dict(state.weights)
    for name, address in prunable(run.model, include=list(masks)).items():
        if name not in masks:
            continue
        mask = masks[name].cpu()
        if address.kind in ("conv", "conv-transpose", "linear"):
            noise = torch.randn(address.shape, generator=generator(seed, "sparse init", name))
            scale = sparse_std(masks.count(name), address.inputs * address.groups)
            weights[name] = (noise * scale).to(weights[name].dtype)
        weights[name] = torch.where(mask, weights[name], torch.zeros_like(weights[name]))
    return State.of(weights, masks)


def rethinking(
    run: Run,
    *,
    sparsity: float = 0.9,
    arm: str = "all",
    score: str = "magnitude",
    budget: str | Mapping[str, Any] = "global",
    epochs: int | None = None,
    finetune_epochs: int | None = None,
    finetune_lr: float | None = None,
    cap: float | None = None,
) -> Outcome:
    """Prune a trained network; then fine-tune it, and train the same masks from new random weights.

    "finetune" goes on from the kept weights at a small constant rate. "scratch-E" trains new weights as long as the
    dense network was trained, "scratch-B" as long as the dense training's multiply-accumulates pay for. Scratch
    training sees nothing of the trained network but its masks. All arms hand back their last weights.

    Args:
        run: stages, data, model and training choices; milestones of the schedule are shares, so they stretch with it.
        sparsity: share of zeros.
        arm: "finetune", "scratch-E", "scratch-B", or "all": all three, with the fine-tuned network as the result.
        score, budget: as in `prunus.prune`.
        epochs: length of the dense training; default the run's.
        finetune_epochs: default a quarter of `epochs` (40 of 160 in the paper).
        finetune_lr: default one hundredth of the run's peak rate (0.001 after 0.1 in the authors' code).
        cap: limit of "scratch-B" as a multiple of `epochs`.

    The details hold lengths, multiply-accumulates, and for every arm trained what it reached on the held-out splits.
    """
    check_sparsity(sparsity)
    if arm not in (*ARMS, "all"):
        raise unknown("arm", arm, (*ARMS, "all"))
    epochs = whole_epochs(run) if epochs is None else epochs
    training = shorter(run.training, epochs)
    trained = dense(run, training)
    masks = cut(run, "prune", trained, sparsity, score=score, budget=budget)

    costs = layer_costs(run.model, run.splits.train.normalise(run.splits.train.x[:1]))
    densities = {row.name: row.density for row in masks.table() if row.name in costs}
    whole, left = effective_macs(costs, {}), effective_macs(costs, densities)
    lengths = {
        "finetune": max(1, epochs // 4) if finetune_epochs is None else finetune_epochs,
        "scratch-E": epochs,
        "scratch-B": scratch_epochs(epochs, whole, left, cap),
    }
    small = 0.01 * training.lr if finetune_lr is None else finetune_lr
    wanted = ARMS if arm == "all" else (arm,)
    scratch = sparse_init(fresh(run), masks, run, run.seed + 1_000_003)
    arms: dict[str, State] = {}
    steps = length(run, training)
    for name in wanted:
        choices = shorter(training, lengths[name])
        if name == "finetune":
            choices = replace(choices, lr=small, schedule="constant", milestones=None, warmup=0)
        start = replace(trained, step=0) if name == "finetune" else scratch
        arms[name] = run.train(name, start=start, masks=masks, training=choices)
        steps += length(run, choices)
    details = {
        "arm": wanted[0],
        "epochs": {name: lengths[name] for name in wanted},
        "dense_macs": whole,
        "pruned_macs": left,
        "dense": measure(run, trained),
        "arms": {name: measure(run, state) for name, state in arms.items()},
    }
    return Outcome(arms[wanted[0]], steps, details)
