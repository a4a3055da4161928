"""Optimal brain surgery on columns and channels: equal to least squares, and the score is the error that remains."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunus.errors import InvalidValue, NonFinite, UnknownName, Unsupported
from prunus.evidence import Batch
from prunus.graph.couple import Coupling, couple
from prunus.graph.plan import Plan
from prunus.graph.record import record
from prunus.models.create import create
from prunus.models.initialise import kaiming
from prunus.models.resnet import ResNet
from prunus.parameters import Address
from prunus.randomness import generator
from prunus.structured import gram as gram_room
from prunus.structured import obs, reconstruct
from prunus.structured.compensate import compensate as by_name
from prunus.structured.gram import Gram, Watch, columns, columns_of, gather, order, patches
from prunus.structured.obspa import compensate, noise, readjusted, unit_scores


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "draw", *shape), dtype=torch.float64)


def one_by_one(weight: Tensor, g: Tensor, columns_gone: list[int]) -> Tensor:
    """Remove columns one after the other, updating weight and inverse each time."""
    weight, g = weight.clone(), g.clone()
    for q in columns_gone:
        weight -= weight[:, [q]] * g[q] / g[q, q]
        g -= torch.outer(g[:, q], g[q]) / g[q, q]
    return weight


def refitted(weight: Tensor, x: Tensor, gone: list[int], ridge: float = 0.0) -> Tensor:
    """Return min over kept columns of ||W X - W' X||^2 + ridge ||W - W'||^2 by a least-squares solver."""
    d = weight.shape[1]
    wide = torch.cat([x, ridge**0.5 * torch.eye(d, dtype=x.dtype)], dim=1)
    kept = [j for j in range(d) if j not in gone]
    solved = torch.linalg.lstsq(wide[kept].T, (weight @ wide).T).solution.T
    result = torch.zeros_like(weight)
    result[:, kept] = solved
    return result


# -- the algebra ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(2, 9),
    rows=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    damp=st.sampled_from([0.0, 0.01, 1.0]),
    data=st.data(),
)
def test_joint_equals_one_by_one_equals_least_squares(d: int, rows: int, seed: int, damp: float, data: Any) -> None:
    gone = data.draw(st.lists(st.integers(0, d - 1), unique=True, min_size=1, max_size=d - 1))
    weight, x = draw(rows, d, seed=seed), draw(d, 8 * d, seed=seed)
    h, dead = obs.hessian(x @ x.T, damp)
    assert not dead.any()
    g = obs.inverse(h)
    joint = obs.without(weight, g, torch.tensor(gone))
    ridge = float(h[0, 0] - 2 * (x[0] @ x[0])) / 2
    for other in (one_by_one(weight, g, gone), refitted(weight, x, gone, max(ridge, 0.0))):
        torch.testing.assert_close(joint, other, rtol=0, atol=1e-10)
    assert (joint[:, gone] == 0).all()
    change = joint - weight
    increase = (change @ x).square().sum() + ridge * change.square().sum()
    torch.testing.assert_close(obs.removal_costs(weight, g, torch.tensor([gone]))[0], increase, rtol=1e-9, atol=1e-10)


def test_no_other_weights_of_the_kept_columns_do_better() -> None:
    weight, x = draw(3, 6), draw(6, 50)
    h, _ = obs.hessian(x @ x.T, 0.0)
    best = obs.without(weight, obs.inverse(h), torch.tensor([1, 4]))
    least = ((best - weight) @ x).square().sum()
    for seed in range(20):
        other = best + 1e-3 * draw(3, 6, seed=seed + 1)
        other[:, [1, 4]] = 0
        assert ((other - weight) @ x).square().sum() > least


def test_inputs_without_correlation_leave_nothing_to_do() -> None:
    c = 3.0
    x = torch.linalg.qr(draw(8, 8)).Q * (c / 2) ** 0.5  # 2 X X^T = c I
    weight, gone = draw(4, 8), torch.tensor([0, 3, 5])
    h, _ = obs.hessian(x @ x.T, 0.0)
    g = obs.inverse(h)
    plain = weight.clone()
    plain[:, gone] = 0
    torch.testing.assert_close(obs.without(weight, g, gone), plain, rtol=0, atol=1e-12)
    cost = obs.removal_costs(weight, g, gone[None])[0]
    torch.testing.assert_close(cost, c * weight[:, gone].square().sum() / 2)
    torch.testing.assert_close(obs.column_costs(weight, g)[gone].sum(), cost)


def test_a_single_column_costs_the_same_by_both_forms() -> None:
    weight, x = draw(3, 5), draw(5, 40)
    g = obs.inverse(obs.hessian(x @ x.T)[0])
    torch.testing.assert_close(
        obs.removal_costs(weight, g, torch.arange(5)[:, None]), obs.column_costs(weight, g), rtol=1e-12, atol=0
    )


def test_sets_in_one_call_equal_sets_one_by_one() -> None:
    weight, x = draw(3, 8), draw(8, 40)
    g = obs.inverse(obs.hessian(x @ x.T)[0])
    sets = torch.tensor([[0, 1], [5, 2], [7, 6]])
    single = torch.cat([obs.removal_costs(weight, g, s[None]) for s in sets])
    torch.testing.assert_close(obs.removal_costs(weight, g, sets), single)
    assert obs.removal_costs(weight, g, sets[:, :0]).tolist() == [0.0] * 3


def test_dead_inputs_cost_nothing_and_move_nothing() -> None:
    weight, x = draw(3, 6), draw(6, 40)
    x[[1, 4]] = 0
    h, dead = obs.hessian(x @ x.T, 0.01)
    assert dead.tolist() == [False, True, False, False, True, False]
    assert h[1, 1] == 1.0
    assert h[0, 0] == 2 * (x[0] @ x[0]) + 0.01 * 2 * (x @ x.T).diagonal()[~dead].mean()
    new = obs.without(weight, obs.inverse(h), torch.tensor([1]))
    kept = [0, 2, 3, 4, 5]
    torch.testing.assert_close(new[:, kept], weight[:, kept], rtol=0, atol=1e-14)
    address = Address(name="w", shape=(3, 6))
    _, error = readjusted(weight, Gram(address, (x @ x.T)[None], 1), torch.tensor([1, 4]))
    assert error == 0.0
    h, dead = obs.hessian(torch.zeros(4, 4))
    assert dead.all()
    assert torch.equal(h, torch.eye(4, dtype=torch.float64))


def test_bad_hessians_are_refused() -> None:
    x = draw(6, 3)
    with pytest.raises(InvalidValue, match="damp > 0"):
        obs.inverse(obs.hessian(torch.ones(3, 3), 0.0)[0])
    assert obs.inverse(obs.hessian(x @ x.T, 0.01)[0]).isfinite().all()
    for damp in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InvalidValue, match="damp"):
            obs.hessian(torch.eye(2), damp)


# -- what a layer reads -----------------------------------------------------------------------------------------

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 3), (2, 5, 4)),
    (nn.Linear(4, 3, bias=False), (5, 4)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (5, 4, 17)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), (5, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, padding="same", groups=4), (5, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (5, 4, 9, 8)),
    (nn.Conv3d(2, 3, 2, padding=1), (3, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=3, dilation=2), (5, 4, 7)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (5, 4, 5, 4)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=3), (5, 4, 5, 4)),
    (nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v)[:60])
def test_patches_times_rows_are_the_outputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = copy.deepcopy(layer).double(), draw(*shape)
    seen: list[Any] = []
    with torch.no_grad(), Watch({"weight": layer.weight}, lambda *a: seen.append(a)):
        y = layer(x)
    ((_, address, inputs, sliding),) = seen
    rows = patches(inputs, address, sliding)
    weight = address.rows(layer.weight).unflatten(0, (address.groups, -1))
    found = (rows @ weight.mT).movedim(0, 1).flatten(1)
    if layer.bias is not None:
        y = y - (layer.bias if sliding is None else layer.bias.view(-1, *[1] * (y.ndim - 2)))
    wanted = y if sliding is None else y.movedim(1, -1)
    torch.testing.assert_close(found, wanted.reshape(-1, wanted.shape[-1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v)[:60])
def test_columns_are_those_of_the_channel(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = copy.deepcopy(layer).double(), draw(*shape)
    (use,) = order(layer, ["weight"], Batch((x,), {}, None)).values()
    address = use[0]
    axis = 1 - address.output_axis
    marked = torch.zeros(address.shape)
    position = address.shape[axis] - 1
    marked.select(axis, position).fill_(1.0)
    rows = address.rows(marked).unflatten(0, (address.groups, -1))
    for group, found in zip(rows, columns_of(address, torch.tensor([position])), strict=True):
        assert sorted(found.tolist()) == group.any(0).nonzero().flatten().tolist()
    assert rows.shape[-1] == columns(address)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten(), nn.Linear(12, 5))


def batches_of(x: Tensor, size: int) -> list[Batch]:
    return [Batch((part,), {}, None) for part in x.split(size)]


def test_moments_are_those_of_all_the_data_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = small_net().double(), draw(7, 2, 5, 5)
    names = ["0.weight", "2.weight", "4.weight"]
    uses = order(net, names, batches_of(x, 7)[0])
    assert list(uses) == names
    whole = gather(net, uses, batches_of(x, 7))
    with torch.no_grad():
        hidden = net[:2](x).double()
        flat = net[:4](x).double()
    unfolded = F.unfold(hidden, 2).movedim(1, 2).reshape(-1, 16)  # columns run (channel, tap)
    unfolded = unfolded.unflatten(1, (4, 4)).mT.flatten(1)
    torch.testing.assert_close(whole["2.weight"].matrix[0], unfolded.T @ unfolded / 7, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole["4.weight"].matrix[0], flat.T @ flat / 7, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(gram_room, "_CHUNK", 50)
    for size in (1, 3):
        part = gather(net, uses, batches_of(x, size))
        alone = gather(net, uses, batches_of(x, size), diagonal=True)
        for name in names:
            torch.testing.assert_close(part[name].matrix, whole[name].matrix, rtol=1e-12, atol=1e-12)
            diagonal = whole[name].matrix.diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(alone[name].matrix, diagonal, rtol=1e-12, atol=1e-12)
    assert whole["2.weight"].matrix.dtype == torch.float64


def test_the_pass_ends_after_the_last_use_and_leaves_the_model_alone() -> None:
    net = small_net()
    net.train()
    reached: list[int] = []
    net[4].register_forward_hook(lambda *_: reached.append(1))
    x = batches_of(draw(4, 2, 5, 5).float(), 2)
    uses = order(net, ["2.weight"], x[0])
    reached.clear()
    gather(net, uses, x)
    assert not reached
    assert all(m.training for m in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x), self.layer.weight)


def test_a_layer_that_runs_twice_sees_both_inputs() -> None:
    net, x = Shared().double(), draw(6, 3)
    uses = order(net, ["layer.weight"], Batch((x,), {}, None))
    assert uses["layer.weight"][1] == 2
    found = gather(net, uses, batches_of(x, 6))["layer.weight"].matrix[0]
    with torch.no_grad():
        second = net.layer(x)
    torch.testing.assert_close(found, (x.T @ x + second.T @ second) / 6)


def test_projections_inside_attention_are_seen() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    names = [n for n, p in net.named_parameters() if p.ndim == 2]
    assert len(names) == 4
    assert list(order(net, names, Batch((torch.randn(2, 5, 8),), {}, None))) == names


def test_padding_tokens_do_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    net, x = Masked().double(), draw(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    batch = Batch((), {"x": x, "attention_mask": mask}, None)
    found = gather(net, order(net, ["layer.weight"], batch), [batch])["layer.weight"].matrix[0]
    real = x[mask.bool()]
    torch.testing.assert_close(found, real.T @ real / 2)


def test_what_cannot_be_gathered_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = small_net(), draw(4, 2, 5, 5).float()
    uses = order(net, ["2.weight"], batches_of(x, 4)[0])
    with pytest.raises(InvalidValue, match="at least one batch"):
        gather(net, uses, [])
    with pytest.raises(NonFinite, match=r"2\.weight"):
        gather(net, uses, batches_of(x * float("nan"), 2))
    monkeypatch.setattr(gram_room, "LIMIT", 15)
    with pytest.raises(Unsupported, match="16 columns"):
        gather(net, uses, batches_of(x, 4))


# -- whole networks ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A stem, one residual block with batch norm, and a linear head."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, 3)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.relu(x + y).mean((2, 3)))


def block(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Block().double().eval()


def images(count: int = 12) -> Tensor:
    return draw(count, 2, 6, 6)


def coupling_of(model: nn.Module, x: Tensor) -> Coupling:
    return couple(record(model, x[:1]))


def keep_some(coupling: Coupling, share: float = 0.5, seed: int = 0) -> dict[str, Any]:
    kept = {}
    for family in coupling.primary():
        mask = np.ones(family.size, dtype=bool)
        gone = torch.randperm(family.size, generator=generator(seed, "gone", family.name))
        mask[gone[: int(share * family.size)].numpy()] = False
        kept[family.name] = mask
    return kept


def test_every_consumer_is_the_least_squares_fit_on_the_prefix_as_it_is_by_then() -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    keep = keep_some(coupling)
    plan = Plan.from_keep(coupling, keep)
    result = compensate(model, coupling, keep, data=[x[:5], x[5:]], damp=0.0, recalibrate=False)
    by_hand = copy.deepcopy(model)
    seen: dict[str, Tensor] = {}
    for name in ("conv1", "conv2", "linear"):
        layer = getattr(by_hand, name)
        hook = layer.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0]))
        with torch.no_grad():
            by_hand(x)
        hook.remove()
        inputs = seen[name]
        inputs = inputs.T if name == "linear" else F.unfold(inputs, 3, padding=1).movedim(1, 0).flatten(1)
        taps = 1 if name == "linear" else 9
        kept = plan.keep[f"{name}.weight:1"]
        gone = [c * taps + t for c in range(layer.weight.shape[1]) if c not in kept for t in range(taps)]
        weight = layer.weight.detach().flatten(1)
        layer.weight.data = refitted(weight, inputs, gone).view_as(layer.weight)
        torch.testing.assert_close(
            plan.mask(by_hand).get_parameter(f"{name}.weight"),
            result.model.get_parameter(f"{name}.weight"),
            rtol=1e-8,
            atol=1e-9,
        )
    assert set(result.errors) == {"conv1.weight", "conv2.weight", "linear.weight"}
    assert all(0 < e < 1 for e in result.errors.values())
    assert not result.skipped
    for name, before in model.state_dict().items():
        assert torch.equal(before, block().state_dict()[name])  # the model given is as it was


def test_the_small_network_equals_the_masked_one() -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    result = compensate(model, coupling, keep_some(coupling), data=[x])
    small = result.plan.apply(result.model)
    with torch.no_grad():
        torch.testing.assert_close(small(x), result.model(x), rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_plan_and_kept_units_give_the_same() -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    keep = keep_some(coupling)
    first = compensate(model, coupling, keep, data=[x]).model.state_dict()
    second = compensate(model, coupling, Plan.from_keep(coupling, keep), data=[x]).model.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_nothing_removed_is_nothing_changed() -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    same = compensate(model, coupling, {}, data=[x], recalibrate=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.model.state_dict().values()))
    assert not same.errors


def test_a_copied_channel_can_go_without_loss_and_a_fresh_one_cannot() -> None:
    model, x = block(), images()
    with torch.no_grad():
        for layer in (model.conv1, model.bn1):
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.ndim:
                    tensor[3] = tensor[5]
    coupling = coupling_of(model, x)
    name = next(f.name for f in coupling.families if f.name.startswith("conv1.weight"))
    with torch.no_grad():
        before = model(x)
        for unit, exact in ((3, True), (5, True), (2, False)):
            keep = {name: np.arange(8) != unit}
            result = compensate(model, coupling, keep, data=[x], damp=1e-10, recalibrate=False)
            assert (float((result.model(x) - before).abs().max()) < 1e-6) == exact
    scores = unit_scores(model, coupling, data=[x], damp=1e-10, families=[name])[name]
    assert sorted(scores.argsort()[:2].tolist()) == [3, 5]
    assert scores[3] < 1e-6 * scores[2]


def test_compensation_lowers_the_error_of_the_outputs() -> None:
    for seed in range(3):
        model, x = block(seed), images(40)
        coupling = coupling_of(model, x)
        keep = keep_some(coupling, 0.34, seed)
        plan = Plan.from_keep(coupling, keep)
        with torch.no_grad():
            before = model(x)
            plain = (plan.mask(model)(x) - before).square().mean()
            fitted = compensate(model, coupling, keep, data=[x], recalibrate=False).model(x)
            assert (fitted - before).square().mean() < 0.8 * plain


def test_statistics_are_renewed_with_data_and_left_with_noise() -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    keep = keep_some(coupling)
    with_data = compensate(model, coupling, keep, data=[x]).model
    with_noise = compensate(model, coupling, keep, example=x, samples=20).model
    kept = torch.from_numpy(np.asarray(Plan.from_keep(coupling, keep).keep["bn1.running_mean:0"]))
    assert torch.equal(with_noise.bn1.running_var[kept], model.bn1.running_var[kept])
    assert not torch.equal(with_data.bn1.running_var[kept], model.bn1.running_var[kept])
    forced = compensate(model, coupling, keep, example=x, samples=20, recalibrate=True).model
    assert not torch.equal(forced.bn1.running_var[kept], model.bn1.running_var[kept])


def test_noise_depends_on_the_seed_alone() -> None:
    x = images()
    one, two, other = (noise(x, 70, seed=s) for s in (1, 1, 2))
    assert [b.size for b in one] == [64, 6]
    assert all(torch.equal(a.args[0], b.args[0]) for a, b in zip(one, two))
    assert not torch.equal(one[0].args[0], other[0].args[0])
    assert one[0].args[0].dtype == torch.float64
    assert one[0].args[0].abs().max() <= 3**0.5
    assert abs(float(one[0].args[0].var()) - 1) < 0.05
    assert abs(float(one[0].args[0].mean())) < 0.05
    keyed = noise({"a": x.float(), "b": x[:, :1]}, 3, low=0.0, high=5.0)[0]
    assert {k: v.shape for k, v in keyed.kwargs.items()} == {"a": (3, 2, 6, 6), "b": (3, 1, 6, 6)}
    with pytest.raises(Unsupported, match="data="):
        noise(torch.ones(2, 3, dtype=torch.long), 5)
    for arguments in ({"samples": 0}, {"samples": 3, "low": 1.0, "high": 1.0}):
        with pytest.raises(InvalidValue):
            noise(x, **arguments)


def test_the_score_is_the_error_that_remains() -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    scores = unit_scores(model, coupling, data=[x], damp=0.0)
    assert set(scores) == {f.name for f in coupling.primary()}
    readers = {"conv1": 9, "conv2": 9, "linear": 1}
    seen: dict[str, Tensor] = {}
    for name in readers:
        getattr(model, name).register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name, a[0]))
    with torch.no_grad():
        model(x)
    for family in coupling.primary():
        assert scores[family.name].dtype == torch.float64
        for unit in range(family.size):
            total = 0.0
            for slot in family.slots:
                if slot.role != "input":
                    continue
                name = slot.tensor.split(".")[0]
                taps, inputs = readers[name], seen[name]
                inputs = inputs.T if taps == 1 else F.unfold(inputs, 3, padding=1).movedim(1, 0).flatten(1)
                weight = getattr(model, name).weight.detach().flatten(1)
                gone = [int(c) * taps + t for c in slot.index[unit] for t in range(taps)]
                total += float(((refitted(weight, inputs, gone) - weight) @ inputs).square().sum()) / len(x)
            assert float(scores[family.name][unit]) == pytest.approx(total, rel=1e-7)


def test_options_of_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    joint = unit_scores(model, coupling, data=[x])
    separate = unit_scores(model, coupling, data=[x], form="separate")
    with_makers = unit_scores(model, coupling, data=[x], producers=True)
    for name in joint:
        assert (joint[name] >= 0).all()
        assert not torch.allclose(joint[name], separate[name])
        assert (with_makers[name] > joint[name]).all()
    name = next(n for n in joint if n.startswith("conv1.weight"))
    with torch.no_grad():
        made = model.conv1(F.relu(model.bn(model.stem(x))))
    energy = made.square().sum((0, 2, 3)) / len(x)
    torch.testing.assert_close(with_makers[name] - joint[name], energy)
    monkeypatch.setattr("prunus.structured.obspa._MEMORY", 1)  # one layer at a time
    again = unit_scores(model, coupling, data=[x])
    assert all(torch.equal(again[n], joint[n]) for n in joint)


def test_layers_too_wide_for_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    name = next(f.name for f in coupling.families if f.name.startswith("conv1.weight"))
    for module in ("gram", "obspa"):
        monkeypatch.setattr(f"prunus.structured.{module}.LIMIT", 60)  # conv2 reads 72 columns
    with pytest.raises(Unsupported, match=r"conv2.weight.*72 columns"):
        compensate(model, coupling, keep_some(coupling), data=[x])
    result = compensate(model, coupling, keep_some(coupling), data=[x], oversize="diagonal")
    assert set(result.skipped) == {"conv2.weight"}
    assert set(result.errors) == {"conv1.weight", "linear.weight"}
    zeroed = copy.deepcopy(model)  # layers behind a skipped one see it without its lost inputs
    with torch.no_grad():
        lost = [c for c in range(8) if c not in result.plan.keep["conv2.weight:1"]]
        zeroed.conv2.weight[:, lost] = 0
    behind = compensate(zeroed, coupling, keep_some(coupling), data=[x], oversize="diagonal").model.linear.weight
    assert torch.equal(behind, result.model.linear.weight)
    with pytest.raises(Unsupported):
        unit_scores(model, coupling, data=[x], oversize="error")
    score = unit_scores(model, coupling, data=[x])[name]
    with torch.no_grad():
        inputs = F.relu(model.bn1(model.conv1(F.relu(model.bn(model.stem(x))))))
    power = F.unfold(inputs, 3, padding=1).square().sum((0, 2)) / len(x)
    wanted = (model.conv2.weight.flatten(1).square().sum(0) * power).unflatten(0, (8, 9)).sum(1)
    torch.testing.assert_close(score, wanted.detach())


def test_bad_requests_are_refused() -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    keep = keep_some(coupling)
    with pytest.raises(InvalidValue, match="data="):
        compensate(model, coupling, keep)
    with pytest.raises(InvalidValue, match="empty"):
        compensate(model, coupling, keep, data=[])
    with pytest.raises(InvalidValue, match="damp"):
        compensate(model, coupling, keep, data=[x], damp=-1.0)
    with pytest.raises(UnknownName, match="oversize"):
        compensate(model, coupling, keep, data=[x], oversize="no")
    with pytest.raises(UnknownName, match="form"):
        unit_scores(model, coupling, data=[x], form="no")
    with pytest.raises(UnknownName, match="family"):
        unit_scores(model, coupling, data=[x], families=["no"])
    with pytest.raises(NonFinite):
        compensate(model, coupling, keep, data=[x * float("inf")])
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match="conv2"):
        compensate(model, coupling, keep, data=[x])


def test_both_methods_are_called_alike() -> None:
    model, x = block(), images()
    coupling = coupling_of(model, x)
    plan = Plan.from_keep(coupling, keep_some(coupling))
    fitted = by_name("obspa", model, coupling, plan, data=[x], damp=0.1).model.state_dict()
    wanted = compensate(model, coupling, plan, data=[x], damp=0.1).model.state_dict()
    assert all(torch.equal(fitted[k], wanted[k]) for k in wanted)
    rebuilt = by_name("udfc", model, coupling, plan, data=[x], nonneg=True).model.state_dict()
    wanted = reconstruct.compensate(model, coupling, plan, nonneg=True).model.state_dict()
    assert all(torch.equal(rebuilt[k], wanted[k]) for k in wanted)
    for method, options in (("obs", {}), ("udfc", {"damp": 0.1}), ("obspa", {"nonneg": True})):
        with pytest.raises(UnknownName):
            by_name(method, model, coupling, plan, data=[x], **options)


class Grouped(nn.Module):
    """Grouped, depthwise and transposed convolutions, then flattening into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(6, 4, 2, stride=2),
            nn.Flatten(),
        )
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Grouped, (2, 3, 3)),
        (lambda: create("vit", num_classes=3, input_shape=(2, 8, 8), width=16, depth=2, patch=2), (2, 8, 8)),
        (lambda: ResNet(3, (2, 8, 8), blocks=(1, 1, 1), width=4), (2, 8, 8)),
        (lambda: nn.Sequential(nn.Flatten(1), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2)), (8,)),
    ],
    ids=["grouped", "vit", "resnet", "attention"],
)
def test_other_networks(make: Any, shape: tuple[int, ...]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make().double().eval()
    x = draw(10, *shape)
    coupling = coupling_of(model, x)
    scores = unit_scores(model, coupling, data=[x])
    families = coupling.primary()
    assert set(scores) == {f.name for f in families}
    keep = {}
    for f in families:
        mask = torch.ones(f.size, dtype=torch.bool)
        mask[scores[f.name].argsort()[: f.size // 3]] = False
        keep[f.name] = mask
    plan = Plan.from_keep(coupling, keep)
    result = compensate(model, coupling, plan, data=[x], recalibrate=False)
    assert not result.skipped
    with torch.no_grad():
        before = model(x)
        assert (result.model(x) - before).square().sum() < (plan.mask(model)(x) - before).square().sum()
    assert plan.verify(result.model, x) < 1e-6
