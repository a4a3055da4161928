"""Channels rebuilt without data: exact where they are combinations, and the objective is at its minimum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunus.errors import InvalidValue, NonFinite
from prunus.graph.couple import Coupling, couple
from prunus.graph.plan import Plan
from prunus.graph.record import record
from prunus.models.create import create
from prunus.randomness import generator
from prunus.structured.reconstruct import absorb, coefficients, compensate, fold, joined, objective


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "draw", *shape), dtype=torch.float64)


# -- the normal equations ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    r=st.integers(1, 6),
    m=st.integers(1, 3),
    d=st.integers(1, 8),
    seed=st.integers(0, 10_000),
    a1=st.sampled_from([0.0, 0.01, 2.0]),
    a2=st.sampled_from([0.008, 0.5]),
)
def test_the_gradient_is_zero_and_nothing_else_is_better(
    r: int, m: int, d: int, seed: int, a1: float, a2: float
) -> None:
    rows, shifts = draw(r + m, d, seed=seed), draw(r + m, seed=seed)
    z = joined(rows, shifts, a1)
    s = coefficients(z[:r], z[r:], a2).requires_grad_(True)
    value = objective(z[:r], z[r:], s, a2)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert gradient.abs().max() < 1e-8
    by_hand = (rows[r:] - s @ rows[:r]).square().sum(1) + a1 * (shifts[r:] - s @ shifts[:r]).square()
    torch.testing.assert_close(value, by_hand + a2 * s.square().sum(1))
    alone = rows[r:].square().sum(1) + a1 * shifts[r:].square()
    assert (value <= alone + 1e-12).all()
    for j in range(m):  # the formula of one channel at a time
        normal = (
            rows[:r] @ rows[:r].T + a1 * torch.outer(shifts[:r], shifts[:r]) + a2 * torch.eye(r, dtype=torch.float64)
        )
        single = torch.linalg.solve(normal, rows[:r] @ rows[r + j] + a1 * shifts[r + j] * shifts[:r])
        torch.testing.assert_close(s[j], single, rtol=1e-8, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(r=st.integers(1, 5), d=st.integers(1, 6), seed=st.integers(0, 10_000), a2=st.sampled_from([0.008, 0.5]))
def test_non_negative_coefficients_meet_their_optimality_conditions(r: int, d: int, seed: int, a2: float) -> None:
    kept, gone = draw(r, d, seed=seed), draw(2, d, seed=seed + 1)
    s = coefficients(kept, gone, a2, nonneg=True)
    assert (s >= 0).all()
    slope = 2 * (s @ (kept @ kept.T + a2 * torch.eye(r, dtype=torch.float64)) - gone @ kept.T)
    assert (slope > -1e-7).all()  # no coefficient wants to rise
    assert (slope * s).abs().max() < 1e-7  # those above zero do not want to move
    free = coefficients(kept, gone, a2)
    least = objective(kept, gone, free, a2)
    assert (objective(kept, gone, s, a2) >= least - 1e-10).all()
    same = (free >= 0).all(1)
    torch.testing.assert_close(s[same], free[same], rtol=1e-6, atol=1e-8)


def test_the_nearest_neighbour_by_hand() -> None:
    kept = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    gone = torch.tensor([[2.0, 0.1], [0.0, 5.0], [0.0, -1.0], [0.0, 0.0]])
    s = coefficients(kept, gone, max_terms=1)
    assert (s.count_nonzero(1) == torch.tensor([1, 1, 0, 0])).all()
    assert float(s[0, 0]) == pytest.approx((4.01**0.5) / 3)
    assert float(s[1, 1]) == pytest.approx(5 / 2**0.5)


def test_linearly_dependent_rows_need_a_penalty() -> None:
    kept = torch.ones(2, 3)
    with pytest.raises(InvalidValue, match="a2 > 0"):
        coefficients(kept, torch.ones(1, 3), 0.0)
    assert float(coefficients(kept, torch.ones(1, 3), 0.008).sum()) == pytest.approx(1, abs=0.01)
    assert coefficients(kept, torch.ones(0, 3)).shape == (0, 2)
    assert coefficients(kept[:0], torch.ones(2, 3)).shape == (2, 0)
    for options in ({"a2": -1.0}, {"a2": float("nan")}, {"max_terms": 2}, {"max_terms": 0}):
        with pytest.raises(InvalidValue):
            coefficients(kept, kept, **options)  # type: ignore[arg-type]


def test_folding_equals_the_norm() -> None:
    layer, norm = nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(draw(5, seed=tensor.ndim))
        norm.running_var.copy_(draw(5).exp())
    layer, norm, x = layer.double(), norm.double().eval(), draw(4, 3, 6, 6)
    a, c = fold(
        layer.weight.flatten(1),
        layer.bias,
        scale=norm.weight,
        shift=norm.bias,
        mean=norm.running_mean,
        var=norm.running_var,
        eps=norm.eps,
    )
    found = F.conv2d(x, a.view_as(layer.weight), c)
    torch.testing.assert_close(found, norm(layer(x)), rtol=1e-5, atol=1e-6)
    plain, zero = fold(layer.weight.flatten(1))
    assert torch.equal(plain, layer.weight.flatten(1).detach())
    assert not zero.any()


def test_columns_are_absorbed_from_their_originals() -> None:
    weight, index = draw(3, 8), torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])  # two positions per channel
    kept, s = torch.tensor([True, False, True, False]), torch.tensor([[2.0, 0.0], [0.5, -1.0]])
    new = absorb(weight, 1, index, kept, s)
    torch.testing.assert_close(new[:, 0:2], weight[:, 0:2] + 2 * weight[:, 2:4] + 0.5 * weight[:, 6:8])
    torch.testing.assert_close(new[:, 4:6], weight[:, 4:6] - weight[:, 6:8])
    assert not new[:, [2, 3, 6, 7]].any()


# -- whole networks ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolution, optional batch norm and activation, then two readers of the same channels."""

    def __init__(self, activation: nn.Module, *, norm: bool = True, bias: bool = False, padding: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=padding, bias=bias)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.activation = activation
        self.conv2 = nn.Conv2d(6, 4, 3, padding=padding, bias=bias)
        self.bn2 = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.side = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        side = self.side(x)
        return self.head(y.mean((2, 3))) + self.head(side.mean((2, 3)))


