"""`prunus bench`: what is compared with what, random masks by pattern, break-even by hand; no claim about times."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus.cli import main
from prunus.errors import DataMissing, InvalidValue, MissingExtra, PrunusError, UnknownName, Unsupported
from prunus.report.bench import bench_plot
from prunus.runtime import peers
from prunus.runtime.bench import ENGINE, Bench, BreakEven, Timing, bench, break_evens, difference, masked
from prunus.runtime.library import why_not
from prunus.runtime.named import named_model, shares, sizes
from prunus.runtime.peers import PEERS, Peer

needs_engine = pytest.mark.skipif(bool(why_not()), reason=f"no native engine: {why_not()}")
X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16)).eval()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose kernels by rule, so that a test takes no time for timing them."""
    from prunus.runtime import bench as module
    from prunus.runtime.compress import compress

    monkeypatch.setattr(module, "compress", lambda *a, **k: compress(*a, **k, timing=False))


# -- one run of it all --------------------------------------------------------------------------------------------


@needs_engine
def test_rows_skipped_peers_and_the_round_trip(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise Unsupported("it has a hole")

    monkeypatch.setitem(PEERS, "absent", Peer(peers.dense, ("no_such_package",), "'prunus[absent]'"))  # type: ignore[arg-type]
    monkeypatch.setitem(PEERS, "broken", Peer(broken))  # type: ignore[arg-type]
    model = net()
    before = copy.deepcopy(model.state_dict())
    told: list[str] = []
    found = bench(
        model,
        X,
        against=["dense", "absent", "broken"],
        batches=[1, 2],
        threads=[1],
        sparsities=[0.9, 0.5],
        patterns=["unstructured", "4x1", "2:4"],
        rounds=2,
        on_stage=told.append,
    )
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    points = [("unstructured", 0.5), ("unstructured", 0.9), ("4x1", 0.5), ("4x1", 0.9), ("2:4", 0.5)]
    wanted = [(r, p, s, b, 1) for b in (1, 2) for p, s in points for r in (ENGINE, "dense")]
    assert [(t.runtime, t.pattern, t.sparsity, t.batch, t.threads) for t in found.timings] == wanted
    assert all(t.speedup == 1 for t in found.timings if t.runtime == ENGINE)
    assert all(t.rounds == 2 and 0 < t.low_ms <= t.median_ms <= t.high_ms for t in found.timings)
    assert all(t.difference < 1e-5 for t in found.timings)
    assert found.skipped["absent"] == "no_such_package not installed: pip install 'prunus[absent]'"
    assert found.skipped["broken, batch 2, 1 threads"] == "it has a hole"
    assert len(found.break_even) == 4  # two patterns with a curve, two batch sizes
    assert found.shapes == ((4, 6, 6),)
    assert Bench.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    text = str(found)
    assert "absent skipped: no_such_package not installed" in text
    assert "90.0% 4x1" in text
    assert "preparing dense (batch 1, 1 threads)" in told
    for plot in (bench_plot(found), bench_plot(found, batch=2)):
        assert plot.startswith("<svg")
        assert "4x1" in plot
        assert "dense" in plot
    with pytest.raises(InvalidValue, match="nothing to plot"):
        bench_plot(found, batch=7)
    with pytest.raises(InvalidValue, match="no result"):
        Bench.from_dict({"model": "x"})


@needs_engine
def test_the_weights_as_given(quick: None) -> None:
    pruned = prunus.prune(net(), 0.8, measure=False).model
    found = bench(pruned, X, against=[], rounds=1)
    assert [(t.runtime, t.pattern, t.sparsity, t.batch) for t in found.timings] == [(ENGINE, "as given", None, 3)]
    assert found.timings[0].difference < 1e-5
    assert not found.break_even


# -- random masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_blocks_of_output_channels_go_together(rows: int) -> None:
    model = net()
    found = masked(model, 0.75, "unstructured" if rows == 1 else f"{rows}x1")
    for number in (0, 3):
        weight = found[number].weight.detach()  # type: ignore[index]
        kept = weight != 0
        assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.01)
        assert torch.equal(weight[kept], model[number].weight[kept])
        grouped = kept.flatten(1).reshape(-1, rows, kept[0].numel())
        assert bool((grouped.all(1) | ~grouped.any(1)).all())
    assert int((model[0].weight == 0).sum()) == 0


