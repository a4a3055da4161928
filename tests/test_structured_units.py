"""Residual blocks and experts as units of `prunus.prune`: hand-made networks, transformers' mixtures, and refusals."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import prunus
from graph_checks import numbers, outputs, scrambled
from prunus.errors import Infeasible, InvalidValue, NothingPrunable, Unsupported
from prunus.graph.plan import Plan
from prunus.measure.cost import dense_bytes
from prunus.structured import depth, experts
from prunus.structured.mixtures import mixtures, plan_for
from prunus.structured.registry import UNIT_SCORES
from prunus.structured.timing import Stopwatch

NOW = [0.0]


# -- layers ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + a scaled MLP of the norm of x; takes a mask as transformer blocks do."""

    def __init__(self, scale: float, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, hidden)
        self.down = nn.Linear(hidden, 6)
        with torch.no_grad():
            self.down.weight *= scale
            self.up.weight *= scale

    def forward(self, x, mask=None, scale=1.0):
        NOW[0] += 1.0
        y = self.down(self.up(self.norm(x)).relu()) * scale
        return x + (y if mask is None else y * mask)


class Tower(nn.Module):
    """Four blocks of rising weight between two linear layers."""

    def __init__(self, hidden=(8, 8, 8, 8), masked=True):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block(0.5 + i, h) for i, h in enumerate(hidden))
        self.leave = nn.Linear(6, 3)
        self.masked = masked

    def forward(self, x):
        x = self.enter(x)
        mask = torch.ones_like(x[..., :1]) if self.masked else None
        for block in self.blocks:
            x = block(x, mask=mask, scale=0.7)
        return self.leave(x)


X = numbers(4, 5)


def layers(model, sparsity=None, **options):
    options.setdefault("measure", False)
    return prunus.prune(model, sparsity, unit="layer", example=X, **options)


def test_the_weakest_blocks_go(tmp_path):
    model = Tower()
    out = layers(model, 0.5)
    assert out.plan.removed_modules == ["blocks.0", "blocks.1"]
    off = Tower()
    with torch.no_grad():
        for p in (*off.blocks[0].parameters(), *off.blocks[1].parameters()):
            p.zero_()
    torch.testing.assert_close(outputs(out.model, X)[0], outputs(off, X)[0])
    assert out.report.difference < 1e-6
    assert out.plan.verify(model, X) == 0.0
    assert out.report.achieved == 0.5
    assert (out.report.units, out.report.units_kept) == (4, 2)
    assert out.report.bytes == dense_bytes(out.model) < out.report.dense_bytes
    assert len(model.blocks[0].up.weight) == 8
    out.save(tmp_path / "shallow.safetensors")
    loaded = prunus.load(tmp_path / "shallow.safetensors", Tower())
    assert torch.equal(outputs(loaded, X)[0], outputs(out.model, X)[0])
    assert Plan.from_dict(out.plan.to_dict()) == out.plan


@pytest.mark.parametrize("what", ["macs", "params", "bytes"])
def test_layers_to_a_target(what):
    """Equal blocks of 96 multiply-accumulates, so how many must go can be counted by hand."""
    model = Tower()
    whole = {
        "macs": 4 * 96 + 30 + 18,
        "params": sum(p.numel() for p in model.parameters()),
        "bytes": dense_bytes(model),
    }
    each = {"macs": 96, "params": 12 + 56 + 54, "bytes": 4 * (12 + 56 + 54)}
    for blocks in (1, 2, 3):
        out = layers(model, **{what: int(whole[what] - blocks * each[what])})
        assert out.plan.removed_modules == [f"blocks.{i}" for i in range(blocks)]
        assert out.report.achieved == whole[what] - blocks * each[what]
    with pytest.raises(Infeasible, match=what):
        layers(model, **{what: int(whole[what] - 4 * each[what])})


def test_layers_to_a_latency(monkeypatch):
    monkeypatch.setattr(depth, "Stopwatch", functools.partial(Stopwatch, clock=lambda: NOW[0], rounds=1))
    out = layers(Tower(), latency=0.75)
    assert out.plan.removed_modules == ["blocks.0"]
    assert out.report.achieved == pytest.approx(0.75)
    out = layers(Tower(), latency=0.6)
    assert len(out.plan.removed_modules) == 2
    assert any("0.5 reached" in n for n in out.report.notes)


