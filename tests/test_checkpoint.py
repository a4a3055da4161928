"""Checkpoints: what goes in comes out bit for bit, and no damage goes unnoticed."""

import errno
import os

import pytest
import torch
from torch import nn

from prunus.errors import DamagedFile, InvalidValue, RecipeChanged, StorageFailed
from prunus.masks import Masks
from prunus.train.checkpoint import Checkpoints, Snapshot, difference, load_optimizer_state, optimizer_state
from prunus.train.optim import build
from prunus.train.tensors import digest, from_bytes, settled, to_bytes


def snapshot(step, seed=0):
    g = torch.Generator().manual_seed(seed + step)
    tensors = {
        "model.weight": torch.randn(4, 3, generator=g),
        "model.count": torch.tensor(step),
        "sparsifier.mask/w": torch.rand(5, generator=g) < 0.5,
    }
    return Snapshot(step, tensors, {"loss": [0.1 + 0.2, step], "history": [{"step": step}]})


def same(a, b):
    return (
        a.step == b.step
        and a.values == b.values
        and set(a.tensors) == set(b.tensors)
        and all(torch.equal(a.tensors[n], b.tensors[n]) and a.tensors[n].dtype == b.tensors[n].dtype for n in a.tensors)
    )


def test_round_trip(tmp_path):
    store = Checkpoints(tmp_path / "c")
    assert store.newest() is None
    store.save(snapshot(3))
    assert same(store.newest(), snapshot(3))
    assert snapshot(3).part("model").keys() == {"weight", "count"}


