"""Layer sparsities by rate-distortion: the exact program, unlabelled and noise inputs, rounds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from prunus.budget.rate_distortion import RateDistortion, solve
from prunus.errors import Infeasible, InvalidValue, UnknownName
from prunus.procedures.common import cut, dense
from prunus.procedures.imp import rounds_for
from prunus.procedures.rate_distortion import noise_inputs, rd
from small_runs import Watched, digits_run


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("budget", "options", "cost"), [(8, [0, 0], 0), (6, [1, 0], 1), (4, [1, 1], 4), (2, [1, 2], 5), (0, [2, 2], 14)]
)
def test_program_by_hand(budget, options, cost):
    costs, keeps = [[0.0, 1.0, 10.0], [0.0, 3.0, 4.0]], [[4, 2, 0], [4, 2, 0]]
    chosen = solve(costs, keeps, budget)
    assert chosen == options
    assert sum(costs[i][a] for i, a in enumerate(chosen)) == cost


def test_program_against_brute_force():
    """Random curves that are neither monotone nor convex, some options forbidden as after earlier rounds."""
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        layers, amounts = int(torch.randint(1, 5, (), generator=g)), int(torch.randint(2, 7, (), generator=g))
        costs = torch.rand(layers, amounts, generator=g, dtype=torch.float64)
        costs[torch.rand(layers, amounts, generator=g) < 0.15] = torch.inf
        keeps = torch.randint(0, 9, (layers, amounts), generator=g)
        budget = int(torch.randint(0, 25, (), generator=g))
        best = min(
            (
                sum(float(costs[i, a]) for i, a in enumerate(choice))
                for choice in itertools.product(range(amounts), repeat=layers)
                if sum(int(keeps[i, a]) for i, a in enumerate(choice)) <= budget
            ),
            default=float("inf"),
        )
        if best == float("inf"):
            with pytest.raises(Infeasible):
                solve(costs.tolist(), keeps.tolist(), budget)
            continue
        chosen = solve(costs.tolist(), keeps.tolist(), budget)
        assert sum(float(costs[i, a]) for i, a in enumerate(chosen)) == pytest.approx(best, abs=1e-12)
        assert sum(int(keeps[i, a]) for i, a in enumerate(chosen)) <= budget


def test_labels_play_no_part_and_noise_mode_sees_no_data():
    run = digits_run(kind=Watched)
    masks = {}
    for inputs in ("train", "noise"):
        rd(run.within(inputs), sparsity=0.8, inputs=inputs, points=40, epochs=0)
        masks[inputs] = run.seen["round-1"][1]["masks"]
    assert masks["train"] != masks["noise"]
    trained = dense(run)
    train = run.splits.train
    relabelled = replace(train, y=train.y.flip(0))
    strange = replace(train, x=torch.randn(train.x.shape))
    budget = {"name": "rate-distortion", "points": 40}
    for inputs, changed in (("train", relabelled), ("noise", strange)):
        other = digits_run(kind=Watched)
        other.splits = replace(other.splits, train=changed)
        x = noise_inputs(other, 256) if inputs == "noise" else None
        found = cut(other, "again", trained, 0.8, budget=budget, data=None if x is None else [x])
        assert found == masks[inputs], inputs


def test_rounds_are_nested_and_end_on_the_target():
    run = digits_run(kind=Watched)
    found = rd(run.within("rd"), sparsity=0.9, rate=0.6, points=10, epochs=1)
    kept = [run.seen[f"round-{i}"][1]["masks"] for i in (1, 2, 3)]
    assert all(b <= a for a, b in itertools.pairwise(kept))
    total = kept[0].total
    assert [m.kept for m in kept] == [total - round(s * total) for s in rounds_for(0.9, 0.6)]
    assert found.steps == (2 + 3) * 15
    for row, masks in zip(found.details["rounds"], kept, strict=True):
        assert row["densities"] == {r.name: r.density for r in masks.table()}


def test_joint_distortion_is_below_that_of_other_budgets():
    """Squared change of the outputs on test images, without retraining, at 80 % sparsity."""
    run = digits_run(epochs=6, hidden=(64, 32), validation=0)
    trained = dense(run)
    x = run.splits.test.normalise(run.splits.test.x)
    reference = trained.model(run)(x).detach()
    changed = {}
    for budget in ("uniform", "global", {"name": "rate-distortion", "points": 25}):
        masks = cut(run, f"prune-{budget}", trained, 0.8, budget=budget)
        model = trained.model(run)
        masks.apply(model)
        changed[str(budget)] = float((model(x).detach() - reference).square().mean())
    rate_distortion = changed.pop(str({"name": "rate-distortion", "points": 25}))
    assert rate_distortion < min(changed.values())


def test_refuses():
    run = digits_run()
    with pytest.raises(UnknownName, match="noise"):
        rd(run, inputs="nois")
    with pytest.raises(InvalidValue, match="rate 0"):
        rd(run, rate=0.0)
    with pytest.raises(InvalidValue, match="calibration"):
        rd(run, calibration=0)
    with pytest.raises(InvalidValue, match="points"):
        RateDistortion(points=0)
