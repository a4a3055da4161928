"""Residual blocks as units: which can go, exact removal, scores against their definitions, tickets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from prunus.errors import Infeasible, InvalidValue, MissingExtra, NothingPrunable, UnknownName
from prunus.graph.plan import Plan
from prunus.measure.cost import count, layer_costs
from prunus.measure.similarity import linear_cka
from prunus.models.create import create
from prunus.models.resnet import BasicBlock
from prunus.parameters import prunable
from prunus.procedures.layer_lottery import layer_lottery, penultimate
from prunus.run.stages import Run, State
from prunus.run.store import Store
from prunus.scores.gradient import snip
from prunus.stats import gather
from prunus.structured.layers import (
    divergence,
    feature_rank,
    mean_activity,
    number_for,
    pooled_scores,
    reset_statistics,
    residual_blocks,
    score_blocks,
    variable_importance,
    worst_blocks,
)
from small_runs import Watched, normed_run, same_weights


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n=4, side=32, channels=3, seed=0):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def batch(classes=10, per_class=3, side=12, seed=0):
    y = torch.arange(classes).repeat(per_class)
    return images(len(y), side, seed=seed) + y[:, None, None, None] / 5, y


def built(name, **options):
    try:
        return create(name, **options)
    except MissingExtra as error:
        pytest.skip(str(error))


def trained_like(name, seed=0, **options):
    """A network whose norm layers have scales, shifts and statistics of their own."""
    model = built(name, seed=seed, **options)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=g) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=g) / 5)
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=g) / 5)
                module.running_var.copy_(torch.rand(module.bias.shape, generator=g) + 0.5)
    return model.eval()


# -- which blocks can go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "per_stage"), [(20, 3), (32, 5), (56, 9)])
def test_removable_blocks_of_residual_networks(depth, per_stage):
    found = residual_blocks(create(f"resnet{depth}"), images(2))
    names = [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(per_stage)]
    assert [b.name for b in found.every] == names
    assert list(found.removable) == [n for n in names if n not in ("layer2.0", "layer3.0")]
    assert {b.name: b.reason.partition(" from")[0] for b in found.every if b.reason} == {
        "layer2.0": "changes shapes",
        "layer3.0": "changes shapes",
    }
    assert [b.stage for b in found.every] == [s for s in range(3) for _ in range(per_stage)]


def test_costs_of_the_paper():
    """ResNet-32: one block has 6.8 % of the arithmetic, five have 34 %; the network without them counts the same."""
    model, x = create("resnet32"), images(1)
    found = residual_blocks(model, x)
    assert found.macs == sum(c.macs for c in layer_costs(model, x).values())
    shares = [b.macs / found.macs for b in found.removable.values()]
    assert max(shares) == min(shares) == pytest.approx(0.0682, abs=0.0004)
    assert 5 * shares[0] == pytest.approx(0.3413, abs=0.002)
    assert found.removable["layer1.0"].macs == 2 * 9 * 16 * 16 * 32 * 32  # 4.7 of 69 million
    for gone in (["layer1.0"], ["layer1.0", "layer1.3", "layer2.2", "layer3.1", "layer3.4"]):
        small = Plan(removed_modules=gone).apply(model)
        left = sum(c.macs for c in layer_costs(small, x).values())
        assert left == found.macs - sum(found.removable[n].macs for n in gone)
        lost = count(model).parameters - count(small).parameters
        assert lost == sum(found.removable[n].params for n in gone)
        assert small(x).shape == model(x).shape
    assert sum(isinstance(m, BasicBlock) for m in small.modules()) == 10


@pytest.mark.parametrize(
    ("name", "shape", "removable", "others"),
    [
        ("resnet18", (3, 32, 32), 5, 3),
        ("wrn", (3, 16, 16), 3, 3),
        ("vit", (3, 32, 32), 6, 0),
        ("torchvision/resnet18", (3, 64, 64), 5, 3),
        ("torchvision/resnet50", (3, 64, 64), 12, 4),
        ("torchvision/mobilenet_v2", (3, 32, 32), 10, 7),
        ("timm/resnet18", (3, 64, 64), 5, 3),
        ("timm/vit_tiny_patch16_224", (3, 224, 224), 12, 0),
        ("timm/convnext_atto", (3, 64, 64), 12, 0),
    ],
)
def test_other_architectures(name, shape, removable, others):
    model, x = built(name).eval(), torch.randn(2, *shape)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = residual_blocks(model, x)
    assert len(found.removable) == removable
    assert len(found.every) - removable == others
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    small = Plan(removed_modules=list(found.removable)[::2]).apply(model)
    assert small(x).shape == model(x).shape


def test_networks_without_blocks():
    for model in (create("vgg-small"), create("lenet5", input_shape=(3, 32, 32))):
        with pytest.raises(NothingPrunable, match="no residual block"):
            residual_blocks(model, images(2))


def test_modules_that_only_look_like_blocks():
    """Same shapes in and out, but no skip; a skip around nothing; a post-norm block; a block called twice."""

    class Body(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind
            self.inner = nn.Linear(6, 6)
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            if self.kind == "plain":
                return self.inner(x).relu()
            if self.kind == "post-norm":
                return self.norm(x + self.inner(x))
            return x + self.inner(self.norm(x))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body("pre-norm")

        def forward(self, x):
            return self.body(self.body(x))

    x = torch.randn(3, 6)
    for kind in ("plain", "post-norm"):
        with pytest.raises(NothingPrunable):
            residual_blocks(nn.Sequential(Body(kind), nn.Linear(6, 6)), x)
    found = residual_blocks(nn.Sequential(Body("pre-norm"), Body("plain"), nn.Linear(6, 2)), x)
    assert list(found.removable) == ["0"]
    assert found.every[1].reason == "its shortcut is not the identity"
    # The outer module is called once and has the identity as its shortcut, so it goes as one.
    assert list(residual_blocks(nn.Sequential(Twice(), nn.Linear(6, 2)), x).removable) == ["0"]


def test_neighbours_can_be_spared():
    found = residual_blocks(create("resnet20"), images(2), spare_neighbours=True)
    assert list(found.removable) == [
        "layer1.0",
        "layer1.1",
        "layer2.2" if "layer2.2" in found.removable else "layer3.2",
    ]
    assert "next to layer2.0" in {b.name: b.reason for b in found.every}["layer1.2"]


def test_emptied_stages_are_told():
    found = residual_blocks(create("resnet20"), images(2))
    assert found.emptied([]) == []
    assert found.emptied(["layer1.0", "layer2.1", "layer3.1"]) == []
    assert found.emptied(["layer2.1", "layer2.2", "layer3.1"]) == [1]
    assert found.emptied(found.removable) == [0, 1, 2]


# -- exact removal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "torchvision/resnet18"])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_with_a_zero_norm_goes_exactly(name, training):
    model, x = trained_like(name).train(training), images(4, 16 if name == "resnet18" else 32)
    blocks = [n for n, b in residual_blocks(model, x).removable.items()]
    for gone in (blocks[:1], blocks[1:4], blocks):
        changed = Plan().apply(model)
        with torch.no_grad():
            for block in gone:
                last = changed.get_submodule(block).bn2
                last.weight.zero_()
                last.bias.zero_()
        small = Plan(removed_modules=gone).apply(changed)
        assert float((small(x) - changed(x)).detach().abs().max()) <= 1e-6
        assert set(small.state_dict()) == {
            n for n in model.state_dict() if not n.startswith(tuple(f"{b}." for b in gone))
        }
    # A block with a live branch is not the identity.
    assert float((Plan(removed_modules=blocks[:1]).apply(model)(x) - model(x)).detach().abs().max()) > 1e-3


def test_forgotten_statistics():
    model = reset_statistics(trained_like("resnet20"))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            assert not bool(buffer.any())
        elif name.endswith("running_var"):
            assert bool((buffer == 1).all())


# -- scores -----------------------------------------------------------------------------------------------------------


def small_net(seed=0):
    return create("resnet20", width=4, input_shape=(3, 12, 12), seed=seed)


def test_snip_of_a_block_is_the_sum_of_its_weights():
    """The shared element scores, and |w dL/dw| by hand in training mode."""
    model, (x, y) = small_net(), batch()
    names = list(residual_blocks(model, x).removable)
    found = score_blocks(model, names, "snip", data=[(x, y)])
    evidence = gather(model, prunable(model), ("weight", "gradient"), data=[(x, y)], train=True)
    elements = {n: snip(**e) for n, e in evidence.items()}
    nn.functional.cross_entropy(model.train()(x), y).backward()
    for name in names:
        weights = [f"{name}.conv1.weight", f"{name}.conv2.weight"]
        assert found[name] == pytest.approx(sum(float(elements[w].double().sum()) for w in weights))
        by_hand = sum(float((p * p.grad).detach().abs().sum()) for w in weights for p in [model.get_parameter(w)])
        assert found[name] == pytest.approx(by_hand, rel=1e-4)
    mean = score_blocks(small_net(), names, "snip", data=[(x, y)], aggregate="mean")
    for name in names:
        assert mean[name] * 2 * model.get_submodule(name).conv1.weight.numel() == pytest.approx(found[name])


def test_grasp_of_a_block_against_finite_differences():
    """d/de g(w + e w_B)^T g over the block's own weights, with logits divided by 200."""
    model, (x, y) = small_net().double(), batch()
    x = x.double()
    names = list(residual_blocks(model, x).removable)
    found = score_blocks(model, names, "grasp", data=[(x, y)])
    model.train()
    parameters = {n: model.get_parameter(n) for n in prunable(model)}

    def gradient():
        loss = nn.functional.cross_entropy(model(x) / 200, y)
        return torch.autograd.grad(loss, list(parameters.values()))

    held = [g.clone() for g in gradient()]
    for name in names[:3]:
        own = {n: p.detach().clone() for n, p in parameters.items() if n.startswith(f"{name}.")}
        inner = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                for n, value in own.items():
                    parameters[n].copy_(value * (1 + step))
            inner.append(sum(float((a * b).sum()) for a, b in zip(gradient(), held, strict=True)))
        with torch.no_grad():
            for n, value in own.items():
                parameters[n].copy_(value)
        assert found[name] == pytest.approx((inner[0] - inner[1]) / 2e-4, rel=1e-4)


