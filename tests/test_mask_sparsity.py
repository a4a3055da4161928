"""MaskSparsity: penalties on victims alone, thresholds and votes by hand, exact cuts, and the whole procedure."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunus
from prunus.budget.channels import above_energy, above_threshold, vote
from prunus.errors import (
    DamagedFile,
    Infeasible,
    InvalidValue,
    MaskMismatch,
    NonFinite,
    NothingPrunable,
    UnknownName,
    Unsupported,
)
from prunus.graph.couple import couple
from prunus.graph.plan import Plan
from prunus.graph.record import record
from prunus.masks import Masks
from prunus.methods.mask_sparsity import MaskSparsity, agreed, norm_scales, scale_masks
from prunus.methods.penalties import PENALTIES, scale_penalty
from prunus.procedures.mask_sparsity import mask_sparsity
from prunus.run.plan import Planner
from prunus.structured.folding import fold_constants, silenced
from small_runs import Watched, digits_run, normed_run

vectors = st.lists(st.floats(-3, 3, allow_nan=False), min_size=1, max_size=9)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(make, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.0, 1.0)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        return model


class Chain(nn.Module):
    """Convolutions with BatchNorm; the second has no bias, so only its norm can take a constant."""

    def __init__(self, padding: int = 0):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, padding=padding), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3, padding=padding, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class Stage(nn.Module):
    """A residual stage: a projection and two blocks whose last norms are added up."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu()
        x = (x + self.bn1(self.conv1(x))).relu()
        return self.head((x + self.bn2(self.conv2(x))).relu().mean((2, 3)))


X = torch.randn(5, 1, 7, 7, generator=torch.Generator().manual_seed(3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 7, 7, generator=generator), torch.randint(3, (8,), generator=generator)


def train(method, *, steps: int = 6, kind: str = "sgd", watch=None) -> nn.Module:
    model = seeded(Chain)
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=0.01)
    )
    handle = None if method is None else prunus.sparsify(model, optimizer, method, steps=steps)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if watch is not None:
            watch(model)
        optimizer.step()
    if handle is not None:
        assert handle.step == steps
    return model


def keep_all(value: bool) -> Masks:
    return Masks({n: torch.full(p.shape, value) for n, p in norm_scales(seeded(Chain)).items()})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- the penalty ----------------------------------------------------------------------------------------------------


def test_penalties_by_hand():
    scale = torch.tensor([2.0, -0.5, 0.0, 0.001, -3.0])
    victims = torch.tensor([True, True, True, True, False])
    assert scale_penalty(scale, victims, 0.1).tolist() == pytest.approx([0.1, -0.1, 0, 0.1, 0])
    assert scale_penalty(scale, victims, 0.1, "l2").tolist() == pytest.approx([0.2, -0.05, 0, 0.0001, 0])
    # Below rate * strength = 0.05 the smooth penalty is the square's: one step does not cross zero.
    smooth = scale_penalty(scale, victims, 0.1, "smooth-l1", rate=0.5)
    assert smooth.tolist() == pytest.approx([0.1, -0.1, 0, 0.0001, 0])


@settings(max_examples=50, deadline=None)
@given(vectors, st.sampled_from(PENALTIES), st.floats(0, 1))
def test_penalty_touches_victims_alone_and_pulls_towards_zero(values, kind, strength):
    scale = torch.tensor(values, dtype=torch.float64)
    victims = torch.arange(len(values)) % 2 == 0
    term = scale_penalty(scale, victims, strength, kind, rate=0.1)
    assert not bool(term[~victims].any())
    assert bool((term * scale >= 0).all())
    if kind == "l1":
        loss = torch.nn.Parameter(scale.clone())
        (strength * (loss.abs() * victims).sum()).backward()
        assert torch.equal(term, loss.grad)


def test_penalty_refuses():
    with pytest.raises(UnknownName, match="smooth-l1"):
        scale_penalty(torch.ones(2), torch.ones(2, dtype=torch.bool), 0.1, "smooth")
    with pytest.raises(InvalidValue, match="victims"):
        scale_penalty(torch.ones(2), torch.ones(2), 0.1)


