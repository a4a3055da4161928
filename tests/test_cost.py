"""Costs: by hand, against brute-force counting, and two independent counters against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, MaskMismatch
from prunus.measure.cost import (
    count,
    dense_bytes,
    effective_macs,
    latency,
    layer_costs,
    packed_bytes,
    total_macs,
)
from prunus.randomness import generator


def macs_of(model: nn.Module, example: Any) -> dict[str, int]:
    return {name: cost.macs for name, cost in layer_costs(model, example).items()}


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ConvTranspose2d(8, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 13 * 13, 10),
    )


def test_hand_counts() -> None:
    assert macs_of(conv_net(), torch.zeros(5, 3, 16, 16)) == {
        "0.weight": 8 * 8 * (8 * 3 * 9),
        "3.weight": 6 * 6 * (8 * 2 * 9),
        "4.weight": 6 * 6 * (8 * 4 * 9),
        "6.weight": 10 * 676,
    }


def test_grouped_convolution_by_brute_force() -> None:
    # A multiply-accumulate is a pair (weight, output it feeds): with all-ones data the output sums count them.
    layer = nn.Conv2d(6, 9, (3, 2), stride=(2, 1), groups=3, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.ones(1, 6, 9, 7)
    assert macs_of(layer, x) == {"weight": int(layer(x).sum())}


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (conv_net, (3, 3, 16, 16)),
        (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding=1), (2, 4, 11)),
        (lambda: nn.Conv3d(2, 4, 3, groups=2), (2, 2, 5, 6, 7)),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2), (2, 4, 5)),
        (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)), (4, 6, 5)),
        (lambda: nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True), (4, 6, 5)),
        (lambda: nn.LSTM(5, 7, proj_size=3, batch_first=True), (4, 6, 5)),
        (lambda: nn.GRU(5, 7, batch_first=True), (4, 6, 5)),
        (lambda: nn.RNN(5, 7, batch_first=True), (4, 6, 5)),
        (lambda: nn.LSTMCell(5, 7), (4, 5)),
        (lambda: nn.GRUCell(5, 7), (4, 5)),
    ],
)
def test_layer_sum_equals_operator_count(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    net, x = make(), torch.zeros(shape)
    assert sum(macs_of(net, x).values()) == total_macs(net, x) > 0
    assert macs_of(net, x) == macs_of(net, x[:1])


def test_transformer_layers_differ_from_the_operator_count_by_attention_scores_only() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.zeros(3, 5, 16)
    costs = macs_of(net, x)
    assert costs["layers.0.self_attn.in_proj_weight"] == 5 * 3 * 16 * 16
    assert costs["layers.1.self_attn.out_proj.weight"] == 5 * 16 * 16
    assert total_macs(net, x) - sum(costs.values()) == 2 * (2 * 5 * 5 * 16)


def test_attention_with_other_widths_and_lengths() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(query, key=key, value=value)[0]

    example = (torch.zeros(2, 3, 8), torch.zeros(2, 5, 6), torch.zeros(2, 5, 4))
    assert macs_of(Cross(), example) == {
        "attention.q_proj_weight": 3 * 8 * 8,
        "attention.k_proj_weight": 5 * 8 * 6,
        "attention.v_proj_weight": 5 * 8 * 4,
        "attention.out_proj.weight": 3 * 8 * 8,
    }
    assert macs_of(Cross(), dict(zip(("query", "key", "value"), example))) == macs_of(Cross(), example)


def test_shared_and_tied_weights_accumulate_under_their_first_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.mix = nn.Linear(4, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.unused = nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mix(self.mix(self.embed(ids))))

    net, ids = Tied(), torch.zeros(2, 3, dtype=torch.long)
    assert macs_of(net, ids) == {"embed.weight": 3 * 40, "mix.weight": 2 * 3 * 16, "unused.weight": 0}
    assert total_macs(net, ids) == 3 * 40 + 2 * 3 * 16
    assert layer_costs(net, ids)["mix.weight"].positions == 6


def test_parametrised_and_look_alike_weights_are_named_and_counted() -> None:
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)))
    assert macs_of(net, torch.zeros(2, 3)) == {"0.parametrizations.weight.original": 12}

    class Conv1D(nn.Module):
        """A linear layer that stores (in, out), as some language models do."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    assert macs_of(Conv1D(), torch.zeros(2, 5, 3)) == {"weight": 5 * 12}


def test_effective_macs_equal_the_uses_of_kept_weights() -> None:
    net = conv_net()
    costs = layer_costs(net, torch.zeros(1, 3, 16, 16))
    g = generator(0, "masks")
    masks = {n: torch.rand(p.shape, generator=g) < 0.3 for n, p in net.named_parameters() if n in costs}
    densities = {n: int(m.sum()) / m.numel() for n, m in masks.items()}
    assert effective_macs(costs, densities) == sum(int(m.sum()) * costs[n].positions for n, m in masks.items())
    assert effective_macs(costs, {}) == sum(c.macs for c in costs.values())
    assert effective_macs(costs, dict.fromkeys(costs, 0.0)) == 0
    with pytest.raises(InvalidValue, match=r"\[0, 1\]"):
        effective_macs(costs, {"0.weight": 1.5})
    with pytest.raises(InvalidValue, match=r"'7\.weight'"):
        effective_macs(costs, {"7.weight": 0.5})


