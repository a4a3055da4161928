"""Reference networks: shapes, gradients, parameter counts, seeds, checkpoints, doors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.data.load import load
from prunus.errors import DataDamaged, DataMissing, InvalidValue, MissingExtra, UnknownName
from prunus.models.checkpoints import IMAGENET_MEAN, IMAGENET_STD, load_foreign
from prunus.models.create import create, seeded
from prunus.models.recurrent import LanguageModel
from prunus.models.registry import MODELS
from prunus.models.resnet import BasicBlock, PadShortcut
from prunus.models.vit import Attention


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def batch(family: str, shape: tuple[int, ...], n: int = 2) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    if family == "language":
        return torch.randint(0, 10, (n, *shape), generator=draws)
    return torch.randn(n, *shape, generator=draws)


def forward_and_backward(name: str, shape: tuple[int, ...]) -> None:
    entry = MODELS.entry(name)
    model = create(name, input_shape=shape)
    out = model(batch(entry.family, shape))
    assert out.shape == ((2, *shape, 10) if entry.family == "language" else (2, 10))
    out.square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert bool(torch.isfinite(parameter.grad).all()), path


# Networks that take seconds at their own size on one core; the fast suite runs them on 8x8 images.
LARGE = ("resnet44", "resnet56", "resnet110", "resnet18", "wrn")


@pytest.mark.parametrize("name", MODELS.names())
def test_forward_and_backward(name: str) -> None:
    forward_and_backward(name, (3, 8, 8) if name in LARGE else MODELS.entry(name).input_shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_forward_and_backward_at_full_size(name: str) -> None:
    forward_and_backward(name, MODELS.entry(name).input_shape)


@pytest.mark.parametrize("name", [n for n in MODELS.names() if n not in LARGE])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = create(name, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second, other = create(name, seed=1).state_dict(), create(name, seed=2).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_the_global_state_comes_back_after_an_error() -> None:
    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError), seeded(0):
        torch.rand(3).view(2, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("lenet", {}, 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
        ("lenet5", {}, 61_706),
        ("mlp", {"hidden": (5, 4), "input_shape": (1, 2, 3)}, 6 * 5 + 5 + 5 * 4 + 4 + 4 * 10 + 10),
        ("mlp", {"hidden": (), "input_shape": (7,)}, 7 * 10 + 10),
        ("resnet20", {}, 269_722),
        ("resnet32", {}, 464_154),
        ("resnet44", {}, 658_586),
        ("resnet56", {}, 853_018),
        ("resnet110", {}, 1_727_962),
        # Shortcut B adds two 1x1 convolutions with batch norm.
        ("resnet20", {"shortcut": "B"}, 269_722 + 16 * 32 + 64 + 32 * 64 + 128),
        ("resnet18", {}, 11_173_962),
        ("wrn", {}, 2_748_890),
        ("wrn", {"depth": 10, "width": 1}, 77_850),
    ],
)
def test_parameter_counts(name: str, options: dict, count: int) -> None:
    assert parameters(create(name, **options)) == count


def test_shortcut_a_is_subsampling_and_zeros() -> None:
    x = batch("cnn", (4, 6, 6))
    y = PadShortcut(1, 3, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 1:5], x[:, :, ::2, ::2])
    assert not bool(y[:, :1].any())
    assert not bool(y[:, 5:].any())


def test_block_with_dead_branch_is_its_shortcut() -> None:
    block = BasicBlock(4, 8, 2, "A").eval()
    nn.init.zeros_(block.bn2.weight)
    x = batch("cnn", (4, 6, 6))
    assert torch.equal(block(x), F.relu(block.shortcut(x)))


def test_attention_against_the_written_formula() -> None:
    torch.manual_seed(0)
    attention = Attention(12, 3, 4)
    x = torch.randn(2, 5, 12)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg-small", "resnet20", "vit", "gru", "lstm"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 28, 28)])
def test_other_images(name: str, shape: tuple[int, ...]) -> None:
    options = {"patch": 4} if name == "vit" else {}
    assert create(name, num_classes=3, input_shape=shape, **options)(batch("cnn", shape)).shape == (2, 3)


def test_a_sequence_classifier_reads_rows() -> None:
    model = create("lstm", input_shape=(2, 5, 3), hidden=4)
    x = batch("cnn", (2, 5, 3))
    rows = torch.stack([x[:, :, t].reshape(2, 6) for t in range(5)], dim=1)
    states, _ = model.recurrent(rows)
    assert torch.equal(model(x), model.linear(states[:, -1]))
    assert create("gru", input_shape=(5, 3))(batch("x", (5, 3))).shape == (2, 10)
    assert create("rnn", input_shape=(5,))(batch("x", (5,))).shape == (2, 10)


@pytest.mark.parametrize("name", ["lstm-lm", "gru-lm"])
def test_language_model(name: str) -> None:
    model = create(name, num_classes=50, hidden=16, embedding=16, layers=2, tied=True)
    assert isinstance(model, LanguageModel)
    assert model.head.weight is model.embedding.weight
    assert parameters(create(name, num_classes=50, hidden=16, embedding=16, layers=2)) - parameters(model) == 50 * 16
    tokens = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    whole = model(tokens)
    start, state = model.step(tokens[:, :5])
    rest, _ = model.step(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat([start, rest], 1), whole, rtol=1e-5, atol=1e-6)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    assert torch.equal(model(changed)[:, :5], whole[:, :5])


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("resnet21", {}, UnknownName),
        ("resnet20", {"widht": 8}, UnknownName),
        ("resnet20", {"shortcut": "C"}, UnknownName),
        ("tim/resnet18", {}, UnknownName),
        ("resnet20", {"width": 0}, InvalidValue),
        ("resnet20", {"input_shape": (64,)}, InvalidValue),
        ("resnet20", {"num_classes": 0}, InvalidValue),
        ("mlp", {"hidden": (3, 0)}, InvalidValue),
        ("lenet5", {"input_shape": (1, 8, 8)}, InvalidValue),
        ("wrn", {"depth": 18}, InvalidValue),
        ("vgg-small", {"width": 0}, InvalidValue),
        ("vit", {"patch": 5}, InvalidValue),
        ("vit", {"heads": 3}, InvalidValue),
        ("gru", {"dropout": 0.5}, InvalidValue),
        ("gru", {"hidden": 0}, InvalidValue),
        ("gru", {"input_shape": (1, 2, 3, 4)}, InvalidValue),
        ("gru-lm", {"tied": True, "hidden": 64}, InvalidValue),
        ("gru-lm", {"input_shape": (1, 28, 28)}, InvalidValue),
    ],
)
def test_refusals(name: str, options: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        create(name, **options)


def test_suggestions() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'width'"):
        create("resnet20", widht=8)
    with pytest.raises(UnknownName, match="resnet20"):
        create("resnet21")


def small() -> nn.Module:
    return create("mlp", input_shape=(4,), hidden=(3,), num_classes=2, seed=9)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
)
def test_foreign_checkpoints(wrap: Callable[[dict], dict], tmp_path: Path) -> None:
    source = small().state_dict()
    torch.save(wrap(source), tmp_path / "w.pt")
    model = load_foreign(create("mlp", input_shape=(4,), hidden=(3,), num_classes=2), tmp_path / "w.pt")
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())


def test_foreign_safetensors_and_renaming(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = {
        k.replace("layers.0", "body.first").replace("layers.2", "top"): v for k, v in small().state_dict().items()
    }
    save_file(source, tmp_path / "w.safetensors")
    model = create("mlp", input_shape=(4,), hidden=(3,), num_classes=2)
    load_foreign(
        model, tmp_path / "w.safetensors", rename={"body": "nowhere", "body.first": "layers.0", "top": "layers.2"}
    )
    assert torch.equal(model.state_dict()["layers.0.weight"], source["body.first.weight"])


def test_foreign_misfits_change_nothing(tmp_path: Path) -> None:
    model = create("mlp", input_shape=(4,), hidden=(3,), num_classes=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    source = small().state_dict()
    cases = [
        ({k: v for k, v in source.items() if k != "layers.2.bias"}, r"missing layers\.2\.bias"),
        ({**source, "extra": torch.zeros(1)}, "unexpected extra"),
        ({**source, "layers.2.bias": torch.zeros(5)}, r"layers\.2\.bias \(5,\) instead of \(2,\)"),
    ]
    for state, words in cases:
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(InvalidValue, match=words):
            load_foreign(model, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with pytest.raises(DataMissing):
        load_foreign(small(), path)
    torch.save(small().state_dict(), path)
    whole = path.read_bytes()
    torch.save(small(), path)
    module = path.read_bytes()
    torch.save({"a": 3}, path)
    numbers = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], module, numbers):
        path.write_bytes(content)
        with pytest.raises(DataDamaged, match=r"w\.pt"):
            load_foreign(small(), path)


def run_alone(code: str) -> None:
    """Run code in a fresh interpreter with warnings as errors: imports of large collections leave traces."""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_torchvision_repair_is_idempotent_and_leaves_the_healthy_alone() -> None:
    pytest.importorskip("PIL")
    if not _installed("torchvision"):
        pytest.skip("torchvision is not installed")
    run_alone(
        "from prunus.models.vision_repair import repair_torchvision as repair\n"
        "first = repair(); assert repair() == first\n"
        "import torchvision, torchvision.transforms.v2\n"
        "assert repair() == first\n"
        "import torch; assert hasattr(torch.ops.torchvision, 'nms')\n"
        # A torchvision that loads its own extension must not have been touched.
        "assert first != torchvision.extension._has_ops()\n"
    )


@pytest.mark.slow
def test_repair_without_torchvision() -> None:
    run_alone(
        "import importlib.util\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from prunus.models.vision_repair import repair_torchvision\n"
        "assert repair_torchvision() is False\n"
        "import torch; assert not hasattr(torch.ops.torchvision, 'nms')\n"
    )


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


@pytest.mark.slow
def test_doors() -> None:
    for name in ("timm", "torchvision", "transformers"):
        if not _installed(name):
            pytest.skip(f"{name} is not installed")
    tiny = "dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32"
    run_alone(
        "import torch\n"
        "from prunus.models.create import create\n"
        "from prunus.errors import InvalidValue, UnknownName, Unsupported\n"
        "def check(shape, x, name, **options):\n"
        "    state = torch.random.get_rng_state()\n"
        "    a, b = create(name, seed=1, **options), create(name, seed=1, **options)\n"
        "    assert torch.equal(torch.random.get_rng_state(), state)\n"
        "    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))\n"
        "    out = a.eval()(x); out = getattr(out, 'logits', out)\n"
        "    assert out.shape == shape, out.shape\n"
        "small = torch.randn(2, 3, 32, 32)\n"
        "check((2, 7), small[:, :1], 'timm/resnet10t', num_classes=7, input_shape=(1, 32, 32))\n"
        "check((2, 7), small, 'timm/vit_tiny_patch16_224', num_classes=7, input_shape=(3, 32, 32), depth=1)\n"
        "check((2, 7), small, 'torchvision/squeezenet1_1', num_classes=7)\n"
        "tokens = torch.randint(0, 50, (2, 6))\n"
        f"check((2, 3), tokens, 'transformers/bert', num_classes=3, config={tiny}, vocab_size=50))\n"
        f"check((2, 6, 50), tokens, 'transformers/gpt_neox', task='causal-lm', config={tiny}, vocab_size=50))\n"
        f"check((2, 5), small, 'transformers/vit', num_classes=5, task='image-classification',\n"
        f"      input_shape=(3, 32, 32), config={tiny}, patch_size=8))\n"
        "def refuse(error, name, **options):\n"
        "    try:\n"
        "        create(name, **options)\n"
        "    except error:\n"
        "        return\n"
        "    raise AssertionError(name)\n"
        "refuse(UnknownName, 'timm/resnet19')\n"
        "refuse(UnknownName, 'torchvision/resnet19')\n"
        "refuse(UnknownName, 'transformers/bort')\n"
        "refuse(UnknownName, 'transformers/bert', config={'hidden_sise': 3})\n"
        "refuse(UnknownName, 'transformers/bert', task='causal')\n"
        "refuse(UnknownName, 'transformers/bert', hidden=3)\n"
        "refuse(InvalidValue, 'timm/resnet18', foo=3)\n"
        "refuse(InvalidValue, 'torchvision/resnet18', foo=3)\n"
        "refuse(InvalidValue, 'timm/resnet18', input_shape=(64,))\n"
        "refuse(InvalidValue, 'transformers/llama', task='image-classification')\n"
        "refuse(Unsupported, 'torchvision/resnet18', input_shape=(1, 32, 32))\n"
    )


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18", "transformers/bert"])
def test_doors_without_their_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunus.models.doors.repair_torchvision", lambda: False)
    monkeypatch.setitem(sys.modules, name.split("/")[0], None)
    with pytest.raises(MissingExtra, match="pip install"):
        create(name)


def checkpoint(name: str) -> Path:
    """Return the path of a published checkpoint, or skip."""
    data = os.environ.get("PRUNUS_DATA")
    folder = os.environ.get("PRUNUS_CHECKPOINTS") or (f"{data}/checkpoints" if data else None)
    if folder is None or not data:
        pytest.skip("PRUNUS_DATA (and PRUNUS_CHECKPOINTS) must point to the data and the published checkpoints")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"no checkpoint {path}; set PRUNUS_CHECKPOINTS to its folder")
    return path


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor, prepare: Callable[[Tensor], Tensor]) -> int:
    model.eval()
    parts = zip(x.split(500), y.split(500), strict=True)
    return sum(int((model(prepare(a)).argmax(1) == b).sum()) for a, b in parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [("resnet20", "cifar10_resnet20-12fca82f.th", 9173), ("resnet56", "cifar10_resnet56-4bfd9763.th", 9339)],
)
def test_published_residual_networks(name: str, file: str, expected: int) -> None:
    model = load_foreign(create(name), checkpoint(file))
    test = load("cifar10").test.normalised_by(IMAGENET_MEAN, IMAGENET_STD)
    # One image may fall to either side when convolutions are summed in another order.
    assert abs(correct(model, test.x, test.y, test.normalise) - expected) <= 2


@pytest.mark.slow
def test_published_lenet5() -> None:
    rename = {
        "convnet.c1": "conv1",
        "convnet.c3": "conv2",
        "convnet.c5": "conv3",
        "fc.f6": "linear1",
        "fc.f7": "linear2",
    }
    model = load_foreign(create("lenet5", input_shape=(1, 32, 32)), checkpoint("mnist_lenet5.pth"), rename=rename)
    test = load("mnist").test
    got = correct(model, test.x, test.y, lambda x: F.interpolate(x / 255, size=(32, 32), mode="bilinear"))
    assert abs(got - 9908) <= 2
