"""Scores of whole units: the catalogue's suite, hand cases, brute force, other libraries, and compensation."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import prunus
import suites
from graph_checks import coupled, numbers, outputs, scrambled
from prunus.catalog import Entry
from prunus.errors import InvalidValue, UnknownName
from prunus.graph.edit import stored_tensors
from prunus.structured.importance import unit_scores
from prunus.structured.registry import EVERY_SCORE, UNIT_SCORES
from prunus.structured.unit_scores import bn_scale, fpgm, lamp_normalised, scales_of

AXES = [i for i in UNIT_SCORES if "channel" in i.units]


class Small(nn.Module):
    """Two convolutions with norms, a residual block and a classifier."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 6, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = x + self.outer(self.inner_norm(self.inner(x)).relu())
        return self.head(x.relu().mean((2, 3)))


def net() -> nn.Module:
    return scrambled(Small())


X = numbers(4, 3, 8, 8)
Y = torch.tensor([0, 1, 2, 3])


def of(model: nn.Module, score: str, **options):
    coupling = coupled(model, X)
    families = coupling.primary()
    return unit_scores(model, families, score, coupling=coupling, example=X, **options), {f.name: f for f in families}


# -- the suite that every row goes through ---------------------------------------------------------------------------


@pytest.mark.parametrize("info", list(UNIT_SCORES), ids=lambda i: i.name)
def test_rows(info):
    suites.check_row(info)
    assert info.units
    assert set(info.units) <= {"channel", "head", "layer", "expert"}
    assert info.data in suites.DATA_KINDS
    assert tuple(inspect.signature(info.load()).parameters) == info.needs
    assert EVERY_SCORE.entry(info.name) is info


@pytest.mark.parametrize("info", AXES, ids=lambda i: i.name)
def test_scores_of_channels(info):
    """Finite, one per unit, an untouched model, the same again; permuted channels have permuted scores."""
    model = net()
    data = [(X, Y)]
    with suites.untouched(model, info.name):
        found, families = of(model, info.name, data=data)
    assert set(found) == set(families)
    for name, scores in found.items():
        assert scores.shape == (families[name].size,)
        assert scores.dtype == torch.float64
        assert bool(torch.isfinite(scores).all())
        assert bool((scores >= 0).all())
    again, _ = of(model, info.name, data=data)
    assert all(torch.equal(found[n], again[n]) for n in found)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    other = net()
    with torch.no_grad():
        for tensor in (other.inner.weight, *other.inner_norm.state_dict().values()):
            if tensor.ndim:
                tensor.copy_(tensor[order])
        other.outer.weight.copy_(other.outer.weight[:, order])
    moved, _ = of(other, info.name, data=data)
    torch.testing.assert_close(moved["inner.weight:0"], found["inner.weight:0"][order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("info", AXES, ids=lambda i: i.name)
def test_pruning_by_each(info):
    out = prunus.prune(net(), 0.4, unit="channel", score=info.name, example=X, measure=False)
    assert out.report.difference < 1e-5
    assert {f["kept"] for f in out.report.families} == {4, 5}


def test_the_listing_says_what_each_ranks(capsys):
    import json

    from prunus.cli import main

    assert main(["ls", "scores", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)}
    assert rows["bn-scale"]["units"] == ["channel", "head"]
    assert rows["hrank"]["units"] == ["layer"]
    assert rows["magnitude"]["units"] == ["any"]
    assert isinstance(EVERY_SCORE.entry("fpgm"), Entry)


# -- by hand and by brute force --------------------------------------------------------------------------------------


def test_bn_scale_by_hand():
    model = net()
    with torch.no_grad():
        model.inner_norm.weight.copy_(torch.tensor([3.0, -5.0, 0.5, 0.0, 2.0, -1.0]))
    found, families = of(model, "bn-scale", normalise="none")
    assert found["inner.weight:0"].tolist() == [3.0, 5.0, 0.5, 0.0, 2.0, 1.0]
    # The residual stream has one norm at its first producer; shifts, means and variances do not count.
    torch.testing.assert_close(found["first.weight:0"], model.norm.weight.detach().abs().double())
    tensors = stored_tensors(model)
    assert set(scales_of(coupled(model, X).graph, tensors)) == {"norm.weight", "inner_norm.weight"}
    assert bn_scale(families["inner.weight:0"], {}) is None


def test_families_without_norm_are_ranked_by_magnitude_and_named():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.PReLU(5),
                          nn.Flatten(), nn.Linear(80, 2))  # fmt: skip
    out = prunus.prune(scrambled(model), 0.4, unit="channel", score="bn-scale", example=X, measure=False)
    assert any("3.weight:0" in n and "magnitude" in n for n in out.report.notes)
    plain = prunus.prune(scrambled(model), 0.4, unit="channel", example=X, measure=False)
    assert out.plan.families["3.weight:0"] == plain.plan.families["3.weight:0"]


def test_fpgm_by_brute_force():
    model = net()
    families = {f.name: f for f in coupled(model, X).primary()}
    tensors = stored_tensors(model)
    for name, makers in (("inner.weight:0", ["inner.weight"]), ("first.weight:0", ["first.weight", "outer.weight"])):
        points = [torch.cat([tensors[m][u].detach().double().flatten() for m in makers])
                  for u in range(families[name].size)]  # fmt: skip
        wanted = [float(sum((p - q).norm() for q in points)) for p in points]
        torch.testing.assert_close(fpgm(families[name], tensors), torch.tensor(wanted, dtype=torch.float64))


def test_fpgm_drops_what_lies_in_the_middle_however_large():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[10.0, 10.0], [10.0, 12.0], [10.0, 8.0], [0.1, 10.0]]))
    coupling = coupled(model, numbers(2, 2))
    family = coupling["0.weight:0"]
    assert int(fpgm(family, stored_tensors(model)).argmin()) == 0
    assert int(unit_scores(model, [family], "l2")["0.weight:0"].argmin()) == 3


