"""`prunus.prune`, `choose`, and what they return: exact counts, nested rounds, baselines at initialisation, files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
import suites
from awkward import AWKWARD, CONV, MLP, case, mlp
from prunus.budget.select import keep_count, keep_top
from prunus.errors import DamagedFile, Infeasible, MaskMismatch, StorageFailed, Unsupported
from prunus.keep import choose
from prunus.masks import Masks
from prunus.oneshot import load, pack
from prunus.parameters import parameters_of, prunable
from prunus.scores.registry import SCORES
from prunus.units import NM

pytestmark = suites.projected_lstm_notice()


@pytest.fixture(autouse=True)
def one_thread():
    """These nets are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights_of(model):
    return {n: p.detach() for n, p in parameters_of(model, prunable(model)).items()}


# -- counts -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.floats(0, 0.996))
def test_every_sparsity_is_met_exactly(sparsity):
    model = mlp()
    masks = choose(model, sparsity)
    assert masks.kept == keep_count(390, sparsity)
    assert abs(masks.sparsity - sparsity) <= 0.5 / 390 + 1e-9


@pytest.mark.parametrize("keep", [1, 2, 195, 389, 390])
def test_every_count_is_met_exactly(keep):
    assert prunus.prune(mlp(), keep=keep, measure=False).masks.kept == keep


def test_the_default_keeps_the_largest_magnitudes_of_the_net():
    model = MLP.build()
    out = prunus.prune(model, 0.9)
    expected = keep_top({n: w.abs() for n, w in weights_of(model).items()}, 39)
    assert out.masks == Masks(expected)
    for name, weight in weights_of(model).items():
        assert torch.equal(weights_of(out.model)[name], weight * expected[name])
    assert torch.equal(out.model[0].bias, model[0].bias)


def test_equal_weights_keep_the_earlier_positions():
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    masks = choose(model, 0.5)
    flat = torch.cat([m.reshape(-1) for m in masks.values()])
    assert flat[:195].all()
    assert not flat[195:].any()


def test_weights_that_are_zero_are_no_holes():
    model = mlp()
    with torch.no_grad():
        model[0].weight.zero_()
    masks = choose(model, keep=300)
    assert masks.kept == 300
    assert masks.count("0.weight") == 300 - 230


# -- what is left alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("awkward", AWKWARD, ids=str)
def test_awkward_models_are_pruned_in_a_copy(awkward):
    model = awkward.build()
    model.train()
    x, _ = awkward.batch()
    with suites.untouched(model, f"pruning {awkward}"):
        out = prunus.prune(model, 0.5, measure=False)
    assert out.masks.kept == keep_count(prunable(model).total, 0.5)
    assert type(out.model) is type(model)
    assert out.model.training
    for name, weight in weights_of(out.model).items():
        assert torch.equal(weight != 0, out.masks[name] & (weights_of(model)[name] != 0))
    other = copy.deepcopy(out.model) if awkward.name != "torch.nn.utils.prune" else out.model
    assert bool(torch.isfinite(other.eval()(x).float()).all())


def test_inplace_prunes_the_model_itself():
    model, twin = MLP.build(), MLP.build()
    out = prunus.prune(model, 0.5, inplace=True, measure=False)
    assert out.model is model
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), prunus.prune(twin, 0.5).model.parameters(), strict=True)
    )


def test_a_failed_round_leaves_the_model_as_it_was():
    for inplace in (True, False):
        model = MLP.build()
        first = choose(model, 0.3)
        calls = []

        def loss(output, target, calls=calls):
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("interrupted")
            return output.square().mean()

        with suites.untouched(model, "an interrupted pruning"), pytest.raises(RuntimeError, match="interrupted"):
            prunus.prune(
                model, 0.8, score="snip", rounds=5, masks=first, data=[MLP.batch()], loss=loss, inplace=inplace
            )


def test_choosing_changes_nothing():
    for name in ("snip-iterative", "synflow"):
        model = CONV.build()
        with suites.untouched(model, f"choosing by {name}"):
            choose(model, 0.8, score=name, rounds=7, data=CONV.batches(), train_mode=True)


