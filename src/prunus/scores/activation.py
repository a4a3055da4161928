"""Scores from the inputs a layer sees."""

from __future__ import annotations

from torch import Tensor


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Return |w_ij| * ||x_j||, weight magnitude times the norm of its input feature (Wanda: Sun et al., ICLR 2024).

    `input_norm` has the weight's shape; for convolutions the norm is that of the input channel, shared by its taps.
    """
    return weight.abs() * input_norm