def test_activity_of_a_block():
    model, (x, y) = trained_like("resnet20", width=4, input_shape=(3, 12, 12)), batch()
    names = list(residual_blocks(model, x).removable)
    by_hand = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, a, out, n=n: by_hand.__setitem__(n, out.detach()))
        for n in names
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    halves = [(x[:15], y[:15]), (x[15:], y[15:])]
    found = score_blocks(model, names, "expect-abs", data=halves)
    ranks = score_blocks(model, names, "hrank", data=halves)
    for name in names:
        assert found[name] == pytest.approx(float(by_hand[name].abs().mean()), rel=1e-5)
        maps = by_hand[name].flatten(0, 1).numpy()
        assert ranks[name] == pytest.approx(np.mean([np.linalg.matrix_rank(m) for m in maps]), abs=0.05)


def test_ranks_and_activity_by_hand():
    assert mean_activity(torch.tensor([[-1.0, 3.0], [0.0, 0.0]])) == 1.0
    feature = torch.zeros(1, 2, 3, 3)
    feature[0, 0] = torch.eye(3)
    feature[0, 1] = torch.ones(3, 3)
    assert feature_rank(feature) == 2.0
    with pytest.raises(InvalidValue, match="feature maps"):
        feature_rank(torch.zeros(3, 4))


