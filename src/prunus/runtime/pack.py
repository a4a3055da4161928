"""Weights as streams: what the multiply-add kernels read, one entry after the other. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.runtime.records import ROW

BLOCKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Packed:
    """A weight stream.

    Attributes:
        block: rows per group.
        groups: row groups.
        k_blocks: parts of the sum.
        rows: (k_blocks * groups,) of `records.ROW`: output group, first entry, end.
        entries: the stream, bytes.
        filled: entries times rows per entry: the multiply-adds per position that the kernel carries out.
    """

    block: int
    groups: int
    k_blocks: int
    rows: NDArray[Any]
    entries: NDArray[np.uint8]
    filled: int


def pack(
    rows: NDArray[np.int64],
    taps: NDArray[np.int64],
    values: NDArray[np.float32],
    offsets: NDArray[np.int64],
    part_of_tap: NDArray[np.int64],
    outputs: int,
    block: int,
) -> Packed:
    """Return the stream of a sparse matrix.

    Args:
        rows, taps, values: the kept weights: output row, input tap (index into `offsets`), value; any order.
        offsets: byte offset of every tap from a tile's start, int64 that fits int32.
        part_of_tap: k-block of every tap, ascending from 0.
        outputs: rows of the matrix, a multiple of `block`.
        block: rows per entry, of `BLOCKS`.
    """
    groups = outputs // block
    parts = int(part_of_tap.max(initial=0)) + 1
    part = part_of_tap[taps]
    group = rows // block
    key = (part * groups + group) * len(offsets) + taps
    order = np.argsort(key, kind="stable")
    key, rows, taps, values = key[order], rows[order], taps[order], values[order]
    if block == 1:
        return _pairs(key // len(offsets), offsets[taps], values, outputs, parts)
    fresh = np.ones(len(key), bool)
    fresh[1:] = key[1:] != key[:-1]
    number = np.cumsum(fresh) - 1
    first = np.flatnonzero(fresh)
    kind = np.dtype([("offset", "<i4"), ("w", "<f4", (block,))])
    entries = np.zeros(max(1, len(first)), kind)
    entries["offset"][: len(first)] = offsets[taps[first]]
    entries["w"][number, rows % block] = values
    counts = np.bincount(key[first] // len(offsets), minlength=parts * groups)
    return Packed(block, groups, parts, _rows(counts, groups, parts), entries.view(np.uint8), len(first) * block)


def _pairs(
    row: NDArray[np.int64], offsets: NDArray[np.int64], values: NDArray[np.float32], outputs: int, parts: int
) -> Packed:
    """Two weights per entry; `row` is (part, output row), sorted."""
    counts = np.bincount(row, minlength=parts * outputs)
    pairs = (counts + 1) // 2
    first = np.cumsum(counts) - counts
    start = np.cumsum(pairs) - pairs
    rank = np.arange(len(row)) - first[row]
    kind = np.dtype([("o", "<i4", (2,)), ("w", "<f4", (2,))])
    entries = np.zeros(max(1, int(pairs.sum())), kind)
    place = start[row] + rank // 2
    entries["o"][place, rank % 2] = offsets
    entries["w"][place, rank % 2] = values
    odd = np.flatnonzero(counts % 2)
    last = start[odd] + pairs[odd] - 1
    # A weight without a partner is its own, by halves: zero times infinity would be no number.
    entries["o"][last, 1] = entries["o"][last, 0]
    entries["w"][last] = entries["w"][last, :1] / 2
    return Packed(1, outputs, parts, _rows(pairs, outputs, parts), entries.view(np.uint8), 2 * int(pairs.sum()))


def _rows(counts: NDArray[np.int64], groups: int, parts: int) -> NDArray[Any]:
    rows = np.zeros(parts * groups, ROW)
    end = np.cumsum(counts)
    rows["group"] = np.tile(np.arange(groups), parts)
    rows["begin"], rows["end"] = end - counts, end
    return rows


def filling(weight: NDArray[np.float32], block: int) -> float:
    """Return the share of a (rows, columns) matrix that is kept when whole columns of `block` rows are."""
    rows, columns = weight.shape
    if rows % block:
        return 1.0
    return float((weight.reshape(rows // block, block, columns) != 0).any(1).mean()) if weight.size else 0.0


def chunks_of(packed: Packed, count: int) -> NDArray[np.int32]:
    """Return the bounds of `count` chunks of row groups with about as many entries each, shape (count + 1,)."""
    cost = np.zeros(packed.groups)
    for part in np.split(packed.rows, packed.k_blocks):
        cost += part["end"] - part["begin"] + 3  # a row costs something by itself
    total = np.concatenate([[0.0], np.cumsum(cost)])
    bounds = np.searchsorted(total, np.linspace(0, total[-1], count + 1)).astype(np.int32)
    bounds[0], bounds[-1] = 0, packed.groups
    return np.maximum.accumulate(bounds)
