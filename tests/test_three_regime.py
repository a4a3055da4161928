"""Temperature and load: sharpness-aware steps, measurements on pairs, regimes, advice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunus.errors import InvalidValue, UnknownName
from prunus.masks import Masks
from prunus.procedures.common import cut, dense, fresh
from prunus.procedures.imp import rewound
from prunus.procedures.three_regime import SAM, compare, label, three_regime, turned
from prunus.train.training import Training
from small_runs import Watched, digits_run, normed_run, same_weights


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- sharpness-aware minimisation -----------------------------------------------------------------------------------


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(16, 5, generator=g), torch.arange(16) % 3


@pytest.mark.parametrize("make", [digits_run, normed_run], ids=["digits", "with BatchNorm"])
def test_radius_zero_is_the_base_optimizer_bit_for_bit(make):
    run = make()
    assert same_weights(run.train("sam", callbacks=(SAM(0.0),)), run.train("plain"))
    assert not same_weights(run.train("sam-1", callbacks=(SAM(0.1),)), run.train("plain"))


@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_the_perturbation_has_length_rho_along_the_gradient(rho):
    model, (x, y) = network(), batch()
    model[3].p = 0.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sam = SAM(rho)
    sam.batch(0, model, x, y, y)
    loss = F.cross_entropy(model(x), y)
    gradients = dict(zip(before, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    sam.perturb(0, model)
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    length = torch.cat([m.reshape(-1) for m in moved.values()]).norm()
    assert float(length) == pytest.approx(rho, rel=1e-4)
    norm = torch.cat([g.reshape(-1) for g in gradients.values()]).norm()
    for name, step in moved.items():
        torch.testing.assert_close(step, gradients[name] * rho / norm, rtol=1e-3, atol=1e-6)


def test_a_step_uses_the_gradient_of_the_perturbed_point_from_where_it_was():
    """Against the written algorithm; statistics and dropout are those of the first pass."""
    model, (x, y) = network(), batch()
    sam, rho = SAM(0.3), 0.3
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(7)
    reference = network()
    loss = F.cross_entropy(reference(x), y)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))
    statistics = {n: b.clone() for n, b in reference.named_buffers()}
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(reference.parameters(), gradients, strict=True):
            p.add_(g * rho / (norm + 1e-12))
    torch.manual_seed(7)
    expected = torch.autograd.grad(F.cross_entropy(reference(x), y), list(reference.parameters()))

    torch.manual_seed(7)
    sam.batch(0, model, x, y, y)
    sam.perturb(0, model)
    F.cross_entropy(model(x), y).backward()
    sam.gradients(0, model)
    for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
        assert torch.equal(p, before[name])
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)
    for name, b in model.named_buffers():
        torch.testing.assert_close(b, statistics[name])
    assert int(model[1].num_batches_tracked) == 1


def test_pruned_weights_stay_at_zero_while_weights_are_perturbed():
    model, (x, y) = network(), batch()
    masks = Masks({"0.weight": torch.rand(8, 5) < 0.5})
    masks.apply(model)
    sam = SAM(0.5, masks=masks)
    sam.batch(0, model, x, y, y)
    sam.perturb(0, model)
    assert not bool(model[0].weight[~masks["0.weight"]].any())
    assert sam.describe()["masks"] == masks.digest()


def test_sam_refuses():
    for rho in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InvalidValue, match="rho"):
            SAM(rho)


# -- measurements -------------------------------------------------------------------------------------------------


def test_a_network_against_itself():
    run = normed_run()
    trained = run.train("a")
    found = compare(run, trained, trained)
    assert found["connectivity"] == 0.0
    assert found["cka"] == pytest.approx(1.0)
    assert len(set(found["errors"])) == 1


def test_ends_of_the_segment_are_the_two_networks():
    run = digits_run()
    first, second = run.train("a"), run.train("b", seed=5)
    found = compare(run, first, second, points=5)
    for state, error in ((first, found["errors"][0]), (second, found["errors"][-1])):
        assert error == pytest.approx(1 - run.evaluate(state, "train")["accuracy"])
    back = compare(run, second, first, points=5)
    assert back["cka"] == pytest.approx(found["cka"])
    assert back["errors"] == pytest.approx(found["errors"][::-1])


def test_a_collapsed_network_is_like_no_other():
    run = digits_run()
    trained = run.train("a")
    weights = {n: torch.zeros_like(t) for n, t in trained.weights.items()}
    dead = type(trained).of(weights)
    assert compare(run, trained, dead, points=3)["cka"] == 0.0


def test_copies_of_one_start_are_connected_and_different_starts_are_not():
    """One LAMP mask: two retrainings of the pruned weights, and two trainings from different random weights."""
    run = digits_run(epochs=6, hidden=(64, 32), validation=0)
    trained = dense(run)
    masks = cut(run, "prune", trained, 0.9, budget="lamp")
    start = replace(trained, step=0)
    same = [run.train(f"same-{s}", start=start, masks=masks, seed=s) for s in (1, 2)]
    starts = [rewound(run.initial, masks, run), rewound(fresh(run), masks, run)]
    other = [run.train(f"other-{i}", start=s, masks=masks, seed=i) for i, s in enumerate(starts)]
    close, far = compare(run, *same), compare(run, *other)
    assert abs(close["connectivity"]) < 0.02
    assert close["cka"] > 0.99
    assert far["connectivity"] < -0.1
    assert far["cka"] < close["cka"] - 0.01


def test_labels():
    cells = [(-0.3, 0.5), (0.0, 0.9), (0.01, 0.99), (-0.04, 0.95)]
    assert label(cells) == ["I", "II-A", "II-B", "II-B"]
    assert label(cells, cka_threshold=0.97) == ["I", "II-A", "II-B", "II-A"]
    assert label(cells, lmc_threshold=-0.5, cka_threshold=0.0) == ["II-B"] * 4
    assert label([(0.0, 0.96)]) == ["II-B"]
    assert label([(0.0, 0.94)]) == ["II-A"]


def test_knobs():
    base = Training(epochs=6, lr=0.1)
    assert turned(base, "epochs", 3) == (replace(base, epochs=3), ())
    assert turned(base, "batch-size", 16)[0].batch_size == 16
    assert turned(base, "lr", 0.2)[0].lr == 0.2
    assert turned(base, "weight-decay", 0.0)[0].weight_decay == 0.0
    training, (sam,) = turned(base, "sam", 0.2)
    assert training == base
    assert isinstance(sam, SAM)
    assert sam.rho == 0.2
    with pytest.raises(UnknownName, match="batch-size"):
        turned(base, "batch_sizes", 3)
    with pytest.raises(InvalidValue, match="whole"):
        turned(base, "epochs", 2.5)


# -- the procedure ------------------------------------------------------------------------------------------------


def test_pairs_share_their_pruned_start_and_the_best_value_is_handed_back():
    run = normed_run(kind=Watched)
    found = three_regime(run.within("m"), sparsity=0.6, values=(1, 3), retrains=3, points=3)
    cells = found.details["cells"]
    assert list(cells) == ["epochs-1", "epochs-3"]
    for name, cell in cells.items():
        starts = [run.seen[f"{name}/retrain-{i}"] for i in range(3)]
        assert len({s.digest for s, _ in starts}) == 1
        assert len({c["seed"] for _, c in starts}) == 3
        assert len(cell["pairs"]) == 3
        assert cell["regime"] in ("I", "II-A", "II-B")
        assert cell["direction"] in ("hotter", "colder", "stay")
        assert {c["masks"].digest() for _, c in starts} == {starts[0][1]["masks"].digest()}
    per_layer = {row.density for row in starts[0][1]["masks"].table()}
    assert max(per_layer) - min(per_layer) < 0.02
    kept = run.seen[f"{found.details['chosen']}/retrain-0"][1]["masks"]
    assert found.state.masks == kept
    # Epochs of 4 steps: dense 1 + 3, retraining 3 times 2 for both.
    assert found.steps == 4 * (1 + 3 + 2 * 3 * 2)


def test_sam_as_a_knob():
    found = three_regime(normed_run().within("m"), sparsity=0.5, knob="sam", values=(0.0, 0.5), points=3)
    assert list(found.details["cells"]) == ["sam-0", "sam-0.5"]


def test_procedure_refuses():
    run = normed_run()
    with pytest.raises(InvalidValue, match="retrains"):
        three_regime(run, retrains=1)
    with pytest.raises(InvalidValue, match="twice"):
        three_regime(run, values=(2, 2))
    with pytest.raises(UnknownName):
        three_regime(run, knob="heat")
