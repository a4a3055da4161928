"""`prunus.export`: each form, read back by what it is for, gives what the pruned model gives."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus.cli import main
from prunus.errors import InvalidValue, MissingExtra, StorageFailed, UnknownName, Unsupported
from prunus.runtime.library import why_not
from prunus.runtime.package import load as load_package

needs_engine = pytest.mark.skipif(bool(why_not()), reason=f"no native engine: {why_not()}")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxruntime", "onnxscript")), reason="no onnx"
)
torchs_own = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")
# torch copies its graphs, and its exporter calls itself, in ways that warn.


class Net(nn.Module):
    """Tied weights, a norm, a number that the module remembers, a buffer that is not saved."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.next = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 8)
        self.again = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)
        self.last.weight = self.again.weight
        self.register_buffer("scale", torch.ones(width, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)) * self.scale)
        x = torch.relu(self.next(x)).reshape(x.shape[0], self.width, -1).mean(-1)
        return self.last(torch.relu(self.again(torch.relu(self.head(x)))))


class Plain(nn.Module):
    """What the engine computes whole, with two inputs and two outputs in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 20)

    def forward(self, late: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.one(x))
        return {"sum": self.two(hidden) + late, "hidden": hidden}


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def masked(image: torch.Tensor) -> Any:
    return prunus.prune(net(), 0.8, measure=False)


@pytest.fixture(scope="module")
def small(image: torch.Tensor) -> Any:
    return prunus.prune(net(), 0.5, unit="channel", example=image, measure=False)


def answer(model: nn.Module, *inputs: Any, **named: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(*inputs, **named)


def loader(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- safetensors --


@pytest.mark.parametrize("kind", ["masked", "small"])
def test_load_py_fills_a_fresh_instance(kind: str, request: Any, image: torch.Tensor, tmp_path: Path) -> None:
    out = request.getfixturevalue(kind)
    made = prunus.export(out, tmp_path / "net")
    assert made.difference == 0
    assert set(made.files) == {"model.safetensors", "config.json", "load.py"}
    assert made.bytes == sum(p.stat().st_size for p in (tmp_path / "net").iterdir())
    torch.manual_seed(7)
    fresh = loader(tmp_path / "net").load(Net())
    assert torch.equal(answer(fresh, image), answer(out.model, image))
    assert fresh.again.weight is fresh.last.weight
    assert sum(p.numel() for p in fresh.parameters()) == sum(p.numel() for p in out.model.parameters())
    fresh.train()(image).sum().backward()
    assert all(p.grad is not None for p in fresh.parameters())


def test_masked_weights_are_a_plain_dense_state(masked: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    prunus.export(masked, tmp_path / "net", format="safetensors")
    state = load_file(tmp_path / "net" / "model.safetensors")
    fresh = Net()
    left = fresh.load_state_dict(state, strict=False)
    assert left.missing_keys == ["last.weight"]  # the tied one, which config.json names
    assert not left.unexpected_keys
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["aliases"] == {"last.weight": "again.weight"}
    assert not config["needs_prunus"]
    kept = sum(int(torch.count_nonzero(t)) for t in state.values())
    assert config["nonzero"] == kept < config["entries"]


def test_a_small_model_says_its_sizes_without_its_plan(small: Any, image: torch.Tensor, tmp_path: Path) -> None:
    model = small.model
    kept = model.conv.out_channels
    assert kept < 16
    with_plan = prunus.export(small, tmp_path / "plan")
    prunus.export(small, tmp_path / "again")
    assert with_plan.files["model.safetensors"] == (tmp_path / "again" / "model.safetensors").stat().st_size
    fresh = loader(tmp_path / "plan").load(Net())
    assert (fresh.conv.out_channels, fresh.norm.num_features, fresh.width) == (kept, kept, small.model.width)
    assert fresh.scale.shape == small.model.scale.shape


FRESH_PROCESS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "prunus":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
from load import load

model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten())
torch.save(load(model).eval()(torch.ones(1, 3, 8, 8)), sys.argv[2])
"""


def test_load_py_needs_no_prunus(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten())
    x = torch.ones(1, 3, 8, 8)
    out = prunus.prune(model, 0.5, unit="channel", example=x, measure=False)
    prunus.export(out, tmp_path / "net")
    words = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path / "net"), str(tmp_path / "y.pt")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), answer(out.model, x))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_cut_that_changes_how_a_module_computes_needs_the_plan(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 32)
    out = prunus.prune(Attending(), 0.5, unit="head", example=x, measure=False)
    with pytest.raises(Unsupported, match=r"instead of its \.model|the plan"):
        prunus.export(out.model, tmp_path / "net")
    assert not list(tmp_path.iterdir())
    prunus.export(out, tmp_path / "net")
    assert json.loads((tmp_path / "net" / "config.json").read_text())["needs_prunus"]
    fresh = loader(tmp_path / "net").load(Attending())
    torch.testing.assert_close(answer(fresh, x), answer(out.model, x))