def test_divergence_of_a_block():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergence(p.log(), q.log()) == pytest.approx(expected)
    assert divergence(p, p) == 0.0
    model, (x, _) = trained_like("resnet20", width=4, input_shape=(3, 12, 12)), batch()
    with torch.no_grad():
        for tensor in (model.layer2[1].bn2.weight, model.layer2[1].bn2.bias):
            tensor.zero_()
    names = list(residual_blocks(model, x).removable)
    found = score_blocks(model, names, "kl", data=[x[:15], x[15:]])
    assert found["layer2.1"] == pytest.approx(0.0, abs=1e-9)
    assert all(v > 1e-6 for n, v in found.items() if n != "layer2.1")
    assert worst_blocks(found, 1) == ["layer2.1"]


def test_partial_least_squares_finds_the_informative_feature():
    g = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    features = g.normal(size=(120, 6))
    features[:, 4] += 4 * labels
    features[:, 5] = 1.0
    found = variable_importance(features, labels, components=1)
    assert found.argmax() == 4
    assert found[5] == 0.0
    # Squares average to one over the features that take part; the constant one only scales.
    assert (found**2).mean() == pytest.approx(1.0)
    with pytest.raises(InvalidValue, match="two classes"):
        variable_importance(features, np.zeros(120), 1)
    model, data = small_net(), [batch()]
    names = list(residual_blocks(model, data[0][0]).removable)
    blocks = score_blocks(model, names, "pls", data=data)
    assert set(blocks) == set(names)
    assert all(v > 0 for v in blocks.values())


