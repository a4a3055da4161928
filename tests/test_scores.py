"""Scores against their definitions: autograd identities, finite differences, brute force over single weights."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import prunus
from awkward import CLASSES, CONV, MLP, case, mlp
from prunus.errors import InvalidValue, NonFinite, Unsupported
from prunus.evidence import default_loss, read_batch
from prunus.keep import choose
from prunus.parameters import parameters_of, prunable
from prunus.scores.registry import SCORES
from prunus.stats import GRASP_TEMPERATURE, gather


def net(*widths, bias=True, dtype=torch.float64, seed=0):
    """Return a ReLU net of the given widths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
        return nn.Sequential(*layers[:-1]).to(dtype)


def data(count=12, inputs=4, classes=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, inputs, generator=generator).to(dtype), torch.randint(
        classes, (count,), generator=generator
    )


def score(name, model, batches=None, **options):
    """Return the scores called `name` of every prunable tensor."""
    info = SCORES.entry(name)
    addresses = prunable(model)
    evidence = gather(model, addresses, info.needs, data=batches, **options)
    return {n: info.load()(**evidence[n]) for n in addresses}


def by_autograd(model, x, y, *, create_graph=False, scale=1.0):
    parameters = parameters_of(model, prunable(model))
    loss = F.cross_entropy(model(x) / scale, y)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph)))


# -- magnitudes and noise -----------------------------------------------------------------------------------------


def test_magnitudes():
    model = mlp()
    for name, power in (("magnitude", 1), ("magnitude-squared", 2)):
        for tensor, value in score(name, model).items():
            torch.testing.assert_close(value, model.get_parameter(tensor).detach().abs() ** power)


def test_random_scores_are_uniform_and_keyed_by_seed_and_tensor():
    model = net(60, 60, 60, dtype=torch.float32)
    values = score("random", model)
    for value in values.values():
        assert float(value.min()) >= 0
        assert float(value.max()) < 1
        assert float(value.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(value.var()) == pytest.approx(1 / 12, abs=0.005)
    assert not torch.equal(*values.values())
    assert not torch.equal(score("random", model, seed=1)["0.weight"], values["0.weight"])


# -- first order --------------------------------------------------------------------------------------------------


def test_snip_is_the_gradient_with_respect_to_a_mask_of_ones():
    model, (x, y) = net(4, 6, 3), data()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    masks = {n: torch.ones_like(parameters[n], requires_grad=True) for n in prunable(model)}
    masked = {n: p * masks[n] if n in masks else p for n, p in parameters.items()}
    loss = F.cross_entropy(functional_call(model, masked, (x,)), y)
    sensitivities = torch.autograd.grad(loss, list(masks.values()))
    for (name, value), expected in zip(score("snip", model, [(x, y)]).items(), sensitivities, strict=True):
        torch.testing.assert_close(value, expected.abs(), rtol=1e-12, atol=0, msg=name)


def test_taylor_scores_predict_the_change_of_loss():
    model, (x, y) = net(4, 5, 3), data()
    values, squares = score("taylor", model, [(x, y)]), score("taylor-squared", model, [(x, y)])
    step = 1e-6
    for name, value in values.items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(squares[name], value.square())
        for index in range(weight.numel()):
            kept = float(weight.detach().view(-1)[index])
            losses = []
            for factor in (1 - step, 1 + step):
                with torch.no_grad():
                    weight.view(-1)[index] = kept * factor
                    losses.append(float(F.cross_entropy(model(x), y)))
            with torch.no_grad():
                weight.view(-1)[index] = kept
            slope = abs(losses[1] - losses[0]) / (2 * step)  # dL/dc at c = 1
            assert float(value.view(-1)[index]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_gradients_are_those_of_the_mean_loss_however_the_data_is_cut():
    model, (x, y) = net(4, 5, 3), data(12)
    whole = by_autograd(model, x, y)
    for cuts in ([12], [6, 6], [1, 4, 7], [5, 7]):
        batches = list(zip(x.split(cuts), y.split(cuts), strict=True))
        for name, value in score("gradient", model, batches).items():
            torch.testing.assert_close(value, whole[name].abs())


def test_fisher_is_the_mean_square_of_single_example_gradients():
    model, (x, y) = net(4, 5, 3), data(7)
    total = {n: torch.zeros_like(p) for n, p in parameters_of(model, prunable(model)).items()}
    for i in range(7):
        for name, gradient in by_autograd(model, x[i : i + 1], y[i : i + 1]).items():
            total[name] += gradient.square() / 7
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    for name, value in score("fisher", model, batches).items():
        expected = model.get_parameter(name).detach().square() * total[name] / 2
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-12)


def test_movement_is_minus_the_sum_of_weight_times_gradient():
    model = net(4, 5, 3)
    batches = [data(4, seed=s) for s in range(3)]
    expected = {n: torch.zeros_like(p) for n, p in parameters_of(model, prunable(model)).items()}
    for x, y in batches:
        for name, gradient in by_autograd(model, x, y).items():
            expected[name] -= model.get_parameter(name).detach() * gradient
    for name, value in score("movement", model, batches).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-8)


