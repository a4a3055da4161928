"""Group-norm regularised training: strengths by hand, gradients by hand, and the whole procedure."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunus
from prunus.errors import Infeasible, InvalidValue, MaskMismatch, NothingPrunable, UnknownName
from prunus.graph.couple import couple
from prunus.graph.record import record
from prunus.methods.channels import group_norms
from prunus.methods.group_norm import GroupNorm, regularised
from prunus.methods.penalties import growing_strengths
from prunus.procedures.group_norm import group_norm
from prunus.run.plan import Planner
from small_runs import Watched, normed_run


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A residual stream of four channels with an inner convolution of five, and a flattened head."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.inner, self.outer = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
            self.head = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (x + self.outer(self.inner(x).relu())).relu()
        return self.head(x.flatten(1))


X = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])


def families():
    return couple(record(Net().eval(), X)).primary()


def test_strengths_by_hand():
    strengths = growing_strengths(torch.tensor([4.0, 0.0, 2.0, 3.0]), alpha=4)
    assert strengths.tolist() == pytest.approx([1, 16, 4, 2])
    assert growing_strengths(torch.tensor([2.0, 2.0, 2.0])).tolist() == [1, 1, 1]
    assert growing_strengths(torch.tensor([5.0])).tolist() == [1]
    assert growing_strengths(torch.tensor([1.0, 3.0]), alpha=0).tolist() == [1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.floats(0, 8), st.floats(0.25, 4))
def test_strengths_are_finite_ordered_and_without_units(values, alpha, factor):
    importance = torch.tensor(values, dtype=torch.float64)
    strengths = growing_strengths(importance, alpha)
    assert bool(torch.isfinite(strengths).all())
    assert float(strengths.min()) == 1
    assert float(strengths.max()) <= 2**alpha * (1 + 1e-9)
    order = importance.argsort()
    assert bool((strengths[order].diff() <= 1e-9 * 2**alpha).all())
    if importance.max() - importance.min() > 1e-3:
        assert torch.allclose(growing_strengths(importance * factor, alpha), strengths, rtol=1e-6)


def test_norms_count_everything_a_unit_occupies():
    model = Net()
    stream = next(f for f in families() if f.name == "stem.weight:0")
    found = group_norms(stream, regularised(model))
    head = model.head.weight.reshape(3, 4, 9)
    wanted = sum(
        t.square().sum(axes)
        for t, axes in (
            (model.stem.weight, (1, 2, 3)),
            (model.inner.weight, (0, 2, 3)),
            (model.outer.weight, (1, 2, 3)),
            (head, (0, 2)),
        )
    )
    wanted = (wanted + model.bn.weight.square()).sqrt()
    assert torch.allclose(found, wanted.detach().double(), rtol=1e-5)


def test_gradients_differ_by_the_regulariser_alone():
    moved = {}
    for method in (None, GroupNorm(families=families(), strength=0.01, alpha=3)):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if method is not None:
            prunus.sparsify(model, optimizer, method, steps=2)
        F.cross_entropy(model(X), Y).backward()
        before = copy.deepcopy(dict(model.named_parameters()))
        optimizer.step()
        moved[method is None] = {n: (before[n] - p).detach() for n, p in model.named_parameters()}
    start = Net()
    parameters = regularised(start)
    stream, inner = families()
    a = growing_strengths(group_norms(stream, parameters), 3).float()
    b = growing_strengths(group_norms(inner, parameters), 3).float()
    grow = {
        "stem.weight": a.view(4, 1, 1, 1),
        "bn.weight": a,
        "inner.weight": b.view(5, 1, 1, 1) + a.view(1, 4, 1, 1),
        "outer.weight": a.view(4, 1, 1, 1) + b.view(1, 5, 1, 1),
        "head.weight": a.repeat_interleave(9),
    }
    for name, parameter in start.named_parameters():
        difference = moved[False][name] - moved[True][name]
        expected = 0.01 * grow[name] * parameter if name in grow else torch.zeros_like(parameter)
        assert torch.allclose(difference, expected, atol=2e-6), name


def test_all_equal_units_decay_alike():
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    stream = [f for f in families() if f.name == "stem.weight:0"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = prunus.sparsify(model, optimizer, GroupNorm(families=tuple(stream), strength=0.5), steps=2)
    terms = dict(zip(("stem.weight", "bn.weight"), handle.method.penalties(handle), strict=False))
    for _, term in terms.values():
        assert torch.allclose(term, torch.full_like(term, 0.05))


def test_zero_strength_is_plain_training_bit_for_bit():
    ends = []
    for method in (None, GroupNorm(families=families(), strength=0.0)):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if method is not None:
            prunus.sparsify(model, optimizer, method, steps=5)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_weak_groups_fall_behind():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = GroupNorm(families=families(), strength=0.2)
    prunus.sparsify(model, optimizer, method, steps=60)
    inner = method.families[1]
    before = group_norms(inner, regularised(model))
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    after = group_norms(inner, regularised(model))
    weakest, best = int(before.argmin()), int(before.argmax())
    assert float(after[weakest] / after[best]) < 0.5 * float(before[weakest] / before[best])


def test_a_cut_training_goes_on_bit_for_bit():
    def loop():
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, prunus.sparsify(model, optimizer, GroupNorm(families=families()), steps=6)

    def run(parts, steps):
        for _ in range(steps):
            parts[1].zero_grad()
            F.cross_entropy(parts[0](X), Y).backward()
            parts[1].step()
        return parts

    whole, first, second = run(loop(), 6), run(loop(), 2), loop()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    state = first[2].state_dict()
    second[2].load_state_dict({"tensors": state["tensors"], "values": json.loads(json.dumps(state["values"]))})
    run(second, 4)
    assert all(torch.equal(p, q) for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True))


def test_step_method_refuses():
    def attach(method, model=None):
        model = Net() if model is None else model
        return prunus.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method, steps=4)

    with pytest.raises(InvalidValue, match="families"):
        attach(GroupNorm())
    with pytest.raises(InvalidValue, match="alpha"):
        attach(GroupNorm(families=families(), alpha=-1))
    with pytest.raises(InvalidValue, match="strength"):
        attach(GroupNorm(families=families(), strength=float("nan")))
    with pytest.raises(MaskMismatch, match="another model"):
        attach(GroupNorm(families=families()), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with pytest.raises(InvalidValue, match="sparsity"):
        attach(GroupNorm(families=families(), sparsity=0.5))
    described = GroupNorm(families=families()).describe()
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_procedure_cuts_for_real(scope):
    run = normed_run(epochs=3, kind=Watched)
    outcome = group_norm(run.within("m"), sparsity=0.5, scope=scope)
    assert list(run.seen) == ["dense-4", "sparse", "tune"]
    model = outcome.state.model(run)
    assert (model.conv.out_channels, model.linear.in_features) == (3, 48)
    pushed = run.within("m").train("sparse", **run.seen["sparse"][1])
    family = run.seen["sparse"][1]["method"].families[0]
    norms = group_norms(family, regularised(pushed.model(run)))
    assert outcome.state.shape.plan.families[family.name] == sorted(norms.topk(3).indices.tolist())
    again = group_norm(normed_run(epochs=3).within("m"), sparsity=0.5, scope=scope)
    assert again.state.digest == outcome.state.digest
    planned: dict[str, int] = {}
    group_norm(Planner.of(normed_run(epochs=3), planned).within("m"), sparsity=0.5, scope=scope)
    assert sum(planned.values()) == outcome.steps == 12


def test_procedure_refuses():
    with pytest.raises(UnknownName, match="isomorphic"):
        group_norm(normed_run().within("m"), scope="layer")
    run = normed_run()
    run.make_model = lambda seed: nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(NothingPrunable, match="cut"):
        group_norm(run.within("m"))
    with pytest.raises(Infeasible, match="floor"):
        group_norm(normed_run().within("m"), sparsity=0.9, minimum=3)
    with pytest.raises(InvalidValue, match="minimum"):
        group_norm(normed_run().within("m"), minimum=0)
