"""Weights of linear layers with few rows of x, laid out for the kernels of `native/gemv.cpp`. Needs no torch.

y = act(W x + b + residual). A kept weight behaves as in any matrix product, NaN and infinities included. A removed one
contributes nothing, even where x is infinite or NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.errors import InvalidValue, UnknownName
from prunus.runtime.records import ACTIVATIONS, Gemv

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

# In the order of GemvKernel in native/layers.hpp.
NAMES = ("csr", "select", "columns16", "row16", "nm", "bitmask", "dense")
LANES = 16

# A weight that finds no slot takes about the time of reading so many bytes: best of a sweep over sizes and densities.
_REST_BYTES = 25.0
_TASK_BYTES = 1 << 16
_MOST_TASKS = 64


@dataclass(frozen=True)
class Kernel:
    """A layout of the weights.

    Attributes:
        name: "csr": rows of values and columns. "select": 16 rows side by side pick their inputs out of registers, the
            same number of times for every block of columns; what is left over is csr. "columns16": 16 rows keep or
            remove a column together. "row16": a row keeps or removes 16 columns together. "nm": one or two of every
            four columns. "bitmask": 16 bits for 16 columns. "dense": all, zeros too.
        half: the values are stored as bfloat16, rounded to nearest, and multiplied as float32.
        block: of "select" the columns of a block, 32 or 64; of "nm" the weights kept of every four, 1 or 2; else 0.
    """

    name: str
    half: bool = False
    block: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UnknownName(f"there is no layout {self.name!r}; there are {', '.join(NAMES)}.")
        blocks = {"select": (32, 64), "nm": (1, 2)}.get(self.name, (0,))
        if self.block not in blocks:
            raise InvalidValue(f"{self.name} takes block {' or '.join(map(str, blocks))}, {self.block!r} was given.")


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in the layout of a kernel.

    Attributes:
        kernel: the layout.
        rows, columns: of the weight.
        arrays: the fields of the record that describe the weight.
        order: (groups * 16,) int32, the row that each lane computes, -1 for none; None where they are in order.
        cost: (groups,) bytes read for each 16 rows.
    """

    kernel: Kernel
    rows: int
    columns: int
    arrays: dict[str, NDArray[Any]]
    order: NDArray[np.int32] | None
    cost: NDArray[np.float64]
    wide: bool = field(default=False)

    @property
    def bytes(self) -> int:
        """Memory of the packed weight."""
        return sum(array.nbytes for array in self.arrays.values()) + (0 if self.order is None else self.order.nbytes)

    def record(
        self,
        x: Array,
        y: Array,
        bias: Array | None = None,
        activation: str = "none",
        *,
        slope: float = 0.0,
        residual: Array | None = None,
    ) -> Gemv:
        """Return the record of y = act(W x + bias + residual); it reads and writes the arrays whenever it runs.

        Args:
            x: (columns,) or (batch, columns) float32; values of a row side by side.
            y: (rows,) or (batch, rows) float32, apart from x.
            bias: (rows,) float32, copied; None for none.
            activation: one of `records.ACTIVATIONS`.
            slope: of a leaky ReLU.
            residual: as y, with the same strides; may be y itself.

        Raises:
            InvalidValue: an array has another shape, type or layout, or x and y overlap.
            UnknownName: there is no such activation.
        """
        x, y = _rows_of(x, self.columns, "x"), _rows_of(y, self.rows, "y")
        if len(x) != len(y):
            raise InvalidValue(f"x has {len(x)} rows, y {len(y)}; they must be as many.")
        if not y.flags.writeable:
            raise InvalidValue("y cannot be written to.")
        if np.may_share_memory(x, y) and np.shares_memory(x, y):
            raise InvalidValue("x and y overlap; give y memory of its own.")
        if residual is not None:
            residual = _rows_of(residual, self.rows, "residual")
            if residual.shape != y.shape or (len(y) > 1 and residual.strides[0] != y.strides[0]):
                raise InvalidValue(f"residual has shape {residual.shape}; it needs shape and strides of y, {y.shape}.")
        if activation not in ACTIVATIONS:
            raise UnknownName(f"there is no activation {activation!r}; there are {', '.join(ACTIVATIONS)}.")
        lanes = len(self.cost) * LANES
        biases = np.zeros(lanes, np.float32)
        if bias is not None:
            if not isinstance(bias, np.ndarray) or bias.dtype != np.float32 or bias.shape != (self.rows,):
                raise InvalidValue(f"bias must be a float32 array of shape ({self.rows},).")
            if self.order is None:
                biases[: self.rows] = bias
            else:
                biases[self.order >= 0] = bias[self.order[self.order >= 0]]
        chunk = _chunks(self.cost)
        record = Gemv(
            kernel=NAMES.index(self.kernel.name),
            half=self.kernel.half,
            wide=self.wide,
            block=self.kernel.block,
            rows=self.rows,
            columns=self.columns,
            batch=len(x),
            chunks=len(chunk) - 1,
            activation=ACTIVATIONS.index(activation),
            slope=slope,
            x_row=x.strides[0],
            y_row=y.strides[0],
            chunk=chunk,
            bias=biases,
            **self.arrays,
        )
        if self.order is not None:
            record.put("order", self.order)
        # Rows may lie apart, so the arrays as wholes need not be contiguous.
        for name, array in (("x", x), ("y", y), ("residual", residual)):
            if array is not None and array.size:
                setattr(record, name, array.ctypes.data)
                record.keep.append(array)
        return record