def network(activation: nn.Module, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(activation, **options).double().eval()
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2.0)
    return net


def without(coupling: Coupling, unit: int | list[int], prefix: str = "conv1.weight") -> dict[str, Tensor]:
    family = next(f for f in coupling.families if f.name.startswith(prefix))
    keep = torch.ones(family.size, dtype=torch.bool)
    keep[unit] = False
    return {family.name: keep}


def images() -> Tensor:
    return draw(5, 3, 7, 7)


def distance(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


@torch.no_grad()
def combine(net: nn.Module, shares: dict[int, float], unit: int, *, shift: bool = True) -> None:
    """Make normalised channel `unit` a combination of others (its shift too, if wanted)."""
    factor = net.bn1.weight / (net.bn1.running_var + net.bn1.eps).sqrt()
    row = sum(t * factor[i] * net.conv1.weight[i] for i, t in shares.items())
    net.conv1.weight[unit] = row / factor[unit]
    if shift:
        c = net.bn1.bias - factor * net.bn1.running_mean
        total = sum(t * c[i] for i, t in shares.items())
        net.bn1.bias[unit] = total + factor[unit] * net.bn1.running_mean[unit]


def test_a_combination_is_rebuilt_exactly_in_a_linear_network() -> None:
    net, x = network(nn.Identity()), images()
    combine(net, {0: 0.7, 4: -1.3}, 2)
    coupling = couple(record(net, x))
    keep = without(coupling, 2)
    result = compensate(net, coupling, keep, a1=1e-12, a2=1e-12)
    assert distance(result.model, net, x) < 1e-8
    assert not result.skipped
    assert distance(result.plan.apply(result.model), net, x) < 1e-8
    assert distance(result.plan.mask(net), net, x) > 1e-2  # without compensation it is not


def test_several_combinations_use_the_original_columns() -> None:
    net, x = network(nn.Identity()), images()
    combine(net, {0: 0.7, 4: -1.3}, 2)
    combine(net, {1: 0.4, 3: 2.0}, 5)
    coupling = couple(record(net, x))
    result = compensate(net, coupling, without(coupling, [2, 5]), a1=1e-12, a2=1e-12)
    assert distance(result.model, net, x) < 1e-8


@pytest.mark.parametrize("options", [{}, {"nonneg": True}, {"max_terms": 1}], ids=str)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2)], ids=str)
def test_a_scaled_copy_passes_a_rectifier_only_with_a_positive_factor(
    activation: nn.Module, options: dict[str, Any]
) -> None:
    for t in (0.3, 2.5, -0.8):
        net, x = network(activation), images()
        combine(net, {4: t}, 2)
        coupling = couple(record(net, x))
        penalties = {} if "max_terms" in options else {"a1": 1.0, "a2": 1e-12}
        result = compensate(net, coupling, without(coupling, 2), **penalties, **options)
        assert (distance(result.model, net, x) < 1e-7) == (t > 0)


