"""Examples: what is checked, what subsets keep, what hashes and statistics say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from prunus.data.balanced import balanced_batch
from prunus.data.examples import Examples, statistics
from prunus.errors import DataDamaged, InvalidValue


def tiny(n: int = 12, classes: int = 3) -> Examples:
    x = torch.arange(n * 4, dtype=torch.float32).view(n, 4)
    return Examples.from_arrays(x, torch.arange(n) % classes, 100 + torch.arange(n), classes=classes, name="tiny")


def test_types_and_defaults() -> None:
    made = Examples.from_arrays(np.zeros((4, 2), np.float64), [0, 1, 0, 1])
    assert made.x.dtype == torch.float32
    assert made.y.dtype == made.ids.dtype == torch.int64
    assert made.ids.tolist() == [0, 1, 2, 3]
    assert made.classes == ("0", "1")
    assert Examples.from_arrays(np.zeros((2, 3), np.uint8), [0, 1]).x.dtype == torch.uint8


@pytest.mark.parametrize(
    ("x", "y", "ids", "words"),
    [
        (np.zeros((0, 2)), [], None, "empty"),
        (np.zeros((3, 2)), [0, 1], None, "3 inputs, 2 labels"),
        (np.zeros((2, 2)), [0, 1], [5], "1 ids"),
        (np.zeros((2, 2)), [0, 3], None, "label 3 of example 1"),
        (np.zeros((2, 2)), [-1, 0], None, "label -1 of example 0"),
        (np.zeros((2, 2)), [1, 1], None, "all 2 examples"),
        (np.zeros((2, 2)), [0.5, 1.0], None, "not whole"),
        (np.zeros((2, 2)), [[0], [1]], None, "one number per example"),
        (np.zeros((2, 2)), [0, 1], [7, 7], "repeated ids, such as 7"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), [0, 1], None, "example 1 in"),
        (np.array([[np.inf, 1.0], [0.0, 0.0]]), [0, 1], None, "example 0 in"),
        (np.zeros(2), [0, 1], None, "shape"),
        (np.array([["a"], ["b"]]), [0, 1], None, "numbers"),
        (np.zeros((2, 2)), ["a", "b"], None, "numbers"),
        (np.zeros((2, 2), np.complex64), [0, 1], None, "complex"),
    ],
)
def test_damage_is_named(x: np.ndarray, y: list, ids: list | None, words: str) -> None:
    with pytest.raises(DataDamaged, match=words):
        Examples.from_arrays(x, y, ids, classes=3)


def test_subset_keeps_ids_and_order() -> None:
    part = tiny().subset([5, 2, 7])
    assert part.ids.tolist() == [105, 102, 107]
    assert part.subset([2, 0]).ids.tolist() == [107, 105]
    assert part.with_ids([107, 102]).ids.tolist() == [107, 102]
    assert torch.equal(part.with_ids([102]).x, tiny().x[2:3])
    assert len(part.subset([])) == 0
    assert len(part.subset([]).with_ids([])) == 0


@pytest.mark.parametrize("indices", [[12], [-1], [1, 1]])
def test_subset_refuses(indices: list[int]) -> None:
    with pytest.raises(InvalidValue):
        tiny().subset(indices)


@pytest.mark.parametrize("ids", [[99], [100, 112], [101, 101]])
def test_with_ids_refuses(ids: list[int]) -> None:
    with pytest.raises(InvalidValue):
        tiny().with_ids(ids)
    with pytest.raises(InvalidValue):
        tiny().subset([]).with_ids([100])


def test_hash_sees_every_part() -> None:
    base = tiny()
    hashes = {
        base.content_hash(),
        base.subset(range(11)).content_hash(),
        base.subset([1, 0, *range(2, 12)]).content_hash(),
        Examples.from_arrays(base.x, base.y, base.ids + 1).content_hash(),
        Examples.from_arrays(base.x, 2 - base.y, base.ids).content_hash(),
        Examples.from_arrays(base.x + 1, base.y, base.ids).content_hash(),
        Examples.from_arrays(base.x.view(12, 2, 2), base.y, base.ids).content_hash(),
    }
    assert len(hashes) == 7
    assert tiny().content_hash() == base.content_hash()


def test_normalise_bytes_is_the_written_formula() -> None:
    x = torch.randint(0, 256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    made = Examples.from_arrays(x, [0, 1] * 3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    expected = (x.double() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.2]).view(
        3, 1, 1
    )
    torch.testing.assert_close(made.normalise(x), expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made[2][0], expected[2].float(), rtol=1e-5, atol=1e-6)


def test_statistics_against_numpy() -> None:
    draws = np.random.default_rng(0)
    images = draws.integers(0, 256, (50, 3, 5, 5)).astype(np.uint8)
    mean, std = statistics(torch.from_numpy(images), chunk=7)
    np.testing.assert_allclose(mean.flatten(), images.mean((0, 2, 3)) / 255, rtol=1e-6)
    np.testing.assert_allclose(std.flatten(), images.std((0, 2, 3)) / 255, rtol=1e-6)
    # A mean far above the spread would cancel in a naive difference of squares.
    table = (draws.normal(size=(50, 4)) * 1e-3 + 1e3).astype(np.float32)
    table[:, 3] = 2.0
    mean, std = statistics(torch.from_numpy(table), chunk=7)
    np.testing.assert_allclose(mean, table.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(std[:3], table.astype(np.float64).std(0)[:3], rtol=1e-4)
    assert std[3] == 1


def test_statistics_must_fit() -> None:
    for mean, std in (((0.0, 0.0), (1.0, 1.0)), ((0.0,) * 4, (0.0,) * 4)):
        with pytest.raises(InvalidValue):
            tiny().normalised_by(mean, std)
    with pytest.raises(InvalidValue, match="both"):
        Examples.from_arrays(np.zeros((2, 2)), [0, 1], mean=(0.0, 0.0))


def test_is_a_map_style_dataset() -> None:
    loader = DataLoader(tiny(), batch_size=5)
    x, y, ids = next(iter(loader))
    assert x.shape == (5, 4)
    assert y.tolist() == [0, 1, 2, 0, 1]
    assert ids.tolist() == [100, 101, 102, 103, 104]
    assert len(list(iter(tiny()))) == 12
    with pytest.raises(IndexError):
        tiny()[12]


def test_from_dataset() -> None:
    base = tiny()
    assert Examples.from_dataset(base) is base
    pairs = Examples.from_dataset(TensorDataset(base.x, base.y))
    assert pairs.ids.tolist() == list(range(12))
    triples = Examples.from_dataset(TensorDataset(base.x, base.y, base.ids))
    assert triples.content_hash() == base.content_hash()
    with pytest.raises(InvalidValue):
        Examples.from_dataset(TensorDataset(base.x))
    with pytest.raises(InvalidValue):
        Examples.from_dataset(iter([]))
    with pytest.raises(DataDamaged):
        Examples.from_dataset([])
    with pytest.raises(InvalidValue, match="shapes"):
        Examples.from_dataset([(torch.zeros(2), 0), (torch.zeros(3), 1)])


def test_from_dataset_of_pil_images() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    made = Examples.from_dataset([(image.fromarray(pixels), 0), (image.fromarray(255 - pixels), 1)])
    assert torch.equal(made.x[0], torch.from_numpy(pixels.transpose(2, 0, 1).copy()))
    grey = Examples.from_dataset([(image.fromarray(pixels[..., 0]), 0), (image.fromarray(pixels[..., 1]), 1)])
    assert grey.x.shape == (2, 1, 2, 3)


def test_balanced_batch() -> None:
    examples = tiny(12, 3)
    x, y, ids = balanced_batch(examples, 3, seed=4)
    assert y.tolist() == [0, 1, 2] * 3
    assert ids.unique().numel() == 9
    assert torch.equal(examples.with_ids(ids).x, x)
    assert torch.equal(balanced_batch(examples, 3, seed=4)[2], ids)
    assert not torch.equal(balanced_batch(examples, 3, seed=5)[2], ids)
    for per_class in (0, 5):
        with pytest.raises(InvalidValue, match="per_class"):
            balanced_batch(examples, per_class)