def test_random_scores_are_of_their_seed():
    model, names = small_net(), ["layer1.0", "layer1.1"]
    assert score_blocks(model, names, "random", seed=1) == score_blocks(model, names, "random", seed=1)
    assert score_blocks(model, names, "random", seed=1) != score_blocks(model, names, "random", seed=2)


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "magnitude", "expect-abs", "hrank", "kl", "pls"])
def test_scoring_leaves_the_network_as_it_is(score):
    model, data = small_net().train(), [batch()]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    names = list(residual_blocks(model, data[0][0]).removable)
    found = score_blocks(model, names, score, data=data)
    assert found == score_blocks(model, names, score, data=data)
    assert list(found) == names
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_lowest_go():
    scores = {"a": 3.0, "b": 1.0, "c": 1.0, "d": -2.0}
    assert worst_blocks(scores, 0) == []
    assert worst_blocks(scores, 1) == ["d"]
    assert worst_blocks(scores, 2) == ["c", "d"]
    assert worst_blocks(scores, 4) == list("abcd")
    with pytest.raises(Infeasible, match="only 4"):
        worst_blocks(scores, 5)
    for number in (-1, 1.5, True):
        with pytest.raises(InvalidValue, match="whole number"):
            worst_blocks(scores, number)


def test_the_number_that_a_share_needs():
    found = residual_blocks(create("resnet32"), images(2))
    scores = dict.fromkeys(found.removable, 0.0)
    assert [number_for(found, scores, s) for s in (0.0, 0.05, 0.0685, 0.07, 0.34)] == [0, 1, 1, 2, 5]
    with pytest.raises(Infeasible, match="all 13"):
        number_for(found, scores, 0.95)


def test_refuses_scores_without_what_they_need():
    model, names = small_net(), ["layer1.0"]
    for score in ("expect-abs", "hrank", "kl", "pls", "snip", "grasp"):
        with pytest.raises(InvalidValue):
            score_blocks(model, names, score)
    with pytest.raises(InvalidValue, match="labels"):
        score_blocks(model, names, "pls", data=[batch()[0]])
    with pytest.raises(UnknownName, match="hrank"):
        score_blocks(model, names, "hranks", data=[batch()])
    with pytest.raises(UnknownName, match="mean"):
        score_blocks(model, names, "snip", data=[batch()], aggregate="median")
    with pytest.raises(InvalidValue, match="no weight"):
        pooled_scores({"a.weight": torch.ones(2)}, ["b"])


# -- tickets ----------------------------------------------------------------------------------------------------------


def run_of(kind=Watched, **options):
    def make(seed):
        return create("resnet20", num_classes=4, input_shape=(1, 6, 6), width=4, seed=seed)

    return normed_run(kind=kind, make=make, **options)


