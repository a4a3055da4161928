"""Cutting a set of labels into parts with exact sizes and fair class shares."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.errors import InvalidValue
from prunus.randomness import generator


def amount(value: float, total: int, what: str) -> int:
    """Return how many of `total` examples `value` means: a whole number is a count, a fraction a share.

    Raises:
        InvalidValue: a negative number, a fraction of 1 or more, or a count of `total` or more.
    """
    is_count = isinstance(value, int) or (value > 1 and float(value).is_integer())
    if value < 0 or (not is_count and value >= 1) or value >= total:
        raise InvalidValue(f"{what}={value!r} must be a fraction in [0, 1) or a count below {total}")
    return int(value) if is_count else min(round(value * total), total - 1)


def shares(weights: Tensor, total: int, most: Tensor) -> Tensor:
    """Cut `total` into whole shares in proportion to `weights`, none above `most`, that sum to `total` exactly.

    Largest remainders first, ties to the lower class; what a full class cannot take goes to the others.

    Args:
        weights: (K,) non-negative numbers.
        total: at most `most.sum()`.
        most: (K,) int64 upper bounds.

    Returns:
        (K,) int64.
    """
    given = torch.zeros_like(most)
    while int(given.sum()) < total:
        open_weight = torch.where(given < most, weights.to(torch.float64), 0.0)
        if not float(open_weight.sum()):
            open_weight = (given < most).to(torch.float64)
        left = total - int(given.sum())
        exact = open_weight * (left / float(open_weight.sum()))
        more = torch.minimum(exact.floor().to(torch.int64), most - given)
        room = (open_weight > 0) & (given + more < most)
        extra = min(left - int(more.sum()), int(room.sum()))
        remainder = torch.where(room, exact - exact.floor(), -1.0)
        # Handing out single pieces is only fair once no class has hit its bound in this round.
        if bool((exact.floor().to(torch.int64) <= most - given).all()):
            more[remainder.argsort(descending=True, stable=True)[:extra]] += 1
        given = given + more
    return given


def stratified(y: Tensor, count: int, classes: int, seed: int, *purpose: object, balanced: bool = False) -> Tensor:
    """Pick exactly `count` positions with fair class shares.

    Args:
        y: (N,) int64 labels.
        count: 0..N.
        classes: number of classes.
        seed, purpose: key of the draw; each class draws on its own, so that one class does not move another.
        balanced: equal shares for all classes (as far as they have examples) instead of proportional ones.

    Returns:
        (count,) int64 positions, ascending.

    Raises:
        InvalidValue: `count` is not in 0..N.
    """
    if not 0 <= count <= y.numel():
        raise InvalidValue(f"cannot pick {count} of {y.numel()} examples")
    sizes = torch.bincount(y, minlength=classes)
    wanted = shares((sizes > 0) if balanced else sizes, count, sizes)
    picks = []
    for label, k in enumerate(wanted.tolist()):
        members = (y == label).nonzero().flatten()
        order = torch.randperm(members.numel(), generator=generator(seed, *purpose, label))
        picks.append(members[order[:k]])
    return torch.cat(picks).sort().values