# -- second order -------------------------------------------------------------------------------------------------


def test_grasp_uses_the_gradient_of_half_the_squared_gradient_norm():
    model, (x, y) = net(4, 5, 3), data()
    gradients = by_autograd(model, x, y, create_graph=True, scale=GRASP_TEMPERATURE)
    half = sum(g.square().sum() for g in gradients.values()) / 2
    parameters = parameters_of(model, prunable(model))
    products = torch.autograd.grad(half, list(parameters.values()))
    for (name, value), product in zip(score("grasp", model, [(x, y)]).items(), products, strict=True):
        torch.testing.assert_close(value, parameters[name].detach() * product, rtol=1e-9, atol=1e-18)


def test_grasp_over_several_batches_is_grasp_of_the_whole():
    model, (x, y) = net(4, 5, 3), data(12)
    whole = score("grasp", model, [(x, y)])
    parts = score("grasp", model, list(zip(x.split([5, 7]), y.split([5, 7]), strict=True)))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-18)


def test_grasp_predicts_how_shrinking_one_weight_changes_the_gradient_flow():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    assert prunable(model).total == 20
    x, y = data(8, inputs=3, classes=2)
    values = score("grasp", model, [(x, y)])

    def flow():
        return float(sum(g.square().sum() for g in by_autograd(model, x, y, scale=GRASP_TEMPERATURE).values())) / 2

    step = 1e-5
    for name, value in values.items():
        weight = model.get_parameter(name)
        for index in range(weight.numel()):
            kept = float(weight.detach().view(-1)[index])
            ends = []
            for factor in (1 + step, 1 - step):
                with torch.no_grad():
                    weight.view(-1)[index] = kept * factor
                ends.append(flow())
            with torch.no_grad():
                weight.view(-1)[index] = kept
            change = (ends[1] - ends[0]) / (2 * step)  # taking the weight away changes the flow by about this
            assert -float(value.view(-1)[index]) == pytest.approx(change, rel=1e-4, abs=1e-14)


# -- paths --------------------------------------------------------------------------------------------------------


def test_synflow_is_conserved_from_layer_to_layer_and_through_every_unit():
    model = net(5, 7, 6, 8, 3, bias=False, dtype=torch.float32)
    values = score("synflow", model, [torch.ones(1, 5)])
    positive = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
        total = float(positive(torch.ones(1, 5, dtype=torch.float64)).sum())
    layers = list(values.values())
    assert all(layer.dtype == torch.float64 for layer in layers)
    for layer in layers:
        assert float(layer.sum()) == pytest.approx(total, rel=1e-12)
    for before, after in itertools.pairwise(layers):
        torch.testing.assert_close(before.sum(1), after.sum(0), rtol=1e-12, atol=0)


