"""Units: what may go. A unit pools element scores to unit scores and spreads kept units to an element mask."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.errors import InvalidValue, unknown
from prunus.parameters import Address


@dataclass(frozen=True)
class Unit:
    """Base of all units. Subclasses define `pool`, `spread` and `sizes`; all three use one unit order."""

    @property
    def density(self) -> float | None:
        """The share kept that the pattern itself fixes (N:M), or None when a budget decides."""
        return None

    def pool(self, scores: Tensor, address: Address) -> Tensor:
        """Return one score per unit (any shape) from element scores of the tensor's shape."""
        raise NotImplementedError

    def spread(self, keep: Tensor, address: Address) -> Tensor:
        """Return the bool mask of the tensor's shape that keeps exactly the units marked in `keep`."""
        raise NotImplementedError

    def sizes(self, address: Address) -> Tensor:
        """Return the number of elements in each unit, int64, flat, in unit order."""
        raise NotImplementedError


@dataclass(frozen=True)
class Weight(Unit):
    """Single weights: unstructured pruning."""

    def pool(self, scores: Tensor, address: Address) -> Tensor:
        """Return the scores themselves."""
        return scores

    def spread(self, keep: Tensor, address: Address) -> Tensor:
        """Return `keep` in the tensor's shape."""
        return keep.reshape(address.shape)

    def sizes(self, address: Address) -> Tensor:
        """Return ones."""
        return torch.ones(address.size, dtype=torch.int64)

    def __str__(self) -> str:
        return "weight"


@dataclass(frozen=True)
class Row(Unit):
    """Whole output rows (filters of a convolution, one gate row of a recurrent matrix), as a mask only.

    The score of a row is the mean of its elements' scores, so rows of different lengths can compete.
    """

    def pool(self, scores: Tensor, address: Address) -> Tensor:
        """Return the mean score of each row, shape (outputs,)."""
        return address.rows(scores).mean(1)

    def spread(self, keep: Tensor, address: Address) -> Tensor:
        """Return the mask that keeps the marked rows whole."""
        row = address.size // address.outputs
        return address.unrows(keep.reshape(-1, 1).expand(-1, row))

    def sizes(self, address: Address) -> Tensor:
        """Return the row length, once per row."""
        return torch.full((address.outputs,), address.size // address.outputs, dtype=torch.int64)

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class Block(Unit):
    """Blocks of `rows` outputs by `columns` inputs of the tensor laid out as a matrix (see `Address.rows`).

    Blocks at the lower and right edge are smaller when the matrix does not divide; nothing is padded. The score
    of a block is the mean of its elements' scores.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise InvalidValue(f"block {self.rows}x{self.columns} has no elements; both sides must be at least 1.")

    def _index(self, address: Address) -> tuple[Tensor, int]:
        """Return the block number of every matrix entry (outputs, row length) and the number of blocks."""
        outputs, length = address.outputs, address.size // address.outputs
        across = -(-length // self.columns)
        down = torch.arange(outputs) // self.rows
        right = torch.arange(length) // self.columns
        return down[:, None] * across + right[None, :], -(-outputs // self.rows) * across

    def pool(self, scores: Tensor, address: Address) -> Tensor:
        """Return the mean score of each block, flat, row-major over blocks."""
        index, blocks = self._index(address)
        index = index.to(scores.device).reshape(-1)
        flat = address.rows(scores).reshape(-1)
        total = torch.zeros(blocks, dtype=flat.dtype, device=flat.device).index_add_(0, index, flat)
        return total / torch.bincount(index, minlength=blocks)

    def spread(self, keep: Tensor, address: Address) -> Tensor:
        """Return the mask that keeps the marked blocks whole."""
        index, _ = self._index(address)
        return address.unrows(keep.reshape(-1)[index.to(keep.device)])

    def sizes(self, address: Address) -> Tensor:
        """Return the elements of each block (smaller at the edges)."""
        index, blocks = self._index(address)
        return torch.bincount(index.reshape(-1), minlength=blocks)

    def __str__(self) -> str:
        return f"block-{self.rows}x{self.columns}"


@dataclass(frozen=True)
class NM(Unit):
    """N:M sparsity: keep the `n` best of every `m` consecutive weights along the input axis (channels last).

    N counts what is KEPT. Where the input axis does not divide by `m`, the tail of t weights is a group of its
    own that keeps ceil(n * t / m); nothing is padded. Source: Zhou et al., ICLR 2021.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise InvalidValue(f"pattern {self.n}:{self.m} is not possible: keep N of M needs 1 <= N <= M.")

    @property
    def density(self) -> float:
        """N / M."""
        return self.n / self.m

    def pool(self, scores: Tensor, address: Address) -> Tensor:
        """Return the scores themselves: the weights of a group compete one by one."""
        return scores

    def spread(self, keep: Tensor, address: Address) -> Tensor:
        """Return `keep` in the tensor's shape."""
        return keep.reshape(address.shape)

    def sizes(self, address: Address) -> Tensor:
        """Return ones."""
        return torch.ones(address.size, dtype=torch.int64)

    def kept(self, address: Address) -> int:
        """Return how many entries of the tensor the pattern keeps."""
        inputs, whole = address.inputs, address.inputs // self.m
        tail = -(-self.n * (inputs - whole * self.m) // self.m)
        return (address.size // inputs) * (whole * self.n + tail)

    def choose(self, scores: Tensor, address: Address) -> Tensor:
        """Return the bool mask keeping exactly N of each M; equal scores keep the earlier position."""
        lines = address.rows(scores).reshape(-1, address.inputs)
        whole = address.inputs // self.m * self.m
        keep = torch.zeros(lines.shape, dtype=torch.bool, device=scores.device)
        if whole:
            keep[:, :whole] = _best(lines[:, :whole].unflatten(1, (-1, self.m)), self.n).flatten(1)
        if whole < address.inputs:
            tail = address.inputs - whole
            keep[:, whole:] = _best(lines[:, whole:], -(-self.n * tail // self.m))
        return address.unrows(keep.reshape(address.outputs, -1))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Structural(Unit):
    """Units that are removed for real and take coupled slices of other tensors with them.

    Which slices belong together is read from the network (`prunus.graph`), so these pool and spread over families of
    coupled slices, not over single tensors.

    Attributes:
        kind: "channel" (channels, features, heads: whatever axis can be cut), "head" (attention heads alone),
            "layer" (residual blocks) or "expert" (of a mixture of experts).
    """

    kind: str = "channel"

    def __str__(self) -> str:
        return self.kind


def _best(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` largest along the last axis; a stable sort breaks ties by position."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return keep.scatter_(-1, order[..., :count], True)


def unit(spec: Unit | str) -> Unit:
    """Return the unit that `spec` names: "weight", "row", "2:4", "block-4x1" or "4x1", "channel", "head", "layer"...

    Raises:
        UnknownName: no unit is spelled like that.
        InvalidValue: the numbers in it make no sense.
    """
    if isinstance(spec, Unit):
        return spec
    text = str(spec).strip().lower()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(?:block-?)?(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    simple: dict[str, Unit] = {"weight": Weight(), "row": Row()}
    simple |= {kind: Structural(kind) for kind in ("channel", "head", "layer", "expert")}
    if text in simple:
        return simple[text]
    raise unknown("unit", spec, [*simple, "2:4", "block-4x1"])
