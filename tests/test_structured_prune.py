"""`prunus.prune` with units that are removed: exact counts, targets, limits, bad input, files, and what comes after."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunus
from graph_checks import Net, coupled, numbers, outputs, scrambled
from prunus.errors import (
    DamagedFile,
    Infeasible,
    InvalidValue,
    MaskMismatch,
    NonFinite,
    NothingPrunable,
    PrunusError,
    StorageFailed,
    UnknownName,
    Unsupported,
)
from prunus.graph.couple import Family, Slot
from prunus.graph.plan import Plan, difference
from prunus.structured.importance import normalised, pooled, unit_scores
from prunus.structured.select import Limits, best, by_share, form, to_target

IMAGE = numbers(2, 3, 8, 8)
ROWS = numbers(3, 5)
LABELLED = [(IMAGE, torch.tensor([0, 1])), (numbers(2, 3, 8, 8, seed=2), torch.tensor([2, 4]))]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Small(nn.Module):
    """A residual stream of 16 channels, a hidden layer of 24, a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 1)
        self.h = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.n(self.a(x)))
        return self.h((y + self.c(F.relu(self.b(y)))).mean((2, 3)))


class Baked(nn.Module):
    """Sizes spelled out in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        return self.b(F.relu(self.a(x)).reshape(batch, 12, 64).mean(-1))


class Heads(nn.Module):
    """One attention layer between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = nn.Linear(5, 12), nn.MultiheadAttention(12, 4, batch_first=True)
        self.d = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.d(self.t(y, y, y, need_weights=False)[0])


def small() -> nn.Module:
    return scrambled(Small())


def cut(model: nn.Module, sparsity: Any = None, *, unit: str = "channel", example: Any = IMAGE, **options: Any) -> Any:
    return prunus.prune(model, sparsity, unit=unit, example=example, measure=False, **options)


def kept(result: Any) -> dict[str, int]:
    return {f["name"]: f["kept"] for f in result.report.families}


# -- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 0.99])
def test_local_scope_removes_the_same_share_of_every_family(share):
    found = kept(cut(small(), share))
    assert found == {"a.weight:0": max(1, 16 - round(16 * share)), "b.weight:0": max(1, 24 - round(24 * share))}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
def test_global_scope_removes_exactly_the_share_of_all_units(share):
    assert sum(kept(cut(small(), share, scope="global")).values()) == 40 - round(40 * share)


def test_isomorphic_families_compete_among_themselves():
    first = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU()]
    model = scrambled(nn.Sequential(*first, nn.Linear(12, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)))
    found = kept(cut(model, 0.5, example=ROWS, scope="isomorphic"))
    assert found["0.weight:0"] + found["2.weight:0"] == 10
    assert found["4.weight:0"] == 3


def test_reports_count_what_is_really_there():
    model = small()
    result = cut(model, 0.5)
    report = result.report
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.parameters_kept == sum(p.numel() for p in result.model.parameters())
    assert report.units == 40
    assert report.units_kept == 20
    assert report.difference <= 1e-5
    assert report.macs == 64 * (16 * 27 + 16 * 24 * 2) + 16 * 5
    assert report.macs_kept == 64 * (8 * 27 + 8 * 12 * 2) + 8 * 5
    assert report.sparsity == 1 - report.parameters_kept / report.parameters
    json.dumps(report.to_dict())
    assert "removed equals masked" in str(report)
    assert not report.blocked


def test_what_goes_are_the_lowest_scores_and_ties_keep_the_earlier_unit():
    model = small()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
        model.b.weight[7] = 0.1
        model.b.weight[20] = 0.2
    plan = cut(model, 0.5).plan
    assert plan.families["a.weight:0"] == list(range(8))
    assert plan.families["b.weight:0"] == [i for i in range(13) if i != 7]


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.8, 1.0])
def test_targets_are_met_from_below_within_one_unit(what, scope, share):
    model = small()
    coupling = coupled(model, IMAGE)
    cost = coupling.macs if what == "macs" else coupling.parameters
    result = cut(model, scope=scope, **{what: share})
    keep = {n: np.isin(np.arange(coupling[n].size), k) for n, k in result.plan.families.items()}
    keep = {f.name: keep.get(f.name, np.ones(f.size, dtype=bool)) for f in coupling.families}
    assert cost(keep) <= share * cost({})
    for name, mask in keep.items():
        if not mask.all():
            more = mask.copy()
            more[np.flatnonzero(~mask)[0]] = True
            assert cost(keep | {name: more}) > share * cost({}), "one more unit would have fitted"


