"""Your own arrays in one .npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunus.data.examples import Examples, statistics
from prunus.data.split import amount, stratified
from prunus.errors import DataDamaged, DataMissing


def read(
    root: Path, *, file: str = "arrays.npz", test: float | int = 0.2, standardise: bool = True, seed: int = 0
) -> tuple[Examples, Examples | None, Examples]:
    """Read x_train, y_train, x_test, y_test (and x_validation, y_validation), or x and y, from an .npz file.

    Names ids_train, ids_validation, ids_test (or ids) may hold example ids; the default counts the rows of
    training, then validation examples, and test examples on their own. From x and y the test part is drawn class
    by class.

    Args:
        root: the .npz file, or the folder that holds `file`.
        file: name of the file in `root`.
        test: fraction or count of test examples, used only when the file has x and y.
        standardise: normalise by statistics of the training inputs (per channel for images (N, C, H, W), else
            per feature); False leaves float inputs as they are and divides uint8 by 255.
        seed: key of the test split.

    Raises:
        DataMissing: the file is not there.
        DataDamaged: it is no .npz file, lacks an array, holds pickled objects, or as `Examples.from_arrays`.
        InvalidValue: a `test` that leaves nothing on one side.
    """
    path = root if root.is_file() else root / file
    if not path.is_file():
        raise DataMissing(f"no file {path.absolute()}; point root= (or PRUNUS_DATA) to your .npz file or its folder")
    arrays = _unpack(path)
    if "x" in arrays and "y" in arrays:
        every = Examples.from_arrays(arrays["x"], arrays["y"], arrays.get("ids"), name=str(path))
        return carve(every, test, seed, standardise)
    labels = [
        value for key, value in arrays.items() if key.startswith("y_") and value.dtype.kind in "iuf" and value.size
    ]
    classes = 1 + max((int(value.max()) for value in labels), default=0)
    parts: dict[str, Examples] = {}
    for part in ("train", "validation", "test"):
        if part == "validation" and "x_validation" not in arrays:
            continue
        ids = arrays.get(f"ids_{part}")
        if ids is None and part == "validation":
            start = int(parts["train"].ids.max()) + 1
            ids = np.arange(start, start + len(arrays["y_validation"]))
        parts[part] = Examples.from_arrays(
            arrays[f"x_{part}"], arrays[f"y_{part}"], ids, classes=classes, name=f"{path} ({part})"
        )
    shapes = {part: examples.input_shape for part, examples in parts.items()}
    if len(set(shapes.values())) > 1:
        raise DataDamaged(f"inputs in {path} differ in shape between the parts: {shapes}")
    if standardise:
        mean, std = statistics(parts["train"].x)
        parts = {part: examples.normalised_by(mean, std) for part, examples in parts.items()}
    return parts["train"], parts.get("validation"), parts["test"]


def carve(every: Examples, test: float | int, seed: int, standardise: bool) -> tuple[Examples, None, Examples]:
    """Set a test part aside, class by class, keyed by `seed`; statistics come from the rest."""
    held = stratified(every.y, amount(test, len(every), "test"), every.num_classes, seed, "test")
    kept = torch.ones(len(every), dtype=torch.bool)
    kept[held] = False
    train, tested = every.subset(kept.nonzero().flatten()), every.subset(held)
    if standardise:
        mean, std = statistics(train.x)
        train, tested = train.normalised_by(mean, std), tested.normalised_by(mean, std)
    return train, None, tested


def _unpack(path: Path) -> Mapping[str, Any]:
    try:
        # Opened here, because numpy leaves the file open when it is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as packed:
            # A bare .npy file loads as an array, which has no names.
            arrays = {name: packed[name] for name in packed.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataDamaged(f"{path} cannot be read as an .npz file of plain arrays: {error}") from error
    needed = ("x_train", "y_train", "x_test", "y_test")
    if not ({"x", "y"} <= set(arrays) or set(needed) <= set(arrays)):
        raise DataDamaged(f"{path} holds {sorted(arrays) or 'nothing'}; x and y, or {', '.join(needed)}, are needed")
    if ("x_validation" in arrays) != ("y_validation" in arrays):
        raise DataDamaged(f"{path} holds only one of x_validation and y_validation")
    return arrays