# -- choosing channels ----------------------------------------------------------------------------------------------


def test_threshold_and_energy_by_hand():
    scale = torch.tensor([0.5, -0.009, 0.011, -0.01])
    assert above_threshold(scale).tolist() == [True, False, True, False]
    assert above_threshold(torch.tensor([0.001, -0.003, 0.002])).tolist() == [False, True, False]
    assert above_threshold(torch.tensor([0.001, -0.003, 0.002]), minimum=2).tolist() == [False, True, True]
    # Squares 1, 4, 16, 100 of 121: 5 / 121 = 4.1 % fits under 5 %, 21 / 121 does not.
    assert above_energy(torch.tensor([4.0, -1.0, 10.0, 2.0]), 0.05).tolist() == [True, False, True, False]
    assert above_energy(torch.tensor([4.0, -1.0, 10.0, 2.0]), 0.0).all()
    assert above_energy(torch.tensor([2e-4, -9e-4, 1e-4])).tolist() == [False, True, False]
    assert above_energy(torch.zeros(3)).tolist() == [True, False, False]
    assert above_energy(torch.tensor([0.0, 0.0, 1.0])).tolist() == [False, False, True]
    assert above_energy(torch.tensor([1.0, 1.0, 10.0]), 0.015).all()  # equal scales at the border stay together


@settings(max_examples=80, deadline=None)
@given(vectors, st.floats(0, 0.9))
def test_energy_takes_the_longest_prefix(values, share):
    scale = torch.tensor(values, dtype=torch.float64)
    keep = above_energy(scale, share, negligible=0.0)
    squares = scale.square()
    assert keep.any()
    gone = squares[~keep]
    if len(gone) < len(values) - 1 or bool(squares.any()):
        assert float(gone.sum()) <= share * float(squares.sum()) * (1 + 1e-12) + 1e-300
        # The next group of equal scales would not fit.
        following = squares[keep].min()
        more = gone.sum() + following * (squares == following).sum()
        if len(squares.unique()) > 1 and following < squares.max():
            assert float(more) > share * float(squares.sum()) * (1 - 1e-12)


def test_scales_that_cannot_be_ranked_are_refused():
    with pytest.raises(NonFinite):
        above_threshold(torch.tensor([1.0, torch.nan]))
    with pytest.raises(InvalidValue, match="vector"):
        above_energy(torch.ones(2, 2))
    with pytest.raises(InvalidValue, match="vector"):
        above_threshold(torch.ones(0))
    with pytest.raises(InvalidValue, match="share"):
        above_energy(torch.ones(2), 1.0)
    with pytest.raises(InvalidValue, match="minimum"):
        above_threshold(torch.ones(2), minimum=0)
    with pytest.raises(InvalidValue, match="threshold"):
        above_threshold(torch.ones(2), -1.0)
    with pytest.raises(UnknownName, match="ratio"):
        scale_masks({"a": torch.ones(2)}, "ration")
    with pytest.raises(InvalidValue, match="ratio"):
        scale_masks({"a": torch.ones(2)}, "ratio", ratio=1.0)


def test_ratio_counts_are_exact():
    scales = {"a": torch.tensor([3.0, -1.0, 2.0, 0.5]), "b": torch.tensor([1.0, 2.0, 3.0])}
    masks = scale_masks(scales, "ratio", ratio=0.5)
    assert masks["a"].tolist() == [True, False, True, False]
    assert int(masks["b"].sum()) == 1
    assert scale_masks(scales, "ratio", ratio=0.99, minimum=2)["b"].tolist() == [False, True, True]