def test_a_target_may_be_an_amount():
    result = cut(small(), params=700)
    assert result.report.parameters_kept <= 700
    assert result.report.parameters_kept > 600


def test_a_target_that_no_cut_reaches_says_how_far_it_could_go():
    with pytest.raises(Infeasible, match="floor"):
        cut(small(), macs=1e-6)
    with pytest.raises(Infeasible, match="remain"):
        cut(small(), params=0.2, minimum=0.9)


@pytest.mark.parametrize("options", [
    {"minimum": 10}, {"minimum": 0.75}, {"round_to": 8}, {"round_to": 5}, {"minimum": 9, "round_to": 4},
    {"minimum": 1000},
])  # fmt: skip
def test_limits_hold(options):
    found = kept(cut(small(), 0.8, scope="global", **options))
    for name, size in (("a.weight:0", 16), ("b.weight:0", 24)):
        least = options.get("minimum", 1)
        least = int(np.ceil(least * size)) if isinstance(least, float) else min(least, size)
        assert found[name] >= least
        step = options.get("round_to", 1)
        assert found[name] % step == 0 or found[name] == size


def test_protected_families_stay_whole():
    assert kept(cut(small(), 0.5, protect="a.*"))["a.weight:0"] == 16
    found = kept(cut(small(), 0.9, scope="global", protect=["b.bias"]))
    assert found["b.weight:0"] == 24
    assert found["a.weight:0"] < 16
    with pytest.raises(InvalidValue, match="matches no tensor"):
        cut(small(), 0.5, protect="nothing*")


def test_heads():
    model = scrambled(Heads())
    result = cut(model, 0.5, unit="head", example=numbers(2, 7, 5))
    assert kept(result) == {"t.in_proj_weight:0": 2}
    assert result.model.t.in_proj_weight.shape == (18, 12)
    assert result.model.t.num_heads == 2
    with pytest.raises(NothingPrunable, match="head"):
        cut(small(), 0.5, unit="head")


# -- selection against brute force --------------------------------------------------------------------------------


def family(name: str, size: int, kind: str = "channel", role: str = "output") -> Family:
    slot = Slot(name, 0, np.arange(size)[:, None], role, (size, 3))
    return Family(f"{name}:0", kind, size, (slot,), np.arange(size))


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(sizes, st.floats(0, 0.99), st.integers(0, 99), st.integers(1, 3), st.integers(1, 3))
def test_global_scope_keeps_the_best_units_above_the_floors(sizes, share, seed, minimum, levels):
    families = [family(f"f{i}", n) for i, n in enumerate(sizes)]
    rng = np.random.default_rng(seed)
    scores = {f.name: torch.tensor(rng.integers(0, levels + 1, f.size), dtype=torch.float64) for f in families}
    limits = Limits(minimum)
    result = by_share(families, scores, share, limits, "global")
    floors = sum(min(minimum, f.size) for f in families)
    total = sum(f.size for f in families)
    assert sum(int(k.sum()) for k in result.values()) == max(total - round(share * total), floors)
    for f in families:
        assert int(result[f.name].sum()) >= min(minimum, f.size)
        gone, stays = scores[f.name][~result[f.name]], scores[f.name][result[f.name]]
        if len(gone):
            assert gone.max() <= stays.min()
    for f, g in itertools.permutations(families, 2):
        gone, stays = scores[f.name][~result[f.name]], scores[g.name][result[g.name]]
        if len(gone) and len(stays) > min(minimum, g.size):
            assert gone.max() <= stays.min()


@settings(max_examples=150, deadline=None)
@given(sizes, st.floats(0.05, 1.0), st.integers(0, 99), st.sampled_from(["local", "global"]))
def test_any_target_is_met_and_nothing_more_fits(sizes, part, seed, scope):
    families = [family(f"f{i}", n) for i, n in enumerate(sizes)]
    rng = np.random.default_rng(seed)
    scores = {f.name: torch.tensor(rng.random(f.size)) for f in families}
    weights = {f.name: float(rng.integers(1, 20)) for f in families}

    def cost(keep: Mapping[str, Tensor]) -> float:
        return sum(weights[f.name] * (int(keep[f.name].sum()) if f.name in keep else f.size) for f in families)

    target = part * cost({})
    floor = sum(weights.values())
    if floor > target:
        with pytest.raises(Infeasible):
            to_target(families, scores, cost, target, Limits(), scope, what="cost")
        return
    result = to_target(families, scores, cost, target, Limits(), scope, what="cost")
    assert cost(result) <= target
    for f in families:
        if not result[f.name].all():
            assert cost(result) + weights[f.name] > target
        assert torch.equal(result[f.name], best(scores[f.name], int(result[f.name].sum())))