def pack(weight: Array, kernel: Kernel, mask: Mask | None = None) -> Packed:
    """Lay a weight out.

    Args:
        weight: (rows, columns) float32.
        kernel: the layout.
        mask: (rows, columns) bool, True for kept weights, which may be zero; by default those that are not zero.

    Raises:
        InvalidValue: weight or mask have another type or shape, or "nm" does not hold for the mask.
    """
    weight, mask = _checked(weight, mask)
    rows, columns = weight.shape
    wide = columns > 1 << 16
    layout = _LAYOUTS[kernel.name](weight, mask, kernel, np.dtype(np.int32 if wide else np.uint16))
    return Packed(kernel, rows, columns, layout.arrays, layout.order, layout.cost, wide)


def candidates(
    weight: Array, mask: Mask | None = None, instruction_set: str = "avx512", *, half: bool = False
) -> list[Kernel]:
    """Return the layouts worth timing for a weight, the best guess first.

    Args:
        weight, mask: as `pack` takes them.
        instruction_set: "avx512", "avx2" or "portable"; only the first can permute registers and expand bits.
        half: store the values as bfloat16.

    Raises:
        InvalidValue: as `pack` does.
    """
    weight, mask = _checked(weight, mask)
    rows, columns = weight.shape
    kept = int(mask.sum())
    if not kept:
        return [Kernel("csr", half=half)]
    size = 2 if half else 4
    wide = 4 if columns > 1 << 16 else 2
    vectors = weight.size / LANES
    shared = int(_lanes(mask).any(1).sum())
    blocks = int(_blocks(mask).any(2).sum())
    # Guesses of the time, counted in bytes that one core could have streamed meanwhile.
    cost: dict[Kernel, float] = {Kernel("csr", half=half): kept * (10.0 if half else 7.0 + wide)}
    cost[Kernel("dense", half=half)] = vectors * (LANES * size + 2)
    if shared < 0.9 * vectors:
        cost[Kernel("columns16", half=half)] = shared * float(LANES * size + wide)
    if blocks < 0.9 * vectors:
        cost[Kernel("row16", half=half)] = blocks * (LANES * size + wide + 4) + 60.0 * rows
    if instruction_set != "portable":
        most = int(_quads(mask).sum(2).max(initial=0))
        for n in (1, 2):
            if most <= n:
                cost[Kernel("nm", half=half, block=n)] = vectors / 4 * n * (LANES * size + 4)
    if instruction_set == "avx512":
        cost[Kernel("bitmask", half=half)] = max(kept * size + 5 * vectors, (24 if half else 20) * vectors)
        for block in (32, 64):
            kernel = Kernel("select", half=half, block=block)
            cost[kernel] = 0.9 * float(_slots(mask, kernel)[2].sum())
    best = min(cost.values())
    return [kernel for kernel, c in sorted(cost.items(), key=lambda item: item[1]) if c <= 1.6 * best]


@dataclass
class _Layout:
    arrays: dict[str, NDArray[Any]]
    cost: NDArray[np.float64]
    order: NDArray[np.int32] | None = None


def _checked(weight: Array, mask: Mask | None) -> tuple[Array, Mask]:
    if not isinstance(weight, np.ndarray) or weight.ndim != 2 or weight.dtype != np.float32:
        raise InvalidValue("the weight must be a two-dimensional float32 array.")
    if max(weight.shape) >= 1 << 31:
        raise InvalidValue(f"a weight of shape {weight.shape} is too large.")
    if mask is None:
        return weight, weight != 0
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != weight.shape:
        raise InvalidValue(f"the mask must be a bool array of the weight's shape {weight.shape}.")
    return weight, mask


