"""Transformable architecture search: its mathematics, its search network against sliced networks, and the procedure."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from prunus.data.batches import Batches
from prunus.data.examples import Splits
from prunus.errors import Infeasible, InvalidValue, NonFinite, NothingPrunable
from prunus.measure.accuracy import evaluate
from prunus.measure.cost import layer_costs
from prunus.models.create import create
from prunus.models.resnet import ResNet
from prunus.procedures.common import dense
from prunus.procedures.cutting import Cut
from prunus.procedures.tas import decide, halves, new_weights, space_of, tas
from prunus.randomness import generator
from prunus.run.stages import State
from prunus.structured.tas.network import SearchConv, SearchNet
from prunus.structured.tas.reading import search_space
from prunus.structured.tas.sampling import (
    FRACTIONS,
    band_loss,
    channel_wise_interpolation,
    depth_choices,
    draw,
    expected_count,
    gumbel,
    keep_probabilities,
    mixture,
    perturbed,
    temperature,
    width_choices,
)
from prunus.structured.tas.space import Found, SearchSpace, into_band
from prunus.structured.tas.step import ArchitectureStep
from prunus.train.loop import fit
from prunus.train.objectives import distillation
from prunus.train.training import Training
from small_runs import Normed, digits_run, normed_run, same_weights, striped

MODELS = [
    ("resnet", {"blocks": (3, 2), "width": 6, "shortcut": "B"}),
    ("resnet", {"blocks": (3, 2), "width": 6, "shortcut": "A"}),
    ("vgg-small", {"width": 6}),
    ("wrn", {"depth": 16, "width": 1}),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(name: str, options: dict, side: int = 8) -> nn.Module:
    """Return a network whose batch norms have parameters and statistics of their own."""
    shape = (3, side, side)
    model = ResNet(10, shape, **options) if name == "resnet" else create(name, input_shape=shape, **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.num_features, generator=g) + 0.5)
                module.bias.copy_(torch.randn(module.num_features, generator=g))
                module.running_mean.copy_(torch.randn(module.num_features, generator=g))
                module.running_var.copy_(torch.rand(module.num_features, generator=g) + 0.5)
    return model


def example(side: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, side, side, generator=torch.Generator().manual_seed(1))


def some(space: SearchSpace, seed: int) -> Found:
    rng = np.random.default_rng(seed)
    return Found(
        tuple(int(rng.integers(len(w.choices))) for w in space.widths),
        tuple(int(rng.integers(len(s.depths))) for s in space.stages),
    )


def one_hot(space: SearchSpace, found: Found, height: float = 1e4) -> tuple[list[Tensor], list[Tensor]]:
    sizes = [len(w.choices) for w in space.widths], [len(s.depths) for s in space.stages]
    return tuple(  # type: ignore[return-value]
        [height * F.one_hot(torch.tensor(k), n).float() for k, n in zip(chosen, size, strict=True)]
        for chosen, size in zip((found.widths, found.depths), sizes, strict=True)
    )


def blocks_of(model: nn.Module, stage: str) -> int:
    return sum(not isinstance(block, nn.Identity) for block in model.get_submodule(stage).children())


# -- mathematics ----------------------------------------------------------------------------------------------------


def test_channel_wise_interpolation_is_its_definition():
    every = torch.randn(2, 12, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for inputs, outputs in itertools.product(range(1, 13), repeat=2):
        x = every[:, :inputs]
        rows = [
            x[:, math.floor(o * inputs / outputs) : math.ceil((o + 1) * inputs / outputs)].mean(1)
            for o in range(outputs)
        ]
        torch.testing.assert_close(channel_wise_interpolation(x, outputs), torch.stack(rows, 1))


def test_channel_wise_interpolation_by_hand():
    x = torch.tensor([[1.0, 3.0, 5.0, 9.0]])
    assert channel_wise_interpolation(x, 4) is x
    assert channel_wise_interpolation(x, 2).tolist() == [[2.0, 7.0]]
    assert channel_wise_interpolation(x[:, :2], 4).tolist() == [[1.0, 1.0, 3.0, 3.0]]
    for bad in ((torch.ones(3), 2), (x, 0)):
        with pytest.raises(InvalidValue):
            channel_wise_interpolation(*bad)


def test_choices():
    assert width_choices(16) == (4, 6, 8, 9, 11, 12, 14, 16)
    assert width_choices(100, (0.29, 1.0)) == (29, 100)
    assert width_choices(2) == (1, 2)
    assert width_choices(1) == (1,)
    assert [depth_choices(n) for n in (1, 2, 3, 4, 18)] == [
        *((1,), (1, 2), (1, 3), (1, 3, 4)),
        (1, 3, 5, 7, 9, 11, 13, 15, 17, 18),
    ]
    for bad in ((), (0.5,), (0.0, 1.0), (1.0, 1.5), (math.nan, 1.0)):
        with pytest.raises(InvalidValue):
            width_choices(8, bad)
    with pytest.raises(InvalidValue):
        width_choices(0)
    with pytest.raises(InvalidValue):
        depth_choices(0)


def test_temperatures_fall_along_a_cosine():
    taus = [temperature(e, 9) for e in range(9)]
    assert taus[0] == 5.0
    assert taus[4] == pytest.approx(2.55)
    assert taus[8] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(taus))
    assert temperature(0, 1) == pytest.approx(0.1)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    return float(stats.chisquare(counts.double().numpy(), expected.numpy()).pvalue)


def test_gumbel_samples_follow_the_softmax_of_the_logits():
    alpha = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.5])
    g = torch.Generator().manual_seed(0)
    picks = torch.stack([perturbed(alpha, 1.0, noise).argmax() for noise in gumbel((5_000, 5), g)])
    counts = torch.bincount(picks, minlength=5)
    assert chi_square(counts, alpha.softmax(0)) > 0.001
    assert chi_square(counts, torch.full((5,), 0.2)) < 1e-6  # the test can fail


def test_two_are_drawn_without_replacement():
    """Ordered pairs come with p_i p_j / (1 - p_i), the law of drawing one after the other from what is left."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0])
    p = logits.softmax(0).double()
    g = torch.Generator().manual_seed(1)
    drawn = torch.stack([draw(logits, 2, g) for _ in range(5_000)])
    assert bool((drawn[:, 0] != drawn[:, 1]).all())
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    counts = torch.tensor([int(((drawn[:, 0] == i) & (drawn[:, 1] == j)).sum()) for i, j in pairs])
    assert chi_square(counts, torch.stack([p[i] * p[j] / (1 - p[i]) for i, j in pairs])) > 0.001
    assert chi_square(counts, torch.stack([p[i] * p[j] for i, j in pairs])) < 1e-6
    far = torch.tensor([0.0, -1000.0, -2000.0])  # probabilities would be 1, 0, 0
    assert draw(far, 2, g).tolist() == [0, 1]
    assert draw(torch.zeros(1), 2, g).tolist() == [0]