def test_best_breaks_ties_by_position():
    assert best(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]


def test_form_tells_kinds_and_roles_apart():
    assert form(family("a", 3)) == form(family("b", 5))
    assert form(family("a", 3)) != form(family("a", 3, role="input"))
    assert form(family("a", 3)) != form(family("a", 3, kind="head"))


@pytest.mark.parametrize("options", [
    {"minimum": 0}, {"minimum": -1}, {"minimum": 1.5}, {"minimum": float("nan")}, {"minimum": True}, {"minimum": "2"},
    {"minimum": None}, {"round_to": 0}, {"round_to": 2.0}, {"round_to": True}, {"round_to": "8"},
])  # fmt: skip
def test_bad_limits(options):
    with pytest.raises(InvalidValue, match=next(iter(options))):
        Limits(**options)


# -- scores of units ----------------------------------------------------------------------------------------------


def test_units_pool_every_slice_that_goes_with_them():
    model = small()
    coupling = coupled(model, IMAGE)
    found = unit_scores(model, coupling.families, normalise="none")
    b, c = model.b.weight.detach().double().abs(), model.c.weight.detach().double().abs()
    torch.testing.assert_close(found["b.weight:0"], b.sum((1, 2, 3)) + c.sum((0, 2, 3)))
    stream = model.a.weight.abs().double().sum((1, 2, 3)) + b.sum((0, 2, 3)) + c.sum((1, 2, 3))
    torch.testing.assert_close(found["a.weight:0"], (stream + model.h.weight.abs().double().sum(0)).detach())


@pytest.mark.parametrize(("pool", "expected"), [("sum", [6.0, 22.0]), ("mean", [1.5, 5.5]), ("max", [3.0, 7.0])])
def test_pools_by_hand(pool, expected):
    slots = (Slot("w", 1, np.array([[0, 1], [2, 3]]), "input", (2, 4)),)
    units = Family("w:1", "channel", 2, slots, np.arange(2))
    scores = {"w": torch.tensor([[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]])}
    assert pooled(scores, units, pool=pool).tolist() == expected
    assert pooled(scores, units, pool="l2").tolist() == pytest.approx([14**0.5, 126**0.5])


def test_normalisation_by_hand():
    scores = torch.tensor([1.0, 3.0])
    assert normalised(scores, "mean").tolist() == [0.5, 1.5]
    assert normalised(scores, "sum").tolist() == [0.25, 0.75]
    assert normalised(scores, "max").tolist() == pytest.approx([1 / 3, 1.0])
    assert normalised(torch.zeros(2), "max").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("score", ["magnitude", "taylor", "random", "wanda", "snip", "fisher", "grasp", "synflow"])
def test_any_element_score_ranks_units(score):
    result = cut(small(), 0.5, score=score, data=LABELLED)
    assert kept(result) == {"a.weight:0": 8, "b.weight:0": 12}
    again = cut(small(), 0.5, score=score, data=LABELLED)
    assert result.plan == again.plan


# -- bad input ----------------------------------------------------------------------------------------------------

