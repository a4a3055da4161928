"""Units by hand, by brute force, and by their text; the shared suite checks the rest on every layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunus.errors import InvalidValue, UnknownName
from prunus.parameters import Address
from prunus.units import NM, Block, Row, Weight, unit
from suites import brute_force_pattern

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weight", Weight()),
        (" Row ", Row()),
        ("2:4", NM(2, 4)),
        ("10:16", NM(10, 16)),
        ("4x1", Block(4, 1)),
        ("block-4x1", Block(4, 1)),
        ("block16x8", Block(16, 8)),
        (NM(1, 2), NM(1, 2)),
    ],
)
def test_text_names_units(text, expected):
    assert unit(text) == expected
    assert unit(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "hint"), [("rows", "'row'"), ("wieght", "'weight'"), ("2:4:8", "'2:4'"), (7, "weight")]
)
def test_unknown_units_come_with_suggestions(text, hint):
    with pytest.raises(UnknownName, match=f"unknown unit.*{hint}"):
        unit(text)


@pytest.mark.parametrize("text", ["0:4", "5:4", "0x3", "3x0"])
def test_impossible_units_are_refused(text):
    with pytest.raises(InvalidValue, match=r"not possible|no elements"):
        unit(text)


def test_rows_by_hand():
    address = Address(name="w", shape=(3, 2))
    scores = torch.tensor([[1.0, 3.0], [0.0, 1.0], [5.0, 5.0]])
    assert Row().pool(scores, address).tolist() == [2.0, 0.5, 5.0]
    assert Row().spread(torch.tensor([True, False, True]), address).tolist() == [[True] * 2, [False] * 2, [True] * 2]
    assert Row().sizes(address).tolist() == [2, 2, 2]
    convolution = Address(name="c", shape=(2, 3, 2, 2), kind="conv")
    assert Row().sizes(convolution).tolist() == [12, 12]
    assert Row().spread(torch.tensor([False, True]), convolution).flatten(1).all(1).tolist() == [False, True]


def test_rows_of_recurrent_matrices_are_gate_rows():
    address = Address(name="w", shape=(8, 3), kind="recurrent", gates=4)
    mask = Row().spread(torch.arange(8) == 5, address)
    assert mask.any(1).nonzero().tolist() == [[5]]


def test_blocks_at_the_edge_are_smaller_and_not_padded():
    address = Address(name="w", shape=(3, 5))
    block = Block(2, 3)
    assert block.sizes(address).tolist() == [6, 4, 3, 2]
    scores = torch.arange(15.0).reshape(3, 5)
    assert block.pool(scores, address).tolist() == [3.5, 6.0, 11.0, 13.5]
    assert block.spread(torch.tensor([False, False, False, True]), address).nonzero().tolist() == [[2, 3], [2, 4]]


def test_patterns_by_hand():
    address = Address(name="w", shape=(1, 10))
    scores = torch.tensor([[5.0, 1, 4, 2, 1, 1, 1, 1, 3, 9]])
    assert NM(2, 4).choose(scores, address).int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0, 0, 1]]  # the tail of 2 keeps 1
    assert NM(2, 4).kept(address) == 5
    assert NM(1, 4).kept(address) == 3
    assert NM(3, 4).kept(address) == 8
    assert NM(2, 4).density == 0.5


def test_a_pattern_keeps_the_largest_sum_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    address = Address(name="w", shape=(6, 4))
    for n in range(1, 5):
        scores = torch.rand(6, 4, generator=generator)
        mask = NM(n, 4).choose(scores, address)
        best = [max(sum(row[i].item() for i in c) for c in itertools.combinations(range(4), n)) for row in scores]
        torch.testing.assert_close((scores * mask).sum(1), torch.tensor(best))


def test_all_of_m_is_dense_and_choosing_is_idempotent():
    address = Address(name="w", shape=(4, 12))
    scores = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    assert NM(4, 4).choose(scores, address).all()
    mask = NM(2, 4).choose(scores, address)
    assert torch.equal(NM(2, 4).choose(scores * mask, address), mask)


SMALL = st.integers(1, 4)


@FEW
@given(
    n=st.integers(1, 5),
    extra=st.integers(0, 4),
    outputs=SMALL,
    inputs=st.integers(1, 11),
    kernel=st.lists(st.integers(1, 3), max_size=2),
    groups=st.integers(1, 2),
    transposed=st.booleans(),
    data=st.data(),
)
def test_patterns_equal_brute_force(n, extra, outputs, inputs, kernel, groups, transposed, data):
    if transposed:
        shape = (groups * inputs, outputs, *kernel)
        address = Address(name="w", shape=shape, kind="conv-transpose", output_axis=1, groups=groups)
    else:
        shape = (groups * outputs, inputs, *kernel)
        address = Address(name="w", shape=shape, kind="conv", groups=groups)
    values = data.draw(hnp.arrays("float32", shape, elements=st.sampled_from([0.0, 1.0, 2.0, 3.0])))
    scores = torch.from_numpy(values)
    what = NM(n, n + extra)
    mask = what.choose(scores, address)
    assert torch.equal(mask, brute_force_pattern(scores, address, what.n, what.m))
    assert int(mask.sum()) == what.kept(address)


@FEW
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 5), height=st.integers(1, 7), width=st.integers(1, 7), data=st.data()
)
def test_blocks_partition_the_matrix(rows, columns, height, width, data):
    address = Address(name="w", shape=(height, width))
    block = Block(rows, columns)
    sizes = block.sizes(address)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=(k := sizes.numel()), max_size=k)))
    mask = block.spread(keep, address)
    assert int(mask.sum()) == int(sizes[keep].sum())
    torch.testing.assert_close(block.pool(mask.float(), address), keep.float())
    for row, column in itertools.product(range(height), range(width)):
        first = (row // rows * rows, column // columns * columns)
        assert mask[row, column] == mask[first]


def test_a_channels_last_tensor_is_pruned_like_any_other():
    scores = torch.rand(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    address = Address(name="w", shape=(4, 8, 3, 3), kind="conv")
    other = scores.to(memory_format=torch.channels_last)
    for what in (Row(), Block(2, 3)):
        torch.testing.assert_close(what.pool(other, address), what.pool(scores, address))
    assert torch.equal(NM(2, 4).choose(other, address), NM(2, 4).choose(scores, address))