# -- choices ------------------------------------------------------------------------------------------------------


def test_include_exclude_and_units():
    model = MLP.build()
    assert list(choose(model, 0.5, exclude="4.*")) == ["0.weight", "2.weight"]
    assert "0.bias" in choose(model, 0.5, include="*.bias")
    rows = choose(model, 0.5, unit="row")
    assert all(bool((m.all(1) | ~m.any(1)).all()) for m in rows.values())
    assert 195 - 20 < rows.kept <= 195
    pattern = choose(model, unit="2:4")
    assert pattern == choose(model, 0.5, unit="2:4") == choose(model, 0.5, unit=NM(2, 4))
    addresses = prunable(model)
    assert [r.kept for r in pattern.table()] == [NM(2, 4).kept(a) for a in addresses.values()]
    for name, mask in pattern.items():
        best = suites.brute_force_pattern(weights_of(model)[name].abs(), addresses[name], 2, 4)
        assert torch.equal(mask, best)


def test_wanda_competes_in_rows_and_takes_patterns():
    model = MLP.build()
    masks = choose(model, 0.5, score="wanda", data=MLP.batches())
    for mask in masks.values():
        length = mask.shape[1]
        assert set(mask.sum(1).tolist()) == {length - length // 2}
    whole = choose(model, 0.5, score="wanda", budget="global", data=MLP.batches())
    assert whole.kept == 195
    assert whole != masks
    pattern = choose(model, unit="2:4", score="wanda", data=MLP.batches())
    assert pattern.count("0.weight") == 80
    assert all(int(m.sum()) == NM(2, 4).kept(prunable(model)[n]) for n, m in pattern.items())


def test_earlier_masks_are_pruned_further():
    model = MLP.build()
    first = choose(model, 0.4, score="random")
    second = choose(model, 0.8, masks=first)
    assert second <= first
    assert second.kept == 78
    scores = {n: w.abs().masked_fill(~first[n], -torch.inf) for n, w in weights_of(model).items()}
    assert second == Masks(keep_top(scores, 78))
    pattern = choose(model, unit="2:4", masks=first)
    assert pattern <= first
    assert 0.3 < pattern.density < 0.5  # groups with fewer than two weights left keep those
    with pytest.raises(Infeasible, match="the given masks keep 234 of 390 weights, fewer than the 312 asked for"):
        choose(model, 0.2, masks=first)


def test_only_so_many_batches_are_read():
    def stream():
        yield MLP.batch(0)
        yield MLP.batch(1)
        yield MLP.batch(2)
        raise AssertionError("read too far")

    model = MLP.build()
    limited = prunus.prune(model, 0.5, score="snip", data=stream(), batches=2, measure=False)
    assert limited.masks == choose(model, 0.5, score="snip", data=MLP.batches(2))


def test_random_scores_follow_the_seed_only():
    model = MLP.build()
    masks = [choose(model, 0.5, score="random", seed=s) for s in (0, 0, 1)]
    assert masks[0] == masks[1] != masks[2]
    assert {m.kept for m in masks} == {195}


@pytest.mark.parametrize("info", [pytest.param(s, id=s.name) for s in SCORES])
def test_scores_through_the_front_door(info):
    model = CONV.build()
    masks = [
        prunus.prune(model, 0.7, score=info.name, rounds=3, data=CONV.batches(), measure=False).masks for _ in range(2)
    ]
    assert masks[0] == masks[1]
    if info.name != "wanda":
        assert masks[0].kept == keep_count(260, 0.7)


@pytest.mark.parametrize("name", ["compiled", "channels last", "bf16"])
def test_pruned_models_compute_what_masked_ones_do(name):
    awkward = case(name)
    model = awkward.build().eval()
    out = prunus.prune(model, 0.6, score="snip", data=awkward.batches(), measure=False)
    x, _ = awkward.batch()
    expected = out.model(x)
    out.masks.apply(model)
    assert torch.equal(model(x), expected)


def test_a_compiled_model_is_scored_as_the_plain_one():
    plain = MLP.build()
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager")  # its graphs refuse second derivatives
    for score in ("grasp", "fisher"):
        assert choose(compiled, 0.6, score=score, data=MLP.batches()) == choose(
            plain, 0.6, score=score, data=MLP.batches()
        )


# -- pruning at initialisation ------------------------------------------------------------------------------------


def deep(seed=0):
    """Return seven linear layers of width 64, without biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = []
        for _ in range(6):
            layers += [nn.Linear(64, 64, bias=False), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(64, 10, bias=False))


def deep_batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 10
    return torch.randn(100, 64, generator=generator) + nn.functional.one_hot(labels, 64) * 3.0, labels


def test_synflow_keeps_every_layer_alive_where_others_thin_them_out():
    model, batch = deep(), deep_batch()
    least = {}
    for compression in (10, 100, 316):
        for name in ("magnitude", "snip", "grasp", "synflow"):
            masks = choose(model, 1 - 1 / compression, score=name, data=[batch])
            assert masks.kept == keep_count(prunable(model).total, 1 - 1 / compression)
            least[name, compression] = min(row.kept for row in masks.table())
    for compression in (10, 100, 316):
        others = [least[name, compression] for name in ("magnitude", "snip", "grasp")]
        assert least["synflow", compression] > max(others)
        assert least["synflow", compression] >= 1
    for name in ("magnitude", "snip", "grasp", "synflow"):
        assert least[name, 10] > least[name, 100] >= least[name, 316]


def test_rounds_are_nested_and_one_round_is_single_shot():
    model, batch = MLP.build(), MLP.batch()
    assert choose(model, 0.8, score="snip-iterative", rounds=1, data=[batch]) == choose(
        model, 0.8, score="snip", data=[batch]
    )
    many = choose(model, 0.8, score="snip", rounds=6, data=[batch])
    assert many.kept == 78
    assert many != choose(model, 0.8, score="snip", data=[batch])
    first = choose(model, 1 - 0.2 ** (1 / 6), score="snip", data=[batch])
    assert many <= first


def test_rounds_of_magnitude_change_nothing():
    model = MLP.build()
    assert choose(model, 0.8, rounds=9) == choose(model, 0.8)


def test_rounds_of_whole_rows_do_not_run_dry():
    model = MLP.build()
    for unit in ("row", "block-3x3"):
        masks = choose(model, 0.5, score="synflow", unit=unit, data=[MLP.batch()])
        assert 195 - 20 < masks.kept <= 195


def test_ratios_of_snip_at_random_places():
    model, batch = MLP.build(), MLP.batch()
    snip = choose(model, 0.7, score="snip", data=[batch])
    budget = {"name": "like", "score": "snip"}
    masks = [choose(model, 0.7, score="random", budget=budget, data=[batch], seed=s) for s in (0, 1)]
    for found in masks:
        assert [r.kept for r in found.table()] == [r.kept for r in snip.table()]
    assert masks[0] != masks[1]
    shared = (masks[0] & snip).kept / snip.kept
    expected = sum(r.kept * r.density for r in snip.table()) / snip.kept
    assert shared == pytest.approx(expected, abs=0.15)


def test_inverting_or_moving_pruned_weights_does_not_revive_them():
    model, batch = MLP.build(), MLP.batch()
    first = choose(model, 0.5, score="snip", data=[batch])
    for name in ("snip", "grasp", "synflow", "random", "gradient"):
        assert choose(model, 0.7, score=name, rounds=2, masks=first, data=[batch]) <= first


# -- what comes back ----------------------------------------------------------------------------------------------


def test_the_report_is_right():
    model = MLP.build()
    out = prunus.prune(model, 0.9, data=MLP.batches())
    report = out.report
    assert (report.kept, report.total, report.sparsity) == (39, 390, pytest.approx(0.9))
    assert report.total_all == sum(p.numel() for p in model.parameters())
    assert report.macs == 390
    assert report.effective_macs == 39
    assert report.dense_bytes > report.packed_bytes
    assert report.latency_ratio is not None
    assert [layer["kept"] for layer in report.layers] == [r.kept for r in out.masks.table()]
    assert set(report.skipped) == {"0.bias", "2.bias", "4.bias"}
    assert "39 of 390" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["kept"] == 39
    quiet = prunus.prune(model, 0.9, measure=False).report
    assert quiet.macs is None
    assert quiet.latency_ms is None


def test_a_collapsed_layer_is_reported():
    model = MLP.build()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    warnings = prunus.prune(model, 0.6, measure=False).report.warnings
    assert len(warnings) == 1
    assert "'2.weight' lost all of its 200 weights" in warnings[0]
    assert not prunus.prune(model, 0.6, budget="lamp", measure=False).report.warnings


# -- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp", "convolution", "tied embedding", "tied linear", "bf16", "channels last", "lstm"]
)
def test_saved_models_come_back(name, tmp_path):
    awkward = case(name)
    out = prunus.prune(awkward.build().eval(), 0.8, measure=False)
    path = tmp_path / "small.safetensors"
    out.save(path)
    fresh = awkward.build(seed=1).eval()
    back, masks = prunus.load(path, fresh, with_masks=True)
    assert back is fresh
    assert masks == out.masks
    x, _ = awkward.batch()
    assert torch.equal(back(x), out.model(x))
    assert prunus.load(path, awkward.build(seed=1)) is not None


def test_saved_models_are_small_and_always_the_same_bytes(tmp_path):
    model = nn.Linear(200, 200)
    out = prunus.prune(model, 0.9, measure=False)
    out.save(tmp_path / "a")
    out.save(tmp_path / "b")
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes() == pack(out.model, out.masks)
    assert len(data) < 4000 * 4 + 40000 / 8 + 200 * 4 + 800


def test_files_of_other_architectures_are_refused(tmp_path):
    path = tmp_path / "model"
    prunus.prune(mlp(), 0.5, measure=False).save(path)
    other = mlp(width=21)
    with suites.untouched(other, "loading the wrong file"), pytest.raises(MaskMismatch, match=r"'0\.bias'|'0\.weight'"):
        load(path, other)
    longer = nn.Sequential(*mlp(), nn.Linear(3, 3))
    with pytest.raises(MaskMismatch, match=r"'5\.bias' \(file absent"):
        load(path, longer)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(DamagedFile, match="none"):
        load(tmp_path / "none", mlp())
    path = tmp_path / "masks"
    choose(mlp(), 0.5).save(path)
    with pytest.raises(DamagedFile, match="masks"):
        load(path, mlp())
    with pytest.raises(StorageFailed, match="nowhere"):
        prunus.prune(mlp(), 0.5, measure=False).save(tmp_path / "nowhere" / "model")


def test_packing_refuses_what_it_could_not_read_back():
    tied = case("tied linear").build()
    with pytest.raises(MaskMismatch, match=r"'second\.weight' is another name of 'first\.weight'"):
        pack(tied, Masks({"second.weight": torch.ones(8, 8, dtype=torch.bool)}))

    class Talkative(nn.Linear):
        def get_extra_state(self):
            return {"words": 3}

        def set_extra_state(self, state):
            pass

    model = Talkative(2, 2)
    with pytest.raises(Unsupported, match="'_extra_state' is a dict, not a tensor"):
        pack(model, Masks.full(nn.Linear(2, 2)))


def test_packing_refuses_masks_of_another_model():
    with pytest.raises(MaskMismatch):
        pack(mlp(), Masks({"9.weight": torch.ones(2, 2, dtype=torch.bool)}))


def test_a_tuple_of_inputs_and_labels_is_one_batch() -> None:
    model = mlp()
    x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
    one = prunus.prune(model, 0.5, score="snip", data=(x, y), measure=False)
    listed = prunus.prune(model, 0.5, score="snip", data=[(x, y)], measure=False)
    assert one.masks == listed.masks