BAD: list[tuple[str, Callable[[], Any], type[PrunusError]]] = [
    ("no target", lambda: cut(small()), InvalidValue),
    ("two targets", lambda: cut(small(), 0.5, macs=0.5), InvalidValue),
    ("everything", lambda: cut(small(), 1.0), InvalidValue),
    ("negative", lambda: cut(small(), -0.1), InvalidValue),
    ("not a number", lambda: cut(small(), float("nan")), InvalidValue),
    ("text", lambda: cut(small(), "0.5"), InvalidValue),
    ("true", lambda: cut(small(), True), InvalidValue),
    ("no macs", lambda: cut(small(), macs=0), InvalidValue),
    ("macs nan", lambda: cut(small(), macs=float("nan")), InvalidValue),
    ("macs text", lambda: cut(small(), macs="half"), InvalidValue),
    ("more macs than there are", lambda: cut(small(), macs=10**12), InvalidValue),
    ("no example", lambda: cut(small(), 0.5, example=None), InvalidValue),
    ("wrong channels", lambda: cut(small(), 0.5, example=numbers(2, 4, 8, 8)), InvalidValue),
    ("wrong dtype", lambda: cut(small(), 0.5, example=IMAGE.long()), InvalidValue),
    ("no tensor", lambda: cut(small(), 0.5, example="x"), InvalidValue),
    ("no arguments", lambda: cut(small(), 0.5, example=[]), InvalidValue),
    ("unknown scope", lambda: cut(small(), 0.5, scope="everywhere"), InvalidValue),
    ("unknown score", lambda: cut(small(), 0.5, score="magnitud"), UnknownName),
    ("unknown pool", lambda: cut(small(), 0.5, pool="median"), InvalidValue),
    ("unknown normalisation", lambda: cut(small(), 0.5, normalise="std"), InvalidValue),
    ("unknown option", lambda: cut(small(), 0.5, mac=0.5), UnknownName),
    ("an option of zeroed units", lambda: cut(small(), 0.5, budget="global"), InvalidValue),
    ("a score without its data", lambda: cut(small(), 0.5, score="taylor"), InvalidValue),
    ("no parameters", lambda: cut(nn.ReLU(), 0.5), NothingPrunable),
    ("outputs only", lambda: cut(nn.Linear(5, 4), 0.5, example=ROWS), NothingPrunable),
    ("TorchScript", lambda: cut(torch.jit.trace(small(), IMAGE), 0.5), Unsupported),
    ("NaN weights", lambda: cut(poisoned("a.weight"), 0.5), NonFinite),
    ("every unit of weights needs an example", lambda: prunus.prune(small(), 0.5, unit="channel"), InvalidValue),
]  # fmt: skip


