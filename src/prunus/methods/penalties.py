"""Penalties that push chosen channels towards zero, as what they add to the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.errors import InvalidValue, unknown

PENALTIES = ("l1", "l2", "smooth-l1")


def scale_penalty(scale: Tensor, victims: Tensor, strength: float, kind: str = "l1", rate: float = 0.0) -> Tensor:
    """Return the gradient of a penalty on the victims among the scales of a norm layer, zero on all others.

    "l1": strength * sign(scale), the subgradient of strength * |scale| with sign(0) = 0. "l2": strength * scale.
    "smooth-l1": as "l1", but strength * scale where |scale| < rate * strength, so that a step does not cross zero.
    With every channel a victim, "l1" is Network Slimming (Liu et al., ICCV 2017). Source: Jiang et al., 2022 (arXiv
    2201.06776); the last two from the authors' code.

    Args:
        scale: (C,) scales, any float dtype; the result has the same.
        victims: bool (C,), True = is to go.
        strength: from 0 up (authors: 5e-4).
        kind: one of `PENALTIES`.
        rate: the current learning rate, which only "smooth-l1" looks at.

    Raises:
        UnknownName: no such penalty.
        InvalidValue: victims are not bool of the shape of `scale`.
    """
    if victims.dtype != torch.bool or victims.shape != scale.shape:
        raise InvalidValue(
            f"victims must be bool of shape {tuple(scale.shape)}, not {victims.dtype} of {tuple(victims.shape)}."
        )
    if kind == "l1":
        pull = scale.sign()
    elif kind == "l2":
        pull = scale
    elif kind == "smooth-l1":
        pull = torch.where(scale.abs() < rate * strength, scale, scale.sign())
    else:
        raise unknown("penalty", kind, PENALTIES)
    return torch.where(victims, strength * pull, torch.zeros_like(scale))


def growing_strengths(importance: Tensor, alpha: float = 4.0) -> Tensor:
    """Return 2^(alpha (I_max - I_i) / (I_max - I_min)): 1 for the most important group, 2^alpha for the least.

    When all are equally important the fraction has no value; then everyone gets 1, plain weight decay. Source: DepGraph
    (Fang et al., CVPR 2023).

    Args:
        importance: (groups,), finite.
        alpha: from 0 up (0: every group alike).
    """
    top, low = importance.max(), importance.min()
    if not bool(top > low):
        return torch.ones_like(importance)
    return torch.exp2(alpha * (top - importance) / (top - low))
