"""Readers against files made by hand, whole and damaged in every way."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from prunus.data.digits import _rows
from prunus.data.files import read_idx_file
from prunus.data.load import load
from prunus.errors import DataDamaged, DataMissing, InvalidValue, MissingExtra, UnknownName, Unsupported

BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]


def cifar10(root: Path, records: int = 4) -> Path:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name in [*BATCHES, "test_batch.bin"]:
        rows = draws.integers(0, 256, (records, 3073)).astype(np.uint8)
        rows[:, 0] = np.arange(records) % 10
        (folder / name).write_bytes(rows.tobytes())
    return folder


def test_cifar10(tmp_path: Path) -> None:
    folder = cifar10(tmp_path)
    splits = load("cifar10", root=tmp_path, records=4, validation=0)
    assert splits.train.x.shape == (20, 3, 32, 32)
    assert splits.train.x.dtype == torch.uint8
    assert splits.train.ids.tolist() == list(range(20))
    assert splits.train.y.tolist() == [0, 1, 2, 3] * 5
    raw = np.frombuffer((folder / "data_batch_3.bin").read_bytes(), np.uint8).reshape(4, 3073)
    assert splits.train.x[9].flatten().tolist() == raw[1, 1:].tolist()
    assert splits.train.classes[3] == "cat"
    direct = load("cifar10", root=folder, records=4, validation=0)
    assert direct.train.content_hash() == splits.train.content_hash()


def test_cifar10_damage(tmp_path: Path) -> None:
    folder = cifar10(tmp_path)
    with pytest.raises(DataDamaged, match="12292 bytes instead of 30730000"):
        load("cifar10", root=tmp_path)
    path = folder / "data_batch_2.bin"
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x", whole[:-3073], b""):
        path.write_bytes(content)
        with pytest.raises(DataDamaged, match=r"data_batch_2\.bin has"):
            load("cifar10", root=tmp_path, records=4)
    path.write_bytes(whole[:3073] + b"\x0a" + whole[3074:])
    with pytest.raises(DataDamaged, match="label 10 of record 1"):
        load("cifar10", root=tmp_path, records=4)
    path.unlink()
    with pytest.raises(DataMissing, match=r"data_batch_2\.bin"):
        load("cifar10", root=tmp_path, records=4)


def test_single_class_is_damage(tmp_path: Path) -> None:
    folder = cifar10(tmp_path)
    for path in folder.iterdir():
        rows = np.frombuffer(path.read_bytes(), np.uint8).reshape(4, 3073).copy()
        rows[:, 0] = 7
        path.write_bytes(rows.tobytes())
    with pytest.raises(DataDamaged, match="all 20 examples"):
        load("cifar10", root=tmp_path, records=4)


def cifar100(root: Path) -> Path:
    folder = root / "cifar-100-binary"
    folder.mkdir()
    for name, records in (("train.bin", 12), ("test.bin", 5)):
        rows = np.zeros((records, 3074), np.uint8)
        rows[:, 0] = np.arange(records) % 20
        rows[:, 1] = 99 - np.arange(records)
        rows[:, 2:] = np.arange(records)[:, None]
        (folder / name).write_bytes(rows.tobytes())
    return folder


def test_cifar100(tmp_path: Path) -> None:
    folder = cifar100(tmp_path)
    fine = load("cifar100", root=tmp_path, validation=0)
    assert (fine.num_classes, len(fine.train), len(fine.test)) == (100, 12, 5)
    assert fine.train.y.tolist() == [99 - i for i in range(12)]
    assert fine.train.x[:, 0, 0, 0].tolist() == list(range(12))
    coarse = load("cifar100", root=tmp_path, labels="coarse", validation=0)
    assert (coarse.num_classes, coarse.test.y.tolist()) == (20, [0, 1, 2, 3, 4])
    with pytest.raises(UnknownName, match="coarse"):
        load("cifar100", root=tmp_path, labels="corse")
    path = folder / "test.bin"
    whole = path.read_bytes()
    for content in (b"", whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(DataDamaged, match="multiple of 3074"):
            load("cifar100", root=tmp_path)
    path.write_bytes(whole[:1] + b"\x64" + whole[2:])
    with pytest.raises(DataDamaged, match="label 100 of record 0"):
        load("cifar100", root=tmp_path)


def idx(array: np.ndarray) -> bytes:
    head = (0x0800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def mnist(folder: Path, packed: bool) -> None:
    folder.mkdir(parents=True)
    for part, count in (("train", 8), ("t10k", 4)):
        images = np.arange(count * 28 * 28).reshape(count, 28, 28) % 251
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", np.arange(count) % 10)):
            data = idx(array)
            if packed:
                (folder / f"{part}-{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / f"{part}-{name}").write_bytes(data)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")])
def test_idx_sets(tmp_path: Path, packed: bool, name: str, folder: str) -> None:
    mnist(tmp_path / folder, packed)
    splits = load(name, root=tmp_path, validation=0)
    assert splits.train.x.shape == (8, 1, 28, 28)
    assert splits.train.x.flatten().tolist() == [i % 251 for i in range(8 * 784)]
    assert splits.test.y.tolist() == [0, 1, 2, 3]
    assert load(name, root=tmp_path / folder, validation=0).train.content_hash() == splits.train.content_hash()


def test_idx_damage(tmp_path: Path) -> None:
    whole = idx(np.arange(12).reshape(3, 2, 2))
    path = tmp_path / "images"
    cases = {
        whole[:10]: "header",
        whole[:-1]: "27 bytes",
        whole + b"x": "29 bytes",
        idx(np.arange(3)) + bytes(20): "0x00000801",
        b"\x00\x00\x0d\x03" + whole[4:]: "0x00000d03",
        idx(np.zeros((0, 2, 2))): "promises",
    }
    for content, words in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataDamaged, match=words):
            read_idx_file(path, 3)
    zipped = tmp_path / "images.gz"
    for content in (b"no gzip", gzip.compress(whole)[:-9], b""):
        zipped.write_bytes(content)
        with pytest.raises(DataDamaged, match=r"images\.gz"):
            read_idx_file(zipped, 3)


def test_idx_labels_and_counts(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST/raw"
    mnist(folder, packed=False)
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.arange(7)))
    with pytest.raises(DataDamaged, match=r"8 images but .* 7 labels"):
        load("mnist", root=tmp_path)
    labels.write_bytes(idx(np.array([0, 1, 2, 3, 4, 10, 6, 7])))
    with pytest.raises(DataDamaged, match=r"label 10 of example 5 in .*train-labels"):
        load("mnist", root=tmp_path)


def test_digits_file_damage(tmp_path: Path) -> None:
    path = tmp_path / "digits.csv.gz"
    for content in (b"broken", gzip.compress(b"1,2,3\n"), gzip.compress(b"1,x\n"), gzip.compress(b"1,2\n" * 9)[:-9]):
        path.write_bytes(content)
        with pytest.raises(DataDamaged, match="scikit-learn"):
            _rows(path)


def test_arrays(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(3, 2, (40, 5))
    y = np.arange(40) % 4
    path = tmp_path / "mine.npz"
    np.savez(path, x=x, y=y, ids=np.arange(40) * 10)
    splits = load("arrays", root=path, test=0.25, validation=0.1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (27, 3, 10)
    assert len(set(torch.cat([splits.train.ids, splits.validation.ids, splits.test.ids]).tolist())) == 40
    assert torch.equal(splits.train.x, torch.from_numpy(x).float()[splits.train.ids // 10])
    every = torch.cat([splits.train.x, splits.validation.x])
    normal = splits.train.normalise(every)
    torch.testing.assert_close(normal.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    plain = load("arrays", root=tmp_path, file="mine.npz", standardise=False)
    assert torch.equal(plain.train.normalise(plain.train.x), plain.train.x)


def test_arrays_with_their_own_splits(tmp_path: Path) -> None:
    parts = {"train": 8, "validation": 4, "test": 6}
    arrays = {f"x_{k}": np.full((n, 2), i, np.float32) for i, (k, n) in enumerate(parts.items())}
    arrays |= {f"y_{k}": np.arange(n) % 2 for k, n in parts.items()}
    np.savez(tmp_path / "arrays.npz", **arrays)
    own = load("arrays", root=tmp_path, validation=None)
    assert [len(p) for p in (own.train, own.validation, own.test)] == [8, 4, 6]
    assert own.validation.ids.tolist() == [8, 9, 10, 11]
    joined = load("arrays", root=tmp_path, validation=2)
    assert [len(p) for p in (joined.train, joined.validation, joined.test)] == [10, 2, 6]
    assert sorted([*joined.train.ids.tolist(), *joined.validation.ids.tolist()]) == list(range(12))


def test_array_damage(tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    good = {"x_train": np.eye(4), "y_train": np.arange(4), "x_test": np.eye(4), "y_test": np.arange(4)}
    cases: list[tuple[dict, str]] = [
        ({"x": np.eye(4)}, "are needed"),
        ({**good, "x_validation": np.eye(4)}, "only one of"),
        ({**good, "x_test": np.eye(5)[:4]}, "differ in shape"),
        ({**good, "x_train": np.eye(4) * np.nan}, "NaN"),
        ({**good, "y_train": np.array(["a", "b", "c", "d"])}, "numbers"),
        ({"x": np.array([None, 1]), "y": np.arange(2)}, "plain arrays"),
    ]
    for arrays, words in cases:
        np.savez(path, **arrays)
        with pytest.raises(DataDamaged, match=words):
            load("arrays", root=tmp_path)
    np.savez(path, **good)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(DataDamaged, match=r"arrays\.npz"):
            load("arrays", root=tmp_path)


def folder_of_images(root: Path, count: int = 3, classes: tuple[str, ...] = ("ant", "bee"), side: int = 6) -> None:
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((side, side, 3), 40 * label + i, np.uint8)
            pixels[0, 0] = (255, 0, 7)
            image.fromarray(pixels).save(root / name / f"{i}.png")


def test_image_folder_flat(tmp_path: Path) -> None:
    folder_of_images(tmp_path, 5)
    splits = load("image-folder", root=tmp_path, validation=0, test=0.4)
    assert splits.train.classes == ("ant", "bee")
    assert (len(splits.train), len(splits.test)) == (6, 4)
    assert splits.test.counts().tolist() == [2, 2]
    for part in (splits.train, splits.test):
        expected = [40 * (i // 5) + i % 5 for i in part.ids.tolist()]
        assert part.x[:, 1, 3, 3].tolist() == expected
        assert part.x[0, :, 0, 0].tolist() == [255, 0, 7]
    assert load("image-folder", root=tmp_path, size=4, grey=True).input_shape == (1, 4, 4)
    assert load("image-folder", root=tmp_path, size=(4, 5)).input_shape == (3, 4, 5)


def test_image_folder_with_splits(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        folder_of_images(tmp_path / part, count)
    own = load("image-folder", root=tmp_path, validation=None)
    assert [len(p) for p in (own.train, own.validation, own.test)] == [8, 4, 6]
    assert own.validation.ids.tolist() == [8, 9, 10, 11]
    again = load("image-folder", root=tmp_path, validation=0)
    assert [len(p) for p in (again.train, again.validation, again.test)] == [12, 0, 6]


def test_validation_folder_serves_as_test(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 2)):
        folder_of_images(tmp_path / part, count)
    splits = load("image-folder", root=tmp_path, validation=2)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [6, 2, 4]


def test_image_folder_damage(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder_of_images(tmp_path, 3)
    image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(tmp_path / "bee" / "odd.png")
    with pytest.raises(DataDamaged, match=r"odd\.png has 5x7 pixels"):
        load("image-folder", root=tmp_path)
    whole = (tmp_path / "bee" / "0.png").read_bytes()
    for content in (whole[:30], b"no image", b""):
        (tmp_path / "bee" / "odd.png").write_bytes(content)
        with pytest.raises(DataDamaged, match=r"odd\.png cannot be read"):
            load("image-folder", root=tmp_path, size=6)
    (tmp_path / "bee" / "odd.png").unlink()
    with pytest.raises(InvalidValue, match="size=0"):
        load("image-folder", root=tmp_path, size=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataMissing, match="empty"):
        load("image-folder", root=tmp_path)
    with pytest.raises(DataMissing, match="no folders of images"):
        load("image-folder", root=tmp_path / "bee")


def test_image_folder_splits_must_agree(tmp_path: Path) -> None:
    folder_of_images(tmp_path / "train")
    with pytest.raises(DataMissing, match="neither test nor validation"):
        load("image-folder", root=tmp_path)
    folder_of_images(tmp_path / "test", classes=("ant", "wasp"))
    with pytest.raises(DataDamaged, match="bee, wasp"):
        load("image-folder", root=tmp_path)


class Rows:
    """Rows as the `datasets` library gives them: columns by name."""

    def __init__(self, **columns: list):
        self.columns = columns
        self.column_names = list(columns)
        self.features = {name: SimpleNamespace() for name in columns}
        if "label" in columns:
            self.features["label"] = SimpleNamespace(names=["no", "yes"])

    def __getitem__(self, name: str) -> list:
        return self.columns[name]


def pretend_library(monkeypatch: pytest.MonkeyPatch, loaded: object) -> ModuleType:
    library = ModuleType("datasets")
    library.config = SimpleNamespace(HF_HUB_OFFLINE=False)  # type: ignore[attr-defined]

    def load_dataset(name: str, config: str | None) -> object:
        assert library.config.HF_HUB_OFFLINE or name == "online"
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")

    def rows(n: int) -> Rows:
        pictures = [image.fromarray(np.full((4, 4, 3), i, np.uint8)) for i in range(n)]
        return Rows(image=pictures, label=[i % 2 for i in range(n)])

    library = pretend_library(monkeypatch, {"train": rows(6), "validation": rows(2), "test": rows(4), "extra": rows(2)})
    splits = load("huggingface", dataset="cats", validation=None, root=tmp_path)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [6, 2, 4]
    assert splits.train.classes == ("no", "yes")
    assert splits.train.x[:, 0, 0, 0].tolist() == list(range(6))
    assert library.config.HF_HUB_OFFLINE is False
    assert len(load("huggingface", dataset="online", online=True, root=tmp_path).test) == 4
    pretend_library(monkeypatch, {"train": rows(10)})
    assert len(load("huggingface", dataset="cats", root=tmp_path).test) == 2
    with pytest.raises(InvalidValue, match="no column 'picture'"):
        load("huggingface", dataset="cats", image="picture", root=tmp_path)


@pytest.mark.parametrize(
    ("loaded", "error", "words"),
    [
        ({"train": Rows(text=["a", "b"], label=[0, 1])}, Unsupported, "text"),
        ({"train": Rows(image=["a", "b"], label=[0, 1])}, Unsupported, "not images"),
        ({"train": Rows(image=[], label=[])}, DataDamaged, "empty"),
        ({"everything": Rows(image=[], label=[])}, Unsupported, "everything"),
        (ConnectionError("offline"), DataMissing, "online=True"),
    ],
)
def test_hub_refuses(
    loaded: object, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_library(monkeypatch, loaded)
    with pytest.raises(error, match=words):
        load("huggingface", dataset="cats", root=tmp_path)


def test_hub_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match="llm"):
        load("huggingface", dataset="cats", root=tmp_path)


def test_hub_with_the_real_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the datasets library")
    image = pytest.importorskip("PIL.Image")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    pictures = [image.fromarray(np.full((4, 4, 3), i, np.uint8)) for i in range(10)]
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [i % 2 for i in range(10)]}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    splits = load("huggingface", dataset="saved", root=tmp_path, validation=0)
    assert splits.train.x[:, 0, 0, 0].tolist() == list(range(10))
    assert splits.train.classes == ("no", "yes")
    with pytest.raises(DataMissing, match="online=True"):
        load("huggingface", dataset="surely/not-there", root=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("cifar10", 50_000, 10_000), ("mnist", 60_000, 10_000), ("fashion-mnist", 60_000, 10_000)],
)
def test_official_files(name: str, train: int, test: int) -> None:
    if not os.environ.get("PRUNUS_DATA"):
        pytest.skip("PRUNUS_DATA does not point to the official files")
    try:
        splits = load(name, validation=0)
    except DataMissing as error:
        pytest.skip(str(error))
    assert (len(splits.train), len(splits.test)) == (train, test)
    assert splits.test.counts().sum() == test
    normal = splits.train.normalise(splits.train.x[:20_000])
    assert float(normal.mean((0, 2, 3)).abs().max()) < 0.02
    assert float((normal.std((0, 2, 3)) - 1).abs().max()) < 0.02