def test_counting_leaves_model_and_settings_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    switches = (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled)
    state = torch.random.get_rng_state()
    layer_costs(net, torch.ones(2, 4))
    total_macs(net, torch.ones(2, 4))
    assert modes == [m.training for m in net.modules()]
    assert switches == (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("example", [torch.zeros(0, 4), torch.tensor(1.0), (), {"a": 3}])
def test_examples_without_rows_are_refused(example: Any) -> None:
    with pytest.raises(InvalidValue):
        layer_costs(nn.Linear(4, 4), example)


def test_count_goes_by_masks_not_by_zeros() -> None:
    net = nn.Linear(4, 2)
    nn.init.zeros_(net.weight)
    assert (count(net).parameters, count(net).nonzeros) == (10, 10)
    mask = torch.tensor([[True, False, False, False], [True, True, False, False]])
    found = count(net, {"weight": mask})
    assert (found.parameters, found.nonzeros, found.masked, found.masked_kept) == (10, 5, 8, 3)


def test_count_takes_tied_parameters_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    mask = torch.eye(3, dtype=torch.bool)
    for masks in ({"0.weight": mask}, {"1.weight": mask}, {"0.weight": mask, "1.weight": mask.clone()}):
        assert (count(net, masks).parameters, count(net, masks).nonzeros) == (9, 3)
    with pytest.raises(MaskMismatch, match="tied"):
        count(net, {"0.weight": mask, "1.weight": ~mask})


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"wieght": torch.ones(2, 4, dtype=torch.bool)}, "no such parameter"),
        ({"weight": torch.ones(4, 2, dtype=torch.bool)}, r"\(2, 4\)"),
        ({"weight": torch.ones(2, 4)}, "must be bool"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: dict[str, Tensor], words: str) -> None:
    for function in (count, packed_bytes):
        with pytest.raises(MaskMismatch, match=words):
            function(nn.Linear(4, 2), masks)


def test_bytes_by_hand() -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    # weights 15, bias 3, scale 3, shift 3, mean 3, variance 3 in float32, one int64 counter
    assert dense_bytes(net) == 30 * 4 + 8
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, :4] = True
    assert packed_bytes(net, {"0.weight": mask}) == 15 * 4 + 8 + 2 + 4 * 4
    assert packed_bytes(net, {}) == dense_bytes(net)
    assert packed_bytes(net.half(), {"0.weight": mask}) == 15 * 2 + 8 + 2 + 4 * 2


def test_bytes_take_shared_tensors_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    assert dense_bytes(net) == 36
    assert packed_bytes(net, {"1.weight": torch.eye(3, dtype=torch.bool)}) == 2 + 12


class Clock:
    """A clock that moves when the fake models say so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_latency_interleaves_and_compares_within_rounds() -> None:
    clock, order = Clock(), []
    mood = {"factor": 1.0}

    def model(name: str, seconds: float) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            order.append(name)
            clock.now += seconds * mood["factor"]
            if len(order) % 2 == 0:
                mood["factor"] *= 1.5  # the machine gets slower and slower
            return x

        return forward

    found = latency({"a": model("a", 1.0), "b": model("b", 0.5)}, torch.zeros(1), repeats=4, warmup=2, clock=clock)
    assert "".join(order) == "abba" * 3
    assert [m.ratio for m in found.values()] == pytest.approx([1.0, 0.5])
    assert (found["a"].low, found["a"].median, found["a"].high, found["a"].repeats) == pytest.approx(
        (1.5**2 * 1.375, 1.5**2 * (1.5 + 2.25) / 2, 1.5**2 * 2.53125, 4)
    )
    assert found["a"].interquartile_range == pytest.approx(found["a"].high - found["a"].low)


def test_latency_of_real_modules_restores_modes_and_sees_large_differences() -> None:
    small, large = nn.Sequential(nn.Linear(64, 8), nn.Dropout()), nn.Sequential(nn.Linear(64, 20000), nn.Dropout())
    found = latency({"small": small, "large": large}, torch.zeros(64, 64), repeats=7, warmup=2)
    assert found["large"].ratio > 3.0
    assert found["small"].ratio == 1.0
    assert all(m.training for net in (small, large) for m in net.modules())


def test_latency_refusals() -> None:
    with pytest.raises(InvalidValue, match="no model"):
        latency({}, torch.zeros(1))
    with pytest.raises(InvalidValue, match="repeats"):
        latency({"a": nn.Identity()}, torch.zeros(1), repeats=0)