def test_synflow_looks_only_at_the_shape_of_the_input():
    model = net(4, 6, 3, dtype=torch.float32)
    a = score("synflow", model, [data(3, dtype=torch.float32)])
    b = score("synflow", model, [data(9, dtype=torch.float32, seed=5)])
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_synflow_survives_deep_nets_that_overflow_single_precision():
    model = net(*[40] * 60, 3, bias=False, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    values = score("synflow", model, [torch.ones(1, 40)])
    assert all(bool(torch.isfinite(v).all()) for v in values.values())
    assert float(values["0.weight"].sum()) > 3e38


def test_pruned_weights_have_no_flow():
    model = net(5, 7, 3, bias=False, dtype=torch.float32)
    with torch.no_grad():
        model[0].weight[2] = 0.0
    values = score("synflow", model, [torch.ones(1, 5)])
    assert not values["0.weight"][2].any()
    assert not values["2.weight"][:, 2].any()


# -- activations --------------------------------------------------------------------------------------------------


def test_wanda_is_weight_times_input_norm_by_hand():
    model = net(4, 6, 3, dtype=torch.float32)
    x, _ = data(10, dtype=torch.float32)
    values = score("wanda", model, [x[:4], x[4:]])
    hidden = F.relu(model[0](x))
    for name, inputs in (("0.weight", x), ("2.weight", hidden)):
        norm = inputs.square().mean(0).sqrt()
        torch.testing.assert_close(values[name], model.get_parameter(name).abs() * norm[None, :])


@pytest.mark.parametrize("layer", ["grouped", "grouped transposed", "one-dimensional"])
def test_wanda_of_convolutions_takes_the_norm_of_the_input_channel(layer):
    awkward = case(layer)
    model = awkward.build().eval()
    x, _ = awkward.batch()
    values = score("wanda", model, [x])["body.0.weight"]
    norms = x.movedim(1, -1).flatten(0, -2).square().mean(0).sqrt()
    address = prunable(model)["body.0.weight"]
    weight = model.get_parameter("body.0.weight")
    torch.testing.assert_close(values, weight.abs() * address.broadcast_inputs(norms))


def test_scaling_a_channel_against_its_weights_moves_magnitude_but_not_wanda():
    model = net(4, 6, 3, dtype=torch.float32)
    x, _ = data(64, dtype=torch.float32)
    scaled = copy.deepcopy(model)
    factor = torch.tensor([1.0, 50.0, 1.0, 0.02])
    with torch.no_grad():
        scaled[0].weight.div_(factor)
    before = {n: choose(model, 0.5, score=n, data=[x], exclude="2.*") for n in ("wanda", "magnitude")}
    after = {n: choose(scaled, 0.5, score=n, data=[x * factor], exclude="2.*") for n in ("wanda", "magnitude")}
    assert before["wanda"] == after["wanda"]
    assert before["magnitude"] != after["magnitude"]


def test_wanda_on_inputs_of_equal_norm_is_magnitude_in_each_row():
    model = net(4, 6, bias=False, dtype=torch.float32)
    x = torch.eye(4) * 3.0
    assert choose(model, 0.5, score="wanda", data=[x]) == choose(model, 0.5, budget="row-wise")


def test_the_order_of_samples_does_not_matter():
    model = net(4, 6, 3, dtype=torch.float64)
    x, _ = data(16)
    a = score("wanda", model, [x])
    b = score("wanda", model, list(x[torch.randperm(16, generator=torch.Generator().manual_seed(0))].split(3)))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_padding_says_nothing_about_the_text():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.layer = nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask=None):
            return self.layer(self.embedding(input_ids)).mean(1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Words()
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]])
    padded = score("wanda", model, [{"input_ids": ids, "attention_mask": (ids > 0).long()}])["layer.weight"]
    words = model.embedding(torch.tensor([1, 2, 3, 4, 5])).detach()
    torch.testing.assert_close(padded, model.layer.weight.abs() * words.square().mean(0).sqrt())
    unmasked = score("wanda", model, [{"input_ids": ids}])["layer.weight"]
    assert not torch.allclose(padded, unmasked)


def test_a_weight_of_two_layers_sees_the_inputs_of_both():
    for name, calls in (("tied linear", ("first", "second")), ("shared module", ("shared", "shared"))):
        awkward = case(name)
        model = awkward.build()
        x, _ = awkward.batch()
        first, second = (getattr(model, c) for c in calls)
        seen = torch.cat([x, F.relu(first(x))])
        tensor = f"{calls[0]}.weight"
        torch.testing.assert_close(
            score("wanda", model, [x])[tensor], second.weight.abs() * seen.square().mean(0).sqrt(), msg=name
        )


def test_spectral_norm_does_not_hide_the_layer():
    awkward = case("spectral norm")
    model = awkward.build()
    x, _ = awkward.batch()
    name = "0.parametrizations.weight.original"
    torch.testing.assert_close(
        score("wanda", model, [x])[name], model.get_parameter(name).abs() * x.square().mean(0).sqrt()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [("lstm", "linear and convolution layers; exclude"), ("layer that never runs", "'never.weight'")],
)
def test_wanda_says_which_layer_it_cannot_score(name, message):
    awkward = case(name)
    with pytest.raises((Unsupported, InvalidValue), match=message):
        score("wanda", awkward.build(), awkward.batches())


# -- gathering ----------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_gathered():
    model = mlp()
    evidence = gather(model, prunable(model), ["weight", "noise", "weight"])
    assert all(list(e) == ["weight", "noise"] for e in evidence.values())
    with pytest.raises(InvalidValue, match="evidence 'wieght' is not known; known: weight"):
        gather(model, prunable(model), ["wieght"])


