"""Augmentation: identities, brute force, counts, names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prunus.data.augment import Crop, Cutout, crop, cutout, erase, flip, mirror, parse, shift
from prunus.errors import InvalidValue, UnknownName
from prunus.randomness import generator


def images(n: int = 9, side: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=generator(0, "images")) + 5


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_shift_against_slices(mode: str, dtype: torch.dtype) -> None:
    x = (images() * 20).to(dtype)
    padding = 3
    rows = torch.arange(9) % 7
    columns = (torch.arange(9) * 5) % 7
    got = shift(x, rows, columns, padding=padding, mode=mode)
    padded = F.pad(x.float(), (padding,) * 4, mode="constant" if mode == "zero" else "reflect").to(dtype)
    for i in range(9):
        r, c = int(rows[i]), int(columns[i])
        assert torch.equal(got[i], padded[i, :, r : r + 8, c : c + 8])
    middle = torch.full((9,), padding)
    assert torch.equal(shift(x, middle, middle, padding=padding, mode=mode), x)


def test_crop_reaches_every_offset_and_nothing_else() -> None:
    x = torch.zeros(2000, 1, 5, 5)
    x[:, 0, 2, 2] = 1
    moved = crop(x, generator(1), padding=1)
    places = {tuple(p[2:].tolist()) for p in moved.nonzero()}
    assert places == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}


def test_reflection_needs_room() -> None:
    for dtype in (torch.float32, torch.uint8):
        with pytest.raises(InvalidValue, match="reflection"):
            crop(torch.zeros(1, 1, 3, 3, dtype=dtype), generator(0), padding=3, mode="reflect")


def test_flip_is_an_involution_and_a_fair_coin() -> None:
    x = images()
    chosen = torch.arange(9) % 2 == 0
    once = mirror(x, chosen)
    assert torch.equal(once[chosen], x[chosen].flip(-1))
    assert torch.equal(once[~chosen], x[~chosen])
    assert torch.equal(mirror(once, chosen), x)
    ramp = torch.arange(4.0).expand(4000, 1, 1, 4)
    share = (flip(ramp, generator(2))[:, 0, 0, 0] == 3).float().mean()
    assert abs(float(share) - 0.5) < 0.04


def test_cutout_area() -> None:
    x = images(side=12)
    centre = torch.full((9,), 6)
    for size in (1, 4, 5):
        assert int((erase(x, centre, centre, size) == 0).sum()) == 9 * 3 * size * size
    corner = torch.zeros(9, dtype=torch.int64)
    assert int((erase(x, corner, corner, 4) == 0).sum()) == 9 * 3 * 2 * 2
    holes = (cutout(x, generator(3), size=4) == 0).sum((1, 2, 3)) // 3
    assert bool(((holes >= 4) & (holes <= 16)).all())


def test_inputs_are_left_alone() -> None:
    x = images()
    before = x.clone()
    for change in parse("crop2,reflect-crop2,flip,cutout3"):
        assert not torch.equal(change(x, generator(5)), before)
        assert torch.equal(x, before)


def test_names() -> None:
    first, second, third = parse("crop4, flip,cutout16")
    assert isinstance(first, Crop)
    assert (first.padding, first.mode) == (4, "zero")
    assert second is flip
    assert isinstance(third, Cutout)
    assert third.size == 16
    (reflected,) = parse(["reflect-crop2"])
    assert isinstance(reflected, Crop)
    assert (reflected.padding, reflected.mode) == (2, "reflect")
    assert parse("") == parse([]) == ()
    assert parse([flip, "crop"])[0] is flip


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("corp4", UnknownName),
        ("crop0", InvalidValue),
        ("flip2", InvalidValue),
        ("4", UnknownName),
        ("crop4x", UnknownName),
    ],
)
def test_wrong_names(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse(text)
    if text == "corp4":
        with pytest.raises(error, match="Did you mean 'crop'"):
            parse(text)
