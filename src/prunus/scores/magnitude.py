"""Scores from the weights alone, and the random baseline."""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Return |w|, the l1 magnitude (LeCun et al., 1990 cite it as the baseline; Han et al., NeurIPS 2015)."""
    return weight.abs()


def magnitude_squared(weight: Tensor) -> Tensor:
    """Return w^2, the l2 magnitude: the same order for single weights, another one once units pool it."""
    return weight.square()


def random(noise: Tensor) -> Tensor:
    """Return uniform noise in [0, 1): the baseline every comparison needs."""
    return noise
