"""Refill: whole channels out of unstructured masks, the scores that rank them, and the tickets made of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunus.errors import InvalidValue, MaskMismatch, NonFinite, NothingPrunable, UnknownName, Unsupported
from prunus.masks import Masks
from prunus.models.create import create
from prunus.parameters import prunable
from prunus.procedures.common import cut
from prunus.procedures.structure_lth import random_channels, structure_lth, targets
from prunus.structured.features import feature_scores, per_channel
from prunus.structured.refill import (
    channel_budget,
    refill,
    refill_masks,
    remaining,
    weight_l1,
    weight_scores,
    whole_rows,
)
from small_runs import Watched, digits_run, normed_run, same_weights


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    mask = torch.rand(rows, columns, generator=g) < draw(st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]))
    return mask, torch.randn(rows, columns, generator=g)


# -- pure functions -----------------------------------------------------------------------------------------------


def test_by_hand():
    mask = bits("1100", "0111", "0000", "1000")
    weight = torch.tensor([[3.0, -2, 9, 9], [9, 1, 1, -1], [9, 9, 9, 9], [-4, 9, 9, 9]])
    assert weight_l1(weight, mask).tolist() == [5, 3, 0, 4]
    assert remaining(weight, mask).tolist() == [2, 3, 0, 1]
    assert channel_budget(mask) == 2  # 6 of 16 kept: 1.5 channels
    assert torch.equal(refill(mask, weight_l1(weight, mask)), bits("1111", "0000", "0000", "1111"))
    assert torch.equal(refill(mask, remaining(weight, mask)), bits("1111", "1111", "0000", "0000"))
    # Refill+: 2 + 0.5 * (4 - 2)
    assert channel_budget(mask, 0.5) == 3
    assert torch.equal(refill(mask, weight_l1(weight, mask), fillback=0.5), bits("1111", "1111", "0000", "1111"))
    assert bool(refill(mask, weight_l1(weight, mask), fillback=1.0).all())


def test_equal_scores_keep_the_earlier_channel_whole():
    mask = bits("100", "010", "001", "100")
    assert torch.equal(refill(mask, torch.ones(4)), bits("111", "111", "000", "000"))


@given(matrices(), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
@settings(max_examples=120, deadline=None)
def test_rows_are_whole_and_exactly_k(case, fillback):
    mask, weight = case
    outputs, length = mask.shape
    full = refill(mask, weight_l1(weight, mask), fillback=fillback)
    k = math.ceil(int(mask.sum()) / mask.numel() * outputs - 1e-9)
    k += math.floor(fillback * (outputs - k) + 0.5 + 1e-9)
    assert k == channel_budget(mask, fillback)
    assert full.dtype == torch.bool
    assert full.shape == mask.shape
    assert set(full.sum(1).tolist()) <= {0, length}
    assert int(full.all(1).sum()) == k
    # At fillback 0 the density rises by less than one channel.
    if not fillback:
        assert 0 <= int(full.sum()) - int(mask.sum()) < length
        # What stays is best: no dropped channel scores higher than a kept one.
        scores = weight_l1(weight, mask)
        dropped, kept = scores[~full.any(1)], scores[full.any(1)]
        assert not len(dropped) or not len(kept) or float(dropped.max()) <= float(kept.min())


@given(matrices(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_structured_masks_stay_as_they_are(case, seed):
    mask, weight = case
    structured = mask[:, :1].expand(mask.shape).clone()
    scores = torch.randn(len(mask), generator=torch.Generator().manual_seed(seed))
    for score in (weight_l1(weight, structured), weight_l1(0 * weight, structured), scores):
        assert torch.equal(refill(structured, score), structured)


def test_refuses_bad_masks_and_scores():
    mask = bits("10", "01")
    for bad in (mask.float(), mask[0], torch.zeros(0, 3, dtype=torch.bool), [[True]]):
        with pytest.raises(InvalidValue, match="bool matrix"):
            channel_budget(bad)
    for bad in (-0.1, 1.5, math.nan, "10%", True):
        with pytest.raises(InvalidValue, match="fillback"):
            refill(mask, torch.ones(2), fillback=bad)
    with pytest.raises(InvalidValue, match="2 channels"):
        refill(mask, torch.ones(3))
    with pytest.raises(NonFinite):
        refill(mask, torch.tensor([1.0, math.nan]))


# -- masks of models ----------------------------------------------------------------------------------------------


def convolutional() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, groups=2),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(6, 3, 2),
            nn.Flatten(),
            nn.Linear(75, 5),
        )


def random_masks(model: nn.Module, density: float) -> Masks:
    g = torch.Generator().manual_seed(1)
    return Masks({n: torch.rand(m.shape, generator=g) < density for n, m in Masks.full(model).items()})


def test_masks_of_every_layout():
    model = convolutional()
    addresses, weights = prunable(model), dict(model.named_parameters())
    masks = random_masks(model, 0.4)
    for kind in ("weight-l1", "remaining"):
        scores = weight_scores(masks, weights, addresses, kind)
        full = refill_masks(masks, scores, addresses)
        for name, address in addresses.items():
            rows = address.rows(full[name])
            assert set(rows.sum(1).tolist()) <= {0, rows.shape[1]}
            assert int(rows.all(1).sum()) == -(-masks.count(name) * address.outputs // address.size)
        assert full.density >= masks.density
        assert refill_masks(full, scores, addresses) == full
    # A transposed convolution stores (inputs, outputs, ...): whole outputs, not whole inputs.
    used = full["4.weight"].any(0).flatten(1)
    assert bool((used.all(1) == used.any(1)).all())


def test_refuses_what_does_not_fit_together():
    model = convolutional()
    addresses, weights = prunable(model), dict(model.named_parameters())
    masks = random_masks(model, 0.4)
    scores = weight_scores(masks, weights, addresses)
    with pytest.raises(UnknownName, match="weight-l1"):
        weight_scores(masks, weights, addresses, "weight-l2")
    with pytest.raises(MaskMismatch, match=r"0\.weight"):
        weight_scores(masks, {}, addresses)
    with pytest.raises(MaskMismatch, match=r"2\.weight"):
        refill_masks(masks, {"0.weight": scores["0.weight"]}, addresses)
    with pytest.raises(MaskMismatch, match="shape"):
        refill_masks(Masks({"0.weight": torch.ones(2, 2, dtype=torch.bool)}), scores, addresses)
    with pytest.raises(NonFinite):
        weight_scores(masks, {n: w * math.nan for n, w in weights.items()}, addresses)


# -- scores of feature maps ---------------------------------------------------------------------------------------


def test_sums_per_channel():
    values = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert per_channel(values, -3).tolist() == [values[:, c].sum() for c in range(3)]
    assert per_channel(torch.tensor([[1.0, 2], [3, 4]]), -1).tolist() == [4, 6]


def test_feature_scores_against_a_forward_pass_by_hand():
    model = convolutional()
    x, y = torch.randn(10, 1, 6, 6), torch.arange(10) % 5
    data = [(x[:7], y[:7]), (x[7:], y[7:])]
    features = {}
    hidden = x
    for number, layer in enumerate(model):
        hidden = layer(hidden.clone())
        if number in (0, 2, 4, 6):
            features[f"{number}.weight"] = hidden
            hidden.retain_grad()
            hidden = hidden * 1.0  # what follows writes in place
    F.cross_entropy(hidden, y, reduction="sum").backward()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = {s: feature_scores(model, prunable(model), data, s) for s in ("feature-l1", "feature-l2", "saliency")}
    for name, feature in features.items():
        others = [a for a in range(feature.ndim) if a != 1]
        expected = {
            "feature-l1": feature.abs().mean(others),
            "feature-l2": feature.square().mean(others).sqrt(),
            "saliency": (feature * feature.grad).abs().mean(others),
        }
        for score, value in expected.items():
            torch.testing.assert_close(found[score][name].float(), value.detach(), rtol=1e-4, atol=1e-7)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_feature_scores_refuse():
    model = convolutional()
    x = torch.randn(4, 1, 6, 6)
    with pytest.raises(UnknownName, match="saliency"):
        feature_scores(model, prunable(model), [x], "feature-l3")
    with pytest.raises(InvalidValue, match="data"):
        feature_scores(model, prunable(model), None)
    with pytest.raises(InvalidValue, match="label"):
        feature_scores(model, prunable(model), [x], "saliency")
    gru = nn.GRU(3, 4)
    with pytest.raises(Unsupported, match="recurrent"):
        feature_scores(gru, prunable(gru), [torch.randn(2, 3)])
    model.extra = nn.Linear(3, 3)
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    with pytest.raises(InvalidValue, match=r"extra\.weight"):
        feature_scores(model, prunable(model), [x])


# -- tickets ------------------------------------------------------------------------------------------------------


def vgg_run(**options):
    def make(seed):
        return create("vgg-small", num_classes=4, input_shape=(1, 6, 6), width=4, seed=seed)

    run = normed_run(**options)
    run.make_model = make
    return run


def test_the_first_and_the_output_layer_are_left_dense():
    assert list(targets(vgg_run())) == [f"features.{n}.weight" for n in (3, 7, 10, 14, 17)]
    assert list(targets(digits_run())) == ["layers.2.weight"]
    with pytest.raises(NothingPrunable, match="two convolutions"):
        targets(normed_run())


def test_a_refilled_ticket():
    run = vgg_run(kind=Watched)
    found = structure_lth(run.within("m"), sparsity=0.6, rewind_to="1ep")
    details, masks = found.details, found.state.masks
    assert details["ticket_sparsity"] == pytest.approx(0.6, abs=1 / masks.total)
    assert details["sparsity"] == masks.sparsity <= details["ticket_sparsity"]
    rounds = len(details["rounds"])
    assert rounds == 5
    per_epoch = 4
    assert found.steps == 2 * per_epoch + (rounds + 1) * per_epoch
    # The masks follow from those of the last round and its trained weights, through the pure functions.
    addresses = targets(run)
    last_start, last = run.seen[f"round-{rounds}"]
    trained = run.train(f"m/round-{rounds}", start=last_start, **{k: v for k, v in last.items() if k != "start"})
    ticket = last["masks"]
    expected = refill_masks(ticket, weight_scores(ticket, trained.weights, addresses), addresses)
    assert masks == expected
    for name, row in details["layers"].items():
        assert row["density_before"] == ticket.count(name) / ticket[name].numel()
        assert row["density"] == masks.count(name) / masks[name].numel() == row["rows"] / row["of_rows"]
    # Training starts from the rewound weights: regrown ones at their early values, not at zero.
    start, choices = run.seen["refill"]
    early = run.train("early-8-4", training=run.training, until=4)
    assert choices["start_step"] == early.step == 4
    for name, mask in masks.items():
        assert torch.equal(start.weights[name], early.weights[name] * mask)
        assert bool((start.weights[name][mask & ~ticket[name]] != 0).any()) or torch.equal(mask & ticket[name], mask)


@pytest.mark.parametrize("score", ["remaining", "feature-l1", "feature-l2", "saliency"])
def test_every_channel_score(score):
    run = vgg_run(epochs=1)
    found = structure_lth(run.within("m"), sparsity=0.4, rate=0.4, channel_score=score)
    assert {n: r["density"] for n, r in found.details["layers"].items()} == {
        n: r["rows"] / r["of_rows"] for n, r in found.details["layers"].items()
    }
    assert found.details["options"] == {"channel_score": score}


def test_refill_plus_keeps_more_and_controls_as_much():
    run = vgg_run(epochs=1)
    common = {"sparsity": 0.6, "rate": 0.6}
    plain = structure_lth(run.within("plain"), **common)
    plus = structure_lth(run.within("plus"), **common, conversion="refill+", fillback=0.5)
    assert plain.state.masks <= plus.state.masks
    for name, row in plain.details["layers"].items():
        extra = math.floor(0.5 * (row["of_rows"] - row["rows"]) + 0.5)
        assert plus.details["layers"][name]["rows"] == row["rows"] + extra
    reinit = structure_lth(run.within("plain"), **common, branch="reinit")
    assert reinit.state.masks == plain.state.masks
    assert not same_weights(reinit.state, plain.state)
    random = structure_lth(run.within("plain"), **common, branch="random")
    assert random.state.masks == random_channels(plain.state.masks, targets(run), run.seed) != plain.state.masks
    assert [r.kept for r in random.state.masks.table()] == [r.kept for r in plain.state.masks.table()]


def test_no_sparsity_keeps_all_of_the_dense_network():
    run = vgg_run(epochs=1)
    found = structure_lth(run.within("m"), sparsity=0.0)
    assert found.state.masks.density == 1
    assert found.details["rounds"] == []


def test_refuses_options_of_another_conversion():
    run = vgg_run(epochs=1)
    with pytest.raises(InvalidValue, match=r"fillback=0\.5 means nothing to 'refill'"):
        structure_lth(run, fillback=0.5)
    with pytest.raises(InvalidValue, match="clusters=4 means nothing"):
        structure_lth(run, conversion="refill+", clusters=4)
    with pytest.raises(InvalidValue, match="channel_score"):
        structure_lth(run, conversion="regroup", channel_score="remaining")
    with pytest.raises(UnknownName, match="regroup"):
        structure_lth(run, conversion="regrop")
    with pytest.raises(UnknownName, match="saliency"):
        structure_lth(run, channel_score="saliencey")
    with pytest.raises(UnknownName, match="reinit"):
        structure_lth(run, branch="re-init")
    for bad in ({"sparsity": 1.0}, {"rate": 0.0}, {"conversion": "refill+", "fillback": 1.5}):
        with pytest.raises(InvalidValue):
            structure_lth(run, **bad)
    for bad in ({"min_nonzeros": "most"}, {"clusters": 0}, {"min_rows": 1.5}, {"passes": 0}):
        with pytest.raises(InvalidValue, match=next(iter(bad))):
            structure_lth(run, conversion="regroup", **bad)
    with pytest.raises(UnknownName, match="jaccard"):
        structure_lth(run, conversion="regroup", partition="jaccrd")
    assert not run._memory, "something was trained before the refusal"


def test_random_rows_differ_between_seeds():
    run = vgg_run()
    masks = cut(run, "cut", run.initial, 0.5, exclude=("features.0.weight", "linear.weight"))
    addresses = targets(run)
    made = [random_channels(masks, addresses, seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert whole_rows(torch.tensor([1.0, 3.0, 2.0]), 2, 2).tolist() == [[False] * 2, [True] * 2, [True] * 2]