def test_weights_are_renormalised_on_the_perturbed_logits():
    alpha = torch.tensor([0.3, -1.0, 1.2], requires_grad=True)
    noise = torch.tensor([0.5, 2.0, -0.3])
    noisy = perturbed(alpha, 0.5, noise)
    expected = ((alpha.log_softmax(0) + noise) / 0.5).detach()
    torch.testing.assert_close(noisy.detach(), expected)
    drawn = torch.tensor([1, 2])
    weights = mixture(noisy, drawn)
    odds = torch.exp(expected[1] - expected[2])
    torch.testing.assert_close(weights.detach(), torch.stack([odds / (1 + odds), 1 / (1 + odds)]))
    (gradient,) = torch.autograd.grad(weights[0], alpha)
    # d p / d alpha = p (1 - p) / tau for the two drawn, none for the other.
    slope = float(weights.detach().prod() / 0.5)
    torch.testing.assert_close(gradient, torch.tensor([0.0, slope, -slope]))
    with pytest.raises(InvalidValue):
        perturbed(alpha, 0.0, noise)
    with pytest.raises(NonFinite):
        perturbed(torch.tensor([math.nan, 0.0]), 1.0, noise[:2])


def test_expectations_by_hand():
    alpha = torch.tensor([0.1, 0.5, 0.4]).log()
    assert float(expected_count(alpha, (2, 4, 8))) == pytest.approx(0.2 + 2.0 + 3.2)
    torch.testing.assert_close(
        keep_probabilities(alpha, (1, 3, 4)), torch.tensor([1.0, 0.9, 0.9, 0.4], dtype=torch.float64)
    )


