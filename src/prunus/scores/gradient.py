"""Scores from first derivatives of the loss."""

from __future__ import annotations

from torch import Tensor


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return |w * dL/dw|, the connection sensitivity |dL/dc| at masks c = 1 (SNIP: Lee et al., ICLR 2019, eq. 5).

    The normalisation by the global sum does not change the order and is left out.
    """
    return (weight * gradient).abs()


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return |w * dL/dw|, the first-order Taylor estimate of the loss change (Molchanov et al., CVPR 2019)."""
    return (weight * gradient).abs()


def taylor_squared(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return (w * dL/dw)^2, the squared first-order estimate (Molchanov et al., CVPR 2019, eq. 8)."""
    return (weight * gradient).square()


def gradient_magnitude(gradient: Tensor) -> Tensor:
    """Return |dL/dw|, the growth score of RigL (Evci et al., ICML 2020): also defined where weights are pruned."""
    return gradient.abs()


def movement(movement: Tensor) -> Tensor:
    """Return -sum over steps of w * dL/dw: high when weights move away from zero (Sanh et al., NeurIPS 2020)."""
    return movement
