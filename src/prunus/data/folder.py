"""Image folders: root/CLASS/IMAGE, or root/{train,validation,test}/CLASS/IMAGE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from prunus.data.arrays import carve
from prunus.data.examples import Examples, statistics
from prunus.errors import DataDamaged, DataMissing, InvalidValue, MissingExtra

_SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def read(
    root: Path, *, size: int | tuple[int, int] | None = None, grey: bool = False, test: float | int = 0.2, seed: int = 0
) -> tuple[Examples, Examples | None, Examples]:
    """Read images into memory as uint8 (N, 3, H, W); classes are the sorted folder names.

    Without a folder of test images, the validation folder serves as test set (as is done with ImageNet); without
    either, the test part is drawn class by class. Ids are positions in the sorted list of paths, training before
    validation, test on its own. Statistics are those of the training images, per channel.

    Args:
        root: the folder.
        size: resize every image to this side, or (height, width), bilinear with antialiasing; default: as they are.
        grey: read one channel, (N, 1, H, W).
        test: fraction or count of test examples, used only when there are no folders of splits.
        seed: key of the test split.

    Raises:
        DataMissing: no such folder, or no class folders with images in it.
        DataDamaged: an image cannot be read, sizes differ (without `size`), or the splits differ in classes.
        MissingExtra: Pillow is not installed.
    """
    if not root.is_dir():
        raise DataMissing(f"no folder {root.absolute()}; point root= (or PRUNUS_DATA) to the folder of your images")
    found = {
        part: folder for part, names in _SPLITS.items() for name in reversed(names) if (folder := root / name).is_dir()
    }
    if "train" not in found:
        classes, paths, labels = _listing(root)
        every = _examples(paths, labels, 0, classes, size, grey, str(root))
        return carve(every, test, seed, standardise=True)
    if len(found) == 1:
        raise DataMissing(f"{root.absolute()} has a folder train but neither test nor validation beside it")
    if "test" not in found:
        found["test"] = found.pop("validation")
    classes = _listing(found["train"])[0]
    parts: dict[str, Examples] = {}
    for part, folder in found.items():
        names, paths, labels = _listing(folder)
        if names != classes:
            odd = sorted(set(names) ^ set(classes))
            raise DataDamaged(f"{folder} and {found['train']} differ in their classes: {', '.join(odd[:5])}")
        start = len(parts["train"]) if part == "validation" else 0
        parts[part] = _examples(paths, labels, start, classes, size, grey, str(folder))
    shapes = {part: examples.input_shape for part, examples in parts.items()}
    if len(set(shapes.values())) > 1:
        raise DataDamaged(f"images below {root} differ in size between the splits ({shapes}); give size=")
    mean, std = statistics(parts["train"].x)
    parts = {part: examples.normalised_by(mean, std) for part, examples in parts.items()}
    return parts["train"], parts.get("validation"), parts["test"]


def to_pixels(image: Any, size: int | tuple[int, int] | None, grey: bool) -> np.ndarray:
    """Return a PIL image as uint8 (C, H, W), resized when `size` is given."""
    image = image.convert("L" if grey else "RGB")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise InvalidValue(f"size={size!r} must be 1 or more")
        # 2 is Pillow's number for bilinear, which keeps this function free of the import.
        image = image.resize((width, height), 2)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _listing(folder: Path) -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Return class names, image paths sorted by class and name, and the label of each path."""
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not images:
            raise DataMissing(f"the class folder {(folder / name).absolute()} holds no images ({', '.join(_SUFFIXES)})")
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise DataMissing(f"{folder.absolute()} has no folders of images; one folder per class is needed")
    return classes, paths, labels


def _examples(
    paths: list[Path],
    labels: list[int],
    start: int,
    classes: tuple[str, ...],
    size: int | tuple[int, int] | None,
    grey: bool,
    name: str,
) -> Examples:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("reading images needs Pillow: pip install pillow") from error
    pixels: np.ndarray | None = None
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                one = to_pixels(image, size, grey)
        except (OSError, SyntaxError) as error:
            raise DataDamaged(f"the image {path} cannot be read: {error}") from error
        if pixels is None:
            pixels = np.empty((len(paths), *one.shape), np.uint8)
        if one.shape != pixels.shape[1:]:
            raise DataDamaged(
                f"{path} has {one.shape[1]}x{one.shape[2]} pixels, {paths[0]} {pixels.shape[2]}x{pixels.shape[3]}; "
                "give size= to resize them all"
            )
        pixels[i] = one
    return Examples.from_arrays(pixels, labels, np.arange(start, start + len(paths)), classes=classes, name=name)