def _rows_of(array: Array, columns: int, name: str) -> Array:
    """Return (batch, columns) as a view, checked."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim not in (1, 2):
        raise InvalidValue(f"{name} must be a float32 array of one or two dimensions.")
    array = array[None] if array.ndim == 1 else array
    if array.shape[1] != columns:
        raise InvalidValue(f"{name} must have {columns} columns, it has {array.shape[1]}.")
    if array.size and ((array.shape[1] > 1 and array.strides[1] != 4) or not array.flags.aligned):
        raise InvalidValue(f"the values of a row of {name} must lie side by side; make it contiguous.")
    return array


def _groups(rows: int) -> int:
    return -(-rows // LANES)


def _padded(array: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """Return the array, continued with zeros to multiples of `rows` and `columns`."""
    missing = [(0, -array.shape[0] % rows), (0, -array.shape[1] % columns)]
    return np.pad(array, missing) if any(m for _, m in missing) else array


def _lanes(array: NDArray[Any]) -> NDArray[Any]:
    """(rows, columns) as (groups, 16, columns)."""
    array = _padded(array, LANES, 1)
    return array.reshape(len(array) // LANES, LANES, array.shape[1])


def _blocks(array: NDArray[Any], size: int = LANES) -> NDArray[Any]:
    """(rows, columns) as (rows, blocks, size)."""
    array = _padded(array, 1, size)
    return array.reshape(array.shape[0], array.shape[1] // size, size)


def _quads(array: NDArray[Any]) -> NDArray[Any]:
    return _blocks(array, 4)


def _zeros(count: int, dtype: Any) -> NDArray[Any]:
    """Zeros from a cache line's start on."""
    dtype = np.dtype(dtype)
    raw = np.zeros(count * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * dtype.itemsize].view(dtype)


def _placed(array: NDArray[Any]) -> NDArray[Any]:
    found = _zeros(array.size, array.dtype)
    found[:] = array.reshape(-1)
    return found