def test_two_are_kept_and_the_newest_is_used(tmp_path):
    store = Checkpoints(tmp_path)
    for step in (1, 5, 20, 7_000_000_000):
        store.save(snapshot(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000000020", "checkpoint-7000000000"]
    assert same(store.newest(), snapshot(7_000_000_000))
    store.clear()
    assert not tmp_path.exists()
    assert store.newest() is None


def files_of(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(snapshot(1))
    folder = tmp_path / "checkpoint-000000001"
    return store, sorted(folder.iterdir())


def test_any_flipped_bit_is_noticed(tmp_path):
    store, files = files_of(tmp_path)
    assert [f.name for f in files] == ["manifest.json", "tensors.safetensors", "values.json"]
    for path in files:
        sound = path.read_bytes()
        for position in range(len(sound)):
            damaged = bytearray(sound)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(bytes(damaged))
            with pytest.raises(DamagedFile, match="every checkpoint"):
                store.newest()
        path.write_bytes(sound)
    assert same(store.newest(), snapshot(1))


def test_any_truncation_or_loss_is_noticed(tmp_path):
    store, files = files_of(tmp_path)
    for path in files:
        sound = path.read_bytes()
        for length in (*range(0, len(sound), 17), len(sound) - 1):
            path.write_bytes(sound[:length])
            with pytest.raises(DamagedFile):
                store.newest()
        path.write_bytes(sound + b"\n")
        with pytest.raises(DamagedFile):
            store.newest()
        path.unlink()
        with pytest.raises(DamagedFile, match=path.name):
            store.newest()
        path.write_bytes(sound)
    assert same(store.newest(), snapshot(1))


def test_a_folder_with_another_name_is_noticed(tmp_path):
    store, _ = files_of(tmp_path)
    os.rename(tmp_path / "checkpoint-000000001", tmp_path / "checkpoint-000000009")
    with pytest.raises(DamagedFile, match="not the checkpoint its name says"):
        store.newest()


def test_the_older_one_serves_when_the_newer_is_damaged(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(snapshot(1))
    store.save(snapshot(2))
    (tmp_path / "checkpoint-000000002" / "values.json").unlink()
    assert same(store.newest(), snapshot(1))
    # Going on from the older one, the damaged one must not take the place of a sound one.
    store.save(snapshot(1, seed=0))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000000001"]


def test_both_damaged_is_an_error_that_names_both(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(snapshot(1))
    store.save(snapshot(2))
    for step in (1, 2):
        (tmp_path / f"checkpoint-00000000{step}" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(DamagedFile, match=r"000000002.*000000001.*Delete that folder"):
        store.newest()


def test_a_process_killed_while_writing_leaves_nothing_that_counts(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(snapshot(1))
    hidden = tmp_path / ".checkpoint-000000002.abc"
    hidden.mkdir()
    (hidden / "values.json").write_bytes(b"{}")
    assert same(store.newest(), snapshot(1))
    store.clear()
    assert not tmp_path.exists()


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, call):
    store = Checkpoints(tmp_path)
    store.save(snapshot(1))

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageFailed, match="No space left"):
        store.save(snapshot(2))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000000001"]
    assert same(store.newest(), snapshot(1))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    Checkpoints(tmp_path, identity={"training": {"lr": 0.1}, "seed": 1}).save(snapshot(1))
    other = Checkpoints(tmp_path, identity={"training": {"lr": 0.2}, "seed": 1})
    with pytest.raises(RecipeChanged, match=r"training\.lr: 0\.1 -> 0\.2"):
        other.newest()


def test_when_one_is_due():
    now = [0.0]
    store = Checkpoints("unused", every_seconds=10.0, clock=lambda: now[0])
    assert not store.due(1)
    now[0] = 10.0
    assert store.due(2)
    by_steps = Checkpoints("unused", every_seconds=None, every_steps=3)
    assert [s for s in range(1, 10) if by_steps.due(s)] == [3, 6, 9]
    with pytest.raises(InvalidValue, match="every_steps=0"):
        Checkpoints("unused", every_steps=0)


def test_difference_reads_well():
    old = {"a": 1, "b": {"c": [1], "d": True}, "gone": 0}
    new = {"a": 1, "b": {"c": [2], "d": 1}, "new": None}
    assert difference(old, new) == "b.c: [1] -> [2]; b.d: true -> 1; gone: 0 -> (absent); new: (absent) -> null"
    assert difference(old, old) == ""
    assert difference({str(i): 0 for i in range(10)}, {}, limit=2).endswith("; and 8 more")


@pytest.mark.parametrize(
    ("name", "options"),
    [("sgd", {}), ("sgd", {"nesterov": True}), ("adam", {}), ("adamw", {"amsgrad": True, "betas": (0.8, 0.99)})],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_optimizer_state_goes_through_bytes(name, options, layout):
    import json

    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=layout)
        return model, build(model, name, lr=0.01, weight_decay=0.1, decay_vectors=False, **options)

    def step(model, optimizer, seed):
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    straight, straight_optimizer = make()
    for seed in range(6):
        step(straight, straight_optimizer, seed)
    first, first_optimizer = make()
    for seed in range(3):
        step(first, first_optimizer, seed)
    tensors, values = optimizer_state(first_optimizer)
    tensors, values = from_bytes(to_bytes(tensors), "test"), json.loads(json.dumps(values))
    second, second_optimizer = make()
    second.load_state_dict(from_bytes(to_bytes(first.state_dict()), "test"))
    load_optimizer_state(second_optimizer, tensors, values)
    for seed in range(3, 6):
        step(second, second_optimizer, seed)
    assert digest(second.state_dict()) == digest(straight.state_dict())
    assert digest(optimizer_state(second_optimizer)[0]) == digest(optimizer_state(straight_optimizer)[0])


def test_an_optimizer_state_that_does_not_fit_is_refused():
    model = nn.Linear(2, 2)
    tensors, values = optimizer_state(build(model, "sgd", lr=0.1, weight_decay=0.1, decay_vectors=False))
    with pytest.raises(DamagedFile, match="2 parameter groups for 1"):
        load_optimizer_state(build(model, "sgd", lr=0.1), tensors, values)


def test_digest_depends_on_content_alone():
    a = torch.arange(6.0).reshape(2, 3)
    assert digest({"x": a, "y": a}) == digest({"y": a.clone(), "x": a.t().contiguous().t()})
    for other in ({"x": a}, {"x": a, "z": a}, {"x": a, "y": a.reshape(3, 2)}, {"x": a, "y": a.double()}):
        assert digest(other) != digest({"x": a, "y": a})
    negative_zero = {"x": torch.tensor([-0.0])}
    assert digest(negative_zero) != digest({"x": torch.tensor([0.0])})


def test_shared_and_empty_tensors_can_be_saved():
    shared = torch.ones(3)
    found = from_bytes(to_bytes({"a": shared, "b": shared, "c": torch.empty(0, 2), "d": torch.tensor(1)}), "test")
    assert torch.equal(found["a"], found["b"])
    assert found["c"].shape == (0, 2)
    with pytest.raises(DamagedFile, match="not a readable tensor file"):
        from_bytes(b"nonsense", "test")


def test_masks_have_one_spelling():
    masks = Masks({"ä.b": torch.tensor([True, False, True]), "c": torch.ones(2, 2, dtype=torch.bool)})
    spellings = {settled(masks.to_bytes()) for _ in range(50)}
    assert len(spellings) == 1
    assert Masks.from_bytes(spellings.pop()) == masks
