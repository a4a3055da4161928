"""Sparse model soups: averages, their identities, members, greedy choice, BatchNorm."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunus.errors import InvalidValue, MaskMismatch, UnknownName
from prunus.procedures.averaging import Ensemble, average, distances
from prunus.procedures.common import in_order, spread_over
from prunus.procedures.imp import imp, rounds_for
from prunus.procedures.soups import greedy, member_choices, phase_sparsities, soups
from prunus.train.training import Training
from small_runs import Watched, digits_run, normed_run, same_weights


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(seed, shape=(30, 40)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sparsities_of_phases():
    assert phase_sparsities(0.98, 3) == pytest.approx([1 - 0.02 ** (1 / 3), 1 - 0.02 ** (2 / 3), 0.98])
    assert phase_sparsities(0.98, 3) == pytest.approx([0.7286, 0.9263, 0.98], abs=5e-5)
    assert phase_sparsities(0.9, 1) == pytest.approx([0.9])
    with pytest.raises(InvalidValue, match="phases"):
        phase_sparsities(0.9, 0)


@pytest.mark.parametrize("members", [1, 2, 3, 7, 10])
def test_equal_members_give_themselves_bit_for_bit(members):
    state = {"w": drawn(0), "steps": torch.tensor(5), "on": torch.tensor([True, False]), "half": drawn(1).half()}
    soup = average([{n: t.clone() for n, t in state.items()} for _ in range(members)])
    assert all(torch.equal(soup[n], state[n]) and soup[n].dtype == state[n].dtype for n in state)


def test_the_soup_is_the_mean_and_counters_come_from_the_first():
    states = [{"w": drawn(i), "steps": torch.tensor(i)} for i in range(4)]
    soup = average(states)
    torch.testing.assert_close(soup["w"], torch.stack([s["w"] for s in states]).mean(0))
    assert int(soup["steps"]) == 0
    # In float32 the large entries would swallow the small one.
    extreme = average([{"w": torch.tensor([1e8])}, {"w": torch.tensor([1.0])}, {"w": torch.tensor([-1e8])}])
    assert float(extreme["w"]) == pytest.approx(1 / 3)


def test_one_mask_stays_one_mask_and_two_do_not():
    mask = drawn(9) > 1.3
    states = [{"w": drawn(i)} for i in range(3)]
    soup = average(states, [{"w": mask}] * 3)["w"]
    assert torch.equal(soup != 0, mask)
    g = torch.Generator().manual_seed(0)
    masks = [torch.rand(400, 400, generator=g) < 0.1 for _ in range(2)]
    both = average([{"w": torch.ones(400, 400) * m} for m in masks])["w"]
    assert float((both != 0).float().mean()) == pytest.approx(2 * 0.1 - 0.1**2, abs=0.005)
    with pytest.raises(MaskMismatch, match="differ"):
        average([{"w": torch.ones(400, 400)}] * 2, [{"w": m} for m in masks])
    with pytest.raises(MaskMismatch, match="another has none"):
        average(states[:2], [{"w": mask}, None])


def test_averages_are_of_networks_of_one_shape():
    with pytest.raises(InvalidValue, match="no network"):
        average([])
    with pytest.raises(InvalidValue, match="'w'"):
        average([{"w": drawn(0)}, {"w": drawn(0, (3,))}])
    with pytest.raises(InvalidValue, match="'v'"):
        average([{"w": drawn(0)}, {"w": drawn(0), "v": drawn(0)}])
    with pytest.raises(InvalidValue, match="masks"):
        average([{"w": drawn(0)}, {"w": drawn(0)}], [None])
    with pytest.raises(MaskMismatch, match="bool"):
        average([{"on": torch.tensor([True])}, {"on": torch.tensor([False])}])


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda out, y: F.mse_loss(out, F.one_hot(y, 5).float())])
def test_a_soup_of_linear_models_is_no_worse_than_the_mean_member(loss):
    """Jensen: the loss is convex in the weights of one linear layer."""
    x, y = drawn(3, (200, 8)), torch.arange(200) % 5
    states = [{"weight": drawn(i, (5, 8)), "bias": drawn(10 + i, (5,))} for i in range(4)]

    def value(state):
        return float(loss(F.linear(x.double(), state["weight"].double(), state["bias"].double()), y))

    assert value(average(states)) <= sum(value(s) for s in states) / 4


def test_distances_by_hand():
    states = [
        {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0])},
        {"a": torch.zeros(2), "b": torch.tensor([4.0])},
    ]
    found = distances(states, ["a", "b"])
    assert found["pairwise_min"] == found["pairwise_mean"] == found["pairwise_max"] == pytest.approx(5.0)
    assert found["to_mean"] == pytest.approx(2.5)
    assert found["angle_max_degrees"] == pytest.approx(90.0)
    assert set(distances(states[:1], ["a", "b"]).values()) == {0.0}


def test_the_ensemble_averages_probabilities():
    nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
    x = drawn(0, (6, 4))
    expected = (nets[0](x).softmax(1) + nets[1](x).softmax(1)) / 2
    torch.testing.assert_close(Ensemble(nets)(x).exp(), expected)


def test_greedy_by_hand():
    values = {(1,): 0.8, (1, 2): 0.8, (1, 0): 0.7, (1, 2, 0): 0.75, (1, 2, 3): 0.9}
    assert greedy([0.6, 0.8, 0.8, 0.5], lambda members: values[tuple(members)]) == [1, 2, 3]
    assert greedy([0.3, 0.2], lambda members: 0.0) == [0]


def test_members_differ_in_exactly_one_factor():
    base = Training(epochs=6, weight_decay=1e-3, lr=0.1)
    assert [c for c, _ in member_choices(base, "seed", 3)] == [base] * 3
    decays = member_choices(base, "weight-decay", 3)
    assert [v for _, v in decays] == pytest.approx([5e-4, 1e-3, 2e-3])
    assert [c.epochs for c, _ in member_choices(base, "length", 3)] == [3, 6, 12]
    assert [c.lr for c, _ in member_choices(base, "lr", 2, [0.05, 0.2])] == [0.05, 0.2]
    assert all(c.lr == 0.1 and c.epochs == 6 for c, _ in decays)
    assert member_choices(base, "lr", 1)[0][1] == 0.1
    with pytest.raises(UnknownName, match="weight-decay"):
        member_choices(base, "weight_decays", 3)
    with pytest.raises(InvalidValue, match="distinct"):
        member_choices(Training(epochs=1, weight_decay=0.0), "weight-decay", 3)
    with pytest.raises(InvalidValue, match="2 values"):
        member_choices(base, "lr", 3, [0.1, 0.2])
    with pytest.raises(InvalidValue, match="seed"):
        member_choices(base, "seed", 2, [1, 2])


@pytest.mark.parametrize("make", [digits_run, normed_run], ids=["digits", "with BatchNorm"])
def test_one_member_is_iterative_pruning(make):
    run = make(epochs=2)
    rate = 1 - (1 - 0.9) ** (1 / 3) + 1e-9
    assert len(rounds_for(0.9, rate)) == 3
    base = imp(run.within("imp"), sparsity=0.9, rate=rate, rewind="finetune")
    soup = soups(run.within("soups"), sparsity=0.9, phases=3, members=1, retrain="FT", epochs=2)
    assert soup.state.masks == base.state.masks
    assert same_weights(soup.state, base.state)
    assert soup.steps == base.steps


def test_phases_go_on_from_the_soup_under_one_mask():
    run = digits_run(kind=Watched)
    found = soups(run.within("soups"), sparsity=0.9, phases=2, members=3, epochs=1)
    members = [run.seen[f"phase-2/member-{i}"] for i in range(3)]
    assert len({start.digest for start, _ in members}) == 1
    assert all(choices["masks"] == found.state.masks for _, choices in members)
    assert len({choices["seed"] for _, choices in members}) == 3
    assert members[0][1]["seed"] is None
    for phase in found.details["phases"]:
        assert phase["chosen"] == [0, 1, 2]
        assert phase["distances"]["pairwise_min"] > 0
        assert len(phase["members"]) == 3
    assert found.state.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    assert set(found.details["phases"][0]["ensemble"]) == {"accuracy", "loss", "ece", "worst_class_accuracy"}
    assert found.steps == 30 + 2 * 3 * 15
    assert found.state.metrics["accuracy"] == found.details["phases"][-1]["soup"]["accuracy"]


@pytest.mark.parametrize("vary", ["weight-decay", "length", "lr"])
def test_other_factors(vary):
    run = normed_run(kind=Watched)
    found = soups(run.within("soups"), sparsity=0.6, phases=1, members=2, vary=vary, epochs=2)
    starts = [run.seen[f"phase-1/member-{i}"] for i in range(2)]
    assert all(choices["seed"] is None for _, choices in starts)
    trainings = [choices["training"] for _, choices in starts]
    assert trainings[0] != trainings[1]
    peaks = [max(choices["rates"]) for _, choices in starts]
    assert (peaks[0] != peaks[1]) == (vary == "lr")
    assert found.details["vary"] == vary


def test_statistics_of_the_soup_are_those_of_its_inputs():
    run = normed_run()
    found = soups(run.within("soups"), sparsity=0.5, phases=1, members=2, epochs=1, share=0.5)
    model = found.state.model(run).eval()
    part = spread_over(run.splits.train, math.ceil(0.5 * len(run.splits.train)))
    x = torch.cat([x for x, _, _ in in_order(run, part)])
    inputs = model.conv(x).double()
    torch.testing.assert_close(model.norm.running_mean.double(), inputs.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var.double(), inputs.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_greedy_is_at_least_the_best_member_and_needs_validation_examples():
    run = digits_run(epochs=2)
    found = soups(run.within("greedy"), sparsity=0.9, phases=2, members=3, epochs=1, soup="greedy")
    for phase in found.details["phases"]:
        assert phase["soup"]["accuracy"] >= max(m["accuracy"] for m in phase["members"])
    with pytest.raises(InvalidValue, match="validation"):
        soups(digits_run(validation=0), soup="greedy")
    with pytest.raises(UnknownName, match="uniform"):
        soups(run, soup="uniformly")
    with pytest.raises(InvalidValue, match="share"):
        soups(run, share=0.0)


def test_the_soup_is_no_worse_in_loss_than_the_mean_member_on_noisy_digits():
    """One fifth of the training labels is wrong (those of the held-out examples are right); the average is calmer."""
    run = digits_run(epochs=8, hidden=(64, 32), validation=300)
    train = run.splits.train
    g = torch.Generator().manual_seed(0)
    wrong, other = torch.rand(len(train), generator=g) < 0.2, torch.randint(0, 10, (len(train),), generator=g)
    noisy = replace(train, y=torch.where(wrong, other, train.y))
    run.splits = replace(run.splits, train=noisy)
    found = soups(run.within("soups"), sparsity=0.9, phases=1, members=4, epochs=5)
    (phase,) = found.details["phases"]
    assert phase["soup"]["loss"] <= sum(m["loss"] for m in phase["members"]) / 4
