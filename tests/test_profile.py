"""`prunus.profile`: counts by hand, sums that add up, rooflines by hand, and a model that stays as it was."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import random_unstructured

import prunus
from prunus.cli import main
from prunus.errors import InvalidValue, MaskMismatch
from prunus.measure.cost import own_macs, total_macs
from prunus.measure.latency import latency, using_threads
from prunus.measure.memory import peak_bytes
from prunus.measure.roofline import Peaks, measured_peaks
from prunus.runtime.library import why_not
from prunus.runtime.profile import Profile, at_batch

PEAKS = Peaks(gflops=100.0, gigabytes_per_second=10.0, threads=1)
X = torch.ones(2, 3, 8, 8)


def net() -> nn.Sequential:
    """Return a small network without a zero weight."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def half_zero(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        model[0].weight[:8] = 0
        model[4].weight[:, ::4] = 0
    return model


def profiled(model: nn.Module, example: Any = X, **options: Any) -> Profile:
    return prunus.profile(model, example, rounds=options.pop("rounds", 2), peaks=options.pop("peaks", PEAKS), **options)


def row(found: Profile, name: str) -> Any:
    return next(layer for layer in found.layers if layer.name == name)


def check_sums(found: Profile) -> None:
    for what in ("parameters", "nonzeros", "macs", "effective_macs", "executed_macs"):
        assert sum(getattr(layer, what) for layer in found.layers) == getattr(found, what), what
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert sum(layer.milliseconds for layer in found.layers) == pytest.approx(found.median_ms)
    assert sum(layer.bytes or 0 for layer in found.layers) == found.bytes


def test_a_dense_network_by_hand() -> None:
    found = profiled(net())
    assert (found.batch, found.rounds) == (2, 2)
    assert found.parameters == found.nonzeros == (16 * 27 + 16) + 32 + (10 * 1024 + 10)
    assert found.macs == found.effective_macs == found.executed_macs == 64 * 16 * 27 + 10 * 1024
    # Batch norm keeps two means and a counter of 8 bytes beside its parameters.
    assert found.dense_bytes == found.packed_bytes == 4 * (found.parameters + 32) + 8
    # Two maps of 2 x 16 x 8 x 8 floats at a time: what a layer reads and what it makes.
    assert found.peak_bytes == 2 * 4 * 2 * 16 * 64
    conv, norm, linear = row(found, "0"), row(found, "1"), row(found, "4")
    assert (conv.operator, conv.shape, conv.parameters, conv.macs) == ("Conv2d", (2, 16, 8, 8), 448, 27_648)
    assert conv.bytes == 4 * (2 * 3 * 64 + 2 * 16 * 64 + 448)
    assert (norm.parameters, norm.macs, norm.bytes) == (32, 0, 4 * (2 * 2 * 16 * 64 + 32))
    assert (linear.shape, linear.parameters, linear.macs) == ((2, 10), 10_250, 10_240)
    assert found.intensity(linear) == pytest.approx(2 * 10_240 / (4 * (2 * 1024 + 20 + 10_250)))
    check_sums(found)


def test_zeros_are_counted_once_and_torch_multiplies_them() -> None:
    found = profiled(half_zero(net()))
    conv, linear = row(found, "0"), row(found, "4")
    assert conv.nonzeros == 8 * 27 + 16
    assert (conv.effective_macs, conv.executed_macs) == (64 * 8 * 27, 64 * 16 * 27)
    assert (linear.nonzeros, linear.effective_macs) == (10 * 768 + 10, 10 * 768)
    assert found.effective_macs == 64 * 8 * 27 + 7680
    assert found.executed_macs == found.macs
    # A bit per weight of the two tensors with zeros, and their kept values.
    pruned, bits = 8 * 27 + 10 * 256, (16 * 27 + 10 * 1024) // 8
    assert found.packed_bytes == found.dense_bytes - 4 * pruned + bits
    check_sums(found)
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0] = 0  # a bitmap would take more than the zero
    assert profiled(model).packed_bytes == profiled(model).dense_bytes


def test_masks_say_what_is_kept_whatever_the_values() -> None:
    keep = torch.zeros(10, 1024, dtype=torch.bool)
    keep[:, :100] = True
    found = profiled(net(), masks={"4.weight": keep})
    assert row(found, "4").effective_macs == 1000
    assert row(found, "0").effective_macs == row(found, "0").macs
    check_sums(found)
    with pytest.raises(MaskMismatch):
        profiled(net(), masks={"5.weight": keep})


def test_masks_of_torch_prune_are_seen() -> None:
    model = net()
    random_unstructured(model[4], "weight", amount=0.75)
    found = profiled(model)
    assert row(found, "4").nonzeros == 2560 + 10
    assert row(found, "4").effective_macs == 2560
    check_sums(found)


