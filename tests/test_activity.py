"""Dead-neuron rates where they are known: forced biases, exact monotonicity, every way of calling a rectifier."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.errors import InvalidValue, NonFinite
from prunus.measure.activity import activity, dead_neuron_rate
from prunus.randomness import generator


def inputs(n: int = 50, width: int = 6) -> Tensor:
    return torch.randn(n, width, generator=generator(0, "inputs"))


def biased(bias: float, last: nn.Module) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), last)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(bias)
    return net


@pytest.mark.parametrize(("bias", "rate"), [(-1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_constant_bias_decides(bias: float, rate: float) -> None:
    found = activity(biased(bias, nn.ReLU()), [inputs()])
    assert (found.dead_rate, found.always_off, found.n) == (rate, rate, 50)


def test_zero_preactivation_is_not_negative_for_smooth_functions() -> None:
    assert dead_neuron_rate(biased(0.0, nn.GELU()), [inputs()]) == 0.0
    assert dead_neuron_rate(biased(-1.0, nn.GELU()), [inputs()]) == 1.0


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.clone())


@pytest.mark.parametrize(
    "function",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        F.relu,
        F.relu6,
        lambda x: F.relu(x, inplace=True),
        F.relu_,
        torch.relu,
        torch.relu_,
        lambda x: x.relu(),
        lambda x: x.relu_(),
        lambda x: F.relu(input=x),
    ],
)
def test_every_way_to_rectify_is_seen_once(function: Callable[[Tensor], Tensor]) -> None:
    x = inputs()
    found = activity(Calls(function), [x])
    assert found.dead_rate == float((x <= 0).double().mean())
    assert len(found.layers) == 1
    assert {layer.kind for layer in found.layers.values()} == {"zero output"}


@pytest.mark.parametrize(
    "function",
    [
        *(nn.GELU(), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.ELU(), nn.ELU(inplace=True), nn.SELU()),
        *(nn.CELU(), nn.LeakyReLU(), nn.LeakyReLU(inplace=True), nn.PReLU(), nn.Hardswish(), nn.Softplus()),
        *(F.gelu, F.silu, F.leaky_relu, F.leaky_relu_, F.elu_, torch.selu, torch.selu_),
    ],
)
def test_smooth_functions_count_negative_inputs(function: Callable[[Tensor], Tensor]) -> None:
    x = inputs()
    found = activity(Calls(function), [x])
    assert found.dead_rate == float((x < 0).double().mean())
    assert [layer.kind for layer in found.layers.values()] == ["negative input"]


def test_average_is_weighted_by_units_and_independent_of_batches() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 2))
    x = inputs(30, 36).reshape(30, 1, 6, 6)
    first = net[:2](x).detach()
    second = net[:5](x).detach()
    found = activity(net, [x])
    zeros = int((first == 0).sum()) + int((second == 0).sum())
    assert found.dead_rate == zeros / (30 * (48 + 5))
    assert [(name, layer.units) for name, layer in found.layers.items()] == [("1", 48), ("4", 5)]
    assert found.layers["4"].off == float((second == 0).double().mean())
    assert found.layers["4"].always_off == float((second == 0).all(0).double().mean())
    parts = activity(net, [(b, None) for b in x.split(7)])
    assert (parts.dead_rate, parts.always_off, parts.n) == (found.dead_rate, found.always_off, 30)


def test_zeroing_negative_weights_never_turns_a_unit_off_for_nonnegative_inputs() -> None:
    x = inputs().abs()
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(20, 6, generator=generator(0, "weights")))
        net[0].bias.fill_(-0.5)
    rates = [dead_neuron_rate(net, [x])]
    for row, column in (net[0].weight < 0).nonzero().tolist():
        with torch.no_grad():
            net[0].weight[row, column] = 0.0
        rates.append(dead_neuron_rate(net, [x]))
    assert all(after <= before for before, after in itertools.pairwise(rates))
    assert rates[-1] < rates[0]
    # Negative control: zeroing positive weights goes the other way.
    with torch.no_grad():
        net[0].weight.zero_()
    assert dead_neuron_rate(net, [x]) == 1.0 > rates[0]


def test_functional_calls_are_named_after_their_module_and_counted() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.fc(F.relu(x)))

    net = nn.Sequential(Block(), Block())
    found = activity(net, [inputs(), inputs()])
    assert list(found.layers) == ["0", "0#2", "1", "1#2"]
    assert found.n == 100


def test_fused_transformer_layers_are_seen() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    found = activity(net, [torch.randn(3, 5, 8, generator=generator(0, "tokens"))])
    assert [layer.units for layer in found.layers.values()] == [80, 80]


def test_sequences_of_different_lengths_have_no_static_rate() -> None:
    found = activity(nn.ReLU(), [torch.ones(2, 3), -torch.ones(2, 5)])
    assert found.dead_rate == 10 / 16
    assert found.always_off is None


def test_model_and_randomness_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout())
    state = torch.random.get_rng_state()
    activity(net, [inputs()])
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())


def test_refusals() -> None:
    with pytest.raises(InvalidValue, match="no activation function"):
        activity(nn.Linear(6, 2), [inputs()])
    with pytest.raises(InvalidValue, match="no examples"):
        activity(nn.ReLU(), [])
    with pytest.raises(NonFinite):
        activity(nn.ReLU(), [inputs() * math.nan])