def test_the_band_decides_the_sign():
    expected = torch.tensor(50.0, dtype=torch.float64, requires_grad=True)
    for discrete, sign in ((61, 1), (60, 0), (56, 0), (55, 0), (54, -1)):
        loss = band_loss(expected, discrete, 60, 5)
        assert float(loss.detach()) == pytest.approx(sign * math.log(50))
        (gradient,) = torch.autograd.grad(loss, expected)
        assert float(gradient) == pytest.approx(sign / 50)


# -- search network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_one_hot_search_network_is_the_small_network(name, options):
    """Zero-padded full convolutions of the search network give what sliced convolutions give, at every architecture."""
    model, x = network(name, options), example()
    space = search_space(model, x)
    net = space.apply(model).eval()
    assert isinstance(net, SearchNet)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for found in (space.whole, space.least, some(space, 0), some(space, 1)):
        small = space.plan(found).apply(model).eval()
        net.choose(found)
        with torch.no_grad():
            torch.testing.assert_close(net.network(x), small(x), rtol=1e-4, atol=1e-5)
            # Through large logits: the arg-max in eval mode.
            for kind, logits in zip(net.logits(), one_hot(space, found), strict=True):
                for buffer, value in zip(kind, logits, strict=True):
                    buffer.copy_(value)
            torch.testing.assert_close(net(x), small(x), rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        net.choose(space.whole)
        torch.testing.assert_close(net.network(x), model.eval()(x))


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_costs_count_what_the_small_network_does(name, options):
    model, x = network(name, options), example()
    space = search_space(model, x)
    for found in (space.whole, space.least, *(some(space, seed) for seed in range(3))):
        small = space.plan(found).apply(model)
        counted = sum(c.macs for c in layer_costs(small, x).values())
        assert space.macs(found) == counted
        assert float(space.expected_macs(*one_hot(space, found))) == pytest.approx(counted, rel=1e-12)
        assert space.likeliest(*one_hot(space, found)) == found


def test_what_is_found_in_the_models():
    space = search_space(network(*MODELS[0]), example())
    assert [s.path for s in space.stages] == ["layer1", "layer2"]
    assert [s.depths for s in space.stages] == [(1, 3), (1, 2)]
    names = [w.family.name for w in space.widths]
    assert len(names) == 5 + 2  # one inside each block, one per residual stream
    assert len(space.pairs) == 1 + 2 * 5 + 1
    assert not search_space(network(*MODELS[0]), example(), depth=False).stages
    vgg = search_space(network(*MODELS[2]), example())
    assert len(vgg.widths) == 6
    assert vgg.stages == ()
    # Streams of pre-activation blocks reach a batch norm only through other blocks: only inner widths are searched.
    wide = search_space(network(*MODELS[3]), example())
    assert all(w.family.name.endswith("conv1.weight:0") for w in wide.widths)
    assert len(wide.stages) == 3
    some_only = search_space(network(*MODELS[2]), example(), prunable={"features.0.weight", "features.3.weight"})
    assert [w.family.name for w in some_only.widths] == ["features.0.weight:0"]
    with pytest.raises(NothingPrunable):
        search_space(create("mlp", input_shape=(1, 8, 8)), example(channels=1))


def test_a_chain_without_shortcuts_is_no_stage():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)).relu()

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Block(), Block(), Block()), nn.Flatten(), nn.Linear(256, 2))
    space = search_space(model, example())
    assert space.stages == ()
    assert len(space.widths) == 3
    small = space.plan(space.least).apply(model)
    assert small(example()).shape == (4, 2)


