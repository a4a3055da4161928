"""CKA, interpolation and mode connectivity: identities, hand cases, and convex landscapes where the sign is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunus.errors import InvalidValue, MaskMismatch, NonFinite
from prunus.measure.recalibrate import recalibrate
from prunus.measure.similarity import (
    advice,
    choose_checkpoint,
    cka_from_grams,
    connectivity_path,
    interpolate,
    linear_cka,
    linear_mode_connectivity,
    regime,
)
from prunus.randomness import generator


def normal(*shape: int, purpose: str = "x") -> Tensor:
    return torch.randn(*shape, generator=generator(0, purpose), dtype=torch.float64)


# -- CKA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "q"), [(40, 5, 7), (10, 30, 50), (64, 10, 10)])
def test_cka_equals_its_definition_and_both_forms_agree(n: int, p: int, q: int) -> None:
    x, y = normal(n, p), normal(n, q, purpose="y")
    xc, yc = x - x.mean(0), y - y.mean(0)
    features = (xc.T @ yc).square().sum() / ((xc.T @ xc).square().sum().sqrt() * (yc.T @ yc).square().sum().sqrt())
    assert linear_cka(x, y) == pytest.approx(float(features), abs=1e-12)
    assert cka_from_grams(x @ x.T, y @ y.T) == pytest.approx(float(features), abs=1e-12)


def test_cka_of_itself_is_one_and_symmetric() -> None:
    x, y = normal(30, 6), normal(30, 4, purpose="y")
    assert linear_cka(x, x) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), abs=1e-12)
    assert 0.0 < linear_cka(x, y) < 1.0


def test_cka_is_blind_to_rotation_scale_and_shift_but_not_to_other_maps() -> None:
    x, y = normal(50, 6), normal(50, 6, purpose="y")
    rotation = torch.linalg.qr(normal(6, 6, purpose="rotation"))[0]
    assert linear_cka(3.0 * x @ rotation - 7.0, y) == pytest.approx(linear_cka(x, y), abs=1e-12)
    stretch = torch.diag(torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert abs(linear_cka(x @ stretch, y) - linear_cka(x, y)) > 0.01


def test_cka_of_unrelated_columns_is_zero() -> None:
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert linear_cka(x, y) == pytest.approx(0.0, abs=1e-15)


def test_cka_flattens_images_and_accepts_half_precision() -> None:
    x = normal(8, 2, 3, 3)
    assert linear_cka(x, x.reshape(8, -1)) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x.half(), x.bfloat16()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("x", "y", "error", "words"),
    [
        (torch.ones(4, 2), torch.eye(4), InvalidValue, "same for all examples"),
        (torch.full((4, 2), 0.1), torch.eye(4), InvalidValue, "same for all examples"),
        (torch.eye(4), torch.eye(5), InvalidValue, "4 and 5"),
        (torch.eye(1), torch.eye(1), InvalidValue, "at least two"),
        (torch.eye(3) / 0.0, torch.eye(3), NonFinite, "first representation"),
    ],
)
def test_cka_refuses_what_has_no_answer(x: Tensor, y: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        linear_cka(x, y)


# -- the path -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([0.1, 0.5, 0.3], -0.3),  # barrier: h = 0.2
        ([0.2, 0.1, 0.2], 0.1),  # the middle is better
        ([0.3, 0.3, 0.3], 0.0),
        ([0.1, 0.2, 0.3], 0.1),  # the first end deviates as much as the last, and comes first
        ([0.4, 0.0], -0.2),
    ],
)
def test_connectivity_by_hand(errors: list[float], expected: float) -> None:
    assert linear_mode_connectivity(errors) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_connectivity_properties(errors: list[float]) -> None:
    value = linear_mode_connectivity(errors)
    middle = (errors[0] + errors[-1]) / 2
    assert abs(value) == pytest.approx(max(abs(middle - e) for e in errors), abs=1e-12)
    assert abs(value) >= abs(errors[0] - errors[-1]) / 2 - 1e-12
    assert abs(linear_mode_connectivity(errors[::-1])) == pytest.approx(abs(value), abs=1e-12)


def test_connectivity_refuses_too_few_and_broken_errors() -> None:
    with pytest.raises(InvalidValue, match="both ends"):
        linear_mode_connectivity([0.1])
    with pytest.raises(NonFinite):
        linear_mode_connectivity([0.1, math.nan, 0.2])


def test_interpolation_is_exact_at_the_ends_and_linear_between() -> None:
    a = {"w": normal(5, 3), "steps": torch.tensor(3)}
    b = {"w": normal(5, 3, purpose="b"), "steps": torch.tensor(9)}
    assert torch.equal(interpolate(a, b, 0.0)["w"], a["w"])
    assert torch.equal(interpolate(a, b, 1.0)["w"], b["w"])
    torch.testing.assert_close(interpolate(a, b, 0.3)["w"], 0.7 * a["w"] + 0.3 * b["w"])
    assert [int(interpolate(a, b, t)["steps"]) for t in (0.0, 0.49, 0.5, 1.0)] == [3, 3, 9, 9]


def test_interpolation_uses_masked_weights_and_identical_masks_stay_sparse() -> None:
    a, b = {"w": torch.ones(4)}, {"w": 3 * torch.ones(4)}
    mask = torch.tensor([True, False, True, False])
    both = interpolate(a, b, 0.5, masks_a={"w": mask}, masks_b={"w": mask})["w"]
    assert both.tolist() == [2.0, 0.0, 2.0, 0.0]
    one = interpolate(a, b, 0.5, masks_a={"w": mask}, masks_b={"w": ~mask})["w"]
    assert one.tolist() == [0.5, 1.5, 0.5, 1.5]
    # A pruned entry is zero whatever is stored under the mask.
    hidden = interpolate({"w": torch.tensor([1.0, math.nan, 1.0, math.inf])}, b, 0.0, masks_a={"w": mask})["w"]
    assert hidden.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_interpolation_refuses_other_architectures() -> None:
    with pytest.raises(InvalidValue, match="extra"):
        interpolate({"w": torch.ones(1)}, {"w": torch.ones(1), "extra": torch.ones(1)}, 0.5)
    with pytest.raises(InvalidValue, match="one architecture"):
        interpolate({"w": torch.ones(1)}, {"w": torch.ones(2)}, 0.5)
    with pytest.raises(InvalidValue, match="between 0 and 1"):
        interpolate({}, {}, 1.5)
    with pytest.raises(MaskMismatch, match="'v'"):
        interpolate({"w": torch.ones(1)}, {"w": torch.ones(1)}, 0.5, masks_a={"v": torch.ones(1, dtype=torch.bool)})


def linear_problem() -> tuple[nn.Linear, Tensor, Tensor]:
    return nn.Linear(4, 2, dtype=torch.float64), normal(32, 4), normal(32, 2, purpose="y")


def test_convex_loss_has_no_barrier_and_ends_are_reproduced() -> None:
    model, x, y = linear_problem()
    states = [{k: normal(*v.shape, purpose=f"{i}{k}") for k, v in model.state_dict().items()} for i in range(2)]
    own = {k: v.clone() for k, v in model.state_dict().items()}

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(x) - y).square().mean())

    path = connectivity_path(model, states[0], states[1], loss, points=5)
    assert path.positions == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert path.connectivity >= -abs(path.errors[0] - path.errors[-1]) / 2 - 1e-12
    for end, state in ((0, states[0]), (-1, states[1])):
        fresh = nn.Linear(4, 2, dtype=torch.float64)
        fresh.load_state_dict(state)
        assert path.errors[end] == loss(fresh)
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())
    assert connectivity_path(model, states[0], states[0], loss, points=3).connectivity == pytest.approx(0.0, abs=1e-12)


def test_permuted_twins_are_disconnected() -> None:
    # Two hidden units that compute +-x: swapping them leaves the function alone, but the mean of the two is nothing.
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    a = {"0.weight": torch.tensor([[1.0], [-1.0]]), "2.weight": torch.tensor([[1.0, -1.0]])}
    b = {"0.weight": torch.tensor([[-1.0], [1.0]]), "2.weight": torch.tensor([[-1.0, 1.0]])}
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])

    def error(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(x).sign() != x.sign()).float().mean())

    path = connectivity_path(model, a, b, error, points=11)
    assert (path.errors[0], path.errors[-1], path.connectivity) == (0.0, 0.0, -1.0)


def test_path_restores_the_model_after_an_error_and_recalibrates_each_point() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    own = {k: v.clone() for k, v in model.state_dict().items()}
    other = {k: v + 1 for k, v in own.items()}
    x = normal(16, 3).float()
    seen = []

    def measure(net: nn.Module) -> float:
        seen.append(net[1].running_mean.clone())  # type: ignore[index, union-attr, operator]
        return 0.0

    connectivity_path(model, own, other, measure, points=3, recalibrate=lambda net: recalibrate(net, [x]))
    for t, mean in zip((0.0, 0.5, 1.0), seen):
        state = interpolate(own, other, t)
        torch.testing.assert_close(mean, (x @ state["0.weight"].T + state["0.bias"]).mean(0))

    def fail(net: nn.Module) -> float:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        connectivity_path(model, other, other, fail)
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())


# -- decisions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lmc", "cka", "expected"),
    [(-0.3, 0.9, "I"), (-0.3, 0.99, "I"), (-0.05, 0.9, "II-A"), (0.0, 0.95, "II-B"), (0.1, 0.99, "II-B")],
)
def test_regimes(lmc: float, cka: float, expected: str) -> None:
    assert regime(lmc, cka, cka_threshold=0.95) == expected


def test_regime_refuses_nan() -> None:
    with pytest.raises(NonFinite):
        regime(math.nan, 0.9, cka_threshold=0.95)


def test_advice_follows_regime_and_load() -> None:
    assert advice("I", 0.05).direction == "hotter"
    assert advice("I", 0.8).direction == "hotter"
    assert advice("II-A", 0.05).direction == "stay"
    assert advice("II-A", 0.4).direction == "colder"
    assert advice("II-B", 0.4).direction == "stay"
    with pytest.raises(InvalidValue, match="density"):
        advice("I", 0.0)


def test_checkpoint_choice_prefers_connected_then_similar() -> None:
    cells = {"ep10": (-0.01, 0.90), "ep80": (-0.02, 0.97), "ep160": (-0.4, 0.99)}
    assert choose_checkpoint(cells) == "ep80"
    assert choose_checkpoint({"a": (-0.4, 0.99), "b": (-0.3, 0.8)}) == "b"
    with pytest.raises(InvalidValue):
        choose_checkpoint({})
