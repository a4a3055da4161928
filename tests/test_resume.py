"""A run that is cut anywhere and resumed leaves the same bytes as one that never was."""

import json
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from killed_run import RIGL, TRAINING, network, splits, work
from prunus.errors import InvalidValue, RecipeChanged, Stopped
from prunus.masks import Masks
from prunus.methods.registry import METHODS
from prunus.run.stages import Run, State
from prunus.run.store import Store
from prunus.train import rates
from prunus.train.callback import Callback
from prunus.train.checkpoint import Checkpoints
from prunus.train.loop import fit
from prunus.train.tensors import digest
from prunus.train.training import Training

HERE = {"versions": "same"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tree(folder):
    """Everything a run leaves behind but clock times and the lock (which holds a process number)."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.name not in ("timing.jsonl", "lock")
    }


class Interrupted(Exception):
    """Stands for anything that ends the process between two steps."""


def whole(folder, **options):
    with Store.create(folder, {}, HERE) as store:
        state = work(store, **options)
    return tree(folder), state


def cut(folder, after, every, **options):
    """Interrupt the run at each step count of `after`, then let it finish."""
    for limit in after:
        steps = iter(range(limit))

        def crash(steps=steps):
            if next(steps, None) is None:
                raise Interrupted
            return False

        with Store.create(folder, {}, HERE) as store, pytest.raises(Interrupted):
            work(store, should_stop=crash, steps=every, **options)
    with Store.create(folder, {}, HERE) as store:
        state = work(store, steps=every, **options)
    return tree(folder), state


def test_memory_and_folder_give_the_same(tmp_path):
    files, state = whole(tmp_path / "run")
    assert work(None).digest == state.digest
    assert "stages/seed-3/sparse/masks.safetensors" in files
    assert "stages/seed-3/sparse/optimizer.safetensors" in files
    assert not [name for name in files if "checkpoint" in name]
    rows = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    assert {row["stage"] for row in rows} == {"seed-3/early", "seed-3/sparse", "seed-3/ticket"}
    again, state_again = whole(tmp_path / "run")
    assert again == files
    assert state_again.digest == state.digest


def test_cut_at_every_step(tmp_path):
    """Weights, masks, optimizer state and history of one training, cut after each of its steps."""

    def train(folder=None, limit=None):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = network(0)
        steps = iter(range(limit or 0))

        def crash():
            if limit is not None and next(steps, None) is None:
                raise Interrupted
            return False

        checkpoint = None if folder is None else Checkpoints(folder, every_steps=3)
        choices = replace(TRAINING, epochs=4)
        fitted = fit(model, splits(), choices, method=RIGL, until=20, seed=7, checkpoint=checkpoint, should_stop=crash)
        assert fitted.masks is not None
        rest = [fitted.masks.digest(), digest(fitted.optimizer[0]), fitted.optimizer[1], fitted.history, fitted.metrics]
        return digest(model.state_dict()), *rest

    expected = train()
    for limit in range(19):
        with pytest.raises(Interrupted):
            train(tmp_path / str(limit), limit)
        assert train(tmp_path / str(limit)) == expected, f"cut after {limit + 1} steps"


def test_cut_in_every_stage(tmp_path):
    # Stages of 6, 30 and 30 steps; the last step of a stage cannot be cut, it only finishes.
    expected, state = whole(tmp_path / "whole")
    for after in (0, 5, 34, 62):
        found, state_cut = cut(tmp_path / f"cut-{after}", [after], every=4)
        assert found == expected, f"cut after {after} steps"
        assert state_cut.digest == state.digest


def test_cut_again_and_again(tmp_path):
    expected, _ = whole(tmp_path / "whole")
    found, _ = cut(tmp_path / "cut", [3, 5, 9, 2, 13, 8, 11, 1], every=3)
    assert found == expected


def test_stopping_saves_and_resumes(tmp_path):
    expected, _ = whole(tmp_path / "whole")
    lives, finished = 0, False
    while not finished:
        countdown = iter([False] * 7)
        lives += 1
        with Store.create(tmp_path / "stopped", {}, HERE) as store:
            try:
                work(store, should_stop=lambda c=countdown: next(c, True), steps=None)
                finished = True
            except Stopped as stopped:
                message = str(stopped)
    assert "its state is saved" in message
    assert lives > 5
    assert tree(tmp_path / "stopped") == expected


def test_killed_with_signal_9(tmp_path):
    expected, _ = whole(tmp_path / "whole")
    draw = random.Random(0)
    delays = [f"{draw.uniform(0.05, 0.5):.3f}" for _ in range(6)]
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed"), *delays],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    ends = done.stdout.split("\n")[:-1]
    assert ends[-1] == "exit 0", done.stderr
    assert ends.count("killed") >= 3
    found = tree(tmp_path / "killed")
    for name in ("recipe.json", "environment.json"):
        expected.pop(name), found.pop(name)
    assert found == expected


@pytest.mark.parametrize("name", [entry.name for entry in METHODS if entry.kind == "step"])
def test_every_step_method_resumes(tmp_path, name):
    method = METHODS.load(name)
    chosen = {"every": 3} if "every" in {f.name for f in fields(method)} else {}

    def train(folder=None, limit=None):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = nn.Linear(36, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4)
            model = nn.Sequential(nn.Flatten(), *layers)
        steps = iter(range(limit or 0))

        def crash():
            if limit is not None and next(steps, None) is None:
                raise Interrupted
            return False

        checkpoint = None if folder is None else Checkpoints(folder, every_steps=2)
        choices = Training(epochs=4, batch_size=8, lr=0.05)
        fitted = fit(model, splits(), choices, method=method(**chosen), checkpoint=checkpoint, should_stop=crash)
        assert fitted.masks is not None
        assert fitted.masks.sparsity > 0.4
        return digest(model.state_dict()), fitted.masks.digest(), digest(fitted.optimizer[0]), fitted.history

    expected = train()
    for limit in (6, 17):
        with pytest.raises(Interrupted):
            train(tmp_path / str(limit), limit)
        assert train(tmp_path / str(limit)) == expected


class Unkeyed(Callback):
    """Negative control: shuffles labels' order from a generator that runs on, and whose state nobody saves."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)

    def batch(self, step, model, x, y, ids):
        order = torch.randperm(len(y), generator=self._generator)
        return x.roll(int(order[0]), -1), y

    def describe(self):
        return {"type": "Unkeyed"}


class Remembering(Unkeyed):
    """The same, but its state is saved."""

    def state_dict(self):
        return {"tensors": {"generator": self._generator.get_state()}, "values": {}}

    def load_state_dict(self, state):
        self._generator.set_state(state["tensors"]["generator"])


@pytest.mark.parametrize(("callback", "equal"), [(Unkeyed, False), (Remembering, True)])
def test_the_comparison_can_fail(tmp_path, callback, equal):
    def trained(folder, crash_at):
        steps = iter(range(crash_at - 1))

        def crash():
            if next(steps, None) is None:
                raise Interrupted
            return False

        for stop in (crash, None) if crash_at else (None,):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = network(0)
            try:
                fit(
                    model,
                    splits(),
                    TRAINING,
                    callbacks=[callback()],
                    checkpoint=Checkpoints(folder, every_steps=5),
                    should_stop=stop,
                )
            except Interrupted:
                continue
        return digest(model.state_dict())

    assert (trained(tmp_path / "a", 0) == trained(tmp_path / "b", 17)) is equal


@pytest.fixture(autouse=True)
def close_stores(monkeypatch):
    opened = []
    create = Store.create
    monkeypatch.setattr(Store, "create", lambda *arguments: opened.append(create(*arguments)) or opened[-1])
    yield
    for store in opened:
        store.close()


def make(folder=None, **options):
    store = None if folder is None else Store.create(folder, {}, HERE)
    return Run(store, splits=splits(), make_model=network, training=TRAINING, **options)


def test_split_in_two_equals_whole():
    run = make()
    early = run.train("early", until=10)
    rest = run.train("rest", start=early, start_step=10, continue_optimizer=True)
    straight = run.train("straight")
    assert digest(rest.weights) == digest(straight.weights)
    fresh = run.train("fresh", start=early, start_step=10)
    assert digest(fresh.weights) != digest(straight.weights)
    with pytest.raises(InvalidValue, match="no optimizer state"):
        run.train("more", start=straight, continue_optimizer=True)


def test_weight_rewinding_starts_from_the_masked_early_weights():
    run = make()
    early = run.train("early", until="1ep")
    masks = Masks({"5.weight": torch.arange(256).reshape(4, 64) % 3 == 0})
    frozen = run.train("frozen", start=early, masks=masks, training=Training(steps=0))
    assert torch.equal(frozen.weights["5.weight"], early.weights["5.weight"] * masks["5.weight"])
    assert torch.equal(frozen.weights["1.running_mean"], early.weights["1.running_mean"])
    ticket = run.train("ticket", start=early, start_step=early.step, masks=masks)
    assert ticket.masks == masks
    assert ticket.step == 36
    assert not bool(ticket.weights["5.weight"][~masks["5.weight"]].any())


def test_finished_stages_are_not_repeated(tmp_path):
    calls = []
    for _ in range(2):
        run = make(tmp_path / "run")
        state = run.train("one", training=Training(steps=3))
        values = run.compute("two", {"state": state}, lambda: calls.append(1) or {"score": torch.ones(2)})
        assert torch.equal(values["score"], torch.ones(2))
        made = run.compute("three", {}, lambda: calls.append(2) or {"a": (1, 2.5), "b": None})
        assert made == {"a": [1, 2.5], "b": None}
        run.store.close()
    assert calls == [1, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"training": Training(steps=4)},
        {"seed": 9},
        {"until": 2},
        {"method": RIGL},
        {"masks": Masks({"5.weight": torch.ones(4, 64, dtype=torch.bool)})},
        {"rates": [0.1, 0.1, 0.2]},
        {"data": splits().train.subset(range(40))},
        {"start": State.of(network(0).state_dict())},
        {"callbacks": [Remembering()]},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("stored", [False, True])
def test_every_input_is_part_of_the_description(tmp_path, change, stored):
    run = make(tmp_path / "run" if stored else None)
    run.train("one", training=Training(steps=3))
    with pytest.raises(RecipeChanged, match="stage 'one'"):
        run.train("one", **{"training": Training(steps=3), **change})


def test_what_cannot_be_described_is_refused():
    run = make()
    with pytest.raises(InvalidValue, match="describe"):
        run.train("one", objective=lambda logits, y, ids: logits.sum())
    with pytest.raises(InvalidValue, match="describe"):
        run.compute("two", {"x": object()}, lambda: 1)


def test_a_checkpoint_of_other_inputs_is_refused(tmp_path):
    run = make(tmp_path / "run", should_stop=lambda: True)
    with pytest.raises(Stopped):
        run.train("one")
    run.store.close()
    other = make(tmp_path / "run", seed=1)
    with pytest.raises(RecipeChanged, match="seed: 0 -> 1"):
        other.train("one")
    other.store.close()


def test_retraining_with_recorded_rates():
    run = make()
    original = run.learning_rates()
    assert len(original) == 6 * run.steps_per_epoch() == 36
    dense = run.train("dense")
    replayed = rates.retraining("lrw", original=original, steps=12)
    choices = Training(steps=12, batch_size=8)
    tuned = run.train("tuned", start=dense, rates=replayed, training=choices)
    assert tuned.step == 12
    constant = run.train("constant", start=dense, rates=[0.1] * 12, training=choices)
    assert digest(tuned.weights) != digest(constant.weights)


def test_a_checkpoint_of_other_choices_is_refused(tmp_path):
    checkpoint = Checkpoints(tmp_path)
    with pytest.raises(Stopped):
        fit(network(0), splits(), TRAINING, checkpoint=checkpoint, should_stop=lambda: True)
    with pytest.raises(RecipeChanged, match=r"training\.lr: 0\.05 -> 0\.5"):
        fit(network(0), splits(), replace(TRAINING, lr=0.5), checkpoint=checkpoint)


def test_models_of_a_run_are_fresh_and_keyed():
    run = make(seed=4)
    torch.manual_seed(1)
    a = run.model
    torch.manual_seed(2)
    b = run.model
    assert a is not b
    assert digest(a.state_dict()) == digest(b.state_dict()) == digest(run.initial.weights)
    assert digest(make(seed=5).model.state_dict()) != digest(a.state_dict())


def test_evaluation():
    run = make()
    state = run.train("one")
    assert run.evaluate(state)["accuracy"] > 0.5
    assert run.evaluate(state, "validation")["accuracy"] == state.metrics["validation_accuracy"]
    with pytest.raises(LookupError, match="Did you mean 'test'"):
        run.evaluate(state, "tests")


def test_a_teacher_is_part_of_a_stage():
    run = make()
    teacher = run.train("teacher")
    choices = Training(steps=5, distill_weight=0.5)
    student = run.train("student", teacher=teacher, training=choices, seed=8)
    assert student.step == 5
    with pytest.raises(RecipeChanged, match="teacher"):
        run.train("student", teacher=student, training=choices, seed=8)
