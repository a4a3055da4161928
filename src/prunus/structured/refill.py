"""Refill: turn an unstructured mask into whole output channels by growing back the best ones and dropping the others.

Source: Chen, Chen, Ma, Wang and Wang, "Coarsening the Granularity: Towards Structurally Sparse Lottery Tickets",
ICML 2022 (arXiv 2202.04736), Refill and Refill+. The paper's formula for the number of channels is garbled in print;
"as many full channels as the remaining weights would fill" is the reading used here. Top channels are exact, with ties
to the earlier channel, where the released code leaves tied channels half masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.budget.select import keep_best, round_half_up
from prunus.errors import InvalidValue, MaskMismatch, NonFinite, unknown
from prunus.masks import Masks
from prunus.parameters import Address, check_finite


def check_matrix(mask: Tensor) -> Tensor:
    """Return `mask` if it is a bool matrix with at least one row and one column, else raise `InvalidValue`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2 or not mask.numel():
        what = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidValue(
            f"a mask must be a bool matrix (output channels, weights of one) that is not empty, not {what}; lay a "
            "convolution out with Address.rows(mask)."
        )
    return mask


def channel_budget(mask: Tensor, fillback: float = 0.0) -> int:
    """Return how many whole channels to keep: ceil(kept fraction x channels), plus a share of the others.

    Refill+ keeps k + r (c_out - k) channels; halves of that product are rounded up (our choice).

    Args:
        mask: bool (c_out, weights of one channel), True = kept.
        fillback: r, share of the channels beyond k that come back as well, in [0, 1].

    Raises:
        InvalidValue: not a bool matrix, or a fillback outside [0, 1].
    """
    outputs, length = check_matrix(mask).shape
    extra = check_fraction("fillback", fillback)
    budget = -(-int(torch.count_nonzero(mask)) // length)  # ceil(kept / length) in whole numbers: no float dust
    return budget + round_half_up(extra * (outputs - budget))


def weight_l1(weight: Tensor, mask: Tensor) -> Tensor:
    """Return sum_j |m_ij w_ij| per channel: the L1 norm of its remaining weights, float64, shape (c_out,)."""
    return (weight.detach().double().abs() * mask.to(weight.device)).sum(1)


def remaining(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the number of remaining weights per channel, float64, shape (c_out,); `weight` only gives the device."""
    return mask.to(weight.device).sum(1).double()


WEIGHT_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"weight-l1": weight_l1, "remaining": remaining}


def whole_rows(scores: Tensor, count: int, columns: int) -> Tensor:
    """Return the bool matrix (len(scores), columns) whose `count` rows of the highest scores are all True.

    Equal scores keep the earlier row.
    """
    return keep_best(scores, count).reshape(-1, 1).expand(-1, columns).contiguous()


def refill(mask: Tensor, scores: Tensor, *, fillback: float = 0.0) -> Tensor:
    """Return a mask of whole channels: the `channel_budget(mask, fillback)` best ones full, all others empty.

    A channel without any remaining weight ranks below all channels with some, whatever its score: a mask that already
    consists of whole channels is returned as it is (with fillback 0).

    Args:
        mask: bool (c_out, weights of one channel), True = kept.
        scores: (c_out,), higher = keep.
        fillback: as in `channel_budget`; above 0 it is Refill+.

    Returns:
        Bool, shape of `mask`. An empty mask stays empty with fillback 0.

    Raises:
        InvalidValue: not a bool matrix, another number of scores than channels, a fillback outside [0, 1].
        NonFinite: a score is NaN or infinite.
    """
    count = channel_budget(mask, fillback)
    if scores.shape != mask.shape[:1]:
        raise InvalidValue(f"{tuple(scores.shape)} scores for {len(mask)} channels; give one number per channel.")
    if not bool(torch.isfinite(scores).all()):
        raise NonFinite("a channel score is NaN or infinite, so channels cannot be ranked; look for bad weights.")
    alive = mask.any(1)
    ranked = scores.detach().double().to(mask.device).masked_fill(~alive, -torch.inf)
    return whole_rows(ranked, count, mask.shape[1])


def weight_scores(
    masks: Masks, weights: Mapping[str, Tensor], addresses: Mapping[str, Address], score: str = "weight-l1"
) -> dict[str, Tensor]:
    """Return one score per output channel of every masked tensor, from trained weights.

    Args:
        masks: the unstructured masks.
        weights: trained weights by name (a state dict will do), of the round that the masks belong to.
        addresses: where the tensors lie, see `prunus.parameters.prunable`.
        score: "weight-l1" (the paper's default and best) or "remaining" (the default of the released code).

    Raises:
        UnknownName: no such score; those of feature maps are in `prunus.structured.features`.
        MaskMismatch: a tensor is missing among weights or addresses, or has another shape.
        NonFinite: a weight is NaN or infinite.
    """
    if score not in WEIGHT_SCORES:
        raise unknown("channel score from weights", score, WEIGHT_SCORES)
    _check_known(masks, addresses)
    chosen = {}
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            raise MaskMismatch(f"there are no weights of shape {tuple(mask.shape)} called {name!r} for its mask.")
        chosen[name] = weights[name]
    check_finite(chosen, "weight")
    rows = {n: (addresses[n].rows(chosen[n]), addresses[n].rows(m)) for n, m in masks.items()}
    return {n: WEIGHT_SCORES[score](weight, mask) for n, (weight, mask) in rows.items()}


def refill_masks(
    masks: Masks, scores: Mapping[str, Tensor], addresses: Mapping[str, Address], *, fillback: float = 0.0
) -> Masks:
    """Return the masks with every tensor refilled (see `refill`); `.density` of the result is the new density.

    Whole output channels only: the input channels that they feed in the next layer are left alone.

    Args:
        masks: the unstructured masks.
        scores: (output channels,) by name.
        addresses: where the tensors lie.
        fillback: as in `channel_budget`.

    Raises:
        MaskMismatch: scores or addresses lack a tensor.
    """
    _check_known(masks, addresses)
    _check_known(masks, scores)
    return Masks(
        {
            n: addresses[n].unrows(refill(addresses[n].rows(m), scores[n].to(m.device), fillback=fillback))
            for n, m in masks.items()
        }
    )


def _check_known(masks: Masks, known: Mapping[str, object]) -> None:
    for name, mask in masks.items():
        if name not in known:
            raise MaskMismatch(f"mask {name!r} belongs to no tensor given; known: {', '.join(known) or 'none'}.")
        address = known[name]
        if isinstance(address, Address) and tuple(mask.shape) != address.shape:
            raise MaskMismatch(f"mask {name!r} has shape {tuple(mask.shape)} but the tensor has {address.shape}.")
