"""Coupled channels as step methods see them: which positions of which tensors belong to each unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prunus.errors import InvalidValue, MaskMismatch, did_you_mean


class ChannelSlot(Protocol):
    """One tensor axis of a family: unit u occupies the positions index[u] of `axis` (`prunus.graph` makes them)."""

    @property
    def tensor(self) -> str:
        """Name of the parameter or buffer."""

    @property
    def axis(self) -> int:
        """Axis of the tensor."""

    @property
    def index(self) -> np.ndarray:
        """Positions (units, k), int64."""

    @property
    def role(self) -> str:
        """What the axis is: "output", "input", "bias", "affine" or "other"."""


class ChannelFamily(Protocol):
    """Sibling units that can only go together in all their slots (`prunus.graph` makes them)."""

    @property
    def name(self) -> str:
        """Name of the first slot."""

    @property
    def size(self) -> int:
        """Number of units."""

    @property
    def slots(self) -> Sequence[ChannelSlot]:
        """All tensor axes of the units."""


def positions(slot: ChannelSlot) -> Tensor:
    """Return the positions of every unit on the slot's axis, int64 (units, k)."""
    index = torch.as_tensor(np.asarray(slot.index), dtype=torch.int64)
    return index.reshape(index.shape[0], -1)


def check_families(families: Sequence[ChannelFamily], tensors: Mapping[str, Tensor]) -> None:
    """Raise a typed error unless every slot that names one of `tensors` lies inside it.

    Raises:
        InvalidValue: not a sequence of families, or one given twice.
        MaskMismatch: no slot of a family is known, or positions beyond a tensor.
    """
    seen: set[str] = set()
    for family in families:
        if not hasattr(family, "slots") or not hasattr(family, "size"):
            raise InvalidValue(
                f"channels hold {type(family).__name__}, not families of coupled channels; pass couple(record(model, "
                "example)).families from prunus.graph, or some of them."
            )
        if family.name in seen:
            raise InvalidValue(f"family {family.name!r} is given twice.")
        seen.add(family.name)
        if not any(slot.tensor in tensors for slot in family.slots):
            first = family.slots[0].tensor if family.slots else family.name
            raise MaskMismatch(
                f"family {family.name!r} belongs to another model: there is no {first!r}.{did_you_mean(first, tensors)}"
            )
        for slot in family.slots:
            tensor = tensors.get(slot.tensor)
            if tensor is not None and (
                slot.axis >= tensor.ndim or int(positions(slot).max()) >= tensor.shape[slot.axis]
            ):
                raise MaskMismatch(
                    f"family {family.name!r} reaches beyond axis {slot.axis} of {slot.tensor!r}, whose shape is "
                    f"{tuple(tensor.shape)}; trace the model as it is now."
                )


def restricted(mask: Tensor, slot: ChannelSlot) -> Tensor:
    """Return which units stay, given which positions of the slot's axis do: a unit goes when all its positions go."""
    return mask[positions(slot).to(mask.device)].any(1)


def spread(values: Tensor, slot: ChannelSlot, length: int, fill: Any) -> Tensor:
    """Return one value per position of the slot's axis: that of its unit, `fill` where no unit lies."""
    line = torch.full((length,), fill, dtype=values.dtype, device=values.device)
    index = positions(slot).to(values.device)
    line[index.reshape(-1)] = values.repeat_interleave(index.shape[1])
    return line


def along(line: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """Shape a line of values so that it multiplies `tensor` along `axis`."""
    return line.view([-1 if i == axis else 1 for i in range(tensor.ndim)])


def unit_rows(tensor: Tensor, slot: ChannelSlot) -> Tensor:
    """Return what the units occupy in `tensor`, as (units, k * rest)."""
    index = positions(slot).to(tensor.device)
    rows = tensor.movedim(slot.axis, 0)[index.reshape(-1)]
    return rows.reshape(index.shape[0], -1)


def unit_kernels(tensor: Tensor, slot: ChannelSlot) -> Tensor:
    """Return what the units occupy in a weight, as (units, kernels, taps): the axes beyond the second are taps."""
    index = positions(slot).to(tensor.device)
    rows = tensor.movedim(slot.axis, 0)[index.reshape(-1)]
    taps = 1 if rows.ndim < 3 else int(torch.Size(rows.shape[2:]).numel())
    return rows.reshape(index.shape[0], -1, taps)


def parameter_slots(
    family: ChannelFamily, tensors: Mapping[str, Tensor], *, roles: Sequence[str] = ()
) -> Iterator[tuple[ChannelSlot, Tensor]]:
    """Yield the slots of a family that lie in `tensors` (and have one of `roles`, when given), with their tensor."""
    for slot in family.slots:
        tensor = tensors.get(slot.tensor)
        if tensor is not None and (not roles or slot.role in roles):
            yield slot, tensor


def group_norms(family: ChannelFamily, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the L2 norm of everything each unit occupies in `tensors`, float64 (units,)."""
    squares = torch.zeros(family.size, dtype=torch.float64)
    for slot, tensor in parameter_slots(family, tensors):
        rows = unit_rows(tensor.detach(), slot).to(torch.float64)
        squares = squares.to(rows.device) + rows.square().sum(1)
    return squares.sqrt()


def describe_families(families: Sequence[ChannelFamily]) -> list[dict[str, Any]]:
    """Return families as JSON values: names, sizes, and every slot with its first and last position."""
    return [
        {
            "name": family.name,
            "size": int(family.size),
            "slots": [[s.tensor, int(s.axis), int(s.index.min()), int(s.index.max())] for s in family.slots],
        }
        for family in families
    ]
