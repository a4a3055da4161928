"""LAMP: scores normalised by the tail of their own layer, so that layers compete fairly without a hyper-parameter."""

from __future__ import annotations

import torch
from torch import Tensor


def lamp(score: Tensor) -> Tensor:
    """Return score(u)^2 / sum of score(v)^2 over all v ranked at or above u, in float64, same shape.

    The largest entry of a layer gets exactly 1, so no layer is emptied while the budget is at least the number of
    layers; scaling a layer changes nothing; zeros get 0. Source: Lee et al., ICLR 2021, equation 2 (there for
    score = |weight|). Negative-infinite scores (already pruned) stay so.

    Args:
        score: non-negative scores of one layer, -inf where already pruned.
    """
    flat = score.detach().reshape(-1).to(torch.float64)
    dead = torch.isneginf(flat)
    squares = flat.masked_fill(dead, 0.0).square()
    # Adding up from the largest down gives each tail sum directly; total minus prefix would cancel near the top.
    ordered, order = squares.sort(descending=True, stable=True)
    tail = ordered.cumsum(0)
    ratio = torch.where(ordered > 0, ordered / tail.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    result = torch.empty_like(squares)
    result[order] = ratio
    return result.masked_fill_(dead, -torch.inf).reshape(score.shape)
