"""Scores from second-order information."""

from __future__ import annotations

from torch import Tensor


def grasp(weight: Tensor, hessian_gradient: Tensor) -> Tensor:
    """Return w * (H g): pruning a weight changes half the squared gradient norm by about minus this.

    Keeping the largest keeps the gradient flow. H g is that of the loss with logits divided by 200. Source: GraSP
    (Wang et al., ICLR 2020), whose score -w * Hg removes the highest; the sign here is turned so that higher = keep.
    """
    return weight * hessian_gradient


def fisher(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """Return w^2 * E[g^2] / 2, the loss increase under a diagonal empirical Fisher.

    g are gradients of single examples. Source: Optimal Brain Damage (LeCun et al., 1990) with the Fisher in place
    of the Hessian (Theis et al., 2018).
    """
    return weight.square() * squared_gradient / 2
