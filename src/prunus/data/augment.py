"""Augmentation of whole batches: pure functions of images and a generator, and names to build them from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prunus.errors import InvalidValue, unknown

Augment = Callable[[Tensor, torch.Generator], Tensor]


def crop(x: Tensor, generator: torch.Generator, *, padding: int = 4, mode: str = "zero") -> Tensor:
    """Shift each image by its own random offset of up to `padding` pixels (pad, then crop to the old size).

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.

    Args:
        x: (N, C, H, W), any dtype.
        generator: source of the offsets, on the CPU.
        padding: pixels added on each side, >= 0; offsets are uniform over the (2 padding + 1)^2 positions.
        mode: what fills the border, "zero" or "reflect".

    Returns:
        (N, C, H, W), new memory.
    """
    side = 2 * padding + 1
    offsets = torch.randint(side, (2, x.shape[0]), generator=generator)
    return shift(x, offsets[0], offsets[1], padding=padding, mode=mode)


def shift(x: Tensor, rows: Tensor, columns: Tensor, *, padding: int, mode: str = "zero") -> Tensor:
    """Pad images by `padding` and cut image i out at (rows[i], columns[i]); offset = padding is the identity.

    Args:
        x: (N, C, H, W).
        rows, columns: (N,) int64 in 0..2 padding.
        padding, mode: as `crop`.
    """
    n, _, height, width = x.shape
    if mode == "reflect" and padding:
        padded = _reflect(x, padding)
    else:
        padded = F.pad(x, (padding,) * 4)
    # All windows as a view without copying: (N, C, 2p+1, 2p+1, H, W); one indexing step copies the chosen ones.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    each = torch.arange(n, device=x.device)
    return windows[each, :, rows.to(x.device), columns.to(x.device)]


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2; (N, C, H, W) to the same shape, new memory."""
    chosen = torch.rand(x.shape[0], generator=generator) < 0.5
    return mirror(x, chosen)


def mirror(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the images (N, C, H, W) for which the (N,) bool `chosen` is true; applied twice it is the identity."""
    index = chosen.nonzero().flatten().to(x.device)
    return x.index_copy(0, index, x[index].flip(-1))


def cutout(x: Tensor, generator: torch.Generator, *, size: int = 8) -> Tensor:
    """Set one square of each image to zero, centred on a random pixel and clipped at the border.

    DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017. On normalised
    images zero is the mean of the training data, as in the paper.

    Args:
        x: (N, C, H, W).
        generator: source of the centres, on the CPU.
        size: side of the square in pixels, >= 1; for even sizes the centre lies right of and below the middle.
    """
    n, _, height, width = x.shape
    rows = torch.randint(height, (n,), generator=generator)
    columns = torch.randint(width, (n,), generator=generator)
    return erase(x, rows, columns, size)


def erase(x: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """Set the square of side `size` around (rows[i], columns[i]) of image i to zero; (N, C, H, W), new memory."""

    def inside(length: int, centre: Tensor) -> Tensor:
        distance = torch.arange(length) - (centre - size // 2)[:, None]
        return (distance >= 0) & (distance < size)

    hole = inside(x.shape[2], rows)[:, :, None] & inside(x.shape[3], columns)[:, None, :]
    return x.masked_fill(hole[:, None].to(x.device), 0)


class Crop:
    """`crop` with its padding and border chosen."""

    def __init__(self, padding: int = 4, mode: str = "zero"):
        self.padding = padding
        self.mode = mode

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return crop(x, generator, padding=self.padding, mode=self.mode)


class Cutout:
    """`cutout` with its size chosen."""

    def __init__(self, size: int = 8):
        self.size = size

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return cutout(x, generator, size=self.size)


NAMES = ("crop", "reflect-crop", "flip", "cutout")


def parse(names: str | Sequence[str | Augment]) -> tuple[Augment, ...]:
    """Build augmentations from names, in order: "crop4,flip,cutout8" or a list of names and functions.

    "cropP" pads by P pixels of zero (default 4), "reflect-cropP" by reflection, "flip" mirrors, "cutoutS" erases
    a square of side S (default 8).

    Raises:
        UnknownName: a name that is none of these.
        InvalidValue: a size that is not a positive number, or one given to "flip".
    """
    items = names.split(",") if isinstance(names, str) else list(names)
    return tuple(_build(i) if isinstance(i, str) else i for i in items if not (isinstance(i, str) and not i.strip()))


def _build(text: str) -> Augment:
    match = re.fullmatch(r"([a-z_-]*[a-z])[-:]?(\d*)", text.strip().lower())
    name, digits = (match[1].replace("_", "-"), match[2]) if match else (text, "")
    if name not in NAMES:
        raise unknown("augmentation", text, NAMES)
    if digits and not int(digits):
        raise InvalidValue(f"the size in augmentation {text!r} must be 1 or more; leave the augmentation out instead")
    if name == "flip":
        if digits:
            raise InvalidValue(f"augmentation {text!r}: flip takes no number")
        return flip
    if name == "cutout":
        return Cutout(int(digits or 8))
    return Crop(int(digits or 4), "reflect" if name == "reflect-crop" else "zero")


def _reflect(x: Tensor, padding: int) -> Tensor:
    if padding >= min(x.shape[-2:]):
        raise InvalidValue(
            f"reflection by {padding} pixels needs images larger than that, got {x.shape[-2]}x{x.shape[-1]}"
        )

    if x.is_floating_point():
        return F.pad(x, (padding,) * 4, mode="reflect")

    # F.pad has no reflection for integers.
    def index(length: int) -> Tensor:
        place = torch.arange(-padding, length + padding).abs()
        return torch.where(place < length, place, 2 * (length - 1) - place).to(x.device)

    return x[:, :, index(x.shape[2])[:, None], index(x.shape[3])]
