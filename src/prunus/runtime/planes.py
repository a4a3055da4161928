"""How activations lie in memory: padded planes with positions, or 16 images, in the vector lanes. Needs no torch.

With `lanes` 1 a plane is an image with zeros around it; the vectors run along its rows, and over the zeros between
them, so that a window's taps are plain offsets. With `lanes` 16 a pixel is a vector of 16 images; nothing is ever
masked. Zeros to the right of a row are those to the left of the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VECTOR = 16  # floats in the vectors that all tables count in
SLACK = 4096  # bytes around a buffer that whole vectors may touch
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)


@dataclass(frozen=True)
class Geometry:
    """Layout of one image-like value.

    Attributes:
        channels, height, width: of an image.
        images: planes sets: images, or groups of 16 of them.
        lanes: 1 or 16.
        top, left: rows of zeros above (and below), columns of zeros between rows.
        pitch: pixels from row to row, at least width + left.
        origin: pixels before position (0, 0), such that it is aligned to a vector.
        plane: pixels of a plane.
    """

    channels: int
    height: int
    width: int
    images: int
    lanes: int
    top: int
    left: int
    pitch: int
    origin: int
    plane: int

    @classmethod
    def make(
        cls,
        channels: int,
        height: int,
        width: int,
        *,
        images: int,
        lanes: int = 1,
        top: int = 0,
        left: int = 0,
        bottom: int | None = None,
        pitch: int | None = None,
    ) -> Geometry:
        """Choose pitch, origin and plane; `bottom` rows of zeros below are as many as above unless said."""
        pitch = width + left if pitch is None else pitch
        bottom = top if bottom is None else bottom
        before = top * pitch + left
        align = VECTOR if lanes == 1 else 1
        lead = -before % align
        origin = lead + before
        plane = origin + (height + bottom) * pitch + left
        plane = -(-plane // align) * align
        # Planes a multiple of 4 KiB apart would fall on the same lines of the first-level cache.
        if plane * 4 * lanes % 4096 < 64:
            plane += align
        return cls(channels, height, width, images, lanes, top, left, pitch, origin, plane)

    @property
    def pixel(self) -> int:
        """Bytes of a pixel."""
        return 4 * self.lanes

    @property
    def plane_bytes(self) -> int:
        """Bytes of a plane."""
        return self.plane * self.pixel

    @property
    def image_bytes(self) -> int:
        """Bytes of all channels of an image (or of 16)."""
        return self.plane_bytes * self.channels

    @property
    def bytes(self) -> int:
        """Bytes of the whole value."""
        return self.image_bytes * self.images

    def at(self, row: int, column: int) -> int:
        """Return the byte offset of a position within a plane; zeros around are at negative ones."""
        return (self.origin + row * self.pitch + column) * self.pixel


@dataclass(frozen=True)
class Tiles:
    """Positions of a plane cut into runs of vectors.

    Attributes:
        widths: vectors of each tile, int32.
        x, y: byte offsets of each tile in the read and the written plane, from their origins, int64.
        masks: (tiles, 16) uint16, lanes of each vector that may be written, or None for all.
    """

    widths: NDArray[np.int32]
    x: NDArray[np.int64]
    y: NDArray[np.int64]
    masks: NDArray[np.uint16] | None


def split(vectors: int, most: int) -> list[int]:
    """Return the widths of tiles of at most `most` vectors that are as even as the kernels' widths allow."""
    allowed = [w for w in WIDTHS if w <= most]
    count = -(-vectors // allowed[-1])
    result: list[int] = []
    left = vectors
    while left > 0:
        want = -(-left // max(1, count - len(result)))
        width = next((w for w in allowed if w >= want), allowed[-1])
        if width > left:
            width = max(w for w in allowed if w <= left)
        result.append(width)
        left -= width
    return result


def tiles(read: Geometry, written: Geometry, most: int) -> Tiles:
    """Cut the positions of `written` into tiles; `read` has its (phase's) position (i, j) at the same place.

    If both have one pitch, a tile may run over the zeros between rows, which the masks then protect; otherwise every
    row starts anew.
    """
    height, width = written.height, written.width
    pixel = written.pixel
    if written.lanes == VECTOR:
        parts = split(width, most)
        starts = np.concatenate([[0], np.cumsum(parts)[:-1]]).astype(np.int64)
        rows = np.arange(height, dtype=np.int64)
        x = (rows[:, None] * read.pitch + starts) * pixel
        y = (rows[:, None] * written.pitch + starts) * pixel
        return Tiles(np.tile(np.array(parts, np.int32), height), x.ravel(), y.ravel(), None)
    one_run = read.pitch == written.pitch and (written.pitch != width or width % VECTOR)
    if one_run:
        last = (height - 1) * written.pitch + width
        parts = split(-(-last // VECTOR), most)
        starts = np.concatenate([[0], np.cumsum(parts)[:-1]]).astype(np.int64) * VECTOR
        masks = _masks(starts, parts, lambda p: (p % written.pitch < width) & (p < last))
        offsets = starts * pixel
        return Tiles(np.array(parts, np.int32), offsets, offsets.copy(), masks)
    parts = split(-(-width // VECTOR), most)
    starts = np.concatenate([[0], np.cumsum(parts)[:-1]]).astype(np.int64) * VECTOR
    rows = np.arange(height, dtype=np.int64)
    x = (rows[:, None] * read.pitch + starts) * pixel
    y = (rows[:, None] * written.pitch + starts) * pixel
    edge = np.tile(_masks(starts, parts, lambda p: p < width), (height, 1)) if width % VECTOR else None
    return Tiles(np.tile(np.array(parts, np.int32), height), x.ravel(), y.ravel(), edge)


def _masks(starts: NDArray[np.int64], parts: list[int], inside: object) -> NDArray[np.uint16]:
    masks = np.zeros((len(parts), 16), np.uint16)
    weights = 1 << np.arange(VECTOR, dtype=np.int64)
    for number, (start, count) in enumerate(zip(starts, parts, strict=True)):
        position = start + np.arange(count * VECTOR)
        bits = inside(position).reshape(count, VECTOR)  # type: ignore[operator]
        masks[number, :count] = (bits * weights).sum(1)
    return masks
