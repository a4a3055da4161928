"""Strings of the embedded Reber grammar: the automaton, what is drawn from it, and how it is encoded."""

from __future__ import annotations

import itertools

import pytest
import torch

from prunus.data import reber
from prunus.data.load import load
from prunus.data.reber import GRAMMAR, SYMBOLS, accepts, encode
from prunus.errors import InvalidValue


def language(length: int) -> set[str]:
    """All strings of the grammar with at most `length` symbols, by walking every way through it."""
    found, walks = set(), [("B", 0)]
    while walks:
        text, state = walks.pop()
        if not GRAMMAR[state]:
            found |= {f"B{outer}{text}E{outer}E" for outer in "TP"}
        elif len(text) < length - 4:
            walks += [(text + symbol, after) for symbol, after in GRAMMAR[state]]
    return {text for text in found if len(text) <= length}


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("BTBTXSETE", True),
        ("BPBPVVEPE", True),
        ("BTBTSSXXTVVETE", True),
        ("BTBTXSEPE", False),  # the outer symbol does not come back
        ("BPBTXSEPE", True),
        ("BTBTXSET", False),
        ("BTBTXVETE", False),
        ("BTBTXXVPSETE", True),
        ("BTBPVPXVVETE", True),
        ("BTBPVPXVPSETE", True),
        ("BTBPTTTVVETE", True),
        ("BTTXSETE", False),
        ("BXBTXSEXE", False),
        ("", False),
    ],
)
def test_automaton_by_hand(text, valid):
    assert accepts(text) is valid


def test_automaton_against_all_walks():
    valid = language(11)
    assert all(accepts(text) for text in valid)
    assert len(min(valid, key=len)) == reber.SHORTEST
    # Every string one symbol away from a valid one is accepted exactly when it is in the language.
    for text in sorted(valid)[:40]:
        for place, symbol in itertools.product(range(len(text)), SYMBOLS):
            changed = text[:place] + symbol + text[place + 1 :]
            assert accepts(changed) == (changed in valid)


def decode(row: torch.Tensor) -> str:
    return "".join(SYMBOLS[int(step.argmax())] for step in row if bool(step.any()))


def test_what_is_drawn():
    train, own, test = reber.read(train=301, test=101, length=25)
    assert own is None
    assert (len(train), len(test)) == (301, 101)
    assert train.counts().tolist() == [151, 150]
    assert test.counts().tolist() == [51, 50]
    texts = [decode(row) for part in (train, test) for row in part.x]
    labels = torch.cat([train.y, test.y]).tolist()
    assert len(set(texts)) == len(texts)
    assert all(accepts(t) == bool(label) for t, label in zip(texts, labels, strict=True))
    assert max(map(len, texts)) <= 25
    wrong = [t for t, label in zip(texts, labels, strict=True) if not label]
    only_the_ends_disagree = [t for t in wrong if accepts(f"{t[:-2]}{t[1]}{t[-1]}")]
    assert 0.35 < len(only_the_ends_disagree) / len(wrong) < 0.7
    again, _, _ = reber.read(train=301, test=101, length=25)
    assert torch.equal(again.x, train.x)
    other, _, _ = reber.read(train=301, test=101, length=25, draw=1)
    assert not torch.equal(other.x, train.x)


def test_encoding():
    x = encode(["BTE", "PX"], 4)
    assert x.shape == (2, 4, 7)
    assert [decode(row) for row in x] == ["BTE", "PX"]
    assert not bool(x[0, 3].any())
    assert not bool(x[1, 2:].any())
    left = encode(["BTE", "PX"], 4, "left")
    assert [decode(row) for row in left] == ["BTE", "PX"]
    assert not bool(left[0, 0].any())
    assert bool(left[:, -1].any(dim=1).all())
    with pytest.raises(InvalidValue, match="padding"):
        encode(["B"], 4, "both")
    with pytest.raises(InvalidValue, match="length=2"):
        encode(["BTE"], 2)


def test_as_a_data_set():
    splits = load("reber", validation=0.1, train=200, test=100)
    assert splits.num_classes == 2
    assert splits.input_shape == (40, 7)
    assert torch.equal(splits.train.normalise(splits.train.x), splits.train.x)
    assert not set(splits.train.ids.tolist()) & set(splits.test.ids.tolist())


@pytest.mark.parametrize("options", [{"train": 1}, {"test": 0}, {"length": 12}, {"train": 20_000, "length": 20}])
def test_refuses(options):
    with pytest.raises(InvalidValue):
        reber.read(**options)