def test_two_of_four() -> None:
    weight = masked(net(), 0.9, "2:4")[3].weight  # type: ignore[index]
    assert bool(((weight != 0).reshape(16, -1, 4).sum(2) == 2).all())


# -- break-even ----------------------------------------------------------------------------------------------------


def curve(*points: tuple[float, float]) -> list[Timing]:
    base = Timing("dense", "4x1", 0.0, 1, 1, 1.0, 1.0, 1.0, 1.0, 0.0, 5)
    return [replace(base, sparsity=s, speedup=r) for s, r in points]


def test_break_even_by_hand() -> None:
    (found,) = break_evens(curve((0.0, 0.25), (0.5, 0.5), (0.9, 2.0)))
    assert found == BreakEven("4x1", "dense", 1, 1, pytest.approx(0.7), True)  # half way between the logarithms
    (found,) = break_evens(curve((0.9, 0.9), (0.5, 0.5)))
    assert found.sparsity is None
    (found,) = break_evens(curve((0.0, 1.5), (0.5, 3.0)))
    assert (found.sparsity, found.within) == (0.0, False)
    # A lucky point does not count while a higher sparsity was slower.
    (found,) = break_evens(curve((0.0, 0.5), (0.2, 1.1), (0.4, 0.5), (0.8, 2.0)))
    assert found.sparsity == pytest.approx(0.6)
    assert break_evens(curve((0.5, 1.0))) == ()
    assert break_evens([replace(t, runtime=ENGINE) for t in curve((0.0, 0.5), (0.9, 2.0))]) == ()


# -- other runtimes ------------------------------------------------------------------------------------------------


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, a: torch.Tensor, *, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(a) + b, a.sum(1)


@pytest.mark.parametrize("name", ["dense", "onnxruntime", "openvino"])
def test_peers_compute_the_same(name: str) -> None:
    if why := PEERS[name].why_not():
        pytest.skip(why)
    model = net().train()
    threads = torch.get_num_threads()
    run = PEERS[name].make(model, X, 1)
    assert model.training
    assert torch.get_num_threads() == threads
    with torch.no_grad():
        assert difference(run(), model.eval()(X)) < 1e-5
        assert difference(run(), model.eval()(X)) < 1e-5


def test_peers_take_several_inputs_and_outputs() -> None:
    model = Keywords()
    a, b = torch.randn(2, 4), torch.randn(2, 3)
    with torch.no_grad():
        wanted = model(a, b=b)
    assert difference(peers.dense(model, {"a": a, "b": b}, 1)(), wanted) == 0
    if not PEERS["onnxruntime"].why_not():
        assert difference(peers.onnxruntime(model, {"a": a, "b": b}, 1)(), wanted) < 1e-6


def test_bfloat16_is_what_runs() -> None:
    out = peers.dense(net(), X, 1, "bf16")()
    assert out.dtype == torch.bfloat16
    assert 0 < difference(out, net()(X).detach()) < 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_computes_the_same() -> None:
    if why := PEERS["torch-compile"].why_not():
        pytest.skip(why)
    assert difference(peers.torch_compile(net(), X, 1)(), net()(X).detach()) < 1e-5


def test_a_runtime_that_is_not_installed_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("onnxruntime", "openvino"):
        assert "pip install 'prunus[bench]'" in PEERS[name].why_not()
        with pytest.raises(MissingExtra, match=r"prunus\[bench\]"):
            PEERS[name].make(net(), X, 1)


def test_a_model_that_a_runtime_cannot_take_is_named() -> None:
    if why := PEERS["onnxruntime"].why_not():
        pytest.skip(why)

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(Unsupported, match="cannot export Odd"):
        peers.onnxruntime(Odd(), X, 1)
    with pytest.raises(Unsupported, match="fp32"):
        peers.onnxruntime(net(), X, 1, "bf16")


