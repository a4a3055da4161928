"""Scores of whole channels under unstructured masks: how much of a channel is still connected.

Source: Dynamic Sparsity Is Channel-Level Sparsity Learner (Yin et al., NeurIPS 2023, Chase). The paper compares several
of them; only UMM is certain under its name here, the other three are reconstructed from descriptions.

Every function takes `weight`, the masked weights of a layer's channels as (channels, inputs, taps), and returns one
number per channel, higher = keep. Sums are divided by the number of weights (or kernels) that a channel had in the
dense network, so that inputs which are physically gone count as the zeros they stand for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def unmasked_mean_magnitude(weight: Tensor, mask: Tensor, weights: int, kernels: int) -> Tensor:
    """Return UMM: the mean of |w| over all weights of a channel, masked ones included as zeros.

    Finds the starved channels that dynamic sparse training leaves behind.

    Args:
        weight: (C, inputs, taps), zero where masked.
        mask: bool of that shape, True = kept.
        weights, kernels: per channel in the dense network.
    """
    return weight.abs().sum((1, 2)) / weights


def masked_mean_magnitude(weight: Tensor, mask: Tensor, weights: int, kernels: int) -> Tensor:
    """Return MM: the mean of |w| over the kept weights of a channel, 0 without any (arguments as above).

    Keeps channels with a few large weights, which is why the paper prefers UMM.
    """
    return weight.abs().sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)


def kept_fraction(weight: Tensor, mask: Tensor, weights: int, kernels: int) -> Tensor:
    """Return the share of a channel's connections that are kept (arguments as above)."""
    return mask.sum((1, 2)).to(weight.dtype) / weights


def nonempty_kernels(weight: Tensor, mask: Tensor, weights: int, kernels: int) -> Tensor:
    """Return the share of a channel's kernels (one per input) with at least one kept weight (arguments as above)."""
    return mask.any(2).sum(1).to(weight.dtype) / kernels


CHANNEL_SCORES: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "umm": unmasked_mean_magnitude,
    "mm": masked_mean_magnitude,
    "kept-fraction": kept_fraction,
    "nonempty-kernels": nonempty_kernels,
}


def channel_density(mask: Tensor) -> Tensor:
    """Return the kept share of every output of a mask, (outputs,): the histogram of starved channels."""
    return mask.reshape(mask.shape[0], -1).to(torch.float32).mean(1)
