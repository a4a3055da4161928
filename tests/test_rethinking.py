"""Fine-tuning against training from scratch: lengths, initial values, independence of what was trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prunus.errors import InvalidValue, UnknownName
from prunus.masks import Masks
from prunus.models.create import create
from prunus.procedures.rethinking import rethinking, scratch_epochs, sparse_init, sparse_std
from prunus.run.stages import State
from small_runs import Watched, digits_run, normed_run, same_weights


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_lengths_by_hand():
    assert scratch_epochs(160, 100, 40) == 400
    assert scratch_epochs(160, 100, 40, cap=2) == 320
    assert scratch_epochs(160, 100, 40, cap=3) == 400
    assert scratch_epochs(90, 7, 7) == 90
    assert scratch_epochs(10, 3, 2) == 15
    for pruned in (0, 101):
        with pytest.raises(InvalidValue, match="pruned_macs"):
            scratch_epochs(160, 100, pruned)
    with pytest.raises(InvalidValue, match="cap"):
        scratch_epochs(160, 100, 40, cap=0.5)


def test_sparse_fan():
    assert sparse_std(9 * 64, 64) == pytest.approx(math.sqrt(2 / 9))
    assert sparse_std(0, 64) == 0.0
    run = normed_run()
    run.make_model = lambda seed: nn.Sequential(nn.Conv2d(40, 80, 3), nn.Flatten(), nn.Linear(80 * 16, 4))
    g = torch.Generator().manual_seed(0)
    masks = Masks({"0.weight": torch.rand(80, 40, 3, 3, generator=g) < 0.3, "2.weight": torch.rand(4, 1280) < 0.5})
    start = State.of(run.model.state_dict())
    made = sparse_init(start, masks, run, seed=5)
    for name, channels in (("0.weight", 40), ("2.weight", 1280)):
        kept = made.weights[name][masks[name]]
        expected = math.sqrt(2 / (len(kept) / channels))
        assert float(kept.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * len(kept)))
        assert abs(float(kept.mean())) < 4 * expected / math.sqrt(len(kept))
        assert not bool(made.weights[name][~masks[name]].any())
    assert torch.equal(made.weights["2.bias"], start.weights["2.bias"])
    assert same_weights(made, sparse_init(start, masks, run, seed=5))
    assert not same_weights(made, sparse_init(start, masks, run, seed=6))


def test_recurrent_layers_keep_their_own_initial_values():
    run = digits_run(make=lambda seed: create("gru", input_shape=(1, 8, 8), hidden=6, seed=seed))
    masks = Masks({"recurrent.weight_hh_l0": torch.rand(18, 6) < 0.5})
    made = sparse_init(run.initial, masks, run, seed=0)
    name = "recurrent.weight_hh_l0"
    assert torch.equal(made.weights[name], run.initial.weights[name] * masks[name])


def test_a_network_that_lost_nothing_has_one_scratch_arm():
    run = digits_run()
    found = {arm: rethinking(run.within(arm), sparsity=0.0, arm=arm) for arm in ("scratch-E", "scratch-B")}
    assert same_weights(found["scratch-E"].state, found["scratch-B"].state)
    assert found["scratch-B"].details["epochs"] == {"scratch-B": 2}


def test_arms_and_their_starts():
    run = digits_run(kind=Watched, epochs=4)
    found = rethinking(run.within("all"), sparsity=0.8, cap=3)
    details = found.details
    assert set(details["arms"]) == {"finetune", "scratch-E", "scratch-B"}
    assert details["epochs"] == {"finetune": 1, "scratch-E": 4, "scratch-B": 12}
    # Every weight of a fully connected network is used once for one example.
    assert details["dense_macs"] == 64 * 32 + 32 * 16 + 16 * 10
    assert details["pruned_macs"] == pytest.approx(found.state.masks.kept, abs=2)
    assert found.steps == (4 + 1 + 4 + 12) * 15
    dense = run.train("dense-60", training=run.training)
    tuned, choices = run.seen["finetune"]
    assert same_weights(tuned, dense)
    assert (choices["training"].lr, choices["training"].schedule) == (pytest.approx(0.001), "constant")
    start, _ = run.seen["scratch-E"]
    assert same_weights(start, run.seen["scratch-B"][0])
    for name, mask in found.state.masks.items():
        ours, theirs = start.weights[name][mask], dense.weights[name][mask]
        correlation = float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(len(ours)), name
        assert not torch.equal(ours, run.initial.weights[name][mask])
    assert {run.seen[n][1]["masks"].digest() for n in details["arms"]} == {found.state.masks.digest()}


def test_scratch_does_not_depend_on_trained_values():
    """BatchNorm statistics and scales included: another dense training with the same masks gives the same start."""
    run = normed_run(kind=Watched)
    rethinking(run.within("m"), sparsity=0.5, arm="scratch-E")
    start = run.seen["scratch-E"][0]
    assert torch.equal(start.weights["norm.running_mean"], torch.zeros(6))
    assert torch.equal(start.weights["norm.weight"], torch.ones(6))
    assert int(start.weights["norm.num_batches_tracked"]) == 0


def test_longer_scratch_training_wins_at_high_sparsity():
    run = digits_run(epochs=6, hidden=(64, 32))
    found = rethinking(run.within("m"), sparsity=0.95, budget="lamp", cap=5)
    accuracy = {name: measured["test"]["accuracy"] for name, measured in found.details["arms"].items()}
    assert accuracy["scratch-B"] > accuracy["scratch-E"]


def test_refuses():
    with pytest.raises(UnknownName, match="scratch-B"):
        rethinking(digits_run(), arm="scratch-C")
    with pytest.raises(InvalidValue):
        rethinking(digits_run(), sparsity=1.5)
