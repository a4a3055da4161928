"""Coupled units against what random networks themselves say: gradients, and brute force over parts of a unit.

A unit is right if, first, removing it equals masking it; second, each of its slices is dead (no output depends on it)
once the others are masked; third, nothing outside it dies with it; fourth, no part of it can be removed alone.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graph_checks import coupled, families, numbers, outputs, prove, scrambled, some
from prunus.graph.couple import Coupling, Family
from prunus.graph.edit import put, sliced
from prunus.graph.plan import Plan, difference

Slice = tuple[str, int, int]  # tensor, axis, position


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- random networks ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One step of a random network on (batch, channels, 4, 4); every activation keeps zero and is never flat."""

    def __init__(self, kind: str, channels: int, wide: int) -> None:
        super().__init__()
        self.kind, self.out = kind, channels
        if kind == "conv":
            self.a, self.out = nn.Conv2d(channels, wide, 3, padding=1), wide
        elif kind == "pointwise":
            self.a, self.out = nn.Conv2d(channels, wide, 1, bias=False), wide
        elif kind == "depthwise":
            self.a = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        elif kind == "grouped":
            self.a = nn.Conv2d(channels, channels, 1, groups=2)
        elif kind == "norm":
            self.n = nn.BatchNorm2d(channels)
        elif kind == "residual":
            self.a, self.b = nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, channels, 1)
        elif kind == "dense":
            self.a, self.out = nn.Conv2d(channels, wide, 1), channels + wide
        elif kind == "gated":
            self.a, self.out = nn.Conv2d(channels, 2 * wide, 1), wide
        elif kind == "excited":
            self.a, self.b = nn.Linear(channels, wide), nn.Linear(wide, channels)
        elif kind == "scaled":
            self.s = nn.Parameter(torch.zeros(channels, 1, 1))
        elif kind == "fork":
            self.a, self.b, self.out = nn.Conv2d(channels, wide, 1), nn.Conv2d(channels, wide, 1), wide
        elif kind == "parted":
            self.a, self.out = nn.Conv2d(channels, 2 + wide, 1), 2 + wide
            self.b = nn.Conv2d(wide, wide, 1)
            self.sizes = [2, wide]
        elif kind == "heads":
            self.a, self.out = nn.Conv2d(channels, 2 * wide, 1), 2 * wide
            self.b = nn.Linear(wide, wide, bias=False)
        elif kind == "attention":
            self.q = nn.Linear(channels, 6 * 2)
            self.b, self.out = nn.Linear(4, wide), wide
        elif kind == "up":
            self.a, self.out = nn.ConvTranspose2d(channels, wide, 1), wide

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        if kind in ("conv", "pointwise", "depthwise", "grouped", "up"):
            return self.a(x)
        if kind == "norm":
            return self.n(x)
        if kind == "act":
            return torch.tanh(x)
        if kind == "residual":
            return x + self.b(F.silu(self.a(x)))
        if kind == "dense":
            return torch.cat([self.a(x), x], 1)
        if kind == "gated":
            value, gate = self.a(x).chunk(2, 1)
            return value * torch.tanh(gate)
        if kind == "excited":
            return x * torch.sigmoid(self.b(F.gelu(self.a(x.mean((2, 3))))))[:, :, None, None]
        if kind == "scaled":
            return x * self.s
        if kind == "fork":
            return self.a(x) * 0.5 + self.b(torch.flip(x, (3,)))
        if kind == "parted":
            left, right = self.a(x).split(self.sizes, 1)
            return torch.cat([torch.tanh(left), self.b(right)], 1)
        if kind == "heads":
            y = self.a(x).unflatten(1, (2, -1)).permute(0, 1, 3, 4, 2)
            return self.b(y).permute(0, 1, 4, 2, 3).flatten(1, 2)
        if kind == "attention":
            q, k, v = self.q(x.flatten(2).transpose(1, 2)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            y = (q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v
            return self.b(y.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (4, 4))
        return x.flip(1)


class Random(nn.Module):
    """A chain of blocks between a convolution and a linear layer."""

    def __init__(self, kinds: list[str], start: int, wide: list[int], flat: bool, backwards: bool = False) -> None:
        super().__init__()
        blocks, channels = [], start
        for kind, width in zip(kinds, wide, strict=True):
            if kind == "grouped" and channels % 2:
                kind = "act"
            blocks.append(Block(kind, channels, width))
            channels = blocks[-1].out
        parts = {
            "first": nn.Conv2d(2, start, 1),
            "blocks": nn.ModuleList(blocks),
            "last": nn.Linear(channels * (16 if flat else 1), 3),
        }
        for name in reversed(parts) if backwards else parts:
            setattr(self, name, parts[name])
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for block in self.blocks:
            y = block(y)
        return self.last(torch.tanh(y.flatten(1) if self.flat else y.mean((2, 3))))


KINDS = [
    *("conv", "pointwise", "depthwise", "grouped", "norm", "act", "residual", "dense", "gated", "excited", "scaled"),
    *("fork", "parted", "heads", "attention", "up", "turned"),
]
EXAMPLE = numbers(2, 2, 4, 4)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the arguments of a `Random` network."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    wide = [draw(st.integers(2, 4)) for _ in kinds]
    return {"kinds": kinds, "start": draw(st.integers(2, 4)), "wide": wide, "flat": draw(st.booleans())}


def build(recipe: dict[str, Any], **options: Any) -> tuple[nn.Module, Coupling]:
    torch.manual_seed(0)
    model = scrambled(Random(**recipe, **options)).double()
    return model, coupled(model, EXAMPLE.double())


def slices_of(family: Family, unit: int) -> set[Slice]:
    return {(s.tensor, s.axis, int(p)) for s in family.slots for p in s.index[unit]}


def units_of(coupling: Coupling) -> set[frozenset[Slice]]:
    return {frozenset(slices_of(f, u)) for f in coupling.families for u in range(f.size)}


# -- the oracle ---------------------------------------------------------------------------------------------------


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def masked(model: nn.Module, slices: set[Slice]) -> nn.Module:
    """Return a copy with slices zero; variances stay, because they divide."""
    result = copy.deepcopy(model)
    stored = tensors(result)
    for name, axis, position in slices:
        if not name.endswith("running_var"):
            stored[name].select(axis, position).zero_()
    return result


def influence(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Return how strongly the outputs depend on every entry of every parameter: squared gradients, summed."""
    found = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    model.requires_grad_(True)
    out = model(example)
    for seed in range(2):
        model.zero_grad()
        (out * numbers(*out.shape, seed=7 + seed)).sum().backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] += parameter.grad.square()
    return found


def alive(strength: dict[str, Tensor], piece: Slice) -> bool:
    name, axis, position = piece
    return name in strength and float(strength[name].select(axis, position).max()) > 1e-18


def check_deaths(model: nn.Module, coupling: Coupling, family: Family, unit: int) -> None:
    mine = slices_of(family, unit)
    parameters = dict(model.named_parameters())
    pieces = [piece for piece in sorted(mine) if piece[0] in parameters]
    for own in pieces[:: max(1, len(pieces) // 8)]:
        strength = influence(masked(model, mine - {own}), EXAMPLE.double())
        # Two axes of one tensor may belong to the unit: what the other one masks is out of the question.
        for name, axis, position in mine - {own}:
            if name == own[0]:
                strength[name].select(axis, position).zero_()
        assert not alive(strength, own), (family.name, unit, own)
    before, after = influence(copy.deepcopy(model), EXAMPLE.double()), influence(masked(model, mine), EXAMPLE.double())
    for name, parameter in model.named_parameters():
        for axis, size in enumerate(parameter.shape):
            for position in range(size if size > 1 else 0):
                piece = (name, axis, position)
                if piece not in mine and alive(before, piece):
                    assert alive(after, piece), (family.name, unit, piece)


def check_minimal(model: nn.Module, family: Family, unit: int, rng: np.random.Generator, most: int = 24) -> None:
    """Assert that no part of a unit can be removed alone: the forward fails, or the outputs are others."""
    mine = sorted(slices_of(family, unit))
    if len(mine) <= 4:
        parts = [set(c) for k in range(1, len(mine)) for c in itertools.combinations(mine, k)]
    else:
        parts = [{piece} for piece in mine] + [set(mine) - {piece} for piece in mine]
        parts += [{p for p in mine if rng.random() < 0.5} for _ in range(most)]
        rng.shuffle(parts)
        parts = [p for p in parts if 0 < len(p) < len(mine)][:most]
    shapes = {n: t.shape for n, t in tensors(model).items()}
    for part in parts:
        gone: dict[str, set[int]] = {}
        for name, axis, position in part:
            gone.setdefault(f"{name}:{axis}", set()).add(position)
        keep = {
            key: np.array(
                [i for i in range(shapes[key.rpartition(":")[0]][int(key.rpartition(":")[2])]) if i not in out]
            )
            for key, out in gone.items()
        }
        if any(len(k) == 0 for k in keep.values()):
            continue
        small = copy.deepcopy(model)
        try:
            put(small, sliced(small, keep))
            found = outputs(small, EXAMPLE.double())
        except (RuntimeError, ValueError, IndexError):
            continue
        expected = outputs(masked(model, part), EXAMPLE.double())
        assert difference(expected, found) > 1e-6, (family.name, unit, part)


def check_partition(coupling: Coupling) -> None:
    """Assert that each family covers each of its axes in units that do not overlap, and rivals cross like a table."""
    for family in coupling.families:
        for slot in family.slots:
            assert slot.index.shape[0] == family.size
            assert len(np.unique(slot.index)) == slot.index.size
            assert slot.index.min() >= 0
            assert slot.index.max() < slot.shape[slot.axis]
    per_axis: dict[tuple[str, int], np.ndarray] = {}
    for family in coupling.families:
        for slot in family.slots:
            count = per_axis.setdefault((slot.tensor, slot.axis), np.zeros(slot.shape[slot.axis], dtype=int))
            count[slot.index.reshape(-1)] += 1
    for (tensor, axis), count in per_axis.items():
        assert f"{tensor}:{axis}" not in coupling.unprunable
        assert count.max() <= 3


# -- tests --------------------------------------------------------------------------------------------------------
# Networks are drawn the same every time: in ones of two channels behind two attentions another slice can lose its
# influence by accident when a unit goes, which the oracle takes for a missing tie.


@settings(max_examples=12, deadline=None, derandomize=True)
@given(recipes(), st.integers(0, 1000))
def test_units_are_what_gradients_and_brute_force_say(recipe, seed):
    model, coupling = build(recipe)
    check_partition(coupling)
    rng = np.random.default_rng(seed)
    candidates = [(f, u) for f in coupling.families if f.size > 1 for u in range(f.size)]
    if not candidates:
        return
    for index in rng.choice(len(candidates), min(2, len(candidates)), replace=False):
        family, unit = candidates[int(index)]
        check_deaths(model, coupling, family, unit)
        check_minimal(model, family, unit, rng)
        keep = np.arange(family.size) != unit
        prove(model, EXAMPLE.double(), coupling, {family.name: keep})


@settings(max_examples=15, deadline=None, derandomize=True)
@given(recipes(), st.integers(0, 1000))
def test_any_choice_of_units_can_go_at_once(recipe, seed):
    model, coupling = build(recipe)
    rng = np.random.default_rng(seed)
    chosen = [f for f in coupling.primary() if f.size > 1]
    if chosen:
        prove(model, EXAMPLE.double(), coupling, {f.name: some(f.size, rng) for f in chosen})


@settings(max_examples=12, deadline=None, derandomize=True)
@given(recipes())
def test_units_do_not_depend_on_the_order_of_parameters(recipe):
    _, coupling = build(recipe)
    _, backwards = build(recipe, backwards=True)
    assert units_of(coupling) == units_of(backwards)
    assert {frozenset(map(frozenset, (slices_of(f, u) for u in range(f.size)))) for f in coupling.families} == {
        frozenset(map(frozenset, (slices_of(f, u) for u in range(f.size)))) for f in backwards.families
    }


@settings(max_examples=8, deadline=None, derandomize=True)
@given(recipes())
def test_every_member_leads_to_the_same_unit(recipe):
    _, coupling = build(recipe)
    for family in coupling.families:
        owner: dict[Slice, int] = {}
        for unit in range(family.size):
            for piece in slices_of(family, unit):
                assert owner.setdefault(piece, unit) == unit
        for unit in range(family.size):
            keep = np.arange(family.size) != unit
            if keep.any():
                gone = {
                    (key.rpartition(":")[0], int(key.rpartition(":")[2]), int(p))
                    for key, kept in coupling.indices({family.name: keep}).items()
                    for p in np.setdiff1d(np.arange(_size(coupling, key)), kept)
                }
                assert gone == slices_of(family, unit)


def _size(coupling: Coupling, key: str) -> int:
    name, _, axis = key.rpartition(":")
    return coupling.graph.stored[name].shape[int(axis)]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(recipes())
def test_coupling_is_deterministic_and_leaves_the_model_alone(recipe):
    model, coupling = build(recipe)
    again = coupled(model, EXAMPLE.double())
    assert families(coupling) == families(again)
    assert units_of(coupling) == units_of(again)
    assert coupling.unprunable == again.unprunable
    assert coupling.macs() == again.macs()
    assert not any(p.is_meta for p in model.parameters())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(recipes(), st.integers(0, 1000))
def test_plans_follow_each_other_and_replay(recipe, seed):
    model, coupling = build(recipe)
    example = EXAMPLE.double()
    rng = np.random.default_rng(seed)
    chosen = [f for f in coupling.primary() if f.size > 1]
    if not chosen:
        return
    first = Plan.from_keep(coupling, {f.name: some(f.size, rng) for f in chosen})
    small = first.apply(model)
    after = coupled(small, example)
    left = [f for f in after.primary() if f.size > 1]
    second = Plan.from_keep(after, {f.name: some(f.size, rng) for f in left})
    assert not second.blocked
    smallest = second.apply(small)
    both = first.then(second)
    at_once = both.apply(model)
    assert {n: t.shape for n, t in smallest.state_dict().items()} == {
        n: t.shape for n, t in at_once.state_dict().items()
    }
    assert difference(outputs(smallest, example), outputs(at_once, example)) <= 1e-9
    assert both.verify(model, example) <= 1e-6
    # The plan as JSON, on a fresh instance with the same weights.
    replayed = Plan.from_dict(both.to_dict())
    assert replayed == both
    fresh = Random(**recipe).double().eval()
    fresh.load_state_dict(model.state_dict())
    assert difference(outputs(at_once, example), outputs(replayed.apply(fresh), example)) == 0


def test_the_oracle_notices_wrong_units():
    recipe = {"kinds": ["conv", "act"], "start": 3, "wide": [3, 2], "flat": False}
    model, coupling = build(recipe)
    family = coupling.families[0]
    rng = np.random.default_rng(0)
    check_deaths(model, coupling, family, 0)
    check_minimal(model, family, 0, rng)
    # A unit whose consumer is shifted by one, and a unit that is really two.
    slots = list(family.slots)
    consumer = next(i for i, s in enumerate(slots) if s.role == "input")
    slots[consumer] = type(slots[consumer])(**{**vars(slots[consumer]), "index": np.roll(slots[consumer].index, 1, 0)})
    shifted = Family(family.name, family.kind, family.size, tuple(slots), family.leaves)
    with pytest.raises(AssertionError):
        check_deaths(model, coupling, shifted, 0)
    pairs = [type(s)(**{**vars(s), "index": np.concatenate([s.index[:1], s.index[1:2]], 1)}) for s in family.slots]
    double = Family(family.name, family.kind, 1, tuple(pairs), family.leaves[:1])
    with pytest.raises(AssertionError):
        check_minimal(model, double, 0, rng, most=4000)
