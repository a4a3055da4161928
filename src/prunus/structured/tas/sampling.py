"""The mathematics of transformable architecture search: choices, samples, alignment, expected cost, budget loss.

Source: Dong and Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019 (arXiv 1905.09717); constants
as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prunus.errors import InvalidValue, NonFinite
from prunus.schedule import cosine

FRACTIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def width_choices(size: int, fractions: Sequence[float] = FRACTIONS) -> tuple[int, ...]:
    """Return the widths floor(size * f), at least 1, each once and ascending.

    Args:
        size: channels of the whole network, >= 1.
        fractions: shares in (0, 1]; the largest must be 1, so that the whole network is one of the choices.

    Raises:
        InvalidValue: a size below 1, or fractions that are not as above.
    """
    if size < 1:
        raise InvalidValue(f"size={size} must be 1 or more channels.")
    if not fractions or not all(0 < f <= 1 for f in fractions) or max(fractions) != 1:
        raise InvalidValue(f"fractions={tuple(fractions)} must lie in (0, 1] and end with 1, such as (0.25, 0.5, 1).")
    # The tolerance keeps 0.29 * 100 = 28.999999999999996 what it means.
    return tuple(sorted({max(1, math.floor(size * f + 1e-9)) for f in fractions}))


def depth_choices(blocks: int) -> tuple[int, ...]:
    """Return the depths 1, 3, 5, ... up to `blocks`, and `blocks` itself (the choices of the CIFAR experiments).

    Raises:
        InvalidValue: fewer than one block.
    """
    if blocks < 1:
        raise InvalidValue(f"blocks={blocks} must be 1 or more.")
    return tuple(sorted({*range(1, blocks + 1, 2), blocks}))


def temperature(epoch: int, epochs: int, first: float = 5.0, last: float = 0.1) -> float:
    """Return tau of an epoch (from 0): half a cosine from `first` in the first epoch to `last` in the last one."""
    return cosine(first, last, epoch / (epochs - 1) if epochs > 1 else 1.0)


def channel_wise_interpolation(x: Tensor, channels: int) -> Tensor:
    """Return `x` with another number of channels (CWI, section 3.1).

    Output o is the mean of inputs floor(o C / channels) .. ceil((o + 1) C / channels) - 1: adaptive average pooling
    along the channel axis.

    Args:
        x: (N, C, ...), floating point.
        channels: how many to return, >= 1.

    Returns:
        (N, channels, ...); `x` itself when nothing changes.

    Raises:
        InvalidValue: fewer than two axes, or no channels.
    """
    if x.ndim < 2 or channels < 1:
        raise InvalidValue(
            f"cannot give x of shape {tuple(x.shape)} {channels} channels; (N, C, ...) and 1 or more fit."
        )
    if x.shape[1] == channels:
        return x
    flat = x.reshape(x.shape[0], 1, x.shape[1], -1)
    pooled = F.adaptive_avg_pool2d(flat, (channels, flat.shape[-1]))
    return pooled.reshape(x.shape[0], channels, *x.shape[2:])


def gumbel(shape: Sequence[int] | torch.Size, generator: torch.Generator | None = None) -> Tensor:
    """Return Gumbel noise -log(E), E ~ Exp(1), float32 on the CPU, from torch's global generator by default."""
    exponential = torch.empty(tuple(shape)).exponential_(generator=generator)
    return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()


def perturbed(alpha: Tensor, tau: float, noise: Tensor) -> Tensor:
    """Return the logits (log softmax(alpha) + noise) / tau; their softmax is the relaxed sample (equation 3).

    Args:
        alpha: (K,) logits of the choices.
        tau: temperature, > 0.
        noise: (K,) as `gumbel` gives it.

    Raises:
        InvalidValue: tau is not above 0.
        NonFinite: alpha has NaN or infinity.
    """
    if not tau > 0:
        raise InvalidValue(f"tau={tau} must be above 0; the schedule of the paper ends at 0.1.")
    if not bool(torch.isfinite(alpha).all()):
        raise NonFinite("the logits of the choices contain NaN or infinity; lower the rate of their optimizer.")
    return (torch.log_softmax(alpha, 0) + noise.to(alpha)) / tau


def draw(logits: Tensor, count: int = 2, generator: torch.Generator | None = None) -> Tensor:
    """Draw distinct choices from softmax(logits) without replacement.

    The `count` largest of logits + fresh Gumbel noise: the same law as drawing one after the other from what is left,
    and unlike probabilities, logits do not underflow at small temperatures.

    Args:
        logits: (K,).
        count: how many, at most K; more are cut to K.
        generator: source of the noise; default torch's global CPU generator.

    Returns:
        (min(count, K),) int64, in the order of drawing; no gradient.
    """
    scores = logits.detach().cpu().float() + gumbel(logits.shape, generator)
    return scores.topk(min(count, logits.numel())).indices


def mixture(logits: Tensor, drawn: Tensor) -> Tensor:
    """Return the weights of the drawn choices: the softmax of their perturbed logits alone; gradients flow."""
    return torch.softmax(logits[drawn.to(logits.device)], 0)


def expected_count(alpha: Tensor, counts: Sequence[int]) -> Tensor:
    """Return sum_j softmax(alpha)_j counts_j, a float64 scalar: the expected number of channels, without noise."""
    return torch.softmax(alpha.double(), 0) @ torch.tensor(counts, dtype=torch.float64, device=alpha.device)


def keep_probabilities(alpha: Tensor, depths: Sequence[int]) -> Tensor:
    """Return for each block of a stage the probability that it stays: that of all depths beyond its index.

    Args:
        alpha: (K,) logits.
        depths: (K,) ascending numbers of blocks, the last one the whole stage.

    Returns:
        (depths[-1],) float64.
    """
    probabilities = torch.softmax(alpha.double(), 0)
    tail = probabilities.flip(0).cumsum(0).flip(0)
    place = [next(k for k, depth in enumerate(depths) if depth > block) for block in range(depths[-1])]
    return tail[torch.tensor(place, device=alpha.device)]


def band_loss(expected: Tensor, discrete: int, target: float, tolerance: float) -> Tensor:
    """Return the loss that pushes the cost into the band from target - tolerance to target (section 3.3).

    log E above it, -log E below it, nothing inside: the cost of the arg-max architecture decides the sign, the expected
    one gives the gradient. The authors' code puts the upper edge at the target itself and measures the tolerance in
    shares of the whole network; the paper describes a symmetric band.

    Args:
        expected: scalar with gradient, > 0.
        discrete: cost of the arg-max architecture.
        target, tolerance: in the same units.
    """
    if discrete > target:
        return expected.log()
    if discrete < target - tolerance:
        return -expected.log()
    return expected * 0.0
