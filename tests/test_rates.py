"""Learning rates: hand cases of the schedules and of the six ways to retrain."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import InvalidValue, UnknownName
from prunus.train import rates as r
from prunus.train.training import Training

ORIGINAL = [0.1] * 4 + [0.01] * 4 + [0.001] * 2


def test_schedules_by_hand():
    assert r.rates("constant", 3, 0.5) == [0.5, 0.5, 0.5]
    assert r.rates("linear", 4, 1.0) == [1.0, 0.75, 0.5, 0.25]
    assert r.rates("cosine", 4, 2.0) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)])
    assert r.rates("step", 8, 1.0) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_milestones_of_160_epochs():
    factors = [r.milestones(e, 160, (0.5, 0.75)) for e in range(160)]
    assert factors[79] == 1.0
    assert factors[80] == pytest.approx(0.1)
    assert factors[119] == pytest.approx(0.1)
    assert factors[120] == pytest.approx(0.01)


def test_warm_up_reaches_the_peak_exactly_once():
    found = r.rates("linear", 7, 1.0, warmup_steps=3)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])


@given(st.sampled_from(sorted(r.SCHEDULES)), st.integers(1, 60), st.floats(0, 1))
def test_every_schedule_stays_within_the_peak(name, total, share):
    found = r.rates(name, total, 0.3, warmup_steps=int(share * total))
    assert len(found) == total
    assert all(0.0 <= value <= 0.3 * (1 + 1e-12) for value in found)


def test_what_cannot_be():
    with pytest.raises(UnknownName, match="cosine"):
        r.rates("cosin", 3, 0.1)
    with pytest.raises(InvalidValue, match="warm-up of 5"):
        r.rates("cosine", 3, 0.1, warmup_steps=5)


def test_fine_tuning_takes_the_last_rate():
    assert r.retraining("ft", original=ORIGINAL, steps=3) == [0.001] * 3


def test_rewinding_replays_the_last_steps():
    assert r.retraining("lrw", original=ORIGINAL, steps=4) == [0.01, 0.01, 0.001, 0.001]
    assert r.retraining("LRW", original=ORIGINAL, steps=10) == ORIGINAL
    with pytest.raises(InvalidValue, match="only 10"):
        r.retraining("lrw", original=ORIGINAL, steps=11)


def test_scaled_compresses_the_whole_schedule():
    assert r.retraining("slr", original=ORIGINAL, steps=5, warmup=0) == [0.1, 0.1, 0.01, 0.01, 0.001]
    assert r.retraining("slr", original=ORIGINAL, steps=10, warmup=0) == ORIGINAL


def test_cyclic_runs_from_largest_to_smallest():
    found = r.retraining("clr", original=ORIGINAL, steps=100, warmup=0)
    assert found[0] == 0.1
    assert found[50] == pytest.approx((0.1 + 0.001) / 2)
    assert min(found) >= 0.001
    assert found[-1] == pytest.approx(0.001, abs=1e-4)


def test_linear_restart_runs_from_largest_to_zero():
    assert r.retraining("llr", original=ORIGINAL, steps=4, warmup=0) == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_ten_percent_warm_up():
    found = r.retraining("llr", original=ORIGINAL, steps=20)
    assert found[:3] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])
    assert found.index(max(found)) == 2
    assert found[-1] == pytest.approx(0.1 / 18)


@pytest.mark.parametrize(
    ("drop", "steps", "first"),
    [
        (0.3, 1, 0.1 * 0.3 / math.sqrt(0.36)),  # the damage decides
        (0.01, 4, 0.1 * 0.4),  # the share of the original length is the floor
        (0.01, 30, 0.1),  # longer than the original: the whole rate
        (0.9, 1, 0.1),  # never above the largest rate
    ],
)
def test_adaptive_restart(drop, steps, first):
    found = r.retraining("allr", original=ORIGINAL, steps=steps, norm_drop=drop, pruned_fraction=0.36, warmup=0)
    assert found[0] == pytest.approx(first)
    assert found == pytest.approx([first * (1 - i / steps) for i in range(steps)])


def test_a_function_serves_as_original():
    assert r.retraining("lrw", original=lambda s: s / 10, original_steps=5, steps=2) == [0.3, 0.4]
    with pytest.raises(InvalidValue, match="original_steps"):
        r.retraining("lrw", original=lambda s: 0.1, steps=2)


def test_arguments_that_do_not_apply_are_refused():
    with pytest.raises(UnknownName, match="allr"):
        r.retraining("al", original=ORIGINAL, steps=2)
    with pytest.raises(InvalidValue, match="needs norm_drop"):
        r.retraining("allr", original=ORIGINAL, steps=2)
    with pytest.raises(InvalidValue, match="belong to 'allr'"):
        r.retraining("llr", original=ORIGINAL, steps=2, norm_drop=0.1)
    with pytest.raises(InvalidValue, match="no steps"):
        r.retraining("llr", original=[], steps=2)


def test_norm_drop_by_hand():
    before = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([100.0])}
    assert r.norm_drop(before, {"a": torch.tensor([0.0, 4.0])}) == pytest.approx(0.6)
    assert r.norm_drop(before, {"a": torch.tensor([True, False])}) == pytest.approx(0.8)
    assert r.norm_drop({"a": torch.zeros(2)}, {"a": torch.tensor([True, False])}) == 0.0


def test_training_records_its_schedule():
    training = Training(epochs=2, lr=0.4, schedule="linear", warmup="0.5ep")
    assert training.learning_rates(4) == pytest.approx(r.rates("linear", 8, 0.4, warmup_steps=2))
    assert Training(steps=5, schedule="step", milestones=(0.2,), lr=1.0).learning_rates(9) == pytest.approx(
        [1.0, 0.1, 0.1, 0.1, 0.1]
    )
    assert Training().total_steps(7) == 140


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"epochs": 1, "steps": 1}, "both set the length"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum=0.9 belongs to optimizer 'sgd'"),
        ({"milestones": (0.5,)}, "belongs to schedule 'step'"),
        ({"distill_temperature": 2.0}, "distillation"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"steps": -1}, "steps=-1"),
        ({"epochs": 2.5}, "epochs=2.5 must be a whole number"),
        ({"evaluate_every": 0}, "evaluate_every=0"),
        ({"clip_norm": "big"}, "clip_norm='big'"),
    ],
)
def test_choices_are_checked_when_made(choices, message):
    with pytest.raises(InvalidValue, match=message):
        Training(**choices)


def test_unknown_names_are_suggested():
    with pytest.raises(UnknownName, match="Did you mean 'adamw'"):
        Training(optimizer="adanw")
    with pytest.raises(UnknownName, match="Did you mean 'cosine'"):
        Training(schedule="cosin")