def test_one_hot_logits_at_a_small_temperature_sample_one_network():
    """In training mode: the widest choices at both depths, under the noise of several draws."""
    model, x = network(*MODELS[0]), example()
    space = search_space(model, x)
    for depths in (space.whole.depths, space.least.depths):
        found = Found(space.whole.widths, depths)
        net, small = space.apply(model).train(), space.plan(found).apply(model).train()
        for kind, logits in zip(net.logits(), one_hot(space, found), strict=True):
            for buffer, value in zip(kind, logits, strict=True):
                buffer.copy_(value)
        net.tau = 0.1
        expected = small(x)
        torch.manual_seed(0)
        for _ in range(3):
            torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_a_mixture_by_hand():
    """Two widths of one convolution: both batch norms, interpolation to the wider, the weighted sum, zeros beyond."""
    model, x = Normed(0).train(), example(6, 1)
    space = search_space(model, x)
    net = space.apply(model).train()
    (conv,) = [m for m in net.modules() if isinstance(m, SearchConv)]
    assert space.widths[0].choices == (1, 2, 3, 4, 5, 6)
    weights = torch.tensor([0.3, 0.7])
    net.sample.widths = [([4, 1], weights)]
    with torch.no_grad():
        found = conv(x)
        y = F.conv2d(x, model.conv.weight, model.conv.bias)
        normal = F.batch_norm(y, None, None, training=True)
        expected = torch.zeros_like(y)
        expected[:, :5] = 0.3 * normal[:, :5] + 0.7 * channel_wise_interpolation(normal[:, :2], 5)
    torch.testing.assert_close(found, expected)


def test_sampling_is_seeded_and_gradients_reach_weights_and_logits():
    model, x = network(*MODELS[0]), example()
    space = search_space(model, x)
    net = space.apply(model).train()
    widths, depths = net.logits()
    for alpha in (*widths, *depths):
        alpha.requires_grad_(True)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(net(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    gradients = torch.autograd.grad(outputs[2].square().sum(), [*widths, *depths], retain_graph=True)
    assert all(bool(g.ne(0).any()) for g in gradients)
    outputs[2].sum().backward()
    assert net.network.layer1[0].conv1.conv.weight.grad is not None
    assert not {id(p) for p in net.parameters()} & {id(a) for a in (*widths, *depths)}
    assert all(0 < float(a.detach().std()) < 0.05 for a in widths)


def test_the_cost_pushes_towards_smaller_widths_and_depths():
    space = search_space(network(*MODELS[0]), example())
    widths = [torch.zeros(len(w.choices), requires_grad=True) for w in space.widths]
    depths = [torch.zeros(len(s.depths), requires_grad=True) for s in space.stages]
    loss = band_loss(space.expected_macs(widths, depths), space.macs(space.whole), 1.0, 0.0)
    for gradient in torch.autograd.grad(loss, [*widths, *depths]):
        # Descending raises the logits of small choices and lowers those of large ones.
        assert gradient[0] < 0 < gradient[-1]
        assert bool((gradient.diff() > 0).all())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.1, 1.0), tolerance=st.floats(0.0, 0.2))
def test_moving_into_the_band(seed, share, tolerance):
    space, most = SPACE, SPACE.macs(SPACE.whole)
    g = torch.Generator().manual_seed(seed)
    widths = [torch.randn(len(w.choices), generator=g) for w in space.widths]
    depths = [torch.randn(len(s.depths), generator=g) for s in space.stages]
    start = space.likeliest(widths, depths)
    found = into_band(space, start, widths, depths, share * most, tolerance * most)
    assert space.macs(found) <= share * most
    inside = (share - tolerance) * most <= space.macs(start) <= share * most
    assert not inside or found == start
    if space.macs(found) < (share - tolerance) * most:  # then no single choice fits between
        flat, split = [*found.widths, *found.depths], len(found.widths)
        for place, sizes in enumerate(
            [*(len(w.choices) for w in space.widths), *(len(s.depths) for s in space.stages)]
        ):
            for choice in range(sizes):
                changed = [*flat[:place], choice, *flat[place + 1 :]]
                cost = space.macs(Found(tuple(changed[:split]), tuple(changed[split:])))
                assert cost <= space.macs(found) or cost > share * most


def test_a_target_out_of_reach_is_refused():
    logits = one_hot(SPACE, SPACE.whole)
    with pytest.raises(Infeasible, match="smallest"):
        into_band(SPACE, SPACE.whole, *logits, 1.0, 0.0)
    with pytest.raises(Infeasible):
        tas(normed_run(), sparsity=0.99)