def _stored(values: Array, half: bool) -> NDArray[Any]:
    """Return kept values as they are stored: zeros as -0, since +0 stands for a removed weight."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    if not half:
        return np.where(bits == 0, np.uint32(1 << 31), bits).view(np.float32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    found = np.where(np.isnan(values), np.uint32(0x7FC0), nearest).astype(np.uint16)
    return np.where(found == 0, np.uint16(1 << 15), found)


def _masked(weight: Array, mask: Mask, half: bool) -> NDArray[Any]:
    """Return all values as they are stored, removed ones as +0."""
    kind = np.uint16 if half else np.float32
    return np.where(mask, _stored(weight, half), np.zeros((), kind))


def _starts(counts: NDArray[Any], length: int) -> NDArray[np.int64]:
    """Return where each of `length` parts starts, and the end; parts beyond `counts` are empty."""
    starts = np.zeros(length + 1, np.int64)
    np.cumsum(counts, out=starts[1 : len(counts) + 1])
    starts[len(counts) + 1 :] = starts[len(counts)]
    return starts


def _per_group(starts: NDArray[np.int64], each: float) -> NDArray[np.float64]:
    """Return the bytes of 16 rows each, from where rows start."""
    return np.diff(starts[::LANES]) * each + 8.0 * LANES


def _csr(weight: Array, mask: Mask, kernel: Kernel, index: np.dtype[Any]) -> _Layout:
    starts = _starts(mask.sum(1), _groups(len(weight)) * LANES)
    values = _placed(_stored(weight[mask], kernel.half))
    columns = _placed(np.nonzero(mask)[1].astype(index))
    cost = _per_group(starts, values.itemsize + columns.itemsize)
    return _Layout({"starts": starts, "values": values, "indices": columns}, cost)


def _columns16(weight: Array, mask: Mask, kernel: Kernel, index: np.dtype[Any]) -> _Layout:
    used = np.asarray(_lanes(mask).any(1))
    values = _lanes(_masked(weight, mask, kernel.half)).transpose(0, 2, 1)[used]
    columns = np.nonzero(used)[1].astype(index)
    starts = _starts(used.sum(1), len(used))
    cost = np.diff(starts) * float(LANES * values.itemsize + index.itemsize) + 8.0
    return _Layout({"starts": starts, "values": _placed(values), "indices": _placed(columns)}, cost)


def _row16(weight: Array, mask: Mask, kernel: Kernel, index: np.dtype[Any]) -> _Layout:
    used = _blocks(mask).any(2)
    values = _blocks(_masked(weight, mask, kernel.half))[used]
    starts = _starts(used.sum(1), _groups(len(weight)) * LANES)
    cost = _per_group(starts, LANES * values.itemsize + index.itemsize)
    numbers = np.nonzero(used)[1].astype(index)
    return _Layout({"starts": starts, "values": _placed(values), "indices": _placed(numbers)}, cost)


def _dense(weight: Array, mask: Mask, kernel: Kernel, index: np.dtype[Any]) -> _Layout:
    values = _padded(_masked(weight, mask, kernel.half), 4, LANES)
    groups = _groups(len(weight))
    return _Layout({"values": _placed(values)}, np.full(groups, float(LANES * values.shape[1] * values.itemsize)))


def _bitmask(weight: Array, mask: Mask, kernel: Kernel, index: np.dtype[Any]) -> _Layout:
    bits = (_blocks(_padded(mask, 4, 1)).astype(np.uint16) << np.arange(LANES, dtype=np.uint16)).sum(2, np.uint16)
    values = _stored(weight[mask], kernel.half)
    # The kernel reads whole vectors, so there is one more behind the last value.
    kept = _zeros(len(values) + LANES, values.dtype)
    kept[: len(values)] = values
    starts = _starts(mask.sum(1), _groups(len(weight)) * LANES)
    cost = _per_group(starts, values.itemsize) + 2.0 * LANES * bits.shape[1]
    return _Layout({"starts": starts, "values": kept, "indices": _placed(bits)}, cost)


def _nm(weight: Array, mask: Mask, kernel: Kernel, index: np.dtype[Any]) -> _Layout:
    n = kernel.block
    most = int(_quads(mask).sum(2).max(initial=0))
    if most > n:
        raise InvalidValue(f"{most} of 4 columns are kept in places; choose another layout than {n} of 4.")
    step = 64 // n  # columns whose indices share a word
    rows, columns = (_padded(a, LANES, step) for a in (_masked(weight, mask, kernel.half), mask))
    groups, quads = len(rows) // LANES, rows.shape[1] // 4
    rows, columns = (a.reshape(groups, LANES, quads, 4) for a in (rows, columns))
    first = np.argsort(~columns, axis=3, kind="stable")[..., :n]
    values = np.take_along_axis(rows, first, 3).transpose(0, 2, 3, 1)
    two_bits = first.transpose(0, 2, 3, 1).reshape(groups, quads * n // 16, 16, LANES).astype(np.uint32)
    words = (two_bits << (2 * np.arange(16, dtype=np.uint32))[:, None]).sum(2, np.uint32)
    cost = np.full(groups, float(quads * n * (LANES * values.itemsize + 4)))
    return _Layout({"values": _placed(values), "indices": _placed(words)}, cost)


# How the slots of a block of columns are packed; the same in native/gemv.cpp.
_SINGLE = 12


def _bits_for(block: int) -> int:
    return 5 if block == 32 else 6


def _per_word(block: int) -> int:
    return 32 // _bits_for(block)


def _together(slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Blocks that share index words."""
    return np.where(slots >= 4, 1, np.where(slots >= 2, 2, 4))