def test_evidence_does_not_depend_on_what_else_is_gathered():
    awkward = case("batch norm and dropout")
    model = awkward.build()
    addresses, batches = prunable(model), awkward.batches()
    alone = gather(model, addresses, ["squared_gradient", "gradient"], data=batches, train=True)
    other = gather(model, addresses, ["movement", "gradient"], data=batches, train=True)
    assert all(torch.equal(alone[n]["gradient"], other[n]["gradient"]) for n in addresses)


def test_train_mode_uses_batch_statistics():
    model = CONV.build()
    batches = CONV.batches()
    assert not torch.equal(
        score("gradient", model, batches)["body.0.weight"],
        score("gradient", model, batches, train=True)["body.0.weight"],
    )


def test_frozen_parameters_are_scored_and_stay_frozen():
    frozen, free = case("frozen").build(), mlp_like_frozen()
    batches = MLP.batches()
    a, b = score("snip", frozen, batches), score("snip", free, batches)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert float(a["0.weight"].sum()) > 0
    assert not frozen[0].weight.requires_grad


def mlp_like_frozen():
    model = case("frozen").build()
    return model.requires_grad_(True)


def test_layers_that_never_run_score_zero():
    awkward = case("layer that never runs")
    values = score("snip", awkward.build(), awkward.batches())
    assert not values["never.weight"].any()
    assert values["first.weight"].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_inputs_are_noticed_in_the_evidence(value):
    x, y = MLP.batch()
    x[0, 0] = value
    for name in ("snip", "wanda", "fisher"):
        with pytest.raises(NonFinite, match="NaN or infinite"):
            score(name, mlp(), [(x, y)])


def test_batches_in_every_form():
    x, y = MLP.batch()
    device = torch.device("cpu")
    for form in ((x, y), [x, y], (x, y, torch.arange(len(y)))):
        batch = read_batch(form, device)
        assert batch.args[0] is x
        assert batch.target is y
        assert batch.size == len(x)
    assert read_batch(x, device).target is None
    assert read_batch((x,), device).target is None
    mapping = read_batch({"input_ids": x, "labels": y}, device)
    assert mapping.target is y
    assert mapping.kwargs.keys() == {"input_ids", "labels"}
    assert read_batch(mapping, device) is mapping
    for wrong in (None, 3, "text", (x, y, x, y), (), {}):
        with pytest.raises(InvalidValue, match="a batch must be"):
            read_batch(wrong, device)
    for empty in (x[:0], (x[:0], y[:0]), {"input_ids": x[:0]}):
        with pytest.raises(InvalidValue, match="no examples"):
            read_batch(empty, device)


def test_losses():
    logits, labels = torch.randn(4, CLASSES), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(default_loss(logits, labels), F.cross_entropy(logits, labels))
    sequence, targets = torch.randn(2, 5, CLASSES), torch.randint(CLASSES, (2, 5))
    expected = F.cross_entropy(sequence.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(default_loss(sequence, targets), expected)

    class Output:
        logits = None
        loss = torch.tensor(0.25)

    assert default_loss(Output(), None) == 0.25
    with pytest.raises(InvalidValue, match="needs labels"):
        default_loss(logits, None)
    own = gather(MLP.build(), prunable(MLP.build()), ["gradient"], data=MLP.batches(), loss=lambda out, _: out.sum())
    assert own["0.weight"]["gradient"].shape == (20, 8)


def test_scores_of_tokens():
    awkward = case("tied embedding")
    model = awkward.build()
    assert score("snip", model, awkward.batches())["middle.weight"].any()
    with pytest.raises(Unsupported, match="token ids"):
        score("synflow", model, awkward.batches())
    with pytest.raises(Unsupported, match="tied to an embedding"):
        prunus.prune(model, 0.5, score="wanda", data=awkward.batches(), include="output.weight", measure=False)


def test_a_refusal_leaves_no_hooks():
    model = case("lstm").build()
    with pytest.raises(Unsupported):
        score("wanda", model, case("lstm").batches())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_input_norms_of_weights_that_a_model_uses_by_itself() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.layer.weight)

    model, x = Own(), torch.randn(7, 5)
    norm = gather(model, prunable(model), ["input_norm"], data=[x])["layer.weight"]["input_norm"]
    torch.testing.assert_close(norm, x.square().mean(0).sqrt().expand(3, 5))
