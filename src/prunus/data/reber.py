"""Strings of the embedded Reber grammar, valid and invalid: a small language with a dependence over its whole length.

Source: Reber, Implicit learning of artificial grammars, 1967; embedded by Hochreiter and Schmidhuber, Long Short-Term
Memory, 1997; as a task for pruned recurrent networks: Darji, 2024 (arXiv 2407.20601).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from prunus.data.examples import Examples
from prunus.errors import InvalidValue
from prunus.randomness import generator

SYMBOLS = "BEPSTVX"
SHORTEST = 9

# State -> the two symbols that may follow, each with the state it leads to; the last state has no way out.
GRAMMAR: dict[int, tuple[tuple[str, int], ...]] = {
    0: (("T", 1), ("P", 2)),
    1: (("S", 1), ("X", 3)),
    2: (("T", 2), ("V", 4)),
    3: (("X", 2), ("S", 5)),
    4: (("P", 3), ("V", 5)),
    5: (),
}


def accepts(text: str) -> bool:
    """Return whether `text` is a string of the embedded Reber grammar: B, T or P, a Reber string, the same again, E.

    A Reber string is B, a walk through `GRAMMAR`, E.
    """
    if len(text) < SHORTEST or text[0] != "B" or text[-1] != "E" or text[1] not in "TP" or text[1] != text[-2]:
        return False
    inner = text[2:-2]
    if inner[0] != "B" or inner[-1] != "E":
        return False
    state = 0
    for symbol in inner[1:-1]:
        following = dict(GRAMMAR[state])
        if symbol not in following:
            return False
        state = following[symbol]
    return not GRAMMAR[state]


def encode(texts: list[str], length: int, padding: str = "right") -> Tensor:
    """Return (N, length, 7) float32: one step per symbol, one-hot in the order of `SYMBOLS`; padding is all zero.

    Raises:
        InvalidValue: a string longer than `length`, or padding other than "right" and "left".
    """
    if padding not in ("right", "left"):
        raise InvalidValue(f"padding={padding!r} must be 'right' or 'left'")
    x = torch.zeros(len(texts), length, len(SYMBOLS))
    for row, text in enumerate(texts):
        if len(text) > length:
            raise InvalidValue(f"{text!r} has {len(text)} symbols, more than length={length}")
        first = length - len(text) if padding == "left" else 0
        for step, symbol in enumerate(text):
            x[row, first + step, SYMBOLS.index(symbol)] = 1.0
    return x


def valid_strings(bits: Iterator[int], length: int) -> Iterator[str]:
    """Yield strings of the grammar with at most `length` symbols; every branch is taken with probability one half."""
    while True:
        outer = "TP"[next(bits)]
        text, state = "B", 0
        while GRAMMAR[state] and len(text) <= length:
            symbol, state = GRAMMAR[state][next(bits)]
            text += symbol
        whole = f"B{outer}{text}E{outer}E"
        if len(whole) <= length and not GRAMMAR[state]:
            yield whole


def invalid_strings(valid: Iterator[str], bits: Iterator[int]) -> Iterator[str]:
    """Yield strings just outside the grammar, made from valid ones.

    Half of them have the wrong symbol before the last one, which only the second symbol tells; in the other half one
    symbol, at any place, is replaced by any other symbol.
    """
    for text in valid:
        if next(bits):
            wrong = "P" if text[-2] == "T" else "T"
            yield f"{text[:-2]}{wrong}{text[-1]}"
            continue
        place = _number(bits, len(text))
        others = SYMBOLS.replace(text[place], "")
        changed = text[:place] + others[_number(bits, len(others))] + text[place + 1 :]
        if not accepts(changed):
            yield changed


def read(
    root: Path | None = None,
    *,
    train: int = 2000,
    test: int = 1000,
    length: int = 40,
    padding: str = "right",
    draw: int = 0,
) -> tuple[Examples, None, Examples]:
    """Return (training examples, None, test examples), inputs float32 (length, 7), label 1 for valid strings.

    Half of each part (rounded down) is valid. No string occurs twice, so none of the test strings was seen in
    training. The same numbers give the same strings everywhere. (The thesis uses 18,750 and 6,250 strings of up to
    about 55 symbols, as padded character codes, and does not say how its invalid strings were made.)

    Args:
        root: not used; the strings are made on the spot.
        train, test: how many strings, at least 2 each.
        length: steps of an input; longer strings are not drawn. At least 20.
        padding: where zeros fill up short strings. A classifier that reads the last step reads right-padded strings
            through their padding; pad on the left, or use a model that looks for the last symbol
            (`prunus.models.random_graph_rnn.RandomGraphRNN(padded=True)`).
        draw: key of the strings.

    Raises:
        InvalidValue: sizes below these, a padding that does not exist, or more strings than the language has.
    """
    if min(train, test) < 2 or length < 20:
        raise InvalidValue(f"train={train} and test={test} must be 2 or more, and length={length} 20 or more")
    total = [train // 2 + test // 2, (train - train // 2) + (test - test // 2)]
    bits = _bits(draw, "valid"), _bits(draw, "invalid base"), _bits(draw, "invalid")
    streams = valid_strings(bits[0], length), invalid_strings(valid_strings(bits[1], length), bits[2])
    valid, invalid = (_distinct(stream, count) for stream, count in zip(streams, total, strict=True))
    texts = [
        *valid[: train // 2],
        *invalid[: train - train // 2],
        *valid[train // 2 :],
        *invalid[train - train // 2 :],
    ]
    labels = [1] * (train // 2) + [0] * (train - train // 2) + [1] * (test // 2) + [0] * (test - test // 2)
    every = Examples.from_arrays(
        encode(texts, length, padding), torch.tensor(labels), classes=("invalid", "valid"), name="reber"
    )
    return every.subset(range(train)), None, every.subset(range(train, train + test))


def _distinct(stream: Iterator[str], count: int) -> list[str]:
    """Return the first `count` different strings of a stream, in the order of their first occurrence."""
    found: dict[str, None] = {}
    in_vain = 0
    while len(found) < count:
        text = next(stream)
        in_vain = in_vain + 1 if text in found else 0
        found[text] = None
        if in_vain > 20_000:
            raise InvalidValue(
                f"only {len(found)} different strings turned up where {count} are needed; allow longer ones (length=) "
                "or ask for fewer"
            )
    return list(found)


def _bits(draw: int, purpose: str) -> Iterator[int]:
    """Yield endless fair coin tosses, drawn in blocks that are keyed one by one."""
    block = 0
    while True:
        yield from torch.randint(0, 2, (4096,), generator=generator(draw, "reber", purpose, block)).tolist()
        block += 1


def _number(bits: Iterator[int], below: int) -> int:
    """Return a whole number in 0..below-1, each as likely as the others."""
    width = max(1, (below - 1).bit_length())
    while True:
        value = 0
        for _ in range(width):
            value = 2 * value + next(bits)
        if value < below:
            return value