def _words_for(slots: NDArray[np.int64], block: int) -> NDArray[np.int64]:
    return -(-_together(slots) * slots // _per_word(block))


def _values_for(slots: NDArray[np.int64], half: bool) -> NDArray[np.int64]:
    count = _together(slots) * slots
    return (count + 1) // 2 * 2 if half else count


def _slot_numbers(block: int) -> NDArray[np.int64]:
    """All numbers of slots that the kernel knows for a block."""
    per = _per_word(block)
    return np.concatenate([np.arange(_SINGLE + 1), np.arange(_SINGLE // per * per + per, block + per, per)])


def _slots(mask: Mask, kernel: Kernel) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return for "select": the rows by lane (-1: none), the slots of each group and the bytes that it costs."""
    rows, columns = mask.shape
    groups, block = _groups(rows), kernel.block
    # Rows with about as many weights share a group, so that few slots stay empty.
    counts = np.zeros(groups * LANES, np.int64)
    counts[:rows] = mask.sum(1)
    order = np.argsort(counts, kind="stable")
    in_block = np.zeros((groups * LANES, -(-columns // block)), np.int64)
    in_block[:rows] = _blocks(mask, block).sum(2)
    in_block = in_block[order].reshape(groups, LANES * in_block.shape[1])
    seen = np.zeros((groups, block + 1), np.int64)
    np.add.at(seen, (np.arange(groups)[:, None], in_block), 1)
    numbers = _slot_numbers(block)
    left = seen @ np.maximum(np.arange(block + 1)[:, None] - numbers, 0)
    steps = -(-columns // (_together(numbers) * block))
    size = 2 if kernel.half else 4
    slot_bytes = steps * LANES * (_values_for(numbers, kernel.half) * size + _words_for(numbers, block) * 4)
    cost = slot_bytes + _REST_BYTES * left
    best = cost.argmin(1)
    order[order >= rows] = -1
    return order, numbers[best], np.take_along_axis(cost, best[:, None], 1)[:, 0] + 8.0 * LANES


def _select(weight: Array, mask: Mask, kernel: Kernel, index: np.dtype[Any]) -> _Layout:
    rows, columns = weight.shape
    block, half, bits, per = kernel.block, kernel.half, _bits_for(kernel.block), _per_word(kernel.block)
    order, slots, cost = _slots(mask, kernel)
    groups, blocks = len(slots), -(-columns // block)
    together, words_for, values_for = _together(slots), _words_for(slots, block), _values_for(slots, half)
    steps = -(-columns // (together * block))
    starts, words_at = _starts(steps * values_for, groups), _starts(steps * words_for, groups)

    lane_of = np.zeros(rows, np.int64)
    lane_of[order[order >= 0]] = np.flatnonzero(order >= 0)
    row, column = np.nonzero(mask)
    value = _stored(weight[mask], half)
    key = row * blocks + column // block
    sizes = np.bincount(key, minlength=rows * blocks)
    rank = np.arange(len(key)) - (np.cumsum(sizes) - sizes)[key]
    lane = lane_of[row]
    group = lane // LANES
    fits = rank < slots[group]

    g, l, number = group[fits], lane[fits] % LANES, column[fits] // block
    i = number % together[g] * slots[g] + rank[fits]
    step = number // together[g]
    values = _zeros(int(starts[-1]) * LANES, value.dtype)
    place = (starts[g] + step * values_for[g]) * LANES
    values[place + (i // 2 * 2 * LANES + 2 * l + i % 2 if half else i * LANES + l)] = value[fits]
    words = _zeros(int(words_at[-1]) * LANES, np.uint32)
    place = (words_at[g] + step * words_for[g] + i // per) * LANES + l
    local = (column[fits] % block).astype(np.uint32)
    for turn in range(per):  # no two weights of one turn are in the same word
        now = i % per == turn
        words[place[now]] |= local[now] << np.uint32(bits * turn)

    by_lane = np.flatnonzero(~fits)
    by_lane = by_lane[np.argsort(lane[by_lane], kind="stable")]
    rest = np.bincount(lane[by_lane], minlength=groups * LANES)
    arrays: dict[str, NDArray[Any]] = {
        "starts": starts,
        "words": words_at,
        "slots": slots.astype(np.int32),
        "values": values,
        "indices": words,
        "rest_starts": _starts(rest, groups * LANES),
        "rest_values": _placed(value[by_lane]),
        "rest_columns": _placed(column[by_lane].astype(index)),
    }
    in_order = bool((order[:rows] == np.arange(rows)).all())
    return _Layout(arrays, cost, None if in_order else order.astype(np.int32))


_LAYOUTS: dict[str, Callable[[Array, Mask, Kernel, np.dtype[Any]], _Layout]] = {
    "csr": _csr,
    "select": _select,
    "columns16": _columns16,
    "row16": _row16,
    "nm": _nm,
    "bitmask": _bitmask,
    "dense": _dense,
}


def _chunks(cost: NDArray[np.float64]) -> NDArray[np.int32]:
    """Return the bounds, in groups, of tasks that cost about the same."""
    if not len(cost):
        return np.zeros(1, np.int32)
    total = np.concatenate([[0.0], np.cumsum(cost)])
    count = int(min(len(cost), _MOST_TASKS, max(1, total[-1] // _TASK_BYTES)))
    bounds = np.searchsorted(total, np.linspace(0, total[-1], count + 1)).astype(np.int32)
    bounds[0], bounds[-1] = 0, len(cost)
    return np.maximum.accumulate(bounds)
