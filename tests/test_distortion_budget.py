"""The dynamic program against brute force, its invariants, and the curves it is fed with."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import nn

import prunus
from prunus.budget.budgets import Problem
from prunus.budget.rate_distortion import RateDistortion, curves, solve
from prunus.budget.select import keep_best
from prunus.errors import Infeasible, InvalidValue
from prunus.keep import choose
from prunus.parameters import Address


def cost_of(costs, chosen):
    return sum(c[i] for c, i in zip(costs, chosen, strict=True))


def spent_by(keeps, chosen):
    return sum(k[i] for k, i in zip(keeps, chosen, strict=True))


def best_of_all(costs, keeps, budget):
    """Return the least cost over all combinations that fit, by trying every one."""
    options = itertools.product(*(range(len(c)) for c in costs))
    return min((cost_of(costs, o) for o in options if spent_by(keeps, o) <= budget), default=math.inf)


def random_problem(seed):
    """Return up to 4 layers with up to 6 options, curves that need not fall, and options that are not allowed."""
    draw = random.Random(seed)
    costs, keeps, most = [], [], 0
    for _ in range(draw.randint(1, 4)):
        size, options = draw.randint(1, 12), draw.randint(1, 6)
        keeps.append([draw.randint(0, size) for _ in range(options)])
        costs.append([math.inf if draw.random() < 0.15 else round(draw.uniform(0, 10), 3) for _ in range(options)])
        most += size
    return costs, keeps, draw.randint(0, most)


def test_three_hundred_random_problems_equal_brute_force():
    infeasible = 0
    for seed in range(300):
        costs, keeps, budget = random_problem(seed)
        best = best_of_all(costs, keeps, budget)
        if math.isinf(best):
            infeasible += 1
            with pytest.raises(Infeasible, match="no combination of layer sparsities"):
                solve(costs, keeps, budget)
            continue
        chosen = solve(costs, keeps, budget)
        assert spent_by(keeps, chosen) <= budget
        assert cost_of(costs, chosen) == pytest.approx(best, abs=1e-9)
    assert 5 < infeasible < 150


@pytest.mark.parametrize(
    ("budget", "cost", "shares"),
    [(8, 0, (0, 0)), (6, 1, (0.5, 0)), (4, 4, (0.5, 0.5)), (2, 5, (0.5, 1)), (0, 14, (1, 1))],
)
def test_two_layers_by_hand(budget, cost, shares):
    grid, costs, keeps = (0, 0.5, 1), [[0, 1, 10], [0, 3, 4]], [[4, 2, 0], [4, 2, 0]]
    chosen = solve(costs, keeps, budget)
    assert cost_of(costs, chosen) == cost
    assert tuple(grid[i] for i in chosen) == shares


@pytest.mark.parametrize("seed", range(20))
def test_invariants(seed):
    draw = random.Random(seed)
    costs = [[0.0, *(round(draw.uniform(0, 5), 3) for _ in range(5))] for _ in range(3)]
    keeps = [[10, 8, 6, 4, 2, 0] for _ in range(3)]
    values = [cost_of(costs, solve(costs, keeps, t)) for t in range(31)]
    assert all(b <= a for a, b in itertools.pairwise(values))
    assert values[-1] == 0.0
    for t in (5, 13, 22):
        chosen = solve(costs, keeps, t)
        assert solve([[2 * c for c in row] for row in costs], keeps, t) == chosen
        turned = solve(costs[::-1], keeps, t)
        assert cost_of(costs[::-1], turned) == pytest.approx(cost_of(costs, chosen))


@pytest.mark.parametrize("seed", range(20))
def test_counting_in_units_is_feasible_never_better_and_within_its_slack(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(20, 60) for _ in range(3)]
    keeps = [[n - int(a / 10 * n) for a in range(11)] for n in sizes]
    costs = [sorted(round(draw.uniform(0, 9), 3) for _ in range(11)) for _ in sizes]
    budget, unit = draw.randint(sum(sizes) // 4, sum(sizes)), 4
    coarse = [[-(-k // unit) for k in row] for row in keeps]
    chosen = solve(costs, coarse, budget // unit)
    assert spent_by(keeps, chosen) <= budget
    exact = cost_of(costs, solve(costs, keeps, budget))
    tight = cost_of(costs, solve(costs, keeps, max(0, budget - unit * (len(sizes) + 1))))
    assert exact - 1e-9 <= cost_of(costs, chosen) <= tight + 1e-9


# -- curves -------------------------------------------------------------------------------------------------------


def test_curves_by_hand():
    seen = []

    def distortion(masks):
        ((name, mask),) = masks.items()
        seen.append((name, mask.int().tolist()))
        return float(10 - mask.sum())

    scores = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([1.0, -math.inf, 2.0, 3.0])}
    table = curves(scores, [0, 0.25, 0.5, 1], distortion)
    assert table == {"a": [0.0, 7.0, 8.0, 10.0], "b": [math.inf, 0.0, 8.0, 10.0]}
    assert seen[:3] == [("a", [1, 0, 1, 1]), ("a", [1, 0, 1, 0]), ("a", [0, 0, 0, 0])]


def test_shares_are_cut_without_float_dust():
    counted = []
    curves({"a": torch.arange(100.0)}, [0.29, 0.57], lambda m: counted.append(int(m["a"].sum())) or 0.0)
    assert counted == [71, 43]


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


def output_distortion(model, masks):
    """Return the mean squared change of the outputs with only `masks` applied, written out again."""
    with torch.no_grad():
        before = model(X).double()
        saved = {n: model.get_parameter(n).detach().clone() for n in masks}
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
        after = model(X).double()
        for name, value in saved.items():
            model.get_parameter(name).copy_(value)
    return float((before - after).square().mean())


def test_the_division_is_the_best_of_all_for_additive_distortions():
    model = net()
    chosen = choose(model, 0.6, budget={"name": "rate-distortion", "points": 5, "resolution": 0}, data=[X])
    names = list(chosen)
    weights = {n: model.get_parameter(n).detach() for n in names}
    grid = [i / 5 for i in range(6)]
    keeps = [[weights[n].numel() - int(a * weights[n].numel() + 1e-9) for a in grid] for n in names]
    costs = [
        [0.0 if a == 0 else output_distortion(model, {n: keep_best(weights[n].abs(), k)}) for a, k in zip(grid, row)]
        for n, row in zip(names, keeps, strict=True)
    ]
    best = best_of_all(costs, keeps, chosen.kept)
    # What the program leaves over is given back, so the masks keep at least what the best combination keeps.
    found = sum(output_distortion(model, {n: chosen[n]}) for n in names)
    assert found <= best + 1e-9
    assert chosen.kept == 164 - 98


def test_measuring_leaves_the_weights_alone_bit_for_bit():
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    choose(model, 0.5, budget={"name": "rate-distortion", "points": 4}, data=[X])
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_joint_distortion_is_below_uniform():
    model = net()
    joint = {
        name: output_distortion(model, dict(choose(model, 0.7, budget=name, data=[X])))
        for name in ("rate-distortion", "uniform")
    }
    assert joint["rate-distortion"] < joint["uniform"]


def test_earlier_rounds_are_respected():
    model = net()
    first = choose(model, 0.4, data=[X])
    second = choose(model, 0.7, masks=first, budget={"name": "rate-distortion", "points": 7}, data=[X])
    assert second <= first
    assert second.kept == 164 - round(0.7 * 164)


def test_it_says_what_it_needs():
    with pytest.raises(InvalidValue, match="pass data="):
        prunus.prune(net(), 0.5, budget="rate-distortion", measure=False)
    address = Address(name="w", shape=(2, 2))
    problem = Problem(addresses={"w": address}, scores={"w": torch.rand(2, 2)}, keep=2)
    with pytest.raises(InvalidValue, match=r"prunus\.prune\(\.\.\., data="):
        RateDistortion().densities(problem)
    with pytest.raises(InvalidValue, match="points 0"):
        RateDistortion(points=0)