def test_vote_hand_case():
    layers = [[False, False, True, True], [True, False, False, True], [True, False, True, True]]
    assert vote([torch.tensor(layer) for layer in layers]).tolist() == [True, False, True, True]
    assert vote([torch.tensor(layers[0]), torch.ones(4, dtype=torch.bool)]).all()
    assert vote([torch.tensor(layers[0])]).tolist() == layers[0]
    with pytest.raises(InvalidValue, match="one length"):
        vote([torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
    with pytest.raises(InvalidValue):
        vote([])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.randoms(use_true_random=False))
def test_vote_is_the_largest_that_gives_enough(channels, layers, random):
    keeps = [torch.tensor([random.random() < 0.5 for _ in range(channels)]) for _ in range(layers)]
    votes = [sum(not bool(k[i]) for k in keeps) for i in range(channels)]
    fewest = min(sum(not bool(v) for v in k) for k in keeps)
    expected = [True] * channels
    if fewest:
        best = max(v for v in range(layers + 1) if sum(n >= v for n in votes) >= fewest)
        expected = [n < best for n in votes]
    assert vote(keeps).tolist() == expected


def test_coupled_norms_vote():
    model = seeded(Stage)
    families = couple(record(model.eval(), X)).families
    stream = next(f for f in families if f.name.startswith("stem"))
    keep = {
        "bn0.weight": torch.tensor([False, False, True, True]),
        "bn1.weight": torch.tensor([True, False, False, True]),
        "bn2.weight": torch.tensor([True, False, True, True]),
    }
    assert agreed(keep, families)[stream.name].tolist() == [True, False, True, True]
    assert stream.name not in agreed({"bn0.weight": keep["bn0.weight"]}, families)


# -- the step method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_without_victims_it_is_plain_training_bit_for_bit(kind):
    plain = train(None, kind=kind)
    assert same(plain, train(MaskSparsity(keep=keep_all(True)), kind=kind))
    assert same(plain, train(MaskSparsity(keep=Masks({})), kind=kind))
    assert not same(plain, train(MaskSparsity(keep=keep_all(False)), kind=kind))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_with_all_channels_as_victims_it_is_network_slimming(kind):
    def slimming(model):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.grad.add_(5e-4 * torch.sign(module.weight.detach()))

    by_hand = train(None, kind=kind, watch=slimming)
    assert same(by_hand, train(MaskSparsity(keep=keep_all(False)), kind=kind))
    assert same(by_hand, train(MaskSparsity(), kind=kind))


def test_keep_is_not_read_the_wrong_way_round():
    keep = Masks({"bn1.weight": torch.tensor([True, True, True, False, False, False])})
    model = train(MaskSparsity(keep=keep, strength=0.05), steps=20)
    plain = train(None, steps=20)
    shrunk = model.bn1.weight.abs() / plain.bn1.weight.abs()
    assert float(shrunk[3:].detach().max()) < 1 < float(shrunk[:3].detach().max()) + 0.5
    assert float(model.bn1.weight[3:].abs().detach().sum()) < float(plain.bn1.weight[3:].abs().detach().sum())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradients_differ_by_the_penalty_of_the_victims_alone(penalty):
    keep = Masks({"bn1.weight": torch.tensor([True, False, True, False, True, True])})
    seen = {}
    for method in (None, MaskSparsity(keep=keep, strength=0.25, penalty=penalty)):
        model = seeded(Chain)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if method is not None:
            prunus.sparsify(model, optimizer, method, steps=2)
        x, y = batch(0)
        F.cross_entropy(model(x), y).backward()
        before = copy.deepcopy(model.state_dict())
        optimizer.step()
        seen[method is None] = {n: before[n] - p.detach() for n, p in model.named_parameters()}
    scale = dict(seeded(Chain).named_parameters())["bn1.weight"].detach()
    expected = scale_penalty(scale, ~keep["bn1.weight"], 0.25, penalty, rate=1.0)
    for name, plain in seen[True].items():
        difference = seen[False][name] - plain
        if name == "bn1.weight":
            assert torch.allclose(difference, expected, atol=1e-6)
            assert not bool(difference[keep["bn1.weight"]].any())
        else:
            assert not bool(difference.any()), name


def test_plan_cuts_the_mask_or_small_scales():
    model = seeded(Chain)
    coupling = couple(record(model.eval(), X))
    keep = Masks({"bn1.weight": torch.tensor([True, False, True, False, True, True])})
    plan = MaskSparsity(keep=keep).plan(model, coupling)
    assert plan.keep["conv1.weight:0"] == [0, 2, 4, 5]
    assert "conv2.weight:0" not in plan.keep
    with torch.no_grad():
        model.bn2.weight.copy_(torch.tensor([0.5, 0.009, -0.02, -0.001, 0.3]))
        model.bn1.weight.fill_(1.0)
    plan = MaskSparsity().plan(model, coupling)
    assert plan.keep["conv2.weight:0"] == [0, 2, 4]
    assert MaskSparsity().plan(model, coupling, threshold=0.4).keep["conv2.weight:0"] == [0]


def test_weights_masks_are_held_as_given():
    model = seeded(Chain)
    masks = prunus.prune(model, 0.5, measure=False).masks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = prunus.sparsify(model, optimizer, MaskSparsity(), steps=3, masks=masks)
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert handle.masks == masks
    assert all(not bool(p.detach()[~masks[n]].any()) for n, p in model.named_parameters() if n in masks)


def test_a_cut_training_goes_on_bit_for_bit():
    method = MaskSparsity(keep=keep_all(False), strength=0.01, penalty="smooth-l1")

    def loop():
        model = seeded(Chain)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, prunus.sparsify(model, optimizer, method, steps=8)

    def run(parts, first, last):
        model, optimizer, _ = parts
        for step in range(first, last):
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return parts

    whole = run(loop(), 0, 8)
    first = run(loop(), 0, 3)
    second = loop()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    state = first[2].state_dict()
    second[2].load_state_dict({"tensors": state["tensors"], "values": json.loads(json.dumps(state["values"]))})
    assert same(whole[0], run(second, 3, 8)[0])
    other = prunus.sparsify(seeded(Chain), loop()[1], MaskSparsity(), steps=8)
    with pytest.raises(InvalidValue, match="method"):
        other.load_state_dict(state)


def test_step_method_refuses():
    def attach(method, model=None, **choices):
        model = seeded(Chain) if model is None else model
        return prunus.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method, steps=4, **choices)

    with pytest.raises(MaskMismatch, match=r"bn3\.weight"):
        attach(MaskSparsity(keep=Masks({"bn3.weight": torch.ones(6, dtype=torch.bool)})))
    with pytest.raises(MaskMismatch, match=r"\(4,\)"):
        attach(MaskSparsity(keep=Masks({"bn1.weight": torch.ones(4, dtype=torch.bool)})))
    with pytest.raises(InvalidValue, match="Masks"):
        attach(MaskSparsity(keep={"bn1.weight": torch.ones(6, dtype=torch.bool)}))
    with pytest.raises(UnknownName, match="l1"):
        attach(MaskSparsity(penalty="l3"))
    for bad in (-1.0, float("nan"), float("inf"), "much", True):
        with pytest.raises(InvalidValue, match="strength"):
            attach(MaskSparsity(strength=bad))
    with pytest.raises(InvalidValue, match="when the channels are cut"):
        attach(MaskSparsity(sparsity=0.5))
    with pytest.raises(NothingPrunable, match="GroupNorm"):
        attach(MaskSparsity(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    model = seeded(Chain)
    optimizer = torch.optim.SGD([model.conv1.weight, model.head.weight], lr=0.1)
    prunus.sparsify(model, optimizer, MaskSparsity(), steps=4)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(Unsupported, match=r"bn1\.weight"):
        optimizer.step()
    described = MaskSparsity(keep=keep_all(True)).describe()
    assert json.loads(json.dumps(described)) == described


# -- exact cuts -----------------------------------------------------------------------------------------------------


def cut_parts(model, keep):
    coupling = couple(record(model.eval(), X))
    plan = Plan.from_keep(coupling, agreed(keep, coupling.families))
    quiet = silenced(model, coupling, plan).eval()
    return coupling, plan, quiet


KEEP = {
    "bn1.weight": torch.tensor([True, False, True, False, True, True]),
    "bn2.weight": torch.tensor([True, True, False, True, True]),
}


@torch.no_grad()
def test_dead_scales_and_shifts_make_the_cut_exact():
    model = seeded(Chain)
    _, plan, quiet = cut_parts(model, KEEP)
    for name, keep in KEEP.items():
        dict(quiet.named_parameters())[name.replace("weight", "bias")][~keep] = 0
    small = plan.apply(quiet).eval()
    assert (small.bn1.num_features, small.bn2.num_features, small.head.in_features) == (4, 4, 4)
    assert torch.allclose(small(X), quiet(X), rtol=1e-5, atol=1e-6)
    assert plan.verify(model, X) < 1e-5


@torch.no_grad()
def test_with_shifts_only_folding_makes_the_cut_exact():
    model = seeded(Chain)
    coupling, plan, quiet = cut_parts(model, KEEP)
    wanted = quiet(X)
    dropped = plan.apply(quiet).eval()(X)
    assert float((dropped - wanted).abs().max()) > 1e-2
    before = copy.deepcopy(model.state_dict())
    folded = fold_constants(model, coupling, plan, X)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert set(folded.constants) == {"conv2.weight", "head.weight"}
    assert folded.skipped == {}
    small = plan.apply(folded.model).eval()
    assert torch.allclose(small(X), wanted, rtol=1e-5, atol=1e-6)
    # The convolution without a bias hands its constant to the norm layer behind it.
    assert not torch.equal(folded.model.bn2.running_mean, model.bn2.running_mean)
    other = torch.randn(4, 1, 9, 9)
    assert torch.allclose(small(other), quiet(other), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_folding_behind_padding_is_exact_inside_the_border():
    model = seeded(lambda: Chain(padding=1))
    coupling, plan, quiet = cut_parts(model, {"bn1.weight": KEEP["bn1.weight"]})
    folded = fold_constants(model, coupling, plan, X)
    small = plan.apply(folded.model).eval()

    def second(net):
        return net.bn2(net.conv2(F.gelu(net.bn1(net.conv1(X)))))

    assert torch.allclose(second(small)[..., 1:-1, 1:-1], second(quiet)[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(second(small)[..., 0, :], second(quiet)[..., 0, :], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_folding_says_what_it_cannot_do():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
            self.conv2 = nn.Conv2d(6, 3, 3, bias=False)
            self.conv3 = nn.Conv2d(1, 4, 1)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.conv2(self.bn1(self.conv1(x)).relu()).mean((2, 3)) + self.head(
                self.conv3(x).sigmoid().mean((2, 3))
            )

    model = seeded(Bare)
    coupling, plan, _ = cut_parts(model, {"bn1.weight": KEEP["bn1.weight"]})
    skipped = fold_constants(model, coupling, plan, X).skipped
    assert "neither a bias" in skipped["conv2.weight"]
    without_norm = Plan.from_keep(coupling, {"conv3.weight:0": torch.tensor([True, False, True, True])})
    assert "not constant" in fold_constants(model, coupling, without_norm, X).skipped["head.weight"]


# -- the whole procedure --------------------------------------------------------------------------------------------

SCALE = "norm.weight"


def test_procedure_cuts_for_real_and_goes_through_its_stages():
    run = normed_run(epochs=4, kind=Watched)
    outcome = mask_sparsity(run.within("m"), sparsity=0.5, epochs=1)
    assert list(run.seen) == ["dense-4", "search", "sparse", "tune"]
    assert outcome.steps == 16
    model = outcome.state.model(run)
    assert (model.conv.out_channels, model.norm.num_features, model.linear.in_features) == (3, 3, 48)
    assert outcome.details["channels_kept"] == {"conv.weight:0": 3}
    start, choices = run.seen["sparse"]
    keep = choices["method"].keep
    assert int(keep[SCALE].sum()) == 3
    searched = start.weights[SCALE].abs()
    assert float(searched[keep[SCALE]].min()) >= float(searched[~keep[SCALE]].max())
    assert run.seen["search"][1]["method"].keep[SCALE].tolist() == [False] * 6
    again = mask_sparsity(normed_run(epochs=4).within("m"), sparsity=0.5, epochs=1)
    assert again.state.digest == outcome.state.digest
    planned: dict[str, int] = {}
    mask_sparsity(Planner.of(normed_run(epochs=4), planned).within("m"), sparsity=0.5, epochs=1)
    assert sum(planned.values()) == 16
    assert json.loads(json.dumps(outcome.details)) == outcome.details


def test_a_ready_mask_is_used_as_it_is(tmp_path):
    keep = [True, False, False, True, True, False]
    masks = Masks({SCALE: torch.tensor(keep)})
    masks.save(tmp_path / "keep.safetensors")
    digests = set()
    for ready in (masks, {SCALE: keep}, {SCALE: np.array(keep)}, str(tmp_path / "keep.safetensors")):
        run = normed_run(kind=Watched)
        outcome = mask_sparsity(run.within("m"), keep=ready, sparsity=0.1)
        assert list(run.seen) == ["dense-4", "sparse", "tune"]
        assert run.seen["sparse"][1]["method"].keep == masks
        start = run.seen["tune"][0]
        big = run.seen["sparse"][0]
        assert start.weights["conv.weight"].shape[0] == 3
        assert big.weights["conv.weight"].shape[0] == 6
        assert outcome.state.shape.plan.keep["conv.weight:0"] == [0, 3, 4]
        digests.add(outcome.state.digest)
    assert len(digests) == 1


def test_the_cut_of_the_procedure_is_the_state_before_it_without_the_victims():
    run = normed_run(kind=Watched)
    keep = {SCALE: [True, False, True, True, False, True]}
    mask_sparsity(run.within("m"), keep=keep, strength=0.0)
    small = run.seen["tune"][0]
    start = run.seen["sparse"][0]
    pushed = run.within("m").train("sparse", **run.seen["sparse"][1])
    kept = torch.tensor(keep[SCALE])
    assert torch.equal(small.weights["conv.weight"], pushed.weights["conv.weight"][kept])
    assert torch.equal(small.weights["norm.running_mean"], pushed.weights["norm.running_mean"][kept])
    assert start.shape is None


def test_folding_in_the_procedure_moves_the_constant_into_the_bias():
    found = {}
    for fold in (False, True):
        run = normed_run(kind=Watched)
        outcome = mask_sparsity(run.within("m"), sparsity=0.5, fold=fold)
        found[fold] = run.seen["tune"][0].weights["linear.bias"]
        assert ("folded" in outcome.details) == fold
    assert not torch.equal(found[False], found[True])


@pytest.mark.parametrize(("rule", "least"), [("threshold", 3), ("energy", 3)])
def test_other_rules_cut_at_most_the_share_asked_for(rule, least):
    run = normed_run(kind=Watched)
    outcome = mask_sparsity(run.within("m"), sparsity=0.5, rule=rule, threshold=5.0, share=0.9)
    assert outcome.details["channels_kept"]["conv.weight:0"] == least
    loose = mask_sparsity(normed_run().within("m"), sparsity=0.5, rule=rule, threshold=0.0, share=0.0)
    assert loose.details["channels_kept"]["conv.weight:0"] == 6


def test_procedure_without_a_search_reads_the_dense_scales():
    run = normed_run(kind=Watched)
    mask_sparsity(run.within("m"), sparsity=0.5, search_epochs=0)
    assert list(run.seen) == ["dense-4", "sparse", "tune"]
    dense = run.seen["sparse"][0].weights[SCALE].abs()
    keep = run.seen["sparse"][1]["method"].keep[SCALE]
    assert float(dense[keep].min()) >= float(dense[~keep].max())


def test_procedure_refuses(tmp_path):
    def refused(kind, hint, **choices):
        with pytest.raises(kind, match=hint):
            mask_sparsity(normed_run().within("m"), **choices)

    refused(UnknownName, "energy", rule="energie")
    refused(UnknownName, "search", start="searched")
    refused(MaskMismatch, "bn7", keep={"bn7.weight": [True]})
    refused(MaskMismatch, "shape", keep={SCALE: [True, False]})
    refused(InvalidValue, "no channel", keep={SCALE: [False] * 6})
    refused(InvalidValue, "bools", keep={SCALE: [1, 0, 1, 0, 1, 0]})
    refused(InvalidValue, "path", keep=3)
    refused(DamagedFile, "nowhere", keep=str(tmp_path / "nowhere"))
    refused(InvalidValue, "sparsity", sparsity=1.0)
    refused(Infeasible, "single channel", sparsity=0.95)
    with pytest.raises(NothingPrunable, match="BatchNorm"):
        mask_sparsity(digits_run(epochs=1, limit=50).within("m"))