def test_layers_respect_limits():
    assert layers(Tower(), 0.5, protect="blocks.0").plan.removed_modules == ["blocks.1", "blocks.2"]
    assert layers(Tower(), 0.9, minimum=3).plan.removed_modules == ["blocks.0"]
    assert len(layers(Tower(), 0.3, round_to=2).plan.removed_modules) == 2
    with pytest.raises(InvalidValue, match=r"blocks\.1"):
        layers(Tower(), 0.5, protect="blocs.1")
    with pytest.raises(NothingPrunable, match="protect"):
        layers(Tower(), 0.5, protect="blocks.*")


@pytest.mark.parametrize("score", [i.name for i in UNIT_SCORES if "layer" in i.units] + ["random", "snip", "l1"])
def test_every_score_of_blocks(score):
    data = [(numbers(12, 5, seed=s), torch.arange(12) % 3) for s in range(2)]
    if score == "hrank":
        with pytest.raises(InvalidValue, match="feature maps"):
            layers(Tower(), 0.5, score=score, data=data)
        return
    assert len(layers(Tower(), 0.5, score=score, data=data).plan.removed_modules) == 2


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"score": "fpgm"}, InvalidValue, "channel"),
        ({"norms": "counted"}, InvalidValue, "norms"),
        ({"compensate": "obspa"}, InvalidValue, "compensate"),
        ({"scope": "global"}, InvalidValue, "scope"),
        ({"score": "expect-abs"}, InvalidValue, "data"),
    ],
)
def test_what_layers_do_not_take(options, error, text):
    with pytest.raises(error, match=text):
        layers(Tower(), 0.5, **options)


def test_networks_without_residual_blocks():
    with pytest.raises(NothingPrunable, match="residual"):
        layers(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)), 0.5)
    with torch.device("meta"), pytest.raises(Unsupported, match="load"):
        layers(Tower(), 0.5)


# -- experts ---------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Experts as stacked matrices; the output of each chosen one is weighted."""

    def __init__(self, count: int, features: int, hidden: int):
        super().__init__()
        self.n_experts, self.size = count, count
        self.up = nn.Parameter(torch.randn(count, hidden, features))
        self.down = nn.Parameter(torch.randn(count, features, hidden))
        self.shift = nn.Parameter(torch.randn(count, features))

    def forward(self, x, index, weight):
        assert int(index.max()) < self.n_experts
        assert self.size == 6, "not a number of experts, though equal to it"
        up, down, shift = self.up[index], self.down[index], self.shift[index]
        y = torch.einsum("tkfh,tkh->tkf", down, torch.einsum("tkhf,tf->tkh", up, x).relu()) + shift
        return (y * weight[..., None]).sum(1)


class Mixed(nn.Module):
    """A mixture after a linear layer of as many outputs as there are experts, with a router of one of three kinds."""

    def __init__(self, kind: str = "linear", count: int = 6, top: int = 2):
        super().__init__()
        self.kind, self.top = kind, top
        self.enter = nn.Linear(count, count)
        self.router = nn.Linear(count, count, bias=kind != "correction")
        self.register_buffer("unused", torch.zeros(count))
        if kind == "correction":
            self.router.register_buffer("correction", torch.randn(count))
        self.experts = Stack(count, count, 4)

    def forward(self, x):
        x = self.enter(x)
        logits = self.router(x)
        if self.kind == "dense":
            index = torch.arange(len(logits[0])).expand(len(x), -1)
            return x + self.experts(x, index, logits.softmax(-1))
        scores = logits.sigmoid() if self.kind == "correction" else logits.softmax(-1)
        index = (scores + self.router.correction if self.kind == "correction" else scores).topk(self.top, -1)[1]
        weight = scores.gather(-1, index)
        return x + self.experts(x, index, weight / weight.sum(-1, keepdim=True))


E = numbers(16, 6)


