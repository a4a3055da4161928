"""Loading and splitting: digits, exact shares, limits, options, names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus.data.load import load
from prunus.data.registry import DATASETS
from prunus.data.split import amount, shares, stratified
from prunus.errors import DataMissing, InvalidValue, UnknownName


def test_digits_protocol() -> None:
    splits = load("digits", validation=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1000, 0, 797)
    assert splits.input_shape == (1, 8, 8)
    assert splits.num_classes == 10
    everything = torch.cat([splits.train.ids, splits.test.ids]).sort().values
    assert torch.equal(everything, torch.arange(1797))
    train = splits.train
    assert float(train.x.max()) == 1
    raw = train.x.double()
    torch.testing.assert_close(
        train.normalise(train.x).double(), (raw - raw.mean(0)) / (raw.std(0, correction=0) + 0.1), rtol=1e-4, atol=1e-5
    )


def test_digits_agree_with_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    official = datasets.load_digits()
    splits = load("digits")
    for part in (splits.train, splits.validation, splits.test):
        np.testing.assert_array_equal(part.x.numpy()[:, 0] * 16, official.images[part.ids.numpy()])
        np.testing.assert_array_equal(part.y.numpy(), official.target[part.ids.numpy()])


def test_validation_is_stratified_disjoint_and_keyed() -> None:
    splits = load("digits", seed=1)
    assert (len(splits.train), len(splits.validation)) == (900, 100)
    assert not set(splits.train.ids.tolist()) & set(splits.validation.ids.tolist())
    whole = load("digits", validation=0)
    assert set(splits.train.ids.tolist()) | set(splits.validation.ids.tolist()) == set(whole.train.ids.tolist())
    assert bool((splits.validation.counts() - whole.train.counts() / 10).abs().max() < 1)
    assert torch.equal(load("digits", seed=1).validation.ids, splits.validation.ids)
    assert not torch.equal(load("digits", seed=2).validation.ids, splits.validation.ids)
    assert torch.equal(load("digits", seed=2).test.ids, splits.test.ids)
    assert len(load("digits", validation=37).validation) == 37
    assert len(load("digits", validation=None).validation) == 0


def test_limit_is_balanced() -> None:
    splits = load("digits", limit=105)
    counts = splits.train.counts()
    assert int(counts.sum()) == 105
    assert int(counts.max() - counts.min()) == 1
    assert len(splits.validation) == 100
    for limit in (1, 901):
        with pytest.raises(InvalidValue, match="limit"):
            load("digits", limit=limit)


@pytest.mark.parametrize("validation", [-0.1, 1.0, 1000, -1])
def test_impossible_validation(validation: float) -> None:
    with pytest.raises(InvalidValue, match="validation"):
        load("digits", validation=validation)


def test_amount() -> None:
    assert amount(0.25, 10, "x") == 2
    assert amount(3, 10, "x") == 3
    assert amount(3.0, 10, "x") == 3
    assert amount(0.999, 10, "x") == 9


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    st.floats(0, 1),
    st.booleans(),
)
def test_shares_are_exact_and_fair(sizes: list[int], part: float, balanced: bool) -> None:
    most = torch.tensor(sizes)
    total = round(part * int(most.sum()))
    got = shares((most > 0) if balanced else most, total, most)
    assert int(got.sum()) == total
    assert bool((got <= most).all())
    assert bool((got >= 0).all())
    if balanced:
        # Fair: nobody who still had examples got more than one fewer than anybody else.
        open_classes = got < most
        if bool(open_classes.any()):
            assert int(got[open_classes].min()) >= int(got.max()) - 1
    else:
        assert bool(((got - most * (total / int(most.sum()))).abs() < 1 + 1e-9).all())


def test_stratified_draws_distinct_positions() -> None:
    y = torch.tensor([0] * 50 + [1] * 5 + [2] * 45)
    picked = stratified(y, 20, 3, 0, "x")
    assert picked.unique().numel() == 20
    assert torch.bincount(y[picked]).tolist() == [10, 1, 9]
    even = stratified(y, 21, 3, 0, "x", balanced=True)
    assert torch.bincount(y[even]).tolist() == [8, 5, 8]
    with pytest.raises(InvalidValue):
        stratified(y, 101, 3, 0)


def test_unknown_names_and_options() -> None:
    with pytest.raises(UnknownName, match="cifar10"):
        load("cifar-11")
    with pytest.raises(UnknownName, match="option of data set 'cifar10'"):
        load("cifar10", record=3)
    with pytest.raises(InvalidValue, match="dataset must be given"):
        load("huggingface")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist", "image-folder", "arrays"])
def test_missing_files_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNUS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataMissing, match="PRUNUS_DATA") as caught:
        load(name)
    assert "nowhere" in str(caught.value)
    with pytest.raises(DataMissing, match="elsewhere"):
        load(name, root=tmp_path / "elsewhere")


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys, prunus.data.registry as r, prunus.models.registry as m;"
        "assert len(r.DATASETS) == 9 and len(m.MODELS) > 12;"
        "assert not {'torch', 'numpy', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_do_not_import_scikit_learn() -> None:
    code = "import sys; from prunus.data.load import load; load('digits'); assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_row_is_complete() -> None:
    for row in DATASETS:
        assert row.summary
        assert row.licence
        assert callable(row.load())
        assert row.needs_files == (row.name not in ("digits", "reber", "huggingface"))
