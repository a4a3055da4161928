"""Masks: the one place where zeros are kept. A mask is True where a weight stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn

from prunus.errors import DamagedFile, InvalidValue, MaskMismatch, did_you_mean
from prunus.files import write_atomic
from prunus.parameters import parameters_of, prunable, unwrap

if TYPE_CHECKING:
    from prunus.hold import Hold

_FORMAT = "prunus-masks-1"


class LayerRow(NamedTuple):
    """One line of the per-layer table."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int

    @property
    def density(self) -> float:
        """Share of entries kept."""
        return self.kept / self.total if self.total else 1.0


class Masks(Mapping[str, Tensor]):
    """An immutable set of bool tensors by parameter name, True = kept: the only pruning state there is.

    Masks are explicit, never read off `weight != 0`. Sparsity is the fraction of zeros among the masked
    (prunable) entries. Do not write into the tensors; every operation returns new masks.

    Args:
        masks: parameter name -> bool tensor of the parameter's shape.

    Raises:
        InvalidValue: a tensor is not bool.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise InvalidValue(
                    f"mask {name!r} must be a bool tensor, not {kind}; write `values > threshold` or .bool()."
                )
        self._masks = dict(masks)
        self._counts: dict[str, int] = {}

    # -- making ---------------------------------------------------------------------------------------------

    @classmethod
    def full(cls, model: nn.Module, *, include: Sequence[str] | str = (), exclude: Sequence[str] | str = ()) -> Masks:
        """Return masks that keep everything in every prunable tensor of `model` (see `prunus.parameters.prunable`)."""
        names = prunable(model, include=include, exclude=exclude)
        return cls({n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters_of(model, names).items()})

    # -- mapping --------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return set(self) == set(other) and all(
            self[n].shape == other[n].shape and torch.equal(self[n].cpu(), other[n].cpu()) for n in self
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, kept {self.kept:,}/{self.total:,}, sparsity {self.sparsity:.4%})"

    # -- counting -------------------------------------------------------------------------------------------

    def count(self, name: str) -> int:
        """Return the number of kept entries of one tensor."""
        if name not in self._counts:
            self._counts[name] = int(torch.count_nonzero(self._masks[name]))
        return self._counts[name]

    @property
    def kept(self) -> int:
        """Number of kept entries over all tensors."""
        return sum(self.count(n) for n in self)

    @property
    def total(self) -> int:
        """Number of entries over all tensors."""
        return sum(m.numel() for m in self.values())

    @property
    def density(self) -> float:
        """Kept share of all entries (1.0 for empty masks)."""
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        """Pruned share of all entries."""
        return 1.0 - self.density

    def table(self) -> list[LayerRow]:
        """Return one row per tensor: name, shape, kept, total (and density)."""
        return [LayerRow(n, tuple(m.shape), self.count(n), m.numel()) for n, m in self.items()]

    # -- set algebra ----------------------------------------------------------------------------------------

    def _combine(self, other: Masks, function: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        self.check_same(other)
        return Masks({n: function(m, other[n].to(m.device)) for n, m in self.items()})

    def __or__(self, other: Masks) -> Masks:
        """Union: kept in either."""
        return self._combine(other, torch.logical_or)

    def __and__(self, other: Masks) -> Masks:
        """Intersection: kept in both."""
        return self._combine(other, torch.logical_and)

    def __invert__(self) -> Masks:
        """Complement: kept becomes pruned and the reverse."""
        return Masks({n: ~m for n, m in self.items()})

    def __le__(self, other: Masks) -> bool:
        """Nested: everything kept here is kept in `other` too."""
        self.check_same(other)
        return all(not bool((m & ~other[n].to(m.device)).any()) for n, m in self.items())

    def churn(self, other: Masks) -> float:
        """Return the share of entries whose state differs between the two (0 = equal)."""
        self.check_same(other)
        changed = sum(int(torch.count_nonzero(m ^ other[n].to(m.device))) for n, m in self.items())
        return changed / self.total if self.total else 0.0

    def overlap(self, other: Masks) -> float:
        """Return kept-in-both over kept-in-either (Jaccard index; 1.0 when both keep nothing)."""
        union = (self | other).kept
        return (self & other).kept / union if union else 1.0

    # -- against a model ------------------------------------------------------------------------------------

    def check_same(self, other: Mapping[str, Tensor]) -> None:
        """Raise `MaskMismatch` unless `other` has the same names and shapes."""
        for name in (*self, *other):
            if name not in self or name not in other:
                side = "second" if name in self else "first"
                raise MaskMismatch(
                    f"mask {name!r} is missing in the {side} set of masks; both must come from one model."
                )
            if self[name].shape != other[name].shape:
                raise MaskMismatch(
                    f"mask {name!r} has shape {tuple(self[name].shape)} in one set and "
                    f"{tuple(other[name].shape)} in the other."
                )

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters these masks belong to.

        Raises:
            MaskMismatch: the model has no parameter of that name, or it has another shape.
        """
        every = dict(unwrap(model).named_parameters(remove_duplicate=False))
        for name, mask in self.items():
            if name not in every:
                raise MaskMismatch(
                    f"the model has no parameter {name!r} that the masks name.{did_you_mean(name, every)} "
                    "Masks fit only the architecture they were made for."
                )
            if every[name].shape != mask.shape:
                raise MaskMismatch(
                    f"mask {name!r} has shape {tuple(mask.shape)} but the parameter has {tuple(every[name].shape)}."
                )
        return {n: every[n] for n in self}

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set every pruned entry of `model` to zero, in place (raises `MaskMismatch` as `parameters` does)."""
        for name, parameter in self.parameters(model).items():
            parameter.masked_fill_(~self[name].to(parameter.device), 0.0)

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hold:
        """Keep pruned entries at zero through training, in weights and optimizer state, by optimizer step hooks.

        Returns a handle with `.masks` (assignable: new masks take effect at once and newly grown entries start
        from zero with clean state) and `.detach()`.
        """
        from prunus.hold import Hold

        return Hold(model, optimizer, self)

    def to(self, device: torch.device | str) -> Masks:
        """Return the masks on another device."""
        return Masks({n: m.to(device) for n, m in self.items()})

    # -- files ----------------------------------------------------------------------------------------------

    def packed(self) -> dict[str, Tensor]:
        """Return each mask as a uint8 tensor with 8 entries per byte, first entry in the highest bit."""
        return {n: torch.from_numpy(np.packbits(m.detach().cpu().reshape(-1).numpy())) for n, m in self.items()}

    def digest(self) -> str:
        """Return the SHA-256 (hex) of names, shapes and bits: equal masks, equal digest."""
        return _digest({n: tuple(m.shape) for n, m in self.items()}, self.packed())

    def to_bytes(self) -> bytes:
        """Return the masks as a bit-packed safetensors file with shapes and content hash in its header."""
        shapes = {n: list(m.shape) for n, m in self.items()}
        # One key only: safetensors writes several in random order, and equal masks should be equal files.
        header = json.dumps({"format": _FORMAT, "shapes": shapes, "sha256": self.digest()})
        return safetensors_save(self.packed(), metadata={"prunus": header})

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "masks") -> Masks:
        """Read what `to_bytes` wrote.

        Raises:
            DamagedFile: anything in it is not as it was written, down to a single bit.
        """
        try:
            packed = safetensors_load(data)
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["prunus"])
            shapes = {n: tuple(int(s) for s in shape) for n, shape in header["shapes"].items()}
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DamagedFile(f"{source} is not a readable mask file ({error}); restore it from a copy.") from error
        sound = (
            header.get("format") == _FORMAT
            and set(shapes) == set(packed)
            and all(p.dtype == torch.uint8 and p.numel() == -(-_numel(shapes[n]) // 8) for n, p in packed.items())
            and header.get("sha256") == _digest(shapes, {n: packed[n] for n in shapes})
        )
        if not sound:
            raise DamagedFile(
                f"{source} does not match its own hash; it was damaged or changed. Restore it from a copy."
            )
        return cls.unpacked(packed, shapes)

    @classmethod
    def unpacked(cls, packed: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Masks:
        """Undo `packed`, given the shape of each mask."""
        masks = {}
        for name, shape in shapes.items():
            bits = np.unpackbits(packed[name].cpu().numpy(), count=_numel(shape))
            masks[name] = torch.from_numpy(bits.astype(bool)).reshape(tuple(shape))
        return cls(masks)

    def save(self, path: Path | str) -> None:
        """Write the masks to `path` (bit-packed safetensors), whole or not at all.

        Raises:
            StorageFailed: the file cannot be written; an older file there is unchanged.
        """
        write_atomic(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> Masks:
        """Read masks from `path`.

        Raises:
            DamagedFile: the file is missing, truncated, or differs from what was written in any bit.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DamagedFile(f"mask file {path} cannot be read: {error.strerror}.") from error
        return cls.from_bytes(data, source=str(path))


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _digest(shapes: Mapping[str, tuple[int, ...]], packed: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256(_FORMAT.encode())
    for name, shape in sorted(shapes.items()):
        hasher.update(json.dumps([name, list(shape)]).encode())
        hasher.update(packed[name].numpy().tobytes())
    return hasher.hexdigest()