def test_load_py_refuses_other_models_and_damaged_files(small: Any, tmp_path: Path) -> None:
    prunus.export(small, tmp_path / "net")
    module = loader(tmp_path / "net")
    with pytest.raises(ValueError, match="no fresh"):
        module.load(nn.Linear(2, 2))
    weights = tmp_path / "net" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="restore"):
        module.load(Net())


# -- graphs --


@torchs_own
@pytest.mark.parametrize("kind", ["masked", "small"])
def test_pt2_gives_the_same_for_any_batch(kind: str, request: Any, image: torch.Tensor, tmp_path: Path) -> None:
    out = request.getfixturevalue(kind)
    made = prunus.export(out, tmp_path / "net.pt2", format="pt2", example=image[:1])
    assert made.difference < 1e-6
    assert made.batch is None
    again = torch.export.load(tmp_path / "net.pt2").module()
    x = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(again(x), answer(out.model, x), rtol=1e-5, atol=1e-6)


class Fixed(nn.Linear):
    """Its code fixes the batch size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).reshape(len(x), -1)


@torchs_own
@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_size_that_the_code_fixes_is_said(batch: int, tmp_path: Path) -> None:
    x = torch.randn(batch, 6)
    made = prunus.export(Fixed(6, 4), tmp_path / "net.pt2", format="pt2", example=x)
    assert made.batch == batch
    assert torch.export.load(tmp_path / "net.pt2").module()(x).shape == (batch, 4)


@needs_onnx
@torchs_own
def test_onnx_gives_the_same_in_onnxruntime_for_any_batch(small: Any, image: torch.Tensor, tmp_path: Path) -> None:
    import onnxruntime

    made = prunus.export(small, tmp_path / "net.onnx", format="onnx", example=image)
    assert made.difference < 1e-4
    assert made.batch is None
    assert list(made.files) == ["net.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 12, 12)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), answer(small.model, x), rtol=1e-4, atol=1e-5)


@needs_engine
def test_a_package_keeps_the_order_of_inputs_and_outputs(tmp_path: Path) -> None:
    out = prunus.prune(Plain(), 0.7, measure=False)
    late, x = torch.randn(6, 20), torch.randn(6, 12)
    made = prunus.export(out, tmp_path / "net.prunus", format="prunus", example=(late, x))
    assert made.difference < 1e-5
    runtime = load_package(tmp_path / "net.prunus")
    late, x = torch.randn(3, 20), torch.randn(3, 12)
    wanted = answer(out.model, late, x)
    got = runtime(late.numpy(), x.numpy())
    for a, b in zip(wanted.values(), got, strict=True):  # type: ignore[operator]
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-4, atol=1e-5)
    by_name = prunus.export(out, tmp_path / "named.prunus", format="prunus", example={"late": late, "x": x})
    assert by_name.difference < 1e-5


@needs_engine
@torchs_own
def test_a_compressed_model_is_a_package_or_says_why_not(image: torch.Tensor, tmp_path: Path) -> None:
    whole = prunus.prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), 0.5, measure=False).model
    fast = prunus.compress(whole, image, engine="always")
    made = prunus.export(fast, tmp_path / "net.prunus", format="prunus")
    assert made.dense_bytes == 4 * (8 * 27 + 4 * 72)
    assert fast.save(tmp_path / "same.prunus") == made.bytes
    assert (tmp_path / "same.prunus").read_bytes() == (tmp_path / "net.prunus").read_bytes()
    assert load_package(tmp_path / "net.prunus").chosen == bool(fast.inner.get_submodule("fused_0").pool.tuner.found)
    with pytest.raises(Unsupported, match="prunus"):
        prunus.export(fast, tmp_path / "net.pt2", format="pt2", example=image)
    mixed = prunus.compress(nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12)), image, engine="always", timing=False)
    with pytest.raises(Unsupported, match="layer_norm"):
        mixed.save(tmp_path / "mixed.prunus")
    with pytest.raises(Unsupported, match="layer_norm"):
        prunus.export(mixed, tmp_path / "mixed.prunus", format="prunus")
    assert {p.name for p in tmp_path.iterdir()} == {"net.prunus", "same.prunus"}


def test_what_torch_runs_for_want_of_an_engine_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunus.runtime.compress.why_not", lambda: "no compiler")
    fast = prunus.compress(nn.Linear(64, 64), torch.ones(2, 64))
    with pytest.raises(Unsupported, match="whole"):
        fast.save(tmp_path / "net.prunus")
    assert not list(tmp_path.iterdir())


def test_transformers_folders(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from prunus.models.create import create

    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
              "vocab_size": 50, "max_position_embeddings": 32}  # fmt: skip
    model = create("transformers/bert", config=config).eval()
    out = prunus.prune(model, 0.8, measure=False)
    made = prunus.export(out, tmp_path / "bert", format="hf")
    assert {"config.json", "model.safetensors"} <= set(made.files)
    again = type(model).from_pretrained(tmp_path / "bert", local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), out.model.parameters(), strict=True))
    x = {"input_ids": torch.randint(0, 50, (2, 7))}
    torch.testing.assert_close(answer(again, **x).logits, answer(out.model, **x).logits)
    small = prunus.prune(model, 0.5, unit="channel", example=x, measure=False)
    with pytest.raises(Unsupported, match="configuration"):
        prunus.export(small, tmp_path / "small", format="hf")
    assert not (tmp_path / "small").exists()


# -- refusals --


def test_what_cannot_be_exported_leaves_nothing_behind(
    masked: Any, image: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownName, match="onnx"):
        prunus.export(masked, tmp_path / "net", format="onxn")
    with pytest.raises(InvalidValue, match="example"):
        prunus.export(masked, tmp_path / "net.onnx", format="onnx")
    with pytest.raises(InvalidValue, match="torch module"):
        prunus.export({"weight": image}, tmp_path / "net")
    if importlib.util.find_spec("transformers") is not None:
        with pytest.raises(Unsupported, match="transformers models"):
            prunus.export(masked, tmp_path / "net", format="hf")
    with pytest.raises(InvalidValue, match="cannot run"):
        prunus.export(masked, tmp_path / "net.pt2", format="pt2", example=image[:, :1])
    with pytest.raises(StorageFailed, match="no/net"):
        prunus.export(masked, tmp_path / "no" / "net")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(InvalidValue, match="exists"):
        prunus.export(masked, tmp_path / "full")
    with pytest.raises(InvalidValue, match="is a folder"):
        prunus.export(masked, tmp_path / "full", format="pt2", example=image)
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine"]

    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in ("onnxruntime", "transformers"):
            raise ImportError(f"no {name}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'prunus\[export\]'"):
        prunus.export(masked, tmp_path / "net.onnx", format="onnx", example=image)
    with pytest.raises(MissingExtra, match=r"pip install 'prunus\[llm\]'"):
        prunus.export(masked, tmp_path / "net", format="hf")


def test_the_model_is_untouched_and_its_pruned_weights_are_zero_in_the_file(masked: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = masked.model
    spoiled = model.next.weight.detach().clone()
    with torch.no_grad():
        model.next.weight.add_(1.0)  # an optimizer that knew no masks
    moved = model.next.weight.detach().clone()
    model.train()
    prunus.export(masked, tmp_path / "net")
    written = load_file(tmp_path / "net" / "model.safetensors")["next.weight"]
    assert torch.equal(written, moved * masked.masks["next.weight"])
    assert torch.equal(model.next.weight, moved)
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        model.next.weight.copy_(spoiled)


# -- command line --


def test_the_command_line_exports_a_small_model_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prunus.models.create import create

    x = torch.randn(1, 3, 32, 32)
    out = prunus.prune(create("resnet20"), 0.5, unit="channel", example=x, measure=False)
    out.save(tmp_path / "small.safetensors")
    words = [
        "export",
        "resnet20",
        "--weights",
        str(tmp_path / "small.safetensors"),
        "-o",
        str(tmp_path / "net"),
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "safetensors"
    assert found["bytes"] == sum(found["files"].values())
    fresh = loader(tmp_path / "net").load(create("resnet20", seed=3))
    torch.testing.assert_close(answer(fresh, x), answer(out.model, x))


@torchs_own
def test_the_command_line_takes_a_function_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mynets.py").write_text("from torch import nn\n\ndef net(width):\n    return nn.Linear(6, width)\n")
    words = ["export", "mynets:net", "--option", "width=4", "--format", "pt2", "-o", "net.pt2"]
    assert main(words) == 2
    assert "--shape" in capsys.readouterr().err
    assert main([*words, "--shape", "6"]) == 0
    assert torch.export.load("net.pt2").module()(torch.ones(3, 6)).shape == (3, 4)
    np.savez("inputs.npz", input=np.ones((2, 6), np.float32))
    assert main([*words, "--inputs", "inputs.npz"]) == 0


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom prunus.cli import main\n"
        "try:\n    main(['export', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("safetensors", "onnx", "pt2", "hf", "prunus"):
        assert word in done.stdout


@needs_engine
def test_verify_knows_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.prunus"
    prunus.compress(nn.Linear(6, 4), torch.ones(2, 6), engine="always", timing=False).save(path)
    assert main(["verify", str(path)]) == 0
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(path)]) == 5
    assert "hash" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["export", "resnet20"], "-o"),
        (["export", "resnet2", "-o", "x"], "resnet20"),
        (["export", "resnet20", "-o", "x", "--format", "onxn"], "onnx"),
        (["export", "resnet20", "-o", "x", "--option", "width"], "NAME=VALUE"),
        (["export", "resnet20", "-o", "x", "--shape", "3,0"], "--shape"),
        (["export", "resnet20", "-o", "x", "--weights", "none.safetensors"], "none.safetensors"),
        (["export", "nomodule:net", "-o", "x"], "module:function"),
        (["export", "prunus.errors:did_you_mean", "-o", "x", "--option", "name=a", "--option", "known=[]"], "str"),
    ],
)
def test_bad_usage_says_what_to_do(
    words: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as stopped:
        code = int(str(stopped.code))
    assert code == 2
    assert hint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