def test_residual_shifts_go_into_the_next_bias_or_norm() -> None:
    for norm, bias in ((True, False), (True, True), (False, True)):
        net, x = network(nn.Identity(), norm=norm, bias=bias, padding=0), images()
        with torch.no_grad():
            if norm:
                combine(net, {0: 0.7, 4: -1.3}, 2, shift=False)
            else:
                net.conv1.weight[2] = 0.7 * net.conv1.weight[0] - 1.3 * net.conv1.weight[4]
        coupling = couple(record(net, x))
        keep = without(coupling, 2)
        plain = compensate(net, coupling, keep, a1=0.0, a2=1e-12)
        shifted = compensate(net, coupling, keep, a1=0.0, a2=1e-12, shift=True)
        assert distance(plain.model, net, x) > 1e-3
        assert distance(shifted.model, net, x) < 1e-8
        assert not shifted.skipped
    net = network(nn.Identity(), norm=False, bias=False)
    coupling = couple(record(net, x))
    result = compensate(net, coupling, without(coupling, 2), shift=True)
    # Without a bias in the layer before there are no shifts to hand on, and conv2 could not take any.
    assert set(result.skipped) <= {"conv2.weight"}


def test_the_model_given_is_as_it_was_and_nothing_removed_changes_nothing() -> None:
    net, x = network(nn.ReLU()), images()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    coupling = couple(record(net, x))
    compensate(net, coupling, without(coupling, [1, 3]), shift=True)
    same = compensate(net, coupling, {}).model.state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(tensor, same[name])


def test_linear_layers_after_flattening() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2)
        ).double()
    x = images()
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[3] = 1.7 * tensor[1]
        for tensor in (net[4].weight, net[4].bias):
            tensor[0] = 0.6 * tensor[2]
    coupling = couple(record(net, x))
    keep = without(coupling, 3, "0.weight") | without(coupling, 0, "4.weight")
    result = compensate(net, coupling, Plan.from_keep(coupling, keep), max_terms=1)
    assert len(result.errors) == 2
    assert distance(result.model, net, x) < 1e-9
    assert distance(result.plan.apply(result.model), net, x) < 1e-9


def test_streams_depthwise_layers_and_groups_are_left_out() -> None:
    net = create("resnet20", num_classes=3, input_shape=(3, 8, 8), width=4).double().eval()
    x = draw(2, 3, 8, 8)
    coupling = couple(record(net, x))
    keep = {f.name: torch.arange(f.size) >= f.size // 3 for f in coupling.primary()}
    result = compensate(net, coupling, keep)
    assert len(result.errors) == 9  # the inside of each block
    assert all(0 <= e < 1 for e in result.errors.values())
    assert result.skipped
    assert all("residual stream" in reason for reason in result.skipped.values())
    assert set(result.errors) | set(result.skipped) == set(keep)
    assert result.plan.verify(result.model, x) < 1e-9

    mixed = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1),
        nn.PReLU(4), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Flatten(), nn.Linear(8 * 36, 2),
    ).double()  # fmt: skip
    coupling = couple(record(mixed, x))
    keep = {f.name: torch.arange(f.size) >= 1 for f in coupling.primary()}
    result = compensate(mixed, coupling, keep)
    reasons = " ".join(result.skipped.values())
    for word in ("depthwise", "5.weight"):
        assert word in reasons
    assert result.plan.verify(result.model, x) < 1e-9


def test_grouped_convolutions_compare_rows_of_one_group() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1)
        ).double()
    x = draw(2, 4, 5, 5)
    coupling = couple(record(net, x))
    pairs = {f.slots[0].tensor: f for f in coupling.families if f.slots[0].index.shape[1] == 2}
    keep = torch.tensor([True, True, False, True])
    for name, layer in (("0.weight", net[0]), ("2.weight", net[2])):
        with torch.no_grad():  # unit 2, one channel in each group, is a copy of unit 1
            for tensor in (layer.weight, layer.bias):
                tensor[[2, 6]] = 1.5 * tensor[[1, 5]]
        result = compensate(net, coupling, {pairs[name].name: keep}, a2=1e-12)
        assert not result.skipped
        assert distance(result.model, net, x) < 1e-8
        shifted = compensate(net, coupling, {pairs[name].name: keep}, shift=True)
        assert shifted.skipped
        assert all("read in groups" in reason for reason in shifted.skipped.values())
    whole = next(f for f in coupling.families if f.size == 2)
    result = compensate(net, coupling, {whole.name: torch.tensor([True, False])})
    assert len(result.skipped) == 1


def test_bad_requests_are_refused() -> None:
    net, x = network(nn.ReLU()), images()
    coupling = couple(record(net, x))
    keep = without(coupling, 1)
    for options in ({"a1": -1.0}, {"a1": float("inf")}, {"a2": -1.0}, {"max_terms": 3}):
        with pytest.raises(InvalidValue):
            compensate(net, coupling, keep, **options)
    with torch.no_grad():
        net.conv1.weight[0] = float("nan")
    with pytest.raises(NonFinite, match="conv1"):
        compensate(net, coupling, keep)