def test_lamp_normalised_by_hand():
    """Norms 1, 2, 2 in one tensor: 1/9, 4/4, 4/8; their reader is a million times larger, with no more say."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]))
        model[2].weight.copy_(1e6 * torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
    family = coupled(model, numbers(2, 2))["0.weight:0"]
    found = lamp_normalised(family, stored_tensors(model))
    first = torch.tensor([1 / 9, 1.0, 4 / 8])  # of equal norms the earlier ranks higher, as everywhere
    second = torch.tensor([9 / 25, 0.0, 1.0])
    torch.testing.assert_close(found.float(), torch.stack([first, second]).mean(0))


def test_l1_and_l2_are_sums_of_magnitudes_and_squares():
    model = net()
    l1, _families = of(model, "l1", normalise="none")
    l2, _ = of(model, "l2", normalise="none")
    tensors = stored_tensors(model)
    made, read = tensors["inner.weight"].detach().double(), tensors["outer.weight"].detach().double()
    torch.testing.assert_close(l1["inner.weight:0"], made.abs().sum((1, 2, 3)) + read.abs().sum((0, 2, 3)))
    torch.testing.assert_close(l2["inner.weight:0"], made.square().sum((1, 2, 3)) + read.square().sum((0, 2, 3)))
    for alias, name in (("l1", "magnitude"), ("L2", "magnitude-squared")):
        one, other = (prunus.prune(net(), 0.5, score=s, measure=False).masks for s in (alias, name))
        assert all(torch.equal(one[n], other[n]) for n in other)


def test_l2_ranks_like_torch_pruning():
    tp = pytest.importorskip("torch_pruning")
    model = net().train()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=X)
    kinds = [nn.Conv2d, nn.Linear]
    theirs = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None, target_types=kinds)
    mine, _ = of(model, "l2", normalise="none")
    for name, layer in (("inner.weight:0", model.inner), ("first.weight:0", model.first)):
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
        expected = theirs(group).double()
        torch.testing.assert_close(mine[name], expected, rtol=1e-5, atol=1e-6)
        assert mine[name].argsort().tolist() == expected.argsort().tolist()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"score": "fpmg"}, UnknownName, "fpgm"),
        ({"score": "bn_scales"}, UnknownName, "bn-scale"),
        ({"score": "fpgm", "pool": "max"}, InvalidValue, "leave pool out"),
        ({"score": "hrank"}, InvalidValue, "layer"),
        ({"score": "fpgm", "normalise": "sun"}, InvalidValue, "sum"),
        ({"compensate": "obsba"}, UnknownName, "obspa"),
        ({"calibration": [X]}, InvalidValue, "leave them out"),
    ],
)
def test_refusals(options, error, text):
    with pytest.raises(error, match=text):
        prunus.prune(net(), 0.5, unit="channel", example=X, measure=False, **options)


def test_unit_scores_do_not_rank_weights():
    with pytest.raises(InvalidValue, match="whole units"):
        prunus.prune(net(), 0.5, score="fpgm")


# -- compensation ----------------------------------------------------------------------------------------------------


def test_compensation_says_what_it_saw_and_helps():
    model = net()
    data = [(X, Y), (numbers(4, 3, 8, 8, seed=2), Y)]
    options = {"unit": "channel", "example": X, "measure": False}
    plain = prunus.prune(model, 0.4, **options)
    want = outputs(model, X)[0]
    assert plain.report.compensation == {}
    seen = {}
    for name, more in {
        "data": {"data": data},
        "calibration data": {"data": data, "calibration": [numbers(8, 3, 8, 8, seed=3)]},
        "noise": {},
    }.items():
        out = prunus.prune(model, 0.4, compensate="obspa", **more, **options)
        facts = out.report.compensation
        assert facts["inputs"] == name
        assert facts["batch_norms"] == ("kept" if name == "noise" else "measured anew")
        assert facts["errors"]
        assert out.report.difference < 1e-5
        assert out.plan.families == plain.plan.families
        assert "obspa" in str(out.report)
        seen[name] = float((outputs(out.model, X)[0] - want).norm())
    assert seen["noise"] < float((outputs(plain.model, X)[0] - want).norm())
    udfc = prunus.prune(model, 0.4, compensate="udfc", **options)
    assert udfc.report.compensation["inputs"] == "weights alone"
    assert "inner.weight:0" in udfc.report.compensation["errors"]
    assert "first.weight:0" in udfc.report.compensation["skipped"]


def test_compensated_models_are_saved_and_cut_in_place(tmp_path):
    options = {"unit": "channel", "example": X, "measure": False, "compensate": "obspa", "score": "obspa"}
    out = prunus.prune(net(), 0.4, **options)
    out.save(tmp_path / "small.safetensors")
    loaded = prunus.load(tmp_path / "small.safetensors", net())
    assert torch.equal(outputs(loaded, X)[0], outputs(out.model, X)[0])
    model = net()
    inside = prunus.prune(model, 0.4, inplace=True, **options)
    assert inside.model is model
    assert torch.equal(outputs(model, X)[0], outputs(out.model, X)[0])


def test_scores_without_labels_make_do_with_the_example():
    model = net()
    scores = unit_scores(model, coupled(model, X[:1]).primary(), "synflow", example=X[:1])
    given = unit_scores(model, coupled(model, X[:1]).primary(), "synflow", data=[X[:1]])
    assert all(torch.equal(scores[name], given[name]) for name in given)
    with pytest.raises(InvalidValue, match="label"):
        unit_scores(model, coupled(model, X[:1]).primary(), "taylor", example=X[:1])
