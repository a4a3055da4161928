"""The coverage benchmark: what counts as working, that failures of every kind are seen, that lists are whole."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
import torch
from benchmarks import coverage
from benchmarks.coverage_models import QUICK, SUITES, Entry, entries, images, settle, stir
from torch import nn

import prunus
from prunus.errors import InvalidValue, UnknownName
from prunus.models.vision_repair import repair_torchvision


def small_net():
    body = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 7))


ENTRY = Entry("small", "timm", small_net, partial(images, 8))


def test_a_model_that_can_be_pruned_works():
    row = coverage.measured(ENTRY, "prunus")
    assert row["works"], row["reasons"]
    assert set(row["checks"]) == set(coverage.COUNTED["prunus"])
    assert 0.5 < row["macs_removed"] < 0.8
    assert row["difference"] <= 1e-4
    json.dumps(row)


class Answer:
    """Stands for what `prunus.prune` returns, with a flaw."""

    def __init__(self, out, model=None, difference=None):
        self._out, self.model = out, model or out.model
        self.report, self.save, self.plan = out.report, out.save, self if difference else out.plan
        self._difference = difference

    def verify(self, model, example):
        return self._difference


def untouched(out, model):
    return Answer(out, model)


def other_shape(out, model):
    out.model[8] = nn.Linear(out.model[8].in_features, 6)
    return out


def broken(out, model):
    out.model[3] = nn.Conv2d(5, 16, 3)
    return out


def inexact(out, model):
    return Answer(out, difference=1e-3)


def forgetful(out, model):
    with torch.no_grad():
        out.model[8].bias.add_(1)
    changed = Answer(out)
    changed.save = lambda path: prunus.prune(model, 0.5, unit="channel", example=images(8)).save(path)
    return changed


@pytest.mark.parametrize(
    ("flaw", "check"),
    [(untouched, "macs"), (other_shape, "shapes"), (broken, "forward"), (inexact, "exact"), (forgetful, "reload")],
)
def test_every_flaw_is_seen(flaw, check, monkeypatch):
    prune = prunus.prune

    def flawed(model, *args, **kwargs):
        monkeypatch.setattr(prunus, "prune", prune)
        return flaw(prune(model, *args, **kwargs), model)

    monkeypatch.setattr(prunus, "prune", flawed)
    row = coverage.measured(ENTRY, "prunus")
    assert not row["works"]
    assert not row["checks"][check]
    assert coverage.reason_of(row).startswith(check)


def test_a_model_that_cannot_be_built_is_a_failure():
    row = coverage.measured(Entry("none", "timm", lambda: 1 / 0, partial(images, 8)), "prunus")
    assert not row["works"]
    assert "ZeroDivisionError" in coverage.reason_of(row)


def forever():
    while True:
        pass


def test_a_process_that_hangs_or_dies_becomes_a_row():
    rows = []
    tasks = [
        (Entry("hangs", "timm", forever, partial(images, 8)), "prunus"),
        (Entry("dies", "timm", partial(os._exit, 3), partial(images, 8)), "prunus"),
        (Entry("raises", "timm", partial(int, "x"), partial(images, 8)), "prunus"),
    ]
    coverage.measure_all(tasks, jobs=3, limit=1, memory=64, done=rows.append)
    reasons = {row["name"]: coverage.reason_of(row) for row in rows}
    assert "longer than 1 s" in reasons["hangs"]
    assert "ended with code 3" in reasons["dies"]
    assert "ValueError" in reasons["raises"]


def test_macs_are_those_of_the_definition():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 5))
    assert coverage.macs_of(net, images(8)) == 2 * (64 * 4 * 27 + 4 * 64 * 5)
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    products = 3 * 64 + 64 + 2 * 128  # of one token: query, key and value; output; both layers behind
    tokens = 2 * 5
    assert coverage.macs_of(attention, torch.randn(2, 5, 8)) == tokens * products + 2 * 2 * 5 * 5 * 8


def test_stirred_models_have_no_values_that_hide_a_wrong_cut():
    net = small_net()
    nn.init.zeros_(net[4].weight)
    stir(net)
    settle(net, images(8, 8))
    for norm in (net[1], net[4]):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert len(tensor.unique()) == len(tensor)
        assert norm.momentum == 0.1
        assert int(norm.num_batches_tracked) == 0
    assert net.training
    first, second = ENTRY.build().state_dict(), ENTRY.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_lists_are_whole():
    repair_torchvision()
    timm = pytest.importorskip("timm")
    pytest.importorskip("transformers")
    every = entries()
    names = [(e.suite, e.name) for e in every]
    assert len(set(names)) == len(names)
    counts = {suite: sum(e.suite == suite for e in every) for suite in SUITES}
    assert counts["torchvision"] == 80
    assert counts["timm"] >= 150
    assert counts["transformers"] >= 15
    assert {e.note for e in every if e.suite == "timm"} == set(timm.list_modules())
    assert {e.name for e in every if e.suite == "timm"} <= set(timm.list_models())
    assert {(e.suite, e.name) for e in entries(quick=True)} == {(s, n) for s, ns in QUICK.items() for n in ns}
    assert [e.name for e in entries(["torchvision"], "resnet1*")] == ["resnet101", "resnet152", "resnet18"]
    with pytest.raises(UnknownName, match="imagenet"):
        entries(["imagenet"])


def test_shards_are_checked_and_torn_lines_left_out(tmp_path):
    assert (coverage.options_of(["--shard", "2/4"]).part, coverage.options_of([]).parts) == (2, 1)
    for wrong in ("0/4", "5/4", "2", "a/b"):
        with pytest.raises(InvalidValue, match="shard"):
            coverage.options_of(["--shard", wrong])
    path = tmp_path / "rows.jsonl"
    old, new = ({"suite": "timm", "name": "a", "tool": "prunus", "works": works} for works in (False, True))
    path.write_text(json.dumps(old) + "\n" + json.dumps(new) + "\n" + json.dumps(old)[:20])
    assert coverage.read_rows(path) == {("timm", "a", "prunus"): new}


def test_the_table_names_every_failure():
    good = coverage.measured(ENTRY, "prunus")
    bad = coverage.measured(Entry("none", "timm", lambda: 1 / 0, partial(images, 8)), "torch-pruning")
    text = coverage.table([good, bad], {"huge": "needs 1 TB"})
    for part in ("| timm | prunus | 1 | 1 (100.0%)", "1 of 1 do not work with torch-pruning", "ZeroDivision", "1 TB"):
        assert part in text