def mixed(kind: str = "linear", **options) -> Mixed:
    return scrambled(Mixed(kind, **options))


def cut(model, sparsity=None, example=E, **options):
    options.setdefault("measure", False)
    return prunus.prune(model, sparsity, unit="expert", example=example, **options)


@pytest.mark.parametrize("kind", ["linear", "correction"])
def test_experts_go_with_their_rows_of_the_router(kind, tmp_path):
    model = mixed(kind)
    found, refused = mixtures(model, E)
    assert refused == {}
    assert len(found) == 1
    assert (found[0].count, found[0].chosen, found[0].router) == (6, 2, "router.weight")
    assert set(found[0].beside) == ({"router.correction"} if kind == "correction" else {"router.bias"})
    out = cut(model, 0.5)
    assert out.report.difference < 1e-5
    assert out.report.blocked == {}
    kept = out.plan.families["experts.up:0"]
    assert len(kept) == 3
    assert torch.equal(out.model.experts.down, model.experts.down[kept])
    assert torch.equal(out.model.router.weight, model.router.weight[kept])
    assert out.model.router.out_features == out.model.experts.n_experts == 3
    assert out.model.experts.size == 6
    assert out.model.enter.weight.shape == (6, 6)
    out.save(tmp_path / "few.safetensors")
    loaded = prunus.load(tmp_path / "few.safetensors", mixed(kind))
    assert torch.equal(outputs(loaded, E)[0], outputs(out.model, E)[0])
    assert Plan.from_dict(out.plan.to_dict()) == out.plan


def test_masked_experts_are_never_chosen():
    """The masked model, computed by hand: the logits of the removed experts are minus infinity."""
    model = mixed()
    found, _ = mixtures(model, E)
    plan = plan_for(model, found, {"experts.up:0": [0, 2, 5]})
    with torch.no_grad():
        x = model.enter(E)
        logits = model.router(x)
        logits[:, [1, 3, 4]] = -torch.inf
        weight, index = logits.softmax(-1).topk(2, -1)
        want = x + model.experts(x, index, weight / weight.sum(-1, keepdim=True))
        torch.testing.assert_close(outputs(plan.mask(model), E)[0], want)
        assert float((outputs(model, E)[0] - want).abs().max()) > 1e-2
    torch.testing.assert_close(outputs(plan.apply(model), E)[0], want)
    # A negative control: rows at zero instead are another function, where other logits are negative.
    with torch.no_grad():
        model.router.bias.fill_(-5.0)
    assert plan.verify(model, E) < 1e-6
    zeroed = Plan(plan.keep, plan.shapes, plan.attributes, families=plan.families)
    assert zeroed.verify(model, E) > 1e-3
    assert plan.then(Plan()).routers == plan.routers


def test_the_weakest_experts_go_and_limits_hold():
    model = mixed()
    with torch.no_grad():
        for name in ("up", "down", "shift"):
            getattr(model.experts, name)[[1, 4]] *= 0.01
    assert cut(model, 0.34).plan.families["experts.up:0"] == [0, 2, 3, 5]
    assert cut(model, 0.5, protect="router.*").report.units_kept == 6
    assert cut(model, 0.6, minimum=5, scope="global").report.units_kept == 5
    assert cut(model, 0.5, round_to=2).report.units_kept == 2
    with pytest.raises(Infeasible, match="each token visits 2"):
        cut(model, 0.8)
    with pytest.raises(InvalidValue, match="router"):
        cut(model, 0.5, protect="rooter.*")


@pytest.mark.parametrize("what", ["params", "bytes"])
def test_experts_to_a_target(what):
    model = mixed()
    each = (6 * 4 + 4 * 6 + 6 + 6 + 1) * (4 if what == "bytes" else 1)
    whole = dense_bytes(model) if what == "bytes" else sum(p.numel() for p in model.parameters())
    out = cut(model, **{what: whole - 3 * each})
    assert out.report.units_kept == 3
    assert out.report.achieved == whole - 3 * each
    with pytest.raises(Infeasible, match=what):
        cut(model, **{what: whole - 5 * each})