SPACE = search_space(ResNet(10, (3, 8, 8), blocks=(3, 3, 3), width=6, shortcut="B"), example())


# -- the search -----------------------------------------------------------------------------------------------------


def search(splits: Splits, epochs: int, tolerance: float) -> SearchNet:
    model = Normed(0)
    space = search_space(model, splits.train.x[:2])
    most = space.macs(space.whole)
    first, second = halves(splits.train, 0)
    per_epoch = -(-len(first) // 16)
    step = ArchitectureStep(
        second, target=most, tolerance=tolerance * most, epochs=epochs, steps_per_epoch=per_epoch, batch_size=16
    )
    net = space.apply(model)
    fit(net, first, Training(epochs=epochs, batch_size=16, lr=0.05), callbacks=[step])
    assert isinstance(net, SearchNet)
    return net


@pytest.mark.parametrize("start", ["whole", "least"])
def test_the_cost_loss_alone_reaches_the_band_and_rests_there(start):
    most = SPACE.macs(SPACE.whole)
    g = torch.Generator().manual_seed(0)
    logits = [
        (0.3 * torch.randn(len(a), generator=g) + a / 1e4).requires_grad_(True)
        for kind in one_hot(SPACE, getattr(SPACE, start))
        for a in kind
    ]
    widths, depths = logits[: len(SPACE.widths)], logits[len(SPACE.widths) :]
    adam = torch.optim.Adam(logits, lr=0.01, betas=(0.5, 0.999))
    costs = []
    for _ in range(120):
        costs.append(SPACE.macs(SPACE.likeliest(widths, depths)) / most)
        loss = band_loss(SPACE.expected_macs(widths, depths), int(costs[-1] * most), 0.5 * most, 0.05 * most)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert not 0.45 <= costs[0] <= 0.5
    assert 0.45 <= costs[-1] <= 0.5
    assert costs[-1] == costs[-2]


def test_the_best_epoch_inside_the_band_is_kept():
    splits = striped()
    net = search(splits, 1, tolerance=1.0)
    _, second = halves(splits.train, 0)
    assert float(net.best_accuracy) == evaluate(net, Batches(second, 256, shuffle=False)).accuracy
    found, how, accuracy = decide(net, 1e9, 1e9)
    assert (found, how, accuracy) == (net.space.likeliest(*net.logits()), "best", float(net.best_accuracy))
    with torch.no_grad():
        net.logits()[0][0].copy_(torch.tensor([0.0, 0, 0, 0, 0, 1]))
    assert decide(net, 1e9, 1e9)[0] == found  # later logits change nothing
    outside = search(splits, 1, tolerance=0.0)
    most = outside.space.macs(outside.space.whole)
    assert float(outside.best_accuracy) == -1 or outside.space.likeliest(*outside.logits()) == outside.space.whole
    if float(outside.best_accuracy) == -1:
        assert decide(outside, most, 0.0) == (outside.space.whole, "moved", None)


def test_weights_learn_from_one_half_and_logits_from_the_other():
    splits = striped()
    first, second = halves(splits.train, 0)
    assert not set(first.ids.tolist()) & set(second.ids.tolist())
    assert set(first.ids.tolist()) | set(second.ids.tolist()) == set(splits.train.ids.tolist())
    assert (first.counts() - second.counts()).abs().max() <= 1
    assert len(halves(splits.train.subset(range(7)), 0)[0]) == 4
    with pytest.raises(InvalidValue):
        halves(splits.train.subset([0]), 0)
    net = search(splits, 2, tolerance=1.0)
    start = 0.01 * torch.randn(6, generator=generator(0, "architecture logits", "width", 0))
    assert bool((net.logits()[0][0] != start).all())
    assert not net.logits()[0][0].requires_grad


# -- the procedure --------------------------------------------------------------------------------------------------


def test_the_procedure_ends_in_a_small_network():
    run = digits_run(
        make=lambda seed: ResNet(10, (1, 8, 8), blocks=(3, 3), width=4, shortcut="B"),
        training=Training(epochs=1, batch_size=64),
        limit=300,
        validation=50,
    )
    found = tas(run.within("tas"), sparsity=0.5)
    state, details = found.state, found.details
    assert state.masks is None
    assert state.shape is not None
    assert {n: len(kept) for n, kept in state.shape.plan.families.items()}.items() <= details["widths"].items()
    model = state.model(run)
    x = example(8, 1)
    assert sum(c.macs for c in layer_costs(model, x).values()) == details["macs"]
    assert sum(c.macs for c in layer_costs(run.model, x).values()) == details["dense_macs"]
    assert 0.45 <= details["macs_share"] <= 0.5
    assert details["in_band"]
    assert {n: blocks_of(model, n) for n in details["depths"]} == details["depths"]
    assert run.evaluate(state)["accuracy"] > 0
    json.dumps(details, allow_nan=False)
    steps = {"search": -(-150 // 64), "dense": -(-300 // 64), "train": -(-300 // 64)}
    assert found.steps == sum(steps.values())
    without = tas(run.within("plain"), sparsity=0.5, distill_weight=0.0)
    assert without.steps == steps["search"] + steps["train"]
    assert "teacher" not in without.details


def test_the_final_training_is_distillation_from_new_weights():
    """The same training by hand: the small network, drawn anew, against the dense network's logits."""
    run = normed_run(epochs=2)
    found = tas(run.within("tas"), sparsity=0.5)
    shape = found.state.shape
    assert shape is not None
    start = new_weights(run, shape)
    small, teacher = start.model(run), dense(run).model(run).eval()
    inherited = shape.apply(run.model).state_dict()
    assert not torch.equal(start.weights["conv.weight"], inherited["conv.weight"])
    fan = start.weights["linear.weight"].shape[1]
    assert float(start.weights["linear.weight"].std()) == pytest.approx(math.sqrt(2 / fan), rel=0.3)
    training = Training(epochs=2, batch_size=16, lr=0.05, distill_weight=0.9, distill_temperature=4.0)
    fit(small, run.splits, training, teacher=teacher, seed=run.seed)
    assert same_weights(State.of(small.state_dict()), found.state)
    x, y = run.splits.train.normalise(run.splits.train.x[:8]), run.splits.train.y[:8]
    with torch.no_grad():
        a, b = small(x), teacher(x)
        soft = (F.softmax(b / 4, 1) * (F.log_softmax(b / 4, 1) - F.log_softmax(a / 4, 1))).sum() / 8
        expected = 0.1 * F.cross_entropy(a, y) + 0.9 * 16 * soft
        torch.testing.assert_close(distillation(a, b, y), expected)


def test_patterns_of_the_run_hold():
    run = normed_run()
    run.exclude = ("linear.*",)
    with pytest.raises(NothingPrunable):
        space_of(run)
    assert space_of(normed_run(), fractions=(0.5, 1.0)).widths[0].choices == (3, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"sparsity": math.nan},
        {"fractions": (0.5,)},
        {"tolerance": -0.1},
        {"tau": (5.0,)},
        {"tau": (5.0, 0.0)},
        {"betas": (0.5,)},
    ],
)
def test_the_procedure_refuses(options):
    with pytest.raises(InvalidValue):
        tas(normed_run(), **options)


def test_defaults_are_those_of_the_paper():
    assert FRACTIONS == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    step = ArchitectureStep(striped().train, target=1, tolerance=0, epochs=1, steps_per_epoch=1)
    assert (step.weight, step.lr, step.betas, step.weight_decay) == (2.0, 1e-3, (0.5, 0.999), 1e-3)
    assert step.tau == (5.0, 0.1)
    assert step.batch_size == 256


def test_states_carry_their_shape():
    run = normed_run(epochs=1)
    space = space_of(run)
    shape, other = Cut(space.plan(space.least)), Cut(space.plan(space.whole))
    start = new_weights(run, shape)
    trained = run.train("small", start=start)
    assert trained.shape is shape
    assert trained.model(run).conv.out_channels == 1
    weights = start.weights
    assert State.of(weights).digest != State.of(weights, shape=shape).digest != State.of(weights, shape=other).digest
    assert run.train("own").shape is None
    assert run.train("small", start=start) is not None
