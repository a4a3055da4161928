"""The embedded digits: 1,797 images of 8x8 pixels that come with scikit-learn, so that no download is needed."""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy as np
import torch

from prunus.data.examples import Examples
from prunus.errors import DataDamaged, DataMissing, MissingExtra
from prunus.randomness import generator

TRAIN = 1000
TOTAL = 1797


def read(root: Path | None = None) -> tuple[Examples, None, Examples]:
    """Return (1,000 training examples, None, 797 test examples), inputs float32 (1, 8, 8) in 0..1.

    Pixels are divided by 16 and normalised one by one with (x - mean) / (std + 0.1), statistics over the 1,000
    training images (the 0.1 keeps border pixels, which are nearly always 0, from being blown up). One fixed
    permutation decides who is a test image; ids are the positions in the file.

    Args:
        root: not used; the file comes with scikit-learn.

    Raises:
        MissingExtra: scikit-learn is not installed.
        DataMissing: it is installed without its digits file.
        DataDamaged: the file does not hold 1,797 rows of 64 pixels in 0..16 and a label in 0..9.
    """
    rows = _rows(_path())
    x = torch.from_numpy((rows[:, :64] / 16).astype(np.float32)).view(TOTAL, 1, 8, 8)
    y = torch.from_numpy(rows[:, 64].astype(np.int64))
    every = Examples.from_arrays(x, y, classes=10, name="digits")
    order = torch.randperm(TOTAL, generator=generator(0, "digits", "split"))
    train = x[order[:TRAIN]]
    every = every.normalised_by(train.mean(0), train.std(0, correction=0) + 0.1)
    return every.subset(order[:TRAIN]), None, every.subset(order[TRAIN:])


def _path() -> Path:
    # Finding a top-level package does not import it: importing scikit-learn takes seconds, reading this file
    # takes milliseconds.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise DataMissing(f"scikit-learn is installed without {path}: pip install --force-reinstall scikit-learn")
    return path


def _rows(path: Path) -> np.ndarray:
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            rows = np.loadtxt(file, delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataDamaged(f"{path} cannot be read ({error}): pip install --force-reinstall scikit-learn") from error
    fine = rows.shape == (TOTAL, 65) and rows.min() >= 0 and rows[:, :64].max() <= 16 and rows[:, 64].max() <= 9
    if not fine:
        raise DataDamaged(
            f"{path} holds {rows.shape} numbers instead of {(TOTAL, 65)} pixels in 0..16 and labels in 0..9: "
            "pip install --force-reinstall scikit-learn"
        )
    return rows