def test_experts_to_a_latency(monkeypatch):
    monkeypatch.setattr(experts, "Stopwatch", functools.partial(Stopwatch, clock=lambda: NOW[0], rounds=1))
    forward = Stack.forward

    def slow(self, *args):
        NOW[0] += len(self.up)
        return forward(self, *args)

    monkeypatch.setattr(Stack, "forward", slow)
    assert cut(mixed(), latency=0.67).report.units_kept == 4
    with pytest.raises(Infeasible, match="floor"):
        cut(mixed(), latency=0.3)


@pytest.mark.parametrize("score", ["fpgm", "lamp-normalised", "l2", "random", "taylor"])
def test_scores_of_experts(score):
    out = cut(mixed(), 0.5, score=score, data=[(E, torch.arange(16) % 6)])
    assert out.report.units_kept == 3
    assert out.report.difference < 1e-5


def test_what_is_no_mixture_of_experts():
    with pytest.raises(Unsupported, match="as many experts as before"):
        cut(mixed(), macs=0.5)
    with pytest.raises(NothingPrunable, match="no choice of the largest"):
        cut(mixed("dense"), 0.5)
    with pytest.raises(NothingPrunable, match="stacked experts"):
        cut(Tower(), 0.5, example=X)
    with pytest.raises(InvalidValue, match="channel"):
        cut(mixed(), 0.5, score="obspa")


def test_a_mixture_that_counts_its_experts_elsewhere_stays_whole():
    """Its forward compares with a number in a closure, which no plan can change."""

    class Fixed(Mixed):
        def forward(self, x):
            return super().forward(x) + self.router(self.enter(x)).reshape(-1, 6).mean()

    out = cut(scrambled(Fixed()), 0.5)
    assert out.report.units_kept == 6
    assert "experts.up:0" in out.report.blocked
    assert torch.equal(outputs(out.model, E)[0], outputs(scrambled(Fixed()), E)[0])


# -- mixtures of transformers ----------------------------------------------------------------------------------------


def language_model(kind: str) -> nn.Module:
    from prunus.models.vision_repair import repair_torchvision

    repair_torchvision()
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    own = {
        "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
        "Qwen2Moe": {
            "num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 16,
        },
        "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
    }[kind]  # fmt: skip
    if not hasattr(transformers, f"{kind}ForCausalLM"):
        pytest.skip(f"this transformers has no {kind}")
    config = getattr(transformers, f"{kind}Config")(**common, **own)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=drawn) + (parameter.ndim == 1))
    return model


IDS = {"input_ids": torch.arange(20).reshape(2, 10) * 7 % 40}


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_mixtures_of_transformers(kind, tmp_path):
    model = language_model(kind)
    out = cut(model, 0.5, example=IDS)
    assert out.report.blocked == {}
    assert out.report.difference < 1e-4
    assert out.plan.verify(model, IDS) < 1e-4
    assert out.report.units_kept * 2 == out.report.units
    assert float((outputs(out.model, IDS)[0] - outputs(model, IDS)[0]).abs().max()) > 1e-2
    # The settings agree with what is left, so the model can be saved and built again by its own library.
    rebuilt = type(out.model)(out.model.config)
    rebuilt.load_state_dict(out.model.state_dict())
    torch.testing.assert_close(outputs(rebuilt, IDS)[0], outputs(out.model, IDS)[0])
    if kind == "Qwen2Moe":
        assert out.model.config.shared_expert_intermediate_size == 16
    out.save(tmp_path / "small.safetensors")
    loaded = prunus.load(tmp_path / "small.safetensors", language_model(kind))
    assert torch.equal(outputs(loaded, IDS)[0], outputs(out.model, IDS)[0])
    with pytest.raises(Infeasible, match="visits"):
        cut(model, 0.95, example=IDS)


def test_layers_of_a_language_model():
    model = language_model("Mixtral")
    out = prunus.prune(model, 0.5, unit="layer", example=IDS, measure=False)
    assert len(out.plan.removed_modules) == 1
    assert out.report.difference < 1e-5
    assert out.model(**IDS).logits.shape == (2, 10, 40)