def poisoned(name: str) -> nn.Module:
    model = small()
    model.state_dict()[name].view(-1)[0] = float("nan")
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:")
@pytest.mark.parametrize(("call", "error"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_gets_a_typed_error(call, error):
    with pytest.raises(error) as caught:
        call()
    assert len(str(caught.value)) > 20


def test_a_model_that_cannot_be_ranked_is_untouched():
    model = poisoned("a.weight")
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(NonFinite):
        cut(model, 0.5, inplace=True)
    assert [p.shape for p in model.parameters()] == shapes


def test_control_flow_that_depends_on_data_is_noted():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(m.a(x)) if x.sum() > -1e9 else m.c(m.b(x))

    model = scrambled(Net(forward, a=nn.Linear(5, 8), b=nn.Linear(5, 8), c=nn.Linear(8, 4)))
    result = cut(model, 0.5, example=ROWS)
    assert any("looks at values" in n for n in result.report.notes)
    assert result.report.difference <= 1e-5


# -- models as they come ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_are_looked_through():
    model = small()
    plain = cut(model, 0.5)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        result = cut(wrapped, 0.5)
        assert type(result.model) is Small
        assert result.plan == plain.plan


def test_the_original_is_untouched_unless_asked():
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    result = cut(model, 0.5)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert result.model.training
    assert result.model is not model
    same = cut(model, 0.5, inplace=True)
    assert same.model is model
    assert model.a.out_channels == 8
    assert model.h.in_features == 8
    assert model.n.num_features == 8


def test_frozen_parameters_are_cut_and_stay_frozen():
    model = small()
    model.a.requires_grad_(False)
    result = cut(model, 0.5)
    assert {n: p.requires_grad for n, p in result.model.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    result = cut(small().to(dtype), 0.5, example=IMAGE.to(dtype))
    assert all(p.dtype == dtype for p in result.model.parameters())
    assert not result.report.blocked


def test_a_model_without_numbers_can_be_planned_but_not_scored():
    model = Small().to("meta")
    coupling = coupled(model, IMAGE)
    plan = Plan.from_keep(coupling, {"b.weight:0": [True, False] * 12})
    assert plan.apply(model).b.weight.shape == (12, 16, 1, 1)
    real = small()
    assert plan.verify(real, IMAGE) <= 1e-5
    with pytest.raises(PrunusError):
        cut(model, 0.5)


def test_sizes_spelled_in_code_are_changed():
    model = scrambled(Baked())
    result = cut(model, 0.5)
    assert kept(result) == {"a.weight:0": 6}
    assert result.report.difference <= 1e-5
    assert result.model(numbers(5, 3, 8, 8)).shape == (5, 4)
    assert isinstance(result.model, Baked)


class Cached(nn.Module):
    """Attention of four heads that reads its bias once in eval mode and remembers it, and whose stride is four, too."""

    def __init__(self, spelled: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.bias = nn.Linear(8, 36), nn.Linear(12, 8), nn.Parameter(torch.zeros(4, 5))
        self.heads, self.stride, self.spelled = 4, 4, spelled
        self.register_buffer("places", torch.arange(8)[:, None].sub(torch.arange(8)).abs() % 5, persistent=False)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Cached:
        self.cache = {}
        return super().train(mode)

    def biases(self) -> Tensor:
        if self.training:
            return self.bias[:, self.places]
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[:, self.places]
        return self.cache["bias"]

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, self.heads, -1).permute(0, 2, 1, 3).split([3, 3, 3], dim=3)
        y = (q @ k.transpose(-2, -1) * 0.5 + self.biases()).softmax(-1) @ v
        if self.spelled:  # heads counted where only the batch is known
            y = y.reshape(batch * 4, tokens, 3).tanh().reshape(batch, 4, tokens, 3)
        return self.out(y.transpose(1, 2).reshape(batch, -1, 12))


class Around(nn.Module):
    """Reads the stride that the attention inside it remembers."""

    def __init__(self, spelled: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 8), Cached(spelled), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.inner(x)
        return self.last(x.view(x.shape[0], self.inner.stride, -1, x.shape[-1]).amax(1))


@pytest.mark.parametrize("spelled", [False, True])
def test_sizes_are_found_again_on_every_forward_and_for_batches_of_any_size(spelled):
    model = scrambled(Around(spelled))
    example, other = numbers(2, 8, 5), numbers(5, 8, 5)
    outputs(model, example)
    result = cut(model, 0.5, example=example)
    assert not result.report.blocked
    assert any(f["kind"] == "head" and f["kept"] == 2 for f in result.report.families)
    assert result.plan.verify(model, other) <= 1e-5
    small = result.model.eval()
    once = [small(batch) for batch in (example, other)]
    for _ in range(2):  # what was computed once is remembered now
        for batch, expected in zip((example, other), once, strict=True):
            assert torch.equal(small(batch), expected)
    small.train()
    assert small(other).shape == (5, 2, 3)


def test_a_size_that_stays_but_is_computed_from_one_that_goes():
    def forward(m: Any, x: Tensor) -> Tensor:
        batch, tokens, width = (x := m.a(x)).shape
        q, k, v = m.q(x), m.k(x), m.v(x)
        y = F.scaled_dot_product_attention(*(t.view(batch, tokens, 1, 12).transpose(1, 2) for t in (q, k, v)))
        return m.c(x + m.o(y.transpose(1, 2).reshape(batch, tokens, width)))

    parts = {name: nn.Linear(12, 12) for name in "qkvo"}
    model = scrambled(Net(forward, a=nn.Linear(5, 12), c=nn.Linear(12, 3), **parts))
    coupling = coupled(model, numbers(2, 7, 5))
    plan = Plan.from_keep(coupling, {"a.weight:0": [True, False] * 6})
    assert not plan.blocked
    assert plan.verify(model, numbers(3, 6, 5)) <= 1e-5


class Routed(nn.Module):
    """Every image is convolved with its own mixture of two weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.zeros(2, outputs * inputs * 9))

    def forward(self, x: Tensor, routing: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weight = (routing @ self.weight).view(batch * self.outputs, self.inputs, 3, 3)
        y = F.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        return y.view(batch, self.outputs, height, width)


def test_a_convolution_of_its_own_for_every_image():
    def forward(m: Any, x: Tensor) -> Tensor:
        routing = torch.sigmoid(m.r(x.mean((2, 3))))
        return m.c(F.relu(m.n(m.d(F.relu(m.b(F.relu(m.a(x)), routing)), routing))))

    parts = {"a": nn.Conv2d(3, 8, 1), "b": Routed(8, 6), "d": Routed(6, 10), "n": nn.BatchNorm2d(10)}
    model = scrambled(Net(forward, r=nn.Linear(3, 2), c=nn.Conv2d(10, 4, 1), **parts))
    result = cut(model, 0.5)
    # Inputs and outputs of such a layer share one axis of its weight, so that of a chain every second is offered.
    assert kept(result) == {"a.weight:0": 4, "d.weight:1": 5, "r.weight:0": 1}
    assert not result.report.blocked
    assert result.plan.verify(model, numbers(3, 3, 8, 8)) <= 1e-5
    both = Plan.from_keep(coupled(model, IMAGE), {"a.weight:0": [True, False] * 4, "b.weight:1": [True, False] * 3})
    assert not both.blocked
    assert both.verify(model, numbers(3, 3, 8, 8)) <= 1e-5


def test_a_buffer_that_the_forward_builds_is_no_reason_to_refuse_a_fresh_model(tmp_path):
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p, self.c = nn.Linear(5, 8), nn.Linear(3, 8), nn.Linear(8, 4)
            self.register_buffer("table", torch.zeros(1, 3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if len(self.table) != x.shape[1]:
                self.table = torch.arange(3.0 * x.shape[1]).reshape(-1, 3).sin()
            return self.c(F.relu(self.a(x) + self.p(self.table)))

    model, example = scrambled(Positions()), numbers(2, 7, 5)
    expected = outputs(model, example)
    result = cut(model, 0.5, example=example)
    assert kept(result) == {"a.weight:0": 4}
    assert "not saved" in result.report.unprunable["p.weight:1"]
    result.save(tmp_path / "small.safetensors")
    loaded = prunus.load(tmp_path / "small.safetensors", Positions())
    assert difference(outputs(result.model, example), outputs(loaded, example)) == 0
    assert difference(expected, outputs(model, example)) == 0


# -- after the cut ------------------------------------------------------------------------------------------------

MAKERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "residual": (Small, IMAGE),
    "baked": (Baked, IMAGE),
    "heads": (Heads, numbers(2, 7, 5)),
}


@pytest.fixture(params=sorted(MAKERS))
def done(request):
    make, example = MAKERS[request.param]
    model = scrambled(make())
    return make, model, cut(model, 0.5, example=example), example


def test_a_pruned_model_trains(done):
    _, _, result, example = done
    model = result.model.train()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(example).square().mean().backward()
    optimizer.step()
    assert all(
        not torch.equal(a, b) for a, b, p in zip(before, model.parameters(), model.parameters()) if p.grad is not None
    )


def test_a_pruned_model_is_copied_saved_and_exported(done, tmp_path):
    make, _, result, example = done
    result.model.eval()
    expected = outputs(result.model, example)
    assert difference(expected, outputs(copy.deepcopy(result.model), example)) == 0
    again = result.plan.apply(scrambled(make(), 9))
    again.load_state_dict(result.model.state_dict())
    assert difference(expected, outputs(again, example)) == 0
    result.save(tmp_path / "small.safetensors")
    loaded = prunus.load(tmp_path / "small.safetensors", scrambled(make(), 5))
    assert difference(expected, outputs(loaded, example)) == 0
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {
        n: t.shape for n, t in result.model.state_dict().items()
    }
    with torch.no_grad():
        exported = torch.export.export(result.model, (example,))
        assert difference(expected, [exported.module()(example)]) <= 1e-6


def test_a_pruned_model_is_pruned_again(done):
    _, model, result, example = done
    second = cut(result.model, 0.5, example=example)
    both = result.plan.then(second.plan)
    assert both.verify(model, example) <= 1e-5
    assert difference(outputs(second.model, example), outputs(both.apply(model), example)) <= 1e-6
    with pytest.raises(MaskMismatch):
        second.plan.then(result.plan)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pruned_model_compiles(done):
    _, _, result, example = done
    result.model.eval()
    compiled = torch.compile(result.model)
    with torch.no_grad():
        assert difference(outputs(result.model, example), [compiled(example)]) <= 1e-5


def test_a_second_cut_remembers_the_sizes_that_the_first_changed():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(m.a(x).view(3, 6)) + m.d(m.b(x).view(3, 8))

    model = scrambled(Net(forward, a=nn.Linear(5, 6), b=nn.Linear(5, 8), c=nn.Linear(6, 4), d=nn.Linear(8, 4)))
    first = Plan.from_keep(coupled(model, ROWS), {"a.weight:0": [True] * 4 + [False] * 2})
    half = first.apply(model)
    second = Plan.from_keep(coupled(half, ROWS), {"b.weight:0": [True, False] * 4})
    assert not second.blocked
    assert second.verify(half, ROWS) <= 1e-5
    assert first.then(second).verify(model, ROWS) <= 1e-5


def test_a_second_cut_goes_on_counting_what_the_first_removed():
    for kind in (nn.LayerNorm, nn.RMSNorm):
        model = scrambled(Net(lambda m, x: m.c(m.n(m.a(x))), a=nn.Linear(5, 8), n=kind(8), c=nn.Linear(8, 4)))
        first = cut(model, 0.25, example=ROWS, norms="counted")
        second = cut(first.model, 0.5, example=ROWS, norms="counted")
        assert kept(second) == {"a.weight:0": 3}
        assert second.report.difference <= 1e-5
        both = first.plan.then(second.plan)
        assert both.verify(model, ROWS) <= 1e-5
        assert difference(outputs(second.model, ROWS), outputs(both.apply(model), ROWS)) <= 1e-6


# -- plans and files ----------------------------------------------------------------------------------------------


def test_a_plan_fits_one_model_once():
    result = cut(small(), 0.5)
    with pytest.raises(MaskMismatch, match="already applied"):
        result.plan.apply(result.model)
    with pytest.raises(MaskMismatch, match="another model"):
        result.plan.apply(nn.Linear(3, 4))
    other = scrambled(Small())
    other.b = nn.Conv2d(16, 20, 1)
    with pytest.raises(MaskMismatch, match="another model"):
        result.plan.apply(other, inplace=True)
    assert other.a.weight.shape[0] == 16


def test_a_mask_must_fit_its_family():
    coupling = coupled(small(), IMAGE)
    with pytest.raises(UnknownName, match="Did you mean"):
        Plan.from_keep(coupling, {"b.weigt:0": [True] * 24})
    with pytest.raises(MaskMismatch, match="24 units"):
        Plan.from_keep(coupling, {"b.weight:0": [True] * 23})
    with pytest.raises(InvalidValue, match="keeps nothing"):
        Plan.from_keep(coupling, {"b.weight:0": [False] * 24})
    whole = Plan.from_keep(coupling, {"b.weight:0": torch.ones(24, dtype=torch.bool)})
    assert not whole
    assert whole.verify(small(), IMAGE) == 0


def test_plans_round_trip_through_files(tmp_path):
    plan = cut(scrambled(Baked()), 0.5).plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text()
    for damaged in (
        "",
        text[:-5],
        "[]",
        "{}",
        text.replace("prunus-plan-1", "prunus-plan-9"),
        text.replace('"keep"', '"kept"'),
    ):
        (tmp_path / "bad.json").write_text(damaged)
        with pytest.raises(DamagedFile):
            Plan.load(tmp_path / "bad.json")
    with pytest.raises(DamagedFile, match="cannot be read"):
        Plan.load(tmp_path / "missing.json")


def test_damaged_files_are_refused_and_the_model_is_untouched(tmp_path):
    path = tmp_path / "small.safetensors"
    result = cut(small(), 0.5)
    result.save(path)
    sound = path.read_bytes()
    model = small()
    before = copy.deepcopy(model.state_dict())
    rng = np.random.default_rng(0)
    places = [0, 9, len(sound) // 2, len(sound) - 1, *rng.integers(8, len(sound), 40).tolist()]
    for place in places:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises((DamagedFile, MaskMismatch)):
            prunus.load(path, model)
    for length in (0, 7, 100, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(DamagedFile):
            prunus.load(path, model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    path.write_bytes(sound)
    for wrong in (nn.Linear(3, 4), scrambled(Baked()), result.model):
        with pytest.raises(MaskMismatch):
            prunus.load(path, wrong)
    assert torch.equal(prunus.load(path, small()).a.weight, result.model.a.weight)


def test_equal_models_are_equal_files(tmp_path):
    for name in ("a", "b"):
        cut(small(), 0.5).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_disk_that_refuses_leaves_the_old_file(tmp_path):
    result = cut(small(), 0.5)
    with pytest.raises(StorageFailed):
        result.save(tmp_path / "missing" / "small.safetensors")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(StorageFailed):
            result.save(tmp_path / "small.safetensors")
        tmp_path.chmod(0o700)


def test_a_plan_that_lies_is_found_by_verify():
    model = small()
    plan = cut(model, 0.5).plan
    swapped = [i for i in range(24) if i not in plan.keep["b.weight:0"]]
    wrong = replace(plan, keep=plan.keep | {"b.weight:0": swapped, "b.bias:0": swapped})
    assert wrong.verify(model, IMAGE) > 1e-3
