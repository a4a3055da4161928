"""Pruned networks in other people's hands: ONNX export, compilers, DistributedDataParallel, deepcopy, torch.save."""

from __future__ import annotations

import copy
import io
import os
import socket
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus


class Spelled(nn.Module):
    """Attention whose output size is computed from the input, which is not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out, self.last = (nn.Linear(a, b) for a, b in ((6, 12), (12, 36), (12, 12), (12, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        return self.last(x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))).mean(1)


class Normed(nn.Module):
    """A residual stream under layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.norm, self.end = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.last(self.end(x)).mean(1)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 24, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


EXAMPLE = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sizes spelled in code": (Spelled, {}),
    "counted norms": (Normed, {"norms": "counted"}),
    "torch's own encoder": (encoder, {}),
}


def pruned(name: str) -> nn.Module:
    make, options = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    out = prunus.prune(model, 0.5, unit="channel", example=EXAMPLE, measure=False, **options)
    assert not out.report.blocked
    assert out.report.macs_removed > 0.2
    assert out.report.difference < 1e-5
    return out.model.eval()


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_network_is_copied_and_saved_whole(name: str):
    model = pruned(name)
    expected = model(EXAMPLE)
    assert torch.equal(copy.deepcopy(model)(EXAMPLE), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(EXAMPLE), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_network_compiles_and_exports(name: str):
    model = pruned(name)
    expected = model(EXAMPLE)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(EXAMPLE), expected, rtol=1e-5, atol=1e-6)
    program = torch.export.export(model, (EXAMPLE,), strict=False)
    torch.testing.assert_close(program.module()(EXAMPLE), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_pruned_network_goes_to_onnx(name: str, tmp_path: Any):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = pruned(name)
    path = tmp_path / "small.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (EXAMPLE,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: EXAMPLE.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(EXAMPLE).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_network_trains_under_ddp(name: str, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        model = pruned(name).train()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        wrapped(EXAMPLE).square().mean().backward()
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        again = prunus.prune(wrapped.eval(), 0.25, unit="channel", example=EXAMPLE, measure=False)
        assert not isinstance(again.model, nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    assert os.environ["MASTER_PORT"] == str(port)