def test_a_smaller_model_and_a_pruned_one() -> None:
    model = net()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.1, 1)
    small = prunus.prune(model, 0.5, unit="channel", example=X, measure=False).model
    found = profiled(small)
    assert found.macs == 64 * 8 * 27 + 10 * 512
    check_sums(found)
    masked = prunus.prune(model, 0.9, measure=False)
    found = profiled(masked.model)
    assert found.parameters - found.nonzeros == masked.masks.total - masked.masks.kept
    check_sums(found)


class Attends(nn.Module):
    """A parameter of its own, a module that never runs, one that runs twice, products without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.twice = nn.Linear(16, 16)
        self.unused = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x + self.token))
        return self.attention(x, x, x, need_weights=False)[0]


def test_attention_shared_layers_and_unused_ones_add_up() -> None:
    found = profiled(Attends().eval(), torch.randn(3, 5, 16))
    assert row(found, "twice").macs == 2 * 5 * 16 * 16
    products = 2 * 5 * 5 * 16  # queries with keys, and what comes of it with values
    assert row(found, "attention").macs == 4 * 5 * 16 * 16 + products
    assert row(found, "attention").parameters == 4 * 16 * 16 + 4 * 16
    assert row(found, "Attends").parameters == 16 + 5 * 7 + 7
    check_sums(found)


def test_modules_that_multiply_activations_have_a_row() -> None:
    from prunus.models.create import create

    model, x = create("vit", depth=1, width=32, heads=2, patch=8), torch.randn(1, 3, 32, 32)
    assert sum(own_macs(model, x).values()) == total_macs(model, x)
    found = profiled(model, x)
    tokens = 17
    products = row(found, "blocks.0.attention")
    assert products.macs == products.effective_macs == 2 * tokens * tokens * 32
    assert products.parameters == 0
    assert products.bound == ""
    names = [layer.name for layer in found.layers]
    assert names.index("blocks.0.norm1") < names.index("blocks.0.attention") < names.index("blocks.0.attention.qkv")
    check_sums(found)


def test_recurrent_networks_and_lone_layers() -> None:
    found = profiled(nn.GRU(4, 6, batch_first=True), torch.randn(2, 5, 4))
    assert found.macs == 5 * (18 * 4 + 18 * 6)
    check_sums(found)
    found = profiled(nn.Linear(4, 3), torch.randn(2, 4))
    assert [layer.name for layer in found.layers] == ["Linear"]
    assert found.macs == 12
    check_sums(found)
    assert profiled(nn.ReLU(), torch.randn(2, 4)).macs == 0


@pytest.mark.skipif(bool(why_not()), reason=f"no native engine: {why_not()}")
def test_layers_of_a_compressed_model_are_those_of_its_report() -> None:
    model = half_zero(net())
    fast = prunus.compress(model, X, engine="always", timing=False)
    found = profiled(fast)
    listed = {layer.name: layer for layer in fast.report.layers}
    for name in ("0", "4"):
        mine = row(found, name)
        assert mine.operator == listed[name].operator
        assert mine.kernel == listed[name].kernel
        assert mine.executed_macs == mine.effective_macs
    assert row(found, "0").shape == (2, 16, 8, 8)
    assert found.macs == profiled(model).macs
    assert found.effective_macs == found.executed_macs == 64 * 8 * 27 + 7680
    assert found.parameters == 448 + 10_250  # the batch norm is part of the convolution
    assert found.nonzeros == 8 * 27 + 16 + 7680 + 10
    check_sums(found)
    check_sums(profiled(fast, batch=5))


@pytest.mark.skipif(bool(why_not()), reason=f"no native engine: {why_not()}")
def test_what_stays_in_torch_beside_the_engine_is_counted() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x).cumsum(1)
            return self.b(x) @ x.transpose(1, 2)

    found = profiled(
        prunus.compress(Mixed(), torch.randn(3, 4, 8), engine="always", timing=False), torch.randn(3, 4, 8)
    )
    assert found.macs == 2 * 4 * 64 + 4 * 4 * 8
    check_sums(found)


def test_nothing_is_changed() -> None:
    model = half_zero(net()).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    threads = torch.get_num_threads()
    x = X.clone().requires_grad_()
    profiled(model, x, batch=3, threads=1)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert x.grad is None
    assert torch.get_num_threads() == threads


def test_batches() -> None:
    assert at_batch(X, None) is X
    one = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(at_batch(one, 3), one[:1].repeat(3, 1))
    several = at_batch({"x": one, "scale": torch.tensor(2.0), "pair": (one, 4)}, 4)
    assert several["x"].shape == several["pair"][0].shape == (4, 3)
    assert several["scale"] == 2
    assert several["pair"][1] == 4
    found = profiled(net(), batch=6)
    assert found.batch == 6
    assert row(found, "4").shape == (6, 10)
    assert found.macs == profiled(net()).macs


def test_json_and_text() -> None:
    found = profiled(half_zero(net()))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["macs"] == found.macs
    assert data["peaks"]["ridge"] == 5.0
    assert data["layers"][0]["shape"] == [2, 16, 8, 8]
    assert data["layers"][0]["density"] == pytest.approx((8 * 27 + 16) / 448)
    assert data["layers"][0]["intensity"] == found.intensity(found.layers[0])
    lines = str(found).splitlines()
    assert len(lines) == 7 + 1 + len(found.layers)
    assert len(max(lines, key=len)) < 200
    deep = profiled(nn.Sequential(*(nn.Linear(4, 4) for _ in range(60))), torch.ones(1, 4))
    assert "shorter ones" in str(deep)
    check_sums(deep)


def test_rooflines_by_hand() -> None:
    assert PEAKS.ridge == 5.0  # 50e9 MACs per second over 10e9 bytes per second
    assert PEAKS.attainable(1.0) == 20.0
    assert PEAKS.attainable(5.0) == PEAKS.attainable(500.0) == 100.0
    assert (PEAKS.bound(4.9), PEAKS.bound(5.0)) == ("memory", "arithmetic")
    found = profiled(net())
    assert row(found, "4").bound == "memory"
    assert row(found, "4").attainable_gflops == pytest.approx(20 * found.intensity(row(found, "4")))
    wide = profiled(nn.Conv2d(64, 64, 3), torch.ones(1, 64, 16, 16))
    assert wide.bound == wide.layers[0].bound == "arithmetic"
    seconds = wide.layers[0].milliseconds / 1e3
    assert wide.layers[0].gflops == pytest.approx(2 * 14 * 14 * 64 * 64 * 9 / seconds / 1e9)


def test_peaks_are_operations_and_bytes_over_the_fastest_time() -> None:
    ticks = itertools.cycle([0.0, 1.0, 0.0, 0.5, 0.0, 2.0])
    found = measured_peaks(1, rounds=2, side=8, copied=4000, clock=lambda: next(ticks))
    assert found == Peaks(2 * 8**3 / 0.5 / 1e9, 2 * 4000 / 0.5 / 1e9, 1)


def test_memory_of_a_call() -> None:
    kept: list[torch.Tensor] = []

    def work(x: torch.Tensor) -> torch.Tensor:
        kept.append(x + 1)  # 400 bytes that stay
        y = x * 2
        y = y.view(10, 10) * 3  # a view is no memory; then both
        return y.sum()

    assert peak_bytes(work, torch.ones(100)) == 1200
    assert peak_bytes(lambda x: x, torch.ones(100)) == 0
    assert peak_bytes(lambda x: x.add_(1), torch.ones(100)) == 0


def test_primed_calls_are_not_counted_and_threads_are_given_back() -> None:
    calls: list[str] = []
    models = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert latency(models, (), repeats=2, warmup=0, primed=True)["a"].repeats == 2
    assert calls == ["a", "a", "b", "b", "b", "b", "a", "a"]
    before = torch.get_num_threads()
    with using_threads(before + 1) as used:
        assert used == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": True}, "batch"),
        ({"threads": 0}, "threads"),
        ({"threads": 1.5}, "threads"),
        ({"rounds": 0}, "rounds"),
        ({"example": torch.ones(2, 4, 8, 8)}, "cannot run the example"),
        ({"example": torch.ones(0, 3, 8, 8)}, "empty"),
        ({"example": "no tensor"}, "batch axis"),
        ({"model": lambda x: x}, "torch module"),
    ],
)
def test_bad_input(options: dict[str, Any], says: str) -> None:
    options = dict(options)
    model, example = options.pop("model", net()), options.pop("example", X)
    with pytest.raises(InvalidValue, match=says):
        profiled(model, example, **options)


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    words = ["profile", "mlp", "--threads", "1", "--batch", "2", "--rounds", "1", "--json", "-o", str(tmp_path / "p")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found == json.loads((tmp_path / "p").read_text())
    assert (found["batch"], found["threads"]) == (2, 1)
    assert "prunus: timing ..." in err
    assert main(["profile", "mlp", "--batch", "1,2"]) == 2
    assert main(["profile", "net.onnx"]) == 2
    assert "--weights" in capsys.readouterr().err
