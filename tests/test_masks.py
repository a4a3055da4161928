"""Masks: counting, set algebra, packing, files, and applying them to models."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_save
from torch import nn

from awkward import case
from prunus.errors import DamagedFile, InvalidValue, MaskMismatch, StorageFailed
from prunus.masks import Masks
from prunus.parameters import prunable

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 1, 3), "": (1, 1)}


@st.composite
def masks_of(draw, shapes=SHAPES):
    return Masks(
        {
            n: torch.tensor(draw(st.lists(st.booleans(), min_size=(k := int(np.prod(s))), max_size=k))).reshape(s)
            for n, s in shapes.items()
        }
    )


def pair():
    a = Masks({"w": torch.tensor([[True, True], [False, False]]), "v": torch.tensor([True, False])})
    b = Masks({"w": torch.tensor([[True, False], [True, False]]), "v": torch.tensor([True, False])})
    return a, b


def test_counts_by_hand():
    a, _ = pair()
    assert (a.kept, a.total, a.density, a.sparsity) == (3, 6, 0.5, 0.5)
    assert [(r.name, r.shape, r.kept, r.total, r.density) for r in a.table()] == [
        ("w", (2, 2), 2, 4, 0.5),
        ("v", (2,), 1, 2, 0.5),
    ]
    assert "kept 3/6" in repr(a)
    assert len(a) == 2
    assert list(a) == ["w", "v"]


def test_nothing_and_everything():
    nothing = Masks({})
    assert (nothing.kept, nothing.total, nothing.density, nothing.sparsity) == (0, 0, 1.0, 0.0)
    assert nothing.overlap(nothing) == 1.0
    assert nothing.churn(nothing) == 0.0
    empty = Masks({"w": torch.zeros(2, 2, dtype=torch.bool)})
    assert empty.overlap(empty) == 1.0
    assert (~empty).sparsity == 0.0
    assert Masks({"w": torch.zeros(0, 3, dtype=torch.bool)}).table()[0].density == 1.0


def test_algebra_by_hand():
    a, b = pair()
    assert (a | b)["w"].tolist() == [[True, True], [True, False]]
    assert (a & b)["w"].tolist() == [[True, False], [False, False]]
    assert (~a)["w"].tolist() == [[False, False], [True, True]]
    assert a.churn(b) == 2 / 6
    assert a.overlap(b) == 2 / 4


@FEW
@given(a=masks_of(), b=masks_of(), c=masks_of())
def test_algebra_laws(a, b, c):
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert ~~a == a
    assert a & (b | c) == (a & b) | (a & c)
    assert a | b == b | a
    assert a & b <= a <= a | b
    assert (a <= b) == (a & b == a) == (a | b == b)
    assert (a | b).kept + (a & b).kept == a.kept + b.kept
    assert a.kept + (~a).kept == a.total


@FEW
@given(a=masks_of(), b=masks_of(), c=masks_of())
def test_churn_is_a_distance_and_overlap_a_similarity(a, b, c):
    assert a.churn(a) == 0
    assert a.churn(b) == b.churn(a)
    assert (a.churn(b) == 0) == (a == b)
    assert a.churn(c) <= a.churn(b) + b.churn(c) + 1e-12
    assert a.churn(~a) == 1.0
    assert a.churn(b) == pytest.approx(((a | b).kept - (a & b).kept) / a.total)
    assert a.overlap(b) == b.overlap(a)
    assert 0 <= a.overlap(b) <= 1
    assert a.overlap(a) == 1.0
    if a.kept or b.kept:
        assert (a.overlap(b) == 1.0) == (a == b)


@FEW
@given(a=masks_of(), b=masks_of())
def test_packing_and_bytes_come_back(a, b):
    shapes = {n: tuple(m.shape) for n, m in a.items()}
    packed = a.packed()
    assert all(t.dtype == torch.uint8 and t.numel() == -(-a[n].numel() // 8) for n, t in packed.items())
    assert Masks.unpacked(packed, shapes) == a
    assert Masks.from_bytes(a.to_bytes()) == a
    assert (a.digest() == b.digest()) == (a == b)


def test_packing_puts_the_first_entry_in_the_highest_bit():
    mask = torch.tensor([True] + [False] * 6 + [True] + [True])
    assert Masks({"w": mask}).packed()["w"].tolist() == [0b10000001, 0b10000000]


def test_layout_in_memory_does_not_matter():
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    transposed = mask.t().contiguous().t()
    assert transposed.stride() != mask.stride()
    assert Masks({"w": transposed}) == Masks({"w": mask})
    assert Masks({"w": transposed}).to_bytes() == Masks({"w": mask}).to_bytes()


def test_the_digest_sees_names_and_shapes():
    bits = torch.tensor([True, False, True, False])
    digests = {Masks({n: bits.reshape(s)}).digest() for n in ("a", "b") for s in ((4,), (2, 2), (1, 4))}
    assert len(digests) == 6


def test_masks_must_be_bool():
    for wrong in (torch.ones(2), torch.ones(2, dtype=torch.uint8), [True, False], np.array([True])):
        with pytest.raises(InvalidValue, match=r"mask 'w' must be a bool tensor, not .*; write"):
            Masks({"w": wrong})


def test_masks_are_not_changed_through_the_mapping_given():
    given = {"w": torch.ones(2, dtype=torch.bool)}
    masks = Masks(given)
    given["v"] = torch.ones(2, dtype=torch.bool)
    assert list(masks) == ["w"]
    with pytest.raises(TypeError):
        masks["w"] = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(TypeError):
        hash(masks)
    assert masks != {"w": 1}


@pytest.mark.parametrize("operation", ["__or__", "__and__", "__le__", "churn", "overlap", "check_same"])
def test_masks_of_other_models_do_not_mix(operation):
    a = Masks({"w": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(MaskMismatch, match="'v' is missing in the first"):
        getattr(a, operation)(Masks({"w": a["w"], "v": a["w"]}))
    with pytest.raises(MaskMismatch, match="'w' is missing in the second"):
        getattr(a, operation)(Masks({}))
    with pytest.raises(MaskMismatch, match=r"\(2, 2\) in one set and \(4,\)"):
        getattr(a, operation)(Masks({"w": torch.ones(4, dtype=torch.bool)}))


def test_full_masks_name_the_prunable_tensors():
    model = case("attention").build()
    masks = Masks.full(model)
    assert list(masks) == list(prunable(model))
    assert masks.sparsity == 0.0
    assert list(Masks.full(model, exclude="attention*")) == ["head.weight"]


def test_apply_zeroes_exactly_the_holes():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = torch.tensor([[True, False, True], [False, True, True]])
    Masks({"0.weight": mask}).apply(model)
    assert torch.equal(model[0].weight, torch.where(mask, before["0.weight"], 0.0))
    assert torch.equal(model[1].weight, before["1.weight"])
    assert torch.equal(model[0].bias, before["0.bias"])


def test_apply_clears_nan_and_infinity_at_pruned_places():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[torch.nan, torch.inf]]))
    Masks({"weight": torch.tensor([[False, False]])}).apply(model)
    assert model.weight.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("action", ["apply", "parameters"])
def test_masks_that_do_not_fit_change_nothing(action):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = model[0].weight.detach().clone()
    hole = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(MaskMismatch, match=r"no parameter '0\.weights'.*Did you mean.*'0\.weight'"):
        getattr(Masks({"0.weight": hole, "0.weights": hole}), action)(model)
    with pytest.raises(MaskMismatch, match=r"'1\.weight' has shape \(2, 3\) but the parameter has \(2, 2\)"):
        getattr(Masks({"0.weight": hole, "1.weight": hole}), action)(model)
    assert torch.equal(model[0].weight, before)


def test_applying_through_a_tie_reaches_both_layers():
    model = case("tied linear").build()
    masks = Masks({"first.weight": torch.zeros(8, 8, dtype=torch.bool)})
    masks.apply(model)
    assert not model.second.weight.any()


def test_to_another_device_keeps_the_bits():
    a, _ = pair()
    assert a.to("cpu") == a
    assert a.to(torch.device("meta"))["w"].device.type == "meta"


# -- files: the shared suite flips every bit; here what a flip cannot reach ---------------------------------------


def forged(**changes):
    header = {"format": "prunus-masks-1", "shapes": '{"w": [2, 2]}', "sha256": "0" * 64} | changes
    return safetensors_save({"w": torch.tensor([160], dtype=torch.uint8)}, metadata=header)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        b"not a mask file at all",
        forged(),
        forged(shapes="[]"),
        forged(shapes="nothing"),
        forged(shapes='{"w": ["x"]}'),
        forged(shapes='{"w": [99999999999999999999999]}'),
        forged(format="prunus-masks-2"),
        safetensors_save({"w": torch.zeros(1)}),
        safetensors_save({}, metadata={}),
    ],
)
def test_foreign_files_are_refused(data):
    with pytest.raises(DamagedFile, match="somewhere"):
        Masks.from_bytes(data, source="somewhere")


def test_every_truncation_is_refused():
    data = pair()[0].to_bytes()
    for length in range(len(data)):
        with pytest.raises(DamagedFile):
            Masks.from_bytes(data[:length])


def test_missing_and_unreadable_files_are_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(DamagedFile, match=str(path)):
            Masks.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    a, b = pair()
    path = tmp_path / "masks.safetensors"
    a.save(path)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageFailed, match=r"masks\.safetensors"):
        b.save(path)
    monkeypatch.undo()
    assert Masks.load(path) == a
    assert os.listdir(tmp_path) == ["masks.safetensors"]


# -- holding ------------------------------------------------------------------------------------------------------


def test_hold_keeps_zeros_and_lets_masks_change():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    columns = {"first": [True, True, False, False], "second": [False, True, True, False]}
    masks = {n: Masks({"weight": torch.tensor([c, c])}) for n, c in columns.items()}
    hold = masks["first"].hold(model, optimizer)

    def step():
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
        for held in (model.weight, *(optimizer.state[model.weight][n] for n in ("exp_avg", "exp_avg_sq"))):
            assert not held[~hold.masks["weight"]].any()
            assert held[hold.masks["weight"]].all()

    for _ in range(3):
        step()
    kept = model.weight[:, 1].tolist()
    hold.masks = masks["second"]
    assert model.weight[:, 1].tolist() == kept
    for fresh in (model.weight, *(optimizer.state[model.weight][n] for n in ("exp_avg", "exp_avg_sq"))):
        assert not fresh[:, [0, 2, 3]].any()
    for _ in range(3):
        step()
    hold.detach()
    optimizer.zero_grad()
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    assert model.weight[:, [0, 3]].all()


def test_hold_refuses_what_is_no_optimizer_or_no_fit():
    model = nn.Linear(4, 2)
    masks = Masks({"weight": torch.ones(2, 4, dtype=torch.bool)})
    with pytest.raises(InvalidValue, match="is not a torch optimizer"):
        masks.hold(model, model)
    with pytest.raises(MaskMismatch):
        masks.hold(nn.Linear(2, 4), torch.optim.SGD(model.parameters(), 0.1))
