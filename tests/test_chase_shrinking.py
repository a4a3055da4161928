"""Chase as a procedure: networks that get narrower stage by stage, on the course of the masked training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from prunus.budget.select import round_half_up
from prunus.errors import Infeasible, InvalidValue, NothingPrunable, UnknownName
from prunus.graph.plan import Plan
from prunus.methods.chase import Chase, removable
from prunus.methods.soft_bound import SoftBound
from prunus.procedures.chase import chase
from prunus.procedures.cutting import coupling_of, cut_state, sliced, sliced_masks
from prunus.run.plan import Planner
from prunus.run.store import Store
from prunus.train.training import Training
from small_runs import Watched, normed_run


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Narrow(nn.Module):
    """Three convolutions with BatchNorm in float64, in which masked and cut trainings differ by rounding alone."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
                *(nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU()),
                *(nn.Conv2d(10, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
            ).double()
            self.head = nn.Linear(12, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.double()).mean((2, 3)))


class Stream(nn.Module):
    """A residual stream of six channels with an inner convolution of five."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(1, 6, 3, padding=1)
            self.inner, self.outer = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
            self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.outer(self.inner(x).relu())).relu().mean((2, 3)))


def narrow_run(**options) -> Watched:
    run = normed_run(kind=Watched, training=Training(epochs=10, batch_size=16, lr=0.05), **options)
    run.make_model = Narrow
    return run


OPTIONS = {"sparsity": 0.8, "channel_sparsity": 0.4, "every": 4, "channel_every": 12, "bound": 0.05}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_cutting_on_the_way_is_masking_to_the_end(optimizer):
    run = narrow_run()
    run.training = replace(run.training, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 0.005)
    outcome = chase(run.within("cut"), refresh=False, **OPTIONS)
    families = removable(coupling_of(run, run.initial).families, dict(run.model.named_parameters()))
    whole = run.within("mask").train("all", method=Chase(families=families, **OPTIONS))
    plan = outcome.state.shape.plan
    assert sum(len(k) for k in plan.families.values()) < 30
    assert sum(outcome.details["channels_kept"].values()) == 30 - round_half_up(0.4 * 30)
    assert sliced_masks(whole.masks, plan) == outcome.state.masks
    assert outcome.state.masks.kept == whole.masks.kept
    for name, weight in outcome.state.weights.items():
        if weight.is_floating_point():
            assert torch.allclose(weight, sliced(whole.weights[name], name, plan), rtol=1e-6, atol=1e-9), name
    for split in ("validation", "test"):
        assert run.evaluate(whole, split) == pytest.approx(run.evaluate(outcome.state, split), rel=1e-6)


def test_procedure_trains_smaller_networks_stage_by_stage():
    run = narrow_run()
    outcome = chase(run.within("m"), **OPTIONS)
    method = Chase(families=(), origin={}, **OPTIONS)
    removals = method.removals(40, 4)
    names = [f"until-{i}" for i in range(1, len(removals) + 1)] + ["last"]
    assert list(run.seen) == names
    sizes = [sum(w.numel() for w in run.seen[n][0].weights.values()) for n in names]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    for name, step in zip(names[1:], removals, strict=True):
        start, choices = run.seen[name]
        assert start.step == step == choices["start_step"]
        assert choices["continue_optimizer"]
        for key, tensor in start.optimizer[0].items():
            assert "momentum" in key
            assert tensor.shape in {w.shape for w in start.weights.values()}
    dense = outcome.details["dense_weights"]
    assert outcome.state.masks.kept == outcome.details["kept"] == dense - round_half_up(0.8 * dense)
    assert outcome.details["room"] == outcome.state.masks.total < dense
    assert [r["step"] for r in outcome.details["removals"]] == removals
    assert json.loads(json.dumps(outcome.details)) == outcome.details
    planned: dict[str, int] = {}
    chase(Planner.of(narrow_run(), planned).within("m"), **OPTIONS)
    assert sum(planned.values()) == outcome.steps == 40
    # BatchNorm statistics are those of the whole training set.
    model = outcome.state.model(run)
    first = model.body[0](run.splits.train.normalise(run.splits.train.x).double())
    assert torch.allclose(model.body[1].running_mean, first.detach().mean((0, 2, 3)))


def test_procedure_without_channels_is_one_stage_of_soft_bound_training():
    options = {k: v for k, v in OPTIONS.items() if not k.startswith("channel")}
    run = narrow_run()
    outcome = chase(run.within("m"), channel_sparsity=0, refresh=False, **options)
    assert list(run.seen) == ["last"]
    alone = run.within("alone").train("all", method=SoftBound(**options))
    assert alone.masks == outcome.state.masks
    assert all(torch.equal(alone.weights[n], w) for n, w in outcome.state.weights.items())


def test_a_cut_procedure_goes_on_bit_for_bit(tmp_path):
    class Interrupted(Exception):
        pass

    def work(folder, limit=None):
        steps = iter(range(limit or 0))

        def crash():
            if limit is not None and next(steps, None) is None:
                raise Interrupted
            return False

        with Store.create(folder, {}, {"versions": "same"}) as store:
            run = narrow_run(store=store, should_stop=crash, checkpoint_seconds=None, checkpoint_steps=3)
            return chase(run.within("m"), **OPTIONS)

    whole = work(tmp_path / "whole")
    for limit in (14,):
        with pytest.raises(Interrupted):
            work(tmp_path / "cut", limit)
    resumed = work(tmp_path / "cut")
    assert resumed.state.digest == whole.state.digest
    assert resumed.details == whole.details


def test_the_best_checkpoint_is_one_of_the_last_stage():
    run = narrow_run()
    run.training = replace(run.training, checkpoint_best=True)
    outcome = chase(run.within("m"), **OPTIONS)
    assert outcome.state.metrics["selected"] == "best"
    assert outcome.state.masks.kept == outcome.details["kept"]


def test_streams_narrow_only_when_asked():
    run = normed_run(training=Training(epochs=5, batch_size=16, lr=0.05))
    run.make_model = Stream
    options = OPTIONS | {"sparsity": 0.85, "channel_every": 6}
    inner = chase(run.within("inner"), **options)
    assert "stem.weight:0" not in inner.details["channels"]
    every = chase(run.within("streams"), streams=True, **options)
    assert every.details["channels"]["stem.weight:0"] == 6


def test_families_may_end_with_a_single_channel():
    run = normed_run(training=Training(epochs=6, batch_size=16, lr=0.05))
    run.make_model = Stream
    outcome = chase(run.within("m"), sparsity=0.9, channel_sparsity=0.8, floor=0, channel_every=6, every=4)
    assert outcome.details["channels"] == {"inner.weight:0": 5}
    assert outcome.details["channels_kept"] == {"inner.weight:0": 1}
    both = chase(
        run.within("streams"), sparsity=0.95, channel_sparsity=0.75, streams=True, floor=0, channel_every=6, every=4
    )
    assert sum(both.details["channels_kept"].values()) == 11 - round_half_up(0.75 * 11)


def test_procedure_refuses():
    run = normed_run()
    run.make_model = lambda seed: nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(NothingPrunable, match="channel_sparsity=0"):
        chase(run.within("m"), sparsity=0.5)
    with pytest.raises(UnknownName, match="umm"):
        chase(normed_run().within("m"), channel_score="umn")
    with pytest.raises(Infeasible, match="remove fewer"):
        chase(narrow_run().within("m"), **(OPTIONS | {"sparsity": 0.2, "channel_sparsity": 0.6}))
    with pytest.raises(InvalidValue, match="cut further"):
        cut_state(normed_run(), replace(normed_run().initial, shape=nn.Identity()), Plan())
