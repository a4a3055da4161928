"""The comparison of channel pruning by accuracy: equal costs, no look at test images before the choice, resuming."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from benchmarks import structured_accuracy as study
from torch import nn

import prunus
from prunus.data.examples import Examples, Splits
from prunus.models.create import create
from prunus.train.tensors import digest

pytest.importorskip("torch_pruning")

SMALL = dataclasses.replace(
    study.QUICK,
    points=(0.4,),
    ours=("magnitude",),
    theirs=("BNScale",),
    training=dataclasses.replace(study.TUNING, epochs=None, steps=1, batch_size=16),
    screen=20,
    validation=40,
    test=40,
)


def examples(count: int, name: str) -> Examples:
    draws = torch.Generator().manual_seed(count)
    x = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draws)
    return Examples.from_arrays(x, torch.arange(count) % 10, classes=10, name=name)


@pytest.fixture
def subject(monkeypatch):
    """An untrained ResNet-20 with noise for data."""
    monkeypatch.setattr(study, "CALIBRATION", 20)
    monkeypatch.setattr(study, "SMALL_CALIBRATION", 20)
    splits = Splits(examples(60, "train"), examples(40, "validation"), examples(50, "test"), "noise")
    made = study.Subject("resnet20", 0, splits, SMALL)
    model = create("resnet20", seed=0).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(module.num_features))
    made.__dict__["model"] = model
    made.__dict__["calibration"] = made.images(20)
    return made


@pytest.mark.parametrize(("scope", "where"), [("local", "all"), ("global", "inner")])
def test_ours_is_what_the_public_function_gives(subject, scope, where):
    mine = study.Ours(subject).cut(study.Cut(study.OURS, "magnitude", scope, where), 0.4)
    protect = (study.STREAM,) if where == "inner" else ()
    options = {"example": subject.example, "macs": 0.6, "scope": scope, "protect": protect}
    public = prunus.prune(subject.model, unit="channel", measure=False, verify=False, **options).model
    assert digest(mine.state_dict()) == digest(public.state_dict())


@pytest.mark.parametrize("where", study.WHERE)
@pytest.mark.parametrize("scope", study.SCOPES)
def test_both_tools_remove_the_same_share_and_inner_cuts_leave_the_streams(subject, scope, where):
    before = {n: t.clone() for n, t in subject.model.state_dict().items()}
    for cutter, tool, score in (
        (study.Ours(subject), study.OURS, "magnitude"),
        (study.Theirs(subject), study.THEIRS, "GroupMagnitude p=2"),
    ):
        small = cutter.cut(study.Cut(tool, score, scope, where), 0.4)
        assert subject.removed(small) == pytest.approx(0.4, abs=study.NEAR)
        streams = [m.out_channels for n, m in small.named_modules() if isinstance(m, nn.Conv2d) and "conv2" in n]
        assert (streams == [16] * 3 + [32] * 3 + [64] * 3) == (where == "inner")
    assert all(torch.equal(t, before[n]) for n, t in subject.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("score", study.THEIR_SCORES)
def test_every_importance_of_the_peer_cuts(subject, score):
    small = study.Theirs(subject).at(study.Cut(study.THEIRS, score, "local", "inner"), 0.3)
    assert 0.1 < subject.removed(small) < 0.5
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_choice_looks_at_validation_only():
    common = {"model": "resnet20", "point": 0.3, "seed": 0, "tool": study.OURS, "data_free": True, "removed": 0.3}
    rows = [
        common | {"name": "a", "validation": 0.8, "test": 0.1},
        common | {"name": "b", "validation": 0.7, "test": 0.9},
        common | {"name": "too much", "validation": 0.9, "removed": 0.289},
        common | {"name": "with data", "validation": 0.85, "data_free": False},
        common | {"name": "failed", "reason": "?"},
    ]
    assert [r["name"] for r in study.ranked(rows, "data-free")] == ["a", "b"]
    assert [r["name"] for r in study.ranked(rows, "calibrated")] == ["with data", "a", "b"]
    assert study.ranked(rows, "re-estimated") == []


@pytest.mark.slow
def test_a_point_is_measured_once_and_reported(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SCOPES", ("global",))
    monkeypatch.setattr(study, "WHERE", ("inner",))
    monkeypatch.setattr(study, "COMPENSATIONS", {"udfc": "none"})
    path = tmp_path / "rows.jsonl"
    book = study.Book(path)
    study.Study(subject, book).point(0.4)
    lines = path.read_text().splitlines()
    assert all("reason" not in json.loads(line) for line in lines)
    path.write_text("\n".join(lines) + '\n{"model": "resn')  # a torn last line
    again = study.Book(path)
    assert again.rows == book.rows
    monkeypatch.setattr(study.Ours, "cut", None)
    monkeypatch.setattr(study.Theirs, "cut", None)
    study.Study(subject, again).point(0.4)
    outcome = study.judged(again, SMALL)
    assert len(outcome["goals"]) == 4
    assert all(goal["value"] is not None for goal in outcome["goals"])
    for result in outcome["results"]:
        for tool in study.TOOLS:
            assert result[tool]["removed"] == [pytest.approx(0.4, abs=study.NEAR)]
    # The test images were shown to nothing but what was chosen.
    seen = sum("test" in row for row in again.rows.values())
    assert seen <= 4
    assert "| 40% |" in study.table(again, SMALL)
    study.plot(again, SMALL, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
