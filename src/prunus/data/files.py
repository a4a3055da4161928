"""Readers of the official file formats: CIFAR binary and idx (MNIST, Fashion-MNIST)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from prunus.data.examples import Examples, check_labels
from prunus.errors import DataDamaged, DataMissing, unknown

_PIXELS = 3 * 32 * 32
_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

# Mean and standard deviation of the official training images, per channel, in units of 0..1.
_CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100_STATISTICS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_MNIST_STATISTICS = ((0.1307,), (0.3081,))
_FASHION_STATISTICS = ((0.2860,), (0.3530,))


def read_cifar10(root: Path, *, records: int = 10_000) -> tuple[Examples, None, Examples]:
    """Read CIFAR-10, binary version: (train, None, test), inputs uint8 (N, 3, 32, 32).

    Ids count the images of data_batch_1..5.bin in order; test ids those of test_batch.bin.

    Args:
        root: folder that holds `cifar-10-batches-bin` (or that folder itself).
        records: images in each of the six files, 10,000 in the official set.

    Raises:
        DataMissing: a file is not there.
        DataDamaged: a file has another length than `records` asks for, or a label above 9.
    """
    folder = _folder(root, "cifar-10-batches-bin")
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    _require(folder, [*names, "test_batch.bin"], "the CIFAR-10 binary version")
    x = np.empty((5 * records, 3, 32, 32), np.uint8)
    y = np.empty(5 * records, np.int64)
    for i, name in enumerate(names):
        _cifar_file(folder / name, 1, 10, x[i * records : (i + 1) * records], y[i * records : (i + 1) * records])
    x_test, y_test = np.empty((records, 3, 32, 32), np.uint8), np.empty(records, np.int64)
    _cifar_file(folder / "test_batch.bin", 1, 10, x_test, y_test)
    return _pair((x, y), (x_test, y_test), _CIFAR10_CLASSES, _CIFAR10_STATISTICS, "cifar10")


def read_cifar100(root: Path, *, labels: str = "fine") -> tuple[Examples, None, Examples]:
    """Read CIFAR-100, binary version: (train, None, test), inputs uint8 (N, 3, 32, 32).

    The number of images follows from the length of the files, so that subsets in this format work too.

    Args:
        root: folder that holds `cifar-100-binary` (or that folder itself).
        labels: "fine" (100 classes) or "coarse" (20 superclasses).

    Raises:
        DataMissing: a file is not there.
        DataDamaged: a file is empty or ends within a record, or a label is out of range.
        UnknownName: `labels` is neither word.
    """
    kinds = {"coarse": (0, 20), "fine": (1, 100)}
    if labels not in kinds:
        raise unknown("kind of CIFAR-100 labels", labels, kinds)
    byte, classes = kinds[labels]
    folder = _folder(root, "cifar-100-binary")
    _require(folder, ["train.bin", "test.bin"], "the CIFAR-100 binary version")
    arrays = []
    for name in ("train.bin", "test.bin"):
        size = (folder / name).stat().st_size
        count, rest = divmod(size, _PIXELS + 2)
        if not count or rest:
            raise DataDamaged(
                f"{folder / name} has {size} bytes, which is not a positive multiple of {_PIXELS + 2}, the length of "
                "a record; fetch the file again"
            )
        x, y = np.empty((count, 3, 32, 32), np.uint8), np.empty(count, np.int64)
        _cifar_file(folder / name, 2, classes, x, y, label_byte=byte)
        arrays.append((x, y))
    names = tuple(f"{labels}-{i}" for i in range(classes))
    return _pair(arrays[0], arrays[1], names, _CIFAR100_STATISTICS, "cifar100")


def read_mnist(root: Path) -> tuple[Examples, None, Examples]:
    """Read MNIST from `MNIST/raw` below `root` (or that folder itself), as `read_idx` describes."""
    classes = tuple(str(i) for i in range(10))
    return read_idx(_folder(root, "MNIST/raw"), classes, _MNIST_STATISTICS, "mnist")


def read_fashion_mnist(root: Path) -> tuple[Examples, None, Examples]:
    """Read Fashion-MNIST from `FashionMNIST/raw` below `root` (or that folder itself), as `read_idx` describes."""
    return read_idx(_folder(root, "FashionMNIST/raw"), _FASHION_CLASSES, _FASHION_STATISTICS, "fashion-mnist")


def read_idx(
    folder: Path, classes: tuple[str, ...], statistics: tuple[tuple[float, ...], ...], name: str
) -> tuple[Examples, None, Examples]:
    """Read the four idx files of a set in MNIST's layout, plain or .gz: (train, None, test), uint8 (N, 1, H, W).

    Raises:
        DataMissing: a file is there neither plain nor with .gz.
        DataDamaged: a wrong magic number, a length that differs from what the header says, as many labels as
            images not given, or a label out of range.
    """
    arrays = []
    paths = {}
    wanted = [f"{part}-{what}" for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for file in wanted:
        plain = folder / file
        packed = folder / f"{file}.gz"
        paths[file] = packed if packed.is_file() and not plain.is_file() else plain
    _require(folder, [path.name for path in paths.values()], f"the four idx files of {name}, plain or .gz,")
    for part in ("train", "t10k"):
        image_path, label_path = paths[f"{part}-images-idx3-ubyte"], paths[f"{part}-labels-idx1-ubyte"]
        images, labels = read_idx_file(image_path, 3), read_idx_file(label_path, 1)
        if len(images) != len(labels):
            raise DataDamaged(f"{image_path} has {len(images)} images but {label_path} has {len(labels)} labels")
        labels = labels.astype(np.int64)
        check_labels(torch.from_numpy(labels), len(classes), str(label_path))
        arrays.append((images[:, None], labels))
    return _pair(arrays[0], arrays[1], classes, statistics, name)


def read_idx_file(path: Path, dimensions: int) -> np.ndarray:
    """Read one idx file of unsigned bytes, plain or .gz, as a uint8 array with `dimensions` axes.

    Raises:
        DataDamaged: the magic number is not 0x00000800 + dimensions, the length differs from what the header
            says, nothing is in it, or the compression is broken.
    """
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise DataDamaged(f"{path} cannot be unpacked ({error}); fetch the file again") from error
    else:
        data = path.read_bytes()
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataDamaged(f"{path} has {len(data)} bytes, fewer than its header of {header}; fetch the file again")
    magic = int.from_bytes(data[:4], "big")
    if magic != 0x0800 + dimensions:
        raise DataDamaged(f"{path} begins with {magic:#010x} instead of {0x0800 + dimensions:#010x}: not this idx file")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    expected = header + math.prod(shape)
    if len(data) != expected or not math.prod(shape):
        raise DataDamaged(
            f"{path} has {len(data)} bytes; its header promises {shape}, which takes {expected}; fetch the file again"
        )
    # A copy, because tensors must not share memory with immutable bytes.
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _cifar_file(path: Path, head: int, classes: int, x: np.ndarray, y: np.ndarray, label_byte: int = 0) -> None:
    """Fill `x` and `y` from records of `head` label bytes and the pixels, checking length and labels."""
    length = head + _PIXELS
    size = path.stat().st_size
    if size != len(y) * length:
        raise DataDamaged(
            f"{path} has {size} bytes instead of {len(y) * length} ({len(y)} records of {length}); fetch the file again"
        )
    records = np.memmap(path, np.uint8, "r", shape=(len(y), length))
    x.reshape(len(y), _PIXELS)[:] = records[:, head:]
    y[:] = records[:, label_byte]
    wrong = np.flatnonzero(y >= classes)
    if wrong.size:
        raise DataDamaged(f"label {y[wrong[0]]} of record {wrong[0]} in {path} is not in 0..{classes - 1}")


def _pair(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: tuple[str, ...],
    statistics: tuple[tuple[float, ...], ...],
    name: str,
) -> tuple[Examples, None, Examples]:
    mean, std = statistics

    def make(arrays: tuple[np.ndarray, np.ndarray], part: str) -> Examples:
        inputs, labels = arrays
        return Examples.from_arrays(inputs, labels, classes=classes, mean=mean, std=std, name=f"{name}/{part}")

    return make(train, "train"), None, make(test, "test")


def _folder(root: Path, name: str) -> Path:
    inside = root / name
    # Pointing at the folder of the files themselves is understood too.
    return root if not inside.is_dir() and root.is_dir() and root.as_posix().endswith(name) else inside


def _require(folder: Path, names: list[str], what: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataMissing(
            f"{what} was looked for in {folder.absolute()}, where {', '.join(missing)} is missing. Unpack the official "
            f"archive so that the files lie there, or point to them with root= or the environment variable "
            "PRUNUS_DATA (the folder above)."
        )