def test_ticket_at_initialisation():
    run = run_of()
    found = layer_lottery(run.within("m"), blocks=2, score="snip")
    details = found.details
    assert len(details["removed"]) == 2
    assert details["removable"] == 7
    assert set(details["fixed"]) == {"layer2.0", "layer3.0"}
    assert sorted(details["scores"], key=details["scores"].get)[:2] == sorted(
        details["removed"], key=details["scores"].get
    )
    start, choices = run.seen["ticket"]
    assert {n for n in run.initial.weights if n not in start.weights} == {
        n for n in run.initial.weights if n.startswith(tuple(f"{b}." for b in details["removed"]))
    }
    assert all(torch.equal(w, run.initial.weights[n]) for n, w in start.weights.items())
    assert choices["start_step"] == 0
    assert found.steps == 2 * 4
    model = found.state.model(run)
    x = run.splits.test.normalise(run.splits.test.x[:3])
    assert sum(isinstance(m, BasicBlock) for m in model.modules()) == 7
    share = sum(c.macs for c in layer_costs(model, x).values()) / sum(
        c.macs for c in layer_costs(run.model, x).values()
    )
    assert details["macs_share"] == pytest.approx(share)
    assert details["params_share"] == pytest.approx(count(model).parameters / count(run.model).parameters)
    assert run.evaluate(found.state)["accuracy"] > 0.25


def test_ticket_with_rewinding():
    run = run_of(epochs=3)
    found = layer_lottery(run.within("m"), blocks=2, when="trained", rewind_to="1ep", score="expect-abs")
    early, dense = run.train("early-12-4", training=run.training, until=4), run.seen["dense-12-from-4"][0]
    assert same_weights(early, dense)
    start, choices = run.seen["ticket"]
    assert choices["start_step"] == 4
    assert not choices.get("continue_optimizer")
    for name, weight in start.weights.items():
        if name.endswith("running_mean"):
            assert not bool(weight.any())
        elif not name.endswith(("running_var", "num_batches_tracked")):
            assert torch.equal(weight, early.weights[name])
    assert found.steps == 12 + 8
    assert 0 <= found.details["cka"] <= 1
    assert set(found.details["dense"]) == {"validation", "test"}
    again = layer_lottery(run_of(epochs=3).within("m"), blocks=2, when="trained", start="reinit", score="random")
    assert again.steps == 12 + 12


def test_no_block_is_the_dense_network():
    run = run_of()
    found = layer_lottery(run.within("m"), blocks=0, score="snip")
    dense = run.train("dense", training=run.training)
    assert same_weights(found.state, dense)
    assert found.details["removed"] == []
    assert found.details["macs_share"] == 1.0


def test_penultimate_features():
    model, x = trained_like("resnet20"), images(6)
    features = penultimate(model, x)
    assert features.shape == (6, 64)
    assert torch.allclose(model.linear(features), model(x), atol=1e-6)
    rotation = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    assert linear_cka(features, features) == pytest.approx(1.0)
    assert linear_cka(features, 3 * features.double() @ rotation) == pytest.approx(1.0)


def test_refuses():
    with pytest.raises(UnknownName, match="init"):
        layer_lottery(run_of(), when="initial")
    with pytest.raises(UnknownName, match="reinit"):
        layer_lottery(run_of(), start="fresh")
    with pytest.raises(Infeasible, match="only 7"):
        layer_lottery(run_of(), blocks=8)
    with pytest.raises(Infeasible, match="all 7"):
        layer_lottery(run_of(), sparsity=0.99)
    with pytest.raises(NothingPrunable):
        layer_lottery(normed_run())
    run = run_of()
    bare = State.of(run.initial.weights)
    assert bare.digest == run.initial.digest


def test_an_interrupted_ticket_goes_on(tmp_path):
    class Interrupted(Exception):
        pass

    def work(folder, limit=None):
        done = iter(range(limit or 0))

        def crash():
            if limit is not None and next(done, None) is None:
                raise Interrupted
            return False

        with Store.create(folder, {}, {"versions": "same"}) as store:
            run = run_of(kind=Run, store=store, should_stop=crash, checkpoint_seconds=None, checkpoint_steps=2)
            return layer_lottery(run.within("m"), blocks=2, when="trained", rewind_to="1ep", score="snip")

    whole = work(tmp_path / "whole")
    for limit in (4, 1):
        with pytest.raises(Interrupted):
            work(tmp_path / "cut", limit)
    resumed, loaded = work(tmp_path / "cut"), work(tmp_path / "cut", 0)
    for found in (resumed, loaded):
        assert found.state.digest == whole.state.digest
        assert found.details == whole.details
        assert found.state.shape.describe() == whole.state.shape.describe()
