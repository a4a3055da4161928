"""A network, a batch size and shapes become one native program: layouts, memory, weight streams. Needs no torch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.runtime.library import Memory, Program
from prunus.runtime.network import Layer, Network, Shape
from prunus.runtime.planes import SLACK, VECTOR, Geometry, Tiles, split, tiles
from prunus.runtime.records import ACTIVATIONS, Copy, Gemv, Mean, Pointwise, Record, Stream, Transpose, Window
from prunus.runtime.streams import Streams
from prunus.runtime.tune import Tuner

Array = NDArray[np.float32]
Patch = tuple[Record, str, int]  # the field of a record that points into an input or output, and the byte offset there


@dataclass
class Place:
    """Where a value lies.

    Attributes:
        geometry: of an image-like value; rows (features, or images of one pixel) have planes of one pixel.
        memory, offset: its bytes.
        users: layers still to read it, and outputs.
    """

    geometry: Geometry
    memory: Memory
    offset: int
    users: int = 0

    @property
    def address(self) -> int:
        """Address of its first byte."""
        return int(self.memory.address or 0) + self.offset

    def rows(self, count: int, features: int) -> Array:
        """Return a value of rows as an array (count, features)."""
        return self.memory.array(self.offset, (count, features))

    @property
    def start(self) -> int:
        """Address of position (0, 0) of its first plane."""
        return self.address + self.geometry.at(0, 0)


@dataclass
class Built:
    """A program for one batch size.

    Attributes:
        program: its steps.
        inputs, outputs: per array the fields that point into it.
        shapes: of the outputs, with batch.
        steps: label of the layer that each step belongs to.
        choices: what was chosen per layer label, for reports.
    """

    program: Program
    inputs: list[list[Patch]]
    outputs: list[list[Patch]]
    shapes: list[Shape]
    steps: list[str]
    choices: dict[str, str]
    keep: list[Any] = field(default_factory=list)

    def run(self, inputs: Sequence[Array], threads: int = 1, outputs: Sequence[Array] | None = None) -> list[Array]:
        """Return the outputs for C-contiguous float32 arrays; written into `outputs` if these are given.

        Not for two threads at once: they would share the memory in between.
        """
        outputs = [np.empty(shape, np.float32) for shape in self.shapes] if outputs is None else outputs
        self.feed([a.ctypes.data for a in inputs], [a.ctypes.data for a in outputs])
        self.program.run(threads)
        return list(outputs)

    def timed(self, inputs: Sequence[Array], threads: int = 1, rounds: int = 3) -> NDArray[np.float64]:
        """Return the seconds that each step took, the fastest of some rounds."""
        outputs = [np.empty(shape, np.float32) for shape in self.shapes]
        self.feed([a.ctypes.data for a in inputs], [a.ctypes.data for a in outputs])
        return np.min([self.program.timed(threads) for _ in range(rounds)], axis=0)  # type: ignore[no-any-return]

    def feed(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Let the program read from and write to these addresses."""
        for address, patches in zip((*inputs, *outputs), (*self.inputs, *self.outputs), strict=True):
            for record, name, offset in patches:
                setattr(record, name, address + offset)


def build(
    network: Network,
    shapes: Sequence[Shape],
    batch: int,
    *,
    lanes: int = 1,
    tuner: Tuner | None = None,
) -> Built:
    """Return the program of a network.

    Args:
        network: what to compute.
        shapes: of the inputs, without batch.
        batch: images or rows, at least 1.
        lanes: 1 for vectors along positions, 16 for vectors of 16 images.
        tuner: picks kernels; without one a rule of thumb does.

    Raises:
        InvalidValue: the shapes do not fit the network.
    """
    return _Builder(network, shapes, batch, lanes, tuner or Tuner()).build()


