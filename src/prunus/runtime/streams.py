"""Convolutions and linear layers as weight streams: which blocks, tiles and cache blocks, and the tables they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.errors import InvalidValue
from prunus.runtime import gemv
from prunus.runtime.network import Layer
from prunus.runtime.pack import BLOCKS, Packed, chunks_of, filling, pack
from prunus.runtime.planes import VECTOR, WIDTHS, Geometry, Tiles, split, tiles
from prunus.runtime.records import ACTIVATIONS, Pointwise, Record, Stream, Transpose

# Bytes of inputs that a k-block may touch so that they stay in the first-level cache.
_CACHE = 24_000
# Up to so many rows a linear layer may go over them one by one instead of putting them into the lanes.
_ROWS = 8


class Streams:
    """Adds layers with weights to a program under construction."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    # -- convolutions ------------------------------------------------------------------------------------------------

    def convolution(self, layer: Layer) -> None:
        """Add a convolution; of images of one pixel it is a linear layer."""
        from prunus.runtime.build import window_view

        b = self.builder
        weight = layer.weight
        assert weight is not None
        x = b.places[layer.inputs[0]]
        one_pixel = x.geometry.plane == 1
        if one_pixel and b.shapes[layer.name][1:] == (1, 1):
            self.linear(layer, _of_one_pixel(layer))
            return
        y = b.made(layer, over_residual=True)
        out, per_group, *kernel = weight.shape
        groups = layer.options["groups"]
        view = window_view(b, layer, x, y.geometry, kernel, copy=one_pixel)  # which has no zeros around it
        count = kernel[0] * kernel[1]
        row, channel, r, c = (i.astype(np.int64) for i in np.nonzero(weight))
        values = weight[row, channel, r, c]
        channel += row // (out // groups) * per_group
        taps = channel * count + r * kernel[1] + c
        channels = per_group * groups
        offsets = (np.arange(channels)[:, None] * view.channel_bytes + view.offsets).ravel()
        if abs(offsets).max(initial=0) >= 2**31:
            raise InvalidValue(f"{layer.label or layer.name}: images of this size do not fit the engine's offsets.")
        # All layers that write images of one size use one width, so that they can be joined tile by tile.
        width = width_for(view.geometry, y.geometry)
        positions = int(tiles(view.geometry, y.geometry, width).widths.sum()) * b.images

        def make(candidate: tuple[Any, ...]) -> list[Record]:
            block, width, cache = candidate
            cut = tiles(view.geometry, y.geometry, width)
            # A k-block's inputs: per channel and row of taps the tile, and the lines that its taps reach into.
            each = kernel[0] * (int(cut.widths.max()) * 64 + (64 * kernel[1] if count > 1 else 0))
            inner = channels if not cache or groups > 1 else max(1, min(channels, cache // each))
            inner = -(-channels // -(-channels // inner))
            part = (np.arange(channels) // inner).repeat(count)
            packed = pack(row, taps, values, offsets, part, out, block)
            repeated = _for_images(cut, b.images, view.image_bytes, y.geometry.image_bytes)
            record = self._record(layer, packed, repeated)
            record.widths_, record.positions_ = cut.widths, cut.y // y.geometry.pixel
            record.put("y_channel", y.geometry.plane_bytes)
            record.put("x", view.address)
            record.put("y", y.start)
            record.put("residual", b.places[layer.residual].start if layer.residual else None)
            return [record]

        form = f"{kernel}s{layer.options['stride']}g{groups}"
        self._picked(layer, weight.reshape(out, -1), positions, make, form, widths=(width,))
        b.done()

    # -- linear layers -----------------------------------------------------------------------------------------------

    def linear(self, layer: Layer, weight: NDArray[np.float32] | None = None) -> None:
        """Add a linear layer over rows of features; images, or rows, lie in the lanes."""
        b = self.builder
        weight = layer.weight if weight is None else weight
        assert weight is not None
        out, inputs = weight.shape
        x, y = b.places[layer.inputs[0]], b.made(layer)
        row, tap = (i.astype(np.int64) for i in np.nonzero(weight))
        values = weight[row, tap]
        vectors = b.images if b.lanes == VECTOR else -(-b.batch // VECTOR)
        if inputs * WIDTHS[-1] * 64 >= 2**31:
            raise InvalidValue(f"{layer.label or layer.name}: {inputs} inputs do not fit the engine's offsets.")

        def make(candidate: tuple[Any, ...]) -> list[Record]:
            if candidate[0] == "rows":
                return [self._by_rows(layer, weight, gemv.Kernel(candidate[1], block=candidate[2]), x, y)]
            block, width, cache = candidate
            step = width * 64
            count = -(-vectors // width)
            inner = inputs if not cache else max(1, min(inputs, cache // step))
            inner = -(-inputs // -(-inputs // inner))
            packed = pack(row, tap, values, np.arange(inputs) * step, np.arange(inputs) // inner, out, block)
            numbers = np.arange(count, dtype=np.int64)
            cut = Tiles(np.full(count, width, np.int32), numbers * inputs * step, numbers * out * step, None)
            stream = self._record(layer, packed, cut)
            stream.put("y_channel", step)
            if b.lanes == VECTOR:
                stream.put("x", x.start)
                stream.put("y", y.start)
                stream.put("residual", b.places[layer.residual].start if layer.residual else None)
                return [stream]
            read = b.scratch(count * inputs * step, ("rows", inputs, width))
            written = b.scratch(count * out * step, ("rows", out, width))
            stream.put("x", read.address)
            stream.put("y", written.address)
            there = Transpose(
                outer=1, inner=1, rows=b.batch, columns=inputs, x_row=inputs * 4, y_row=step,
                y_tile=inputs * step, tile=width * VECTOR, x=x.start, y=read.address,
            )  # fmt: skip
            back = Transpose(
                outer=1, inner=1, rows=out, columns=b.batch, x_row=step, y_row=out * 4,
                x_tile=out * step, tile=width * VECTOR, x=written.address, y=y.start,
            )  # fmt: skip
            steps: list[Record] = [there, stream, back]
            if layer.residual:
                # The sum is taken where the rows lie, so the activation has to wait for it.
                stream.put("activation", 0)
                steps.append(self._residual(layer, y, b.places[layer.residual]))
            return steps

        by_rows: list[tuple[Any, ...]] = []
        if b.lanes == 1 and b.batch <= _ROWS and weight.size:
            kernels = gemv.candidates(weight, instruction_set=b.tuner.set_name)
            by_rows = [("rows", kernel.name, kernel.block) for kernel in kernels]
        # Groups of 16 images lie apart, so a tile holds one of them.
        self._picked(layer, weight, 1 if b.lanes == VECTOR else vectors, make, f"linear {b.batch} rows", by_rows)
        b.done()

    def _by_rows(self, layer: Layer, weight: NDArray[np.float32], kernel: gemv.Kernel, x: Any, y: Any) -> Record:
        """Return the record of a layer that goes over x row by row."""
        out, inputs = weight.shape
        batch = self.builder.batch
        residual = self.builder.places[layer.residual].rows(batch, out) if layer.residual else None
        return gemv.pack(weight, kernel).record(
            x.rows(batch, inputs),
            y.rows(batch, out),
            layer.bias,
            layer.activation,
            slope=layer.slope,
            residual=residual,
        )

    def _residual(self, layer: Layer, y: Any, residual: Any) -> Record:
        length = self.builder.batch * y.geometry.channels
        parts = split(-(-length // VECTOR), 14)
        offsets = np.concatenate([[0], np.cumsum(parts)[:-1]]).astype(np.int64) * 64
        return Pointwise(
            planes=1, op=1, activation=ACTIVATIONS.index(layer.activation), slope=layer.slope, lanes=1,
            tiles=len(parts), widths=np.array(parts, np.int32), offsets=offsets, a=y.start, b=residual.start, y=y.start,
        )  # fmt: skip

    # -- both --------------------------------------------------------------------------------------------------------

    def _record(self, layer: Layer, packed: Packed, cut: Tiles) -> Stream:
        b = self.builder
        chunks = 1 if len(cut.widths) >= 3 * b.tuner.threads else min(packed.groups, 4 * b.tuner.threads)
        chunks = chunks if b.tuner.threads > 1 else 1
        bias = np.zeros(packed.groups * packed.block, np.float32)
        if layer.bias is not None:
            bias[:] = layer.bias
        record = Stream(
            block=packed.block,
            groups=packed.groups,
            k_blocks=packed.k_blocks,
            activation=ACTIVATIONS.index(layer.activation),
            slope=layer.slope,
            tiles=len(cut.widths),
            chunks=chunks,
            rows=packed.rows,
            entries=packed.entries,
            bias=bias,
            widths=cut.widths,
            x_offsets=cut.x,
            y_offsets=cut.y,
            chunk=chunks_of(packed, chunks),
        )
        if cut.masks is not None:
            record.put("masks", cut.masks)
        return record

    def _picked(
        self,
        layer: Layer,
        weight: NDArray[np.float32],
        vectors: int,
        make: Callable[[tuple[Any, ...]], list[Record]],
        form: str,
        others: Sequence[tuple[Any, ...]] = (),
        widths: Sequence[int] = (),
    ) -> None:
        b = self.builder
        tuner = b.tuner
        fillings = {block: filling(weight, block) for block in BLOCKS if weight.shape[0] % block == 0}
        candidates = [*others, *_candidates(fillings, vectors, weight.shape[1], widths)]
        kept = " ".join(f"{block}:{fill:.2f}" for block, fill in fillings.items())
        key = f"{form} {weight.shape} {vectors} vectors of {b.lanes}, {tuner.threads} threads, {kept}"
        chosen, records = tuner.pick(key, candidates, make)
        for record in records:
            b.add(layer, record)
        block, width, cache = chosen
        b.choices[layer.label or layer.name] = f"{block}x1 blocks, {width} vectors" + (
            ", cache blocks" if cache else ""
        )


def _of_one_pixel(layer: Layer) -> NDArray[np.float32]:
    """Return the matrix of a convolution of images of one pixel."""
    weight, o = layer.weight, layer.options
    assert weight is not None
    out, per_group, *kernel = weight.shape
    place = [p // d for p, d in zip(o["padding"], o["dilation"], strict=True)]
    exact = all(p % d == 0 and p // d < k for p, d, k in zip(o["padding"], o["dilation"], kernel, strict=True))
    matrix = weight[:, :, place[0], place[1]] if exact else np.zeros((out, per_group), np.float32)
    groups = o["groups"]
    if groups == 1:
        return np.ascontiguousarray(matrix)
    spread = np.zeros((out, per_group * groups), np.float32)
    rows = np.arange(out)
    columns = (rows // (out // groups) * per_group)[:, None] + np.arange(per_group)
    spread[rows[:, None], columns] = matrix
    return spread


def _for_images(cut: Tiles, images: int, x_image: int, y_image: int) -> Tiles:
    """Repeat the tiles of one image for all."""
    if images == 1:
        return cut
    number = np.arange(images, dtype=np.int64)[:, None]
    masks = None if cut.masks is None else np.tile(cut.masks, (images, 1))
    return Tiles(
        np.tile(cut.widths, images),
        (number * x_image + cut.x).ravel(),
        (number * y_image + cut.y).ravel(),
        masks,
    )


def width_for(read: Geometry, written: Geometry) -> int:
    """Return the vectors per tile: enough to hide the latency of multiply-adds, few enough to fit, little waste."""
    run = tiles(read, written, 14)
    rows = written.height if len(run.x) % written.height == 0 and written.height > 1 and _rowwise(run, written) else 1
    whole = int(run.widths.sum()) // rows
    best, least = 1, math.inf
    for width in (8, 7, 6, 5, 4):
        parts = -(-whole // width)
        cost = (1 + 1.1 / width) * parts * min(width, whole) / whole
        if cost < least - 1e-9:
            best, least = min(width, whole), cost
    return best


def _rowwise(run: Tiles, written: Geometry) -> bool:
    """Whether every row of positions starts a tile of its own."""
    starts = np.arange(written.height) * written.pitch * written.pixel
    return bool(np.isin(starts, run.y).all())


def _candidates(
    fillings: dict[int, float], vectors: int, inputs: int, widths: Sequence[int] = ()
) -> list[tuple[Any, ...]]:
    """Return (block, vectors per tile, bytes per k-block) worth a try, the likeliest first."""
    # Loads and multiply-adds per position: single weights load for every product, blocks once for all rows.
    cost = {block: fill * (1.0 if block == 1 else 0.55 + 0.45 / block) for block, fill in fillings.items()}
    cheapest = min(cost.values())
    blocks = sorted((b for b in cost if cost[b] <= 1.5 * cheapest + 1e-9), key=lambda b: (cost[b], b))[:3]
    result: list[tuple[Any, ...]] = []
    for block in blocks:
        for width in widths or ((4, 6, 8, 12) if block == 1 else (3, 4, 6, 8) if block < 8 else (1, 2, 3, 4)):
            width = min(width, vectors)
            width = max(w for w in WIDTHS if w <= width)
            for cache in (_CACHE, 0) if inputs * width * 64 > _CACHE else (0,):
                if (block, width, cache) not in result:
                    result.append((block, width, cache))
    return result