def test_differences() -> None:
    assert difference(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0])) == pytest.approx(0.2)
    assert difference([np.ones(2, np.float32)], (torch.ones(2),)) == 0
    assert difference(torch.ones(2), torch.ones(3)) is None
    assert difference([torch.ones(2)] * 2, torch.ones(2)) is None
    assert difference([torch.tensor([1.0, math.nan])], torch.ones(2)) is None
    assert difference({"a": torch.zeros(0)}, torch.zeros(0)) == 0


# -- models by name ------------------------------------------------------------------------------------------------


def test_named_models(tmp_path: Path) -> None:
    model, x = named_model("resnet20", seed=3)
    assert not model.training
    assert x.shape == (1, 3, 32, 32)
    again, y = named_model("resnet20", seed=3)
    assert torch.equal(x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        assert model(x).shape == (1, 10)
    model, x = named_model("gru-lm", classes=30)
    assert x.dtype == torch.int64
    pruned = prunus.prune(named_model("mlp")[0], 0.7, measure=False)
    pruned.save(tmp_path / "mine.safetensors")
    torch.save(pruned.model.state_dict(), tmp_path / "foreign.pt")
    for file in ("mine.safetensors", "foreign.pt"):
        loaded, _ = named_model("mlp", weights=tmp_path / file, seed=1)
        for a, b in zip(loaded.parameters(), pruned.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_scales_that_start_from_zero_would_make_layers_free() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    model, x = named_model("timm/resnet10t", shape=(3, 64, 64))
    assert x.shape == (1, 3, 64, 64)
    assert not any(m.weight.eq(0).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: named_model("resnet19"), UnknownName, "resnet20"),
        (lambda: named_model("tim/resnet18"), UnknownName, "timm"),
        (lambda: named_model("net.onnx"), InvalidValue, "--weights"),
        (lambda: named_model("mlp", weights=Path("nowhere.pt")), DataMissing, "nowhere"),
        (lambda: named_model("mlp", classes=0), InvalidValue, "num_classes"),
        (lambda: sizes("1,x", "--batch"), InvalidValue, "--batch"),
        (lambda: sizes("0", "--batch"), InvalidValue, "from 1 up"),
        (lambda: shares("0,half", "--sparsity"), InvalidValue, "--sparsity"),
    ],
)
def test_bad_names_and_numbers(make: Any, error: type[PrunusError], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"against": ["onxruntime"]}, UnknownName, "onnxruntime"),
        ({"patterns": ["4by1"]}, UnknownName, "4x1"),
        ({"patterns": ["channel"]}, InvalidValue, "unstructured"),
        ({"patterns": []}, InvalidValue, "no pattern"),
        ({"sparsities": [1.0]}, InvalidValue, r"\[0, 1\)"),
        ({"sparsities": [float("nan")]}, InvalidValue, "nan"),
        ({"batches": [0]}, InvalidValue, "batches"),
        ({"batches": []}, InvalidValue, "no batches"),
        ({"threads": [True]}, InvalidValue, "threads"),
        ({"rounds": -1}, InvalidValue, "rounds"),
        ({"precision": "fp8", "against": ["dense"]}, InvalidValue, "fp32, bf16"),
        ({"example": torch.ones(1, 5, 6, 6), "against": []}, InvalidValue, "cannot run the example"),
        ({"engine": "sometimes", "against": []}, InvalidValue, "auto"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[PrunusError], says: str) -> None:
    options = dict(options)
    with pytest.raises(error, match=says):
        bench(net(), options.pop("example", X), **options)


@needs_engine
def test_the_command_line(quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["bench", "mlp", "--against", "dense", "--threads", "1", "--rounds", "1", "--sparsity", "0,0.9"]
    words += ["--pattern", "4x1", "--json", "-o", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    found = Bench.from_dict(json.loads(out))
    assert found == Bench.from_dict(json.loads((tmp_path / "b.json").read_text()))
    assert found.model == "mlp"
    assert [t.sparsity for t in found.timings if t.runtime == ENGINE] == [0.0, 0.9]
    assert (tmp_path / "b.svg").read_text().startswith("<svg")
    assert "prunus: timing 2 runtimes" in err
    assert main(["bench", "mlp", "--plot", "b.svg"]) == 2
    assert "--sparsity" in capsys.readouterr().err