class _Builder:
    def __init__(self, network: Network, shapes: Sequence[Shape], batch: int, lanes: int, tuner: Tuner) -> None:
        self.network, self.batch, self.lanes, self.tuner = network, batch, lanes, tuner
        self.shapes = network.shapes(shapes)
        self.images = batch if lanes == 1 else -(-batch // VECTOR)
        self.margins = self._margins()
        self.places: dict[str, Place] = {}
        self.free: dict[tuple[Any, ...], list[Place]] = {}
        self.spare: dict[tuple[Any, ...], list[Memory]] = {}
        self.temporary: list[tuple[tuple[Any, ...], Memory]] = []
        self.released: list[Place] = []
        self.handed_on: set[str] = set()
        self.head_reads: set[str] = set()  # by the first of the joined layers, around the positions it writes, too
        self.records: list[Record] = []
        self.labels: list[str] = []
        self.choices: dict[str, str] = {}
        self.keep: list[Any] = []
        self.inputs: list[list[Patch]] = []
        self.streams = Streams(self)
        self.users = Counter(name for layer in network.layers for name in layer.reads)
        self.users.update(network.outputs)

    def build(self) -> Built:
        last: Layer | None = None
        for layer in self.network.layers:
            if not self._joins(last, layer):
                self._forget()
                self.head_reads = set(layer.inputs)
            start = len(self.records)
            getattr(self, f"_{layer.op}")(layer)
            if self._joins(last, layer) and len(self.records) == start + 1:
                self._join(self.records[start - 1], self.records[start])
            for name in set(layer.reads):
                self._released(name, layer.reads.count(name))
            last = layer
        self._forget()
        outputs = [self._returned(name) for name in self.network.outputs]
        for patches, name in zip((*self.inputs, *outputs), (*self.network.inputs, *self.network.outputs), strict=True):
            self._without_copy(patches, self.places[name])
        program = Program(self.records, instruction_set=self.tuner.instruction_set)
        shapes = [(self.batch, *self.shapes[name]) for name in self.network.outputs]
        return Built(program, self.inputs, outputs, shapes, self.labels, self.choices, self.keep)

    # -- memory ------------------------------------------------------------------------------------------------------

    def _margins(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Return rows and columns of zeros around values of each size, alike so that windows are plain offsets."""
        margins: dict[tuple[int, int], tuple[int, int]] = {}
        for layer in self.network.layers:
            if layer.op == "convolution" or layer.op == "average_pool":
                size = self.shapes[layer.inputs[0]][1:]
                if tuple(layer.options["stride"]) == (1, 1):
                    top, left = margins.get(size, (0, 0))  # type: ignore[arg-type]
                    down, right = layer.options["padding"]
                    margins[size] = (max(top, down), max(left, right))  # type: ignore[index]
        return margins

    def geometry(self, name: str) -> Geometry:
        """Return the layout of a value."""
        shape = self.shapes[name]
        return self.geometry_of(shape)

    def geometry_of(self, shape: Shape) -> Geometry:
        if len(shape) == 1 or shape[1:] == (1, 1):
            return Geometry(shape[0], 1, 1, self.images, self.lanes, 0, 0, 1, 0, 1)
        top, left = self.margins.get(shape[1:], (0, 0))  # type: ignore[arg-type]
        return Geometry.make(*shape, images=self.images, lanes=self.lanes, top=top, left=left)  # type: ignore[misc]

    def allocate(self, geometry: Geometry, *, fresh: bool = False) -> Place:
        """Return memory for a value, unused so far if `fresh`; what lies around the positions is zero and stays so."""
        key = (geometry.lanes, geometry.pitch, geometry.origin, geometry.plane, geometry.height, geometry.width)
        fitting = [p for p in self.free.get(key, ()) if p.geometry.bytes >= geometry.bytes]
        if fitting and not fresh:
            best = min(fitting, key=lambda p: p.geometry.bytes)
            self.free[key].remove(best)
            return Place(geometry, best.memory, best.offset)
        memory = Memory(geometry.bytes + 2 * SLACK)
        self.keep.append(memory)
        return Place(geometry, memory, SLACK)

    def scratch(self, size: int, use: tuple[Any, ...]) -> Memory:
        """Return memory that only the current layer uses; later layers with the same `use` may get it again.

        What one of them never writes is zero, if all of the same `use` write the same places.
        """
        fitting = [m for m in self.spare.get(use, ()) if m.size >= size]
        if fitting:
            found = min(fitting, key=lambda m: m.size)
            self.spare[use].remove(found)
        else:
            found = Memory(size)
            self.keep.append(found)
        self.temporary.append((use, found))
        return found

    def _released(self, name: str, times: int) -> None:
        self.users[name] -= times
        if self.users[name] == 0 and name not in self.handed_on:
            self.released.append(self.places[name])

    def _forget(self) -> None:
        """Let later layers have the memory that joined ones have done with: their tasks may still be reading it."""
        for place in self.released:
            g = place.geometry
            self.free.setdefault((g.lanes, g.pitch, g.origin, g.plane, g.height, g.width), []).append(place)
        self.released = []

    def made(self, layer: Layer, *, over_residual: bool = False) -> Place:
        """Allocate the value that a layer makes; over its residual if nobody else needs that and it is allowed."""
        residual = layer.residual
        wanted = residual is None or residual in layer.inputs or residual in self.head_reads
        if layer.name in self.network.outputs:
            # Memory of its own, which may then be replaced by the caller's.
            place = self.places[layer.name] = self.allocate(self.geometry(layer.name), fresh=True)
        elif over_residual and residual is not None and not wanted and self.users[residual] == 1:
            self.handed_on.add(residual)
            place = self.places[layer.name] = self.places[residual]
        else:
            place = self.places[layer.name] = self.allocate(self.geometry(layer.name))
        return place

    # -- joining -----------------------------------------------------------------------------------------------------

    def _joins(self, last: Layer | None, layer: Layer) -> bool:
        """Whether a layer looks only at the positions that it writes, as its predecessor wrote or may have read them.

        Its tiles may then run right after those of the layer before, while their values are in the cache.
        """
        if last is None or last.op != "convolution" or layer.op != "convolution" or layer.weight is None:
            return False
        o = layer.options
        alone = layer.weight.shape[2:] == (1, 1) and o["stride"] == (1, 1) and o["padding"] == (0, 0)
        size = self.shapes[layer.name][1:]
        return alone and size == self.shapes[last.name][1:] and size != (1, 1)

    @staticmethod
    def _join(last: Record, record: Record) -> None:
        if not (isinstance(last, Stream) and isinstance(record, Stream)) or last.chunks != 1 or record.chunks != 1:
            return
        # Both must cut the positions alike: x of this one lies where y of the last one does.
        last.joined = last.tiles == record.tiles and all(
            np.array_equal(a, b) for a, b in ((last.widths_, record.widths_), (last.positions_, record.positions_))
        )

    def add(self, layer: Layer, record: Record) -> None:
        """Append a step."""
        self.records.append(record)
        self.labels.append(layer.label or layer.name)

    def done(self) -> None:
        """Let later layers use the temporary memory of this one."""
        for use, memory in self.temporary:
            self.spare.setdefault(use, []).append(memory)
        self.temporary = []

    # -- in and out --------------------------------------------------------------------------------------------------

    def _input(self, layer: Layer) -> None:
        place = self.made(layer)
        self.handed_on.add(layer.name)  # to nobody: it may be read where the caller has it
        shape = self.shapes[layer.name]
        self.inputs.append(self._moved(layer, place, shape, reading=True))

    def _returned(self, name: str) -> list[Patch]:
        layer = Layer("output", f"{name}:out", label="output")
        return self._moved(layer, self.places[name], self.shapes[name], reading=False)

    def _moved(self, layer: Layer, place: Place, shape: Shape, *, reading: bool) -> list[Patch]:
        """Add copies between a plain array and planes; return each with its offset into the array."""
        channels, height, width = (*shape, 1, 1)[:3]
        g = place.geometry
        size = channels * height * width * 4
        found: list[Patch] = []
        if g.plane == 1:
            return self._rows_moved(layer, place, channels, reading=reading)
        if self.lanes == 1:
            plain = {"plane": height * width * 4, "row": width * 4, "step": 4}
            planes = {"plane": g.plane_bytes, "row": g.pitch * 4, "step": 4}
            record: Record = Copy(planes=self.batch * channels, rows=height, columns=width, lanes=1)
            for name, value in plain.items():
                record.put(f"{'x' if reading else 'y'}_{name}", value)
            for name, value in planes.items():
                record.put(f"{'y' if reading else 'x'}_{name}", value)
            record.put("y" if reading else "x", place.start)
            self.add(layer, record)
            return [(record, "x" if reading else "y", 0)]
        for group in range(self.images):
            images = min(VECTOR, self.batch - group * VECTOR)
            start = place.start + group * g.image_bytes
            record = Transpose(outer=channels, inner=height)
            here, there = ("x", "y") if reading else ("y", "x")
            record.put("rows", images if reading else width)
            record.put("columns", width if reading else images)
            record.put(f"{here}_outer", height * width * 4)
            record.put(f"{here}_inner", width * 4)
            record.put(f"{here}_row", size)
            record.put(f"{there}_outer", g.plane_bytes)
            record.put(f"{there}_inner", g.pitch * 64)
            record.put(f"{there}_row", 64)
            record.put(there, start)
            self.add(layer, record)
            found.append((record, here, group * VECTOR * size))
        return found

    def _rows_moved(self, layer: Layer, place: Place, features: int, *, reading: bool) -> list[Patch]:
        """The same for rows of features."""
        here, there = ("x", "y") if reading else ("y", "x")
        row = features * 4
        if self.lanes == 1:
            record: Record = Copy(planes=self.batch, rows=1, columns=features, lanes=1)
            for side in "xy":
                record.put(f"{side}_plane", row)
                record.put(f"{side}_step", 4)
            record.put(there, place.start)
            self.add(layer, record)
            return [(record, "x" if reading else "y", 0)]
        found: list[Patch] = []
        for group in range(self.images):
            images = min(VECTOR, self.batch - group * VECTOR)
            record = Transpose(outer=1, inner=1)
            record.put("rows", images if reading else features)
            record.put("columns", features if reading else images)
            record.put(f"{here}_row", row)
            record.put(f"{there}_row", 64)
            record.put(there, place.start + group * features * 64)
            self.add(layer, record)
            found.append((record, here, group * VECTOR * row))
        return found

    def _without_copy(self, patches: list[Patch], place: Place) -> None:
        """Let steps that touch only what they are told to read or write an array in place, without the copy of it."""
        copy = patches[0][0]
        if len(patches) > 1 or not isinstance(copy, Copy) or place.geometry.plane != 1 or self.lanes != 1:
            return
        end = place.start + place.geometry.bytes
        found: list[Patch] = []
        for record in self.records:
            for name in ("x", "y", "a", "b", "residual"):
                address = getattr(record, name, None)
                if record is not copy and address is not None and place.start <= address < end:
                    if not isinstance(record, Transpose | Gemv):
                        return
                    found.append((record, name, address - place.start))
        if found:
            number = self.records.index(copy)
            del self.records[number], self.labels[number]
            patches[:] = found

    # -- layers of weights -------------------------------------------------------------------------------------------

    def _convolution(self, layer: Layer) -> None:
        self.streams.convolution(layer)

    def _linear(self, layer: Layer) -> None:
        self.streams.linear(layer)

    # -- windows and arithmetic --------------------------------------------------------------------------------------

    def _max_pool(self, layer: Layer) -> None:
        self._pooled(layer, largest=True)

    def _average_pool(self, layer: Layer) -> None:
        self._pooled(layer, largest=False)

    def _pooled(self, layer: Layer, *, largest: bool) -> None:
        x, y = self.places[layer.inputs[0]], self.made(layer)
        o = layer.options
        kernel = o["kernel"]
        edged = largest and any(o["padding"])
        copy = edged or x.geometry.plane == 1  # images of one pixel have no zeros around them
        view = window_view(self, layer, x, y.geometry, kernel, fill=-math.inf if edged else 0.0, copy=copy)
        cut = tiles(view.geometry, y.geometry, 8)
        record = Window(
            planes=self.images * y.geometry.channels,
            taps=len(view.offsets),
            largest=int(largest),
            scale=1.0 / (kernel[0] * kernel[1]),
            tiles=len(cut.widths),
            offsets=view.offsets,
            x_plane=view.channel_bytes,
            y_plane=y.geometry.plane_bytes,
            x=view.address,
            y=y.start,
        )
        put_tiles(record, cut)
        self.add(layer, record)
        self.done()

    def _mean(self, layer: Layer) -> None:
        x, y = self.places[layer.inputs[0]], self.made(layer)
        g = x.geometry
        record = Mean(
            planes=self.images * g.channels,
            rows=g.height,
            columns=g.width,
            x_plane=g.plane_bytes,
            x_row=g.pitch * g.pixel,
            y_plane=y.geometry.plane_bytes,
            lanes=self.lanes,
            x=x.start,
            y=y.start,
        )
        self.add(layer, record)

    def _add(self, layer: Layer) -> None:
        self._pointwise(layer, 1)

    def _multiply(self, layer: Layer) -> None:
        self._pointwise(layer, 2)

    def _activation(self, layer: Layer) -> None:
        self._pointwise(layer, 0)

    def _pointwise(self, layer: Layer, op: int) -> None:
        a = self.places[layer.inputs[0]]
        b = self.places[layer.inputs[1]] if op else None
        y = self.made(layer)
        g = y.geometry
        if g.plane == 1:
            # Values of one pixel are one long plane.
            whole = Geometry(1, 1, g.images * g.channels, 1, g.lanes, 0, 0, g.images * g.channels, 0, 1)
            cut = tiles(whole, whole, 8)
            planes, per_plane = 1, False
        else:
            cut = tiles(g, g, 8)
            planes = self.images * g.channels
            per_plane = b is not None and b.geometry.plane == 1
        record = Pointwise(
            planes=planes,
            op=op,
            activation=ACTIVATIONS.index(layer.activation),
            slope=layer.slope,
            per_plane=int(per_plane),
            lanes=self.lanes,
            a_plane=g.plane_bytes,
            b_plane=b.geometry.plane_bytes if b else 0,
            y_plane=g.plane_bytes,
            tiles=len(cut.widths),
            offsets=cut.y,
            a=a.start,
            b=b.start if b else None,
            y=y.start,
        )
        record.put("widths", cut.widths)
        if cut.masks is not None:
            record.put("masks", cut.masks)
        self.add(layer, record)

    def _concatenate(self, layer: Layer) -> None:
        y = self.made(layer)
        channel = 0
        for name in layer.inputs:
            x = self.places[name]
            g = x.geometry
            for image in range(self.images):
                # Whole planes, with the zeros around them, which are alike for all values of one size.
                record = Copy(
                    planes=g.channels,
                    rows=1,
                    columns=g.plane,
                    lanes=self.lanes,
                    x_plane=g.plane_bytes,
                    y_plane=g.plane_bytes,
                    x_step=g.pixel,
                    y_step=g.pixel,
                    x=x.address + image * g.image_bytes,
                    y=y.address + image * y.geometry.image_bytes + channel * g.plane_bytes,
                )
                self.add(layer, record)
            channel += g.channels

    def _flatten(self, layer: Layer) -> None:
        x, y = self.places[layer.inputs[0]], self.made(layer)
        g = x.geometry
        if g.plane == 1:
            step = g.channels * g.pixel
            record = Copy(planes=self.images, rows=1, columns=g.channels, lanes=self.lanes, x=x.start, y=y.start)
            for side in "xy":
                record.put(f"{side}_plane", step)
                record.put(f"{side}_step", g.pixel)
            self.add(layer, record)
            return
        pixels = g.height * g.width
        record = Copy(
            planes=self.images * g.channels,
            rows=g.height,
            columns=g.width,
            lanes=self.lanes,
            x_plane=g.plane_bytes,
            y_plane=pixels * g.pixel,
            x_row=g.pitch * g.pixel,
            y_row=g.width * g.pixel,
            x_step=g.pixel,
            y_step=g.pixel,
            x=x.start,
            y=y.start,
        )
        self.add(layer, record)


def put_tiles(record: Record, cut: Tiles) -> None:
    """Set the tables of tiles of a record."""
    record.put("widths", cut.widths)
    record.put("x_offsets", cut.x)
    record.put("y_offsets", cut.y)
    if cut.masks is not None:
        record.put("masks", cut.masks)


@dataclass
class View:
    """A value as a window's taps see it.

    Attributes:
        address: of tap 0 for output position (0, 0).
        geometry: pitch and pixel in which tiles move, as for `tiles`.
        offsets: byte offset of each tap from `address`.
        channel_bytes, image_bytes: between channels and images.
    """

    address: int
    geometry: Geometry
    offsets: NDArray[np.int64]
    channel_bytes: int
    image_bytes: int


def window_view(
    builder: Any, layer: Layer, x: Place, y: Geometry, kernel: Sequence[int], *, fill: float = 0.0, copy: bool = False
) -> View:
    """Make every tap of a window a plain byte offset, by copying the input apart into phases where it moves in strides.

    Args:
        builder: gives memory and takes the steps.
        layer: with stride, padding and dilation.
        x: what is read.
        y: geometry of what is written.
        kernel: rows and columns of taps.
        fill: what lies around the positions; anything but 0 needs a copy.
        copy: whether to copy although the stride is 1.
    """
    o = layer.options
    (sr, sc), (pr, pc), (dr, dc) = o["stride"], o["padding"], o["dilation"]
    g = x.geometry
    taps = list(itertools.product(range(kernel[0]), range(kernel[1])))
    if (sr, sc) == (1, 1) and not copy:
        offsets = [((r * dr - pr) * g.pitch + c * dc - pc) * g.pixel for r, c in taps]
        return View(x.start, g, np.array(offsets, np.int64), g.plane_bytes, g.image_bytes)
    # Phase (a, b) holds the positions (a + stride * i, b + stride * j); tap r reads it at row i + floor((r d - p) / s).
    rows = [((r * dr - pr) % sr, (r * dr - pr) // sr) for r in range(kernel[0])]
    columns = [((c * dc - pc) % sc, (c * dc - pc) // sc) for c in range(kernel[1])]
    top, left = max(0, *(-q for _, q in rows)), max(0, *(-q for _, q in columns))
    bottom, right = max(0, *(q for _, q in rows)), max(0, *(q for _, q in columns))
    # Zeros to the right of a row may be those to the left of the next, but what is read there may not.
    widest = max(min(-(-(g.width - b) // sc), y.width + right) for b, _ in columns)
    extra = max(0, widest - y.width)
    pitch = y.width + extra + max(left, right - extra)
    if y.pitch >= pitch:
        pitch = y.pitch  # tiles may then run over whole planes
    phases = sorted({(a, b) for a, _ in rows for b, _ in columns})
    phase = Geometry.make(
        g.channels * len(phases),
        y.height,
        y.width,
        images=g.images,
        lanes=g.lanes,
        top=top,
        bottom=bottom + 1,
        left=max(left, right),
        pitch=pitch,
    )
    if fill:
        held = Memory(phase.bytes + 2 * SLACK)
        held.array(0, (held.size // 4,))[:] = fill
        builder.keep.append(held)
    else:
        written = (phase.pitch, phase.origin, phase.plane, g.height, g.width, sr, sc, tuple(rows), tuple(columns))
        held = builder.scratch(phase.bytes + 2 * SLACK, written)
    split_ = Place(phase, held, SLACK)
    for number, (a, b) in enumerate(phases):
        last = max(q for p, q in rows if p == a)
        height = min(-(-(g.height - a) // sr), y.height + max(0, last))
        width = min(-(-(g.width - b) // sc), y.width + right)
        if height <= 0 or width <= 0:
            continue
        record = Copy(
            planes=g.images * g.channels,
            rows=height,
            columns=width,
            lanes=g.lanes,
            x_plane=g.plane_bytes,
            y_plane=phase.plane_bytes * len(phases),
            x_row=sr * g.pitch * g.pixel,
            y_row=phase.pitch * g.pixel,
            x_step=sc * g.pixel,
            y_step=g.pixel,
            x=x.start + (a * g.pitch + b) * g.pixel,
            y=split_.start + number * phase.plane_bytes,
        )
        builder.add(layer, record)
    offsets = [
        phases.index((a, b)) * phase.plane_bytes + (q * phase.pitch + u) * phase.pixel
        for (a, q), (b, u) in itertools.product(rows, columns)
    ]
    return View(
        split_.start,
        phase,
        np.array(offsets, np.int64),
        phase.plane_bytes * len(phases),
        phase.plane_bytes * len(phases) * g.channels,
    )


__all__ = ["Built", "Place", "View", "build", "put_tiles", "split", "window_view"]
