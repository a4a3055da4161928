"""Chase: channel scores and quotas by hand, soft-bound exploration, and a training whose channels go for ever."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunus
from prunus.budget.channels import channel_floor, keep_channels
from prunus.budget.select import round_half_up
from prunus.errors import Infeasible, InvalidValue, MaskMismatch, NonFinite, ScheduleTooShort, UnknownName
from prunus.graph.couple import couple
from prunus.graph.record import record
from prunus.hold import state_tensors
from prunus.masks import Masks
from prunus.methods.chase import Chase, channel_scores, living, origin_of, removable
from prunus.methods.rigl import RigL
from prunus.methods.soft_bound import SoftBound, explore
from prunus.scores.channel import CHANNEL_SCORES, channel_density

CLASSES = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Plain(nn.Module):
    """A chain of three convolutions with BatchNorm and a linear layer; biases everywhere."""

    def __init__(self, seed: int = 0, widths: tuple[int, ...] = (8, 10, 12)):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            inputs = 1
            for width in widths:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            self.body = nn.Sequential(*layers)
            self.head = nn.Linear(inputs, CLASSES)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    """Two blocks on a residual stream."""

    def __init__(self, width: int = 6):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(1, width, 3, padding=1)
            self.first = nn.ModuleList([nn.Conv2d(width, 5, 3, padding=1), nn.Conv2d(5, width, 3, padding=1)])
            self.second = nn.ModuleList([nn.Conv2d(width, 7, 3, padding=1), nn.Conv2d(7, width, 3, padding=1)])
            self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for inner, outer in (self.first, self.second):
            x = (x + outer(inner(x).relu())).relu()
        return self.head(x.mean((2, 3)))


EXAMPLE = torch.zeros(2, 1, 6, 6)


def families_of(model: nn.Module):
    coupling = couple(record(model, EXAMPLE))
    return removable(coupling.families, dict(model.named_parameters()))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(CLASSES, (8,), generator=generator)
    x = torch.randn(8, 1, 6, 6, generator=generator)
    for row, label in enumerate(y.tolist()):
        x[row, 0, 2 * label : 2 * label + 2] += 1.5
    return x, y


class Training:
    """A plain loop with a method attached."""

    def __init__(self, method, *, steps: int = 40, seed: int = 0, model: nn.Module | None = None, kind: str = "sgd"):
        self.model = model if model is not None else Plain()
        makers = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
            "adam": lambda p: torch.optim.Adam(p, lr=0.01),
        }
        self.optimizer = makers[kind](self.model.parameters())
        self.handle = prunus.sparsify(
            self.model, self.optimizer, method, steps=steps, steps_per_epoch=min(10, steps), seed=seed
        )
        self.done = 0

    def step(self) -> None:
        x, y = batch(self.done)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.done += 1

    def run(self, steps: int) -> Training:
        for _ in range(steps):
            self.step()
        return self


def chase(model: nn.Module, **choices) -> Chase:
    options = {"sparsity": 0.8, "channel_sparsity": 0.4, "every": 4, "channel_every": 8, "bound": 0.06} | choices
    return Chase(families=families_of(model), **options)


# -- scores of channels ---------------------------------------------------------------------------------------------


def test_channel_scores_by_hand():
    weight = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[-1.0, 1.0], [1.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    mask = weight != 0
    expected = {"umm": [0.75, 1.0, 0], "mm": [3, 1, 0], "kept-fraction": [0.25, 1, 0], "nonempty-kernels": [0.5, 1, 0]}
    assert set(expected) == set(CHANNEL_SCORES)
    for name, values in expected.items():
        assert CHANNEL_SCORES[name](weight, mask, 4, 2).tolist() == pytest.approx(values)
    # Two dense inputs that are gone physically count as zeros.
    assert CHANNEL_SCORES["umm"](weight, mask, 8, 4).tolist() == pytest.approx([0.375, 0.5, 0])
    assert CHANNEL_SCORES["nonempty-kernels"](weight, mask, 8, 4).tolist() == pytest.approx([0.25, 0.5, 0])


def test_umm_starves_where_mm_does_not():
    weight = torch.tensor([[[5.0, 0, 0, 0]], [[1.5, 1.5, 1.5, 1.5]]])
    mask = weight != 0
    assert int(CHANNEL_SCORES["mm"](weight, mask, 4, 1).argmin()) == 1
    assert int(CHANNEL_SCORES["umm"](weight, mask, 4, 1).argmin()) == 0


def test_scores_of_a_family_read_what_makes_its_channels():
    model = Plain()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    masks = Masks.full(model)
    for family in families_of(model):
        origin = origin_of([family], parameters)[family.name]
        weight = parameters[family.name.removesuffix(":0")]
        assert origin == [weight.shape[0], weight[0].numel(), weight.shape[1]]
        score = channel_scores(family, parameters, masks, origin)
        assert torch.allclose(score, weight.abs().mean((1, 2, 3)))


def test_channel_density():
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    mask[0], mask[1, 0, 0] = True, True
    assert channel_density(mask).tolist() == [1.0, 0.25, 0.0]


# -- quotas ---------------------------------------------------------------------------------------------------------


def test_quota_hand_case_moves_the_residual():
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    alive = {n: torch.ones(4, dtype=torch.bool) for n in scores}
    # The three lowest all lie in a, whose floor of three lets one go; the other two come from b.
    keep = keep_channels(scores, alive, 3, {"a": 3, "b": 1})
    assert keep["a"].tolist() == [False, True, True, True]
    assert keep["b"].tolist() == [False, False, True, True]
    free = keep_channels(scores, alive, 3, {"a": 1, "b": 1})
    assert free["a"].tolist() == [False, False, False, True]
    assert free["b"].all()


def by_rounds(scores, alive, remove, floors):
    """Cut layers that fall below their floor to it, share the rest out among the others, until nothing is left."""
    keep = {n: a.clone() for n, a in alive.items()}
    bound: set[str] = set()
    while remove > 0:
        ranked = sorted(
            (float(scores[n][i]), n, i) for n in scores if n not in bound for i in keep[n].nonzero().flatten()
        )
        chosen = ranked[:remove]
        over = [n for n in scores if n not in bound and sum(c[1] == n for c in chosen) > int(keep[n].sum()) - floors[n]]
        if not over:
            for _, name, i in chosen:
                keep[name][i] = False
            return keep
        for name in over:
            spare = int(keep[name].sum()) - floors[name]
            for _, _, i in [c for c in ranked if c[1] == name][:spare]:
                keep[name][i] = False
            remove -= spare
            bound.add(name)
    return keep


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_quota_equals_redistribution_in_rounds(data):
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    values = data.draw(st.permutations(range(sum(sizes))))
    scores, alive, floors, at = {}, {}, {}, 0
    for number, size in enumerate(sizes):
        name = f"layer{number}"
        scores[name] = torch.tensor(values[at : at + size], dtype=torch.float32)
        alive[name] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        floors[name] = data.draw(st.integers(0, size))
        at += size
    spare = sum(max(0, int(alive[n].sum()) - floors[n]) for n in scores)
    remove = data.draw(st.integers(0, spare))
    floors = {n: min(f, int(alive[n].sum())) for n, f in floors.items()}
    keep = keep_channels(scores, alive, remove, floors)
    wanted = by_rounds(scores, alive, remove, floors)
    for name in scores:
        assert torch.equal(keep[name], wanted[name])
        assert int(keep[name].sum()) >= floors[name]
        assert not bool((keep[name] & ~alive[name]).any())


def test_quota_ties_go_to_the_earlier_and_dead_channels_do_not_count():
    scores = {"a": torch.ones(4), "b": torch.ones(3)}
    alive = {"a": torch.tensor([True, False, True, True]), "b": torch.ones(3, dtype=torch.bool)}
    keep = keep_channels(scores, alive, 2, {"a": 1, "b": 0})
    assert keep["a"].tolist() == [True, False, True, True]
    assert keep["b"].tolist() == [True, False, False]


def test_quota_refuses():
    scores = {"a": torch.tensor([1.0, 2.0])}
    alive = {"a": torch.tensor([True, True])}
    with pytest.raises(Infeasible, match="floors leave 1"):
        keep_channels(scores, alive, 2, {"a": 1})
    with pytest.raises(NonFinite, match="'a'"):
        keep_channels({"a": torch.tensor([1.0, torch.nan])}, alive, 1, {"a": 0})
    assert [channel_floor(64, 0.5, 0.5), channel_floor(10, 0.4, 0.2), channel_floor(3, 0.5, 0.1)] == [16, 1, 0]


# -- exploration ----------------------------------------------------------------------------------------------------


def test_explore_by_hand():
    masks = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, False])}
    drop = {"a": torch.tensor([3.0, 1.0, 9.0]), "b": torch.tensor([2.0, 9.0, 9.0])}
    grow = {"a": torch.tensor([0.0, 5.0, 1.0]), "b": torch.tensor([0.0, 2.0, 4.0])}
    new = explore(masks, drop, grow, 2, 4)
    assert new["a"].tolist() == [True, True, False]
    assert new["b"].tolist() == [True, False, True]
    allowed = {"a": torch.tensor([True, False, True]), "b": torch.tensor([True, True, False])}
    new = explore(masks, drop, grow, 2, 4, allowed)
    assert new["a"].tolist() == [True, False, True]
    assert new["b"].tolist() == [True, True, False]
    assert sum(int(m.sum()) for m in explore(masks, drop, grow, 0, 99, allowed).values()) == 4
    assert explore(masks, drop, grow, 5, 3)["a"].tolist() == [True, True, False]


def test_counts_after_every_event():
    model = Plain()
    training = Training(chase(model), model=model)
    method, handle = training.handle.method, training.handle
    total = training.handle.masks.total
    budget = total - round_half_up(0.8 * total)
    families = method.families
    channels = sum(f.size for f in families)
    end = round(0.81 * 40)
    removals = method.removals(40, 10)
    assert removals == [10, 18, 26, 31]
    gone: dict[str, Tensor] = {f.name: torch.zeros(f.size, dtype=torch.bool) for f in families}
    assert handle.masks.kept == budget
    for step in range(1, 41):
        before = handle.masks
        training.step()
        now = handle.masks
        alive = method.alive(handle)
        left = sum(int(a.sum()) for a in alive.values())
        if step in removals:
            wanted = 0.4 - 0.4 * (1 - step / 31) ** 3
            assert abs(left - channels * (1 - wanted)) <= 0.5
        if step < end and step % 4 == 0:
            bound, most = method.counts(handle, step)
            assert bound == budget
            assert now.kept == most >= budget
            share = 0.06 * (1 + torch.tensor(step / end * torch.pi).cos().item()) / 2
            assert abs(most - budget - total * share) <= 0.5
            assert sum(int((now[n] & ~before[n]).sum()) for n in now) > 0
        elif step >= end and step % 4 == 0:
            assert now.kept == budget
        for family in families:
            assert not bool((alive[family.name] & gone[family.name]).any()), "a channel came back"
            gone[family.name] = ~alive[family.name]
            floor = max(1, channel_floor(family.size, 0.4, 0.5))
            assert int(alive[family.name].sum()) >= floor
        room = living(families, alive, handle.parameters)
        for name, weight in handle.parameters.items():
            assert not bool(weight.detach()[~room[name]].any())
            assert not bool(now[name][~room[name]].any())
        for family in families:
            for slot in family.slots:
                tensor = dict(training.model.named_parameters()).get(slot.tensor)
                if tensor is not None and tensor.ndim == 1:
                    assert not bool(tensor.detach()[gone[family.name]].any())
                    for state in state_tensors(training.optimizer, tensor):
                        assert not bool(state[gone[family.name]].any())
    assert handle.masks.kept == budget
    assert left == channels - round_half_up(0.4 * channels)


def test_budget_belongs_to_the_dense_network():
    model = Plain()
    training = Training(chase(model, channel_sparsity=0.5, floor=0.2), model=model).run(40)
    method = training.handle.method
    room = living(method.families, method.alive(training.handle), training.handle.parameters)
    capacity = sum(int(r.sum()) for r in room.values())
    assert capacity < 0.6 * training.handle.masks.total
    assert training.handle.masks.kept == training.handle.masks.total - round_half_up(0.8 * training.handle.masks.total)
    assert training.handle.masks.kept / capacity > 0.3


def test_floors_bind():
    model = Plain()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1}
    weights["body.3.weight"] *= 0.01  # without a floor the weakest layer would lose all that go
    alive = {f.name: torch.ones(f.size, dtype=torch.bool) for f in families_of(model)}
    left = {}
    for floor in (1.0, 0.2):
        found = chase(model, floor=floor).survivors(31, 40, 10, weights=weights, masks=Masks.full(model), alive=alive)
        left[floor] = {n: int(a.sum()) for n, a in found.items()}
        assert sum(left[floor].values()) == 18
    assert left[1.0]["body.3.weight:0"] == 6 == channel_floor(10, 0.4, 1.0)
    assert left[0.2]["body.3.weight:0"] == 1 == channel_floor(10, 0.4, 0.2)


# -- reductions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_without_channels_it_is_soft_bound_training(kind):
    options = {"sparsity": 0.8, "every": 4, "bound": 0.06}
    one = Training(Chase(channel_sparsity=0, families=families_of(Plain()), **options), kind=kind).run(40)
    two = Training(SoftBound(**options), kind=kind).run(40)
    assert one.handle.masks == two.handle.masks
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_without_bound_and_exploration_it_is_global_rigl():
    method = SoftBound(sparsity=0.8, every=4, bound=0, explore_end=0, fraction=0.3, fraction_end=0.0, end="0.75dur")
    training = Training(method)
    rigl = RigL(sparsity=0.8, every=4)
    exchanges = 0
    for step in range(1, 41):
        before = flat(training.handle.masks)
        twin_model = copy.deepcopy(training.model)
        twin = torch.optim.SGD(twin_model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        twin.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
        x, y = batch(training.done)
        F.cross_entropy(twin_model(x), y).backward()
        named = {n: p for n, p in twin_model.named_parameters() if n in training.handle.masks}
        gradients = flat({n: p.grad.clone() for n, p in named.items()})
        for name, parameter in named.items():
            parameter.grad.masked_fill_(~training.handle.masks[name], 0.0)
        twin.step()
        training.step()
        after = flat(training.handle.masks)
        if not (step % 4 == 0 and step <= 30):
            assert torch.equal(before, after)
            continue
        count = int(rigl.fraction_at(training.handle, step) * int(before.sum()) + 1e-9)
        magnitude = flat({n: p.detach().abs() for n, p in named.items()})
        kept = before.clone()
        kept[magnitude.masked_fill(~before, torch.inf).argsort(stable=True)[:count]] = False
        order = gradients.abs().masked_fill(kept, -1).argsort(descending=True, stable=True)
        kept[order[:count]] = True
        assert torch.equal(after, kept), step
        exchanges += int(count > 0)
    assert exchanges >= 6


def flat(tensors) -> Tensor:
    """Return all entries in one line."""
    return torch.cat([t.reshape(-1) for t in tensors.values()])


# -- removal is exact -----------------------------------------------------------------------------------------------


def test_cutting_the_removed_channels_changes_nothing():
    model = Plain()
    coupling = couple(record(model, EXAMPLE))
    training = Training(chase(model), model=model).run(40)
    method = training.handle.method
    plan = method.plan(training.handle, coupling)
    small = plan.apply(training.model).eval()
    training.model.eval()
    x, _ = batch(99)
    difference = (small(x) - training.model(x)).abs().max() / training.model(x).abs().max()
    assert difference.item() < 1e-5
    alive = method.alive(training.handle)
    widths = [small.body[i].out_channels for i in (0, 3, 6)]
    assert widths == [int(alive[f"body.{i}.weight:0"].sum()) for i in (0, 3, 6)]
    assert sum(widths) == 18 < 30
    weights = sum(int(torch.count_nonzero(p)) for n, p in small.named_parameters() if n in training.handle.masks)
    assert weights <= training.handle.masks.kept


def test_removable_leaves_residual_streams_alone():
    model = Residual()
    names = [f.name for f in families_of(model)]
    assert names == ["first.0.weight:0", "second.0.weight:0"]


def test_residual_streams_may_go_when_asked():
    model = Residual()
    coupling = couple(record(model, EXAMPLE))
    method = replace(chase(model), families=coupling.families)
    training = Training(method, model=model).run(40)
    alive = method.alive(training.handle)
    assert sum(int(a.sum()) for a in alive.values()) == 18 - round_half_up(0.4 * 18)
    small = method.plan(training.handle, coupling).apply(training.model).eval()
    training.model.eval()
    x, _ = batch(99)
    assert torch.allclose(small(x), training.model(x), rtol=1e-5, atol=1e-6)


# -- saving, refusing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [3, 9, 20, 33])
def test_a_cut_training_goes_on_bit_for_bit(cut):
    whole = Training(chase(Plain()), kind="adam").run(40)
    first = Training(chase(Plain()), kind="adam").run(cut)
    state = first.handle.state_dict()
    saved = {
        "tensors": {n: t.clone() for n, t in state["tensors"].items()},
        "values": json.loads(json.dumps(state["values"])),
    }
    second = Training(chase(Plain()), kind="adam", model=Plain(seed=5))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.handle.load_state_dict(saved)
    second.done = cut
    second.run(40 - cut)
    assert second.handle.masks == whole.handle.masks
    assert all(torch.equal(p, q) for p, q in zip(second.model.parameters(), whole.model.parameters(), strict=True))
    assert set(second.handle.memory) == set(whole.handle.memory)
    for key, value in whole.handle.memory.items():
        assert torch.equal(value, second.handle.memory[key])


def test_refusals():
    model = Plain()
    families = families_of(model)

    def attach(method, steps=40, **choices):
        net = Plain()
        return prunus.sparsify(net, torch.optim.SGD(net.parameters(), lr=0.1), method, steps=steps, **choices)

    with pytest.raises(InvalidValue, match="coupled"):
        attach(Chase(sparsity=0.8, every=4))
    with pytest.raises(InvalidValue, match="twice"):
        attach(replace(chase(model), families=(families[0], families[0])))
    with pytest.raises(InvalidValue, match="not families"):
        attach(replace(chase(model), families=("conv1",)))
    with pytest.raises(MaskMismatch, match="another model"):
        attach(replace(chase(model), families=families_of(Residual())))
    with pytest.raises(MaskMismatch, match="reaches beyond"):
        attach(replace(chase(model), families=families_of(Plain(widths=(9, 12, 14)))))
    with pytest.raises(MaskMismatch, match="cannot be removed"):
        attach(chase(model), exclude="head.weight")
    with pytest.raises(UnknownName, match="umm"):
        attach(chase(model, channel_score="um"))
    with pytest.raises(InvalidValue, match="channel_sparsity"):
        attach(chase(model, channel_sparsity=1.0))
    with pytest.raises(InvalidValue, match="after exploration"):
        attach(chase(model, channel_end="0.9dur"))
    with pytest.raises(ScheduleTooShort):
        attach(chase(model, channel_end=0))
    with pytest.raises(ScheduleTooShort, match="longer"):
        attach(SoftBound(every=4, explore_end=50))
    with pytest.raises(Infeasible, match="remove fewer"):
        attach(chase(model, sparsity=0.3, channel_sparsity=0.6))
    with pytest.raises(InvalidValue, match="since"):
        attach(SoftBound(every=4, since=-1))
    with pytest.raises(InvalidValue, match="masks it had"):
        attach(SoftBound(every=4, since=8))
    with pytest.raises(InvalidValue, match="origin"):
        attach(chase(model, origin={"body.0.weight:0": (8, 9, 1)}))
    with pytest.raises(InvalidValue, match="bound"):
        attach(SoftBound(every=4, bound=1.5))


def test_describe_is_json():
    described = chase(Plain(), origin={"body.0.weight:0": (8, 9, 1)}).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["families"][0]["name"] == "body.0.weight:0"
