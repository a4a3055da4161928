"""The shared suites: what every unit, score, budget, method and mask file must do, as functions that take a row.

Each function raises AssertionError with a message that says what went wrong for which row. A new registry row is
checked without a new test; `test_suites.py` also runs every suite on broken rows, for which it must fail.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunus
from awkward import MLP, Case
from prunus.budget.budgets import Budget, Problem, RowWise, budget, decide
from prunus.budget.registry import BudgetInfo
from prunus.budget.select import keep_count
from prunus.catalog import Entry
from prunus.errors import DamagedFile, Infeasible, InvalidValue, NonFinite, PrunusError, ScheduleTooShort
from prunus.hold import state_tensors
from prunus.masks import Masks
from prunus.methods.base import Method
from prunus.methods.gradual import Gradual
from prunus.methods.registry import MethodInfo
from prunus.methods.regrow import Regrow
from prunus.oneshot import load, pack
from prunus.parameters import Address, parameters_of, prunable, unwrap
from prunus.scores.registry import ScoreInfo
from prunus.sparsifier import Sparsifier
from prunus.stats import GATHERERS, gather
from prunus.units import NM, Block, Row, Unit, Weight, unit

DATA_KINDS = ("none", "inputs", "labelled", "example")


def require(condition: object, message: str) -> None:
    """Raise AssertionError with `message` unless `condition` holds (suites are no test modules: no rewriting)."""
    if not condition:
        raise AssertionError(message)


def check_row(row: Entry) -> None:
    """A catalogue row: every column filled, the object importable, the description JSON-ready."""
    for column in fields(row):
        value = getattr(row, column.name)
        if column.name in ("aliases", "needs") and isinstance(value, tuple):
            continue
        if isinstance(value, str):
            require(value.strip(), f"{row.name}: column {column.name!r} is empty")
    require(row.name == row.name.lower() and " " not in row.name, f"{row.name!r} is not lower case joined by '-'")
    require(row.load() is not None, f"{row.name}: target {row.target!r} gives nothing")
    require(json.loads(json.dumps(row.describe())) == row.describe(), f"{row.name}: description is not JSON-ready")


# -- keeping a model under watch ----------------------------------------------------------------------------------


def _hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


def _random_states() -> tuple[bytes, bytes, bytes]:
    numpy_state = np.random.get_state()
    return (
        torch.random.get_rng_state().numpy().tobytes(),
        repr(random.getstate()).encode(),
        np.asarray(numpy_state[1]).tobytes() + repr(numpy_state[2:]).encode(),
    )


@contextmanager
def untouched(model: nn.Module, what: str) -> Iterator[None]:
    """Assert that the block leaves weights, buffers, modes, flags, gradients, hooks and random states as they were."""
    tensors = {n: t.detach().clone() for n, t in model.state_dict(keep_vars=True).items()}
    places = dict(model.named_parameters(remove_duplicate=False))
    flags = {n: p.requires_grad for n, p in places.items()}
    gradients = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in places.items()}
    modes = {n: m.training for n, m in model.named_modules()}
    hooks, states = _hooks(model), _random_states()
    yield
    for name, tensor in model.state_dict(keep_vars=True).items():
        same = tensor.dtype == tensors[name].dtype and same_bits(tensor, tensors[name])
        require(same, f"{what} changed the values of {name!r}")
    now = dict(model.named_parameters(remove_duplicate=False))
    require(all(now[n] is places[n] for n in places), f"{what} replaced a parameter object")
    for name, flag in flags.items():
        require(now[name].requires_grad is flag, f"{what} changed requires_grad of {name!r}")
        before, value = gradients[name]
        require(now[name].grad is before, f"{what} replaced .grad of {name!r}")
        require(before is None or same_bits(before, value), f"{what} changed the values of {name!r}.grad")
    for name, module in model.named_modules():
        require(module.training is modes[name], f"{what} changed the training mode of {name!r}")
    require(_hooks(model) == hooks, f"{what} left hooks on the model")
    for kind, before, after in zip(("torch", "random", "numpy"), states, _random_states(), strict=True):
        require(before == after, f"{what} drew from the global random state of {kind}")


def same_bits(a: Tensor, b: Tensor | None) -> bool:
    """Tell whether two tensors hold the same bits (NaN equals NaN, 0 differs from -0)."""
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


# -- units --------------------------------------------------------------------------------------------------------

ADDRESSES: tuple[Address, ...] = (
    Address(name="linear", shape=(6, 10)),
    Address(name="odd", shape=(5, 7)),
    Address(name="vector", shape=(9,), kind="other"),
    Address(name="convolution", shape=(4, 6, 3, 2), kind="conv"),
    Address(name="grouped", shape=(6, 4, 3), kind="conv", groups=3),
    Address(name="depthwise", shape=(6, 1, 3, 3), kind="conv", groups=6),
    Address(name="transposed", shape=(8, 3, 2, 2), kind="conv-transpose", output_axis=1),
    Address(name="grouped transposed", shape=(8, 3, 2, 3), kind="conv-transpose", output_axis=1, groups=2),
    Address(name="embedding", shape=(9, 4), kind="embedding", output_axis=1),
    Address(name="recurrent", shape=(12, 5), kind="recurrent", gates=4),
    Address(name="bilinear", shape=(3, 4, 5), kind="bilinear"),
    Address(name="one", shape=(1, 1)),
)

UNITS: tuple[str, ...] = ("weight", "row", "2:4", "1:4", "4:4", "3:5", "block-2x3", "block-1x4", "block-16x16")


def check_unit(what: Unit, address: Address) -> None:
    """One unit on one layout: pool and spread share an order, sizes add up, patterns hold, ties keep the earlier."""
    where = f"unit {what} on {address.name} {address.shape}"
    require(str(unit(str(what))) == str(what), f"{where}: its text does not name it")
    scores = torch.rand(address.shape, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    pooled = what.pool(scores, address)
    require(torch.equal(scores, before), f"{where}: pool changed its input")
    sizes = what.sizes(address)
    require(sizes.dtype == torch.int64 and sizes.ndim == 1, f"{where}: sizes are not flat int64")
    require(int(sizes.sum()) == address.size, f"{where}: sizes add up to {int(sizes.sum())}, not {address.size}")
    require(pooled.numel() == sizes.numel(), f"{where}: {pooled.numel()} unit scores for {sizes.numel()} sizes")
    for value in (True, False):
        mask = what.spread(torch.full(pooled.shape, value), address)
        require(mask.dtype == torch.bool and mask.shape == address.shape, f"{where}: spread is no mask of that shape")
        require(bool((mask == value).all()), f"{where}: spreading all {value} gives something else")
    owner = torch.full(address.shape, -1)
    for number in range(sizes.numel()):
        keep = torch.zeros(pooled.shape, dtype=torch.bool)
        keep.view(-1)[number] = True
        mask = what.spread(keep, address)
        require(int(mask.sum()) == int(sizes[number]), f"{where}: unit {number} spreads to a size that is not its own")
        require(bool((owner[mask] == -1).all()), f"{where}: unit {number} overlaps another")
        owner[mask] = number
        mean = float(scores[mask].mean())
        require(
            math.isclose(float(pooled.reshape(-1)[number]), mean, rel_tol=1e-5),
            f"{where}: unit {number} does not pool the elements it spreads to",
        )
    level = what.pool(torch.ones(address.shape), address)
    require(bool(torch.isclose(level, torch.ones_like(level)).all()), f"{where}: equal scores pool to different ones")
    dead = torch.full(address.shape, -torch.inf)
    require(bool((what.pool(dead, address) == -torch.inf).all()), f"{where}: dead elements do not pool to -inf")
    if isinstance(what, NM):
        _check_pattern(what, address, where)
    else:
        require(what.density is None, f"{where}: fixes a density although it is no pattern")


def input_lines(address: Address) -> list[list[tuple[int, ...]]]:
    """Return, by brute force over indices, the groups of positions that one output reads along the input axis."""
    lines: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in np.ndindex(*address.shape):
        if len(address.shape) == 1:
            key: tuple[int, ...] = index
        elif address.output_axis == 0:
            key = (index[0], *index[2:])
        else:
            per_group = address.shape[0] // address.groups
            key = (index[0] // per_group, index[1], *index[2:])
        lines.setdefault(key, []).append(index)  # ndindex counts inputs upwards within a line
    return list(lines.values())


def brute_force_pattern(scores: Tensor, address: Address, n: int, m: int) -> Tensor:
    """Return the mask that keeps the n best of each m inputs (ceil(n t / m) of a tail of t), one by one."""
    mask = torch.zeros(address.shape, dtype=torch.bool)
    for line in input_lines(address):
        for start in range(0, len(line), m):
            group = line[start : start + m]
            count = math.ceil(n * len(group) / m)
            for index in sorted(group, key=lambda i: -float(scores[i]))[:count]:
                mask[index] = True
    return mask


def _check_pattern(what: NM, address: Address, where: str) -> None:
    for scores in (
        torch.rand(address.shape, generator=torch.Generator().manual_seed(1)),
        torch.ones(address.shape),
        torch.randint(3, address.shape, generator=torch.Generator().manual_seed(2)).float(),
    ):
        mask = what.choose(scores, address)
        require(torch.equal(mask, brute_force_pattern(scores, address, what.n, what.m)), f"{where}: not the best N")
        require(int(mask.sum()) == what.kept(address), f"{where}: keeps {int(mask.sum())}, says {what.kept(address)}")
        again = what.choose(torch.where(mask, scores + 1, torch.zeros_like(scores)), address)
        require(torch.equal(again, mask), f"{where}: choosing twice gives another mask")


# -- scores -------------------------------------------------------------------------------------------------------


def scores_of(
    info: ScoreInfo, case: Case, model: nn.Module, *, seed: int = 0, train: bool = False
) -> dict[str, Tensor]:
    """Return the scores of all prunable tensors, from whatever evidence the row says it needs."""
    addresses = prunable(model)
    evidence = gather(model, addresses, info.needs, data=case.batches(), seed=seed, train=train)
    function = info.load()
    return {n: function(**{need: evidence[n][need] for need in info.needs}) for n in addresses}


def check_score(info: ScoreInfo, case: Case = MLP) -> None:
    """One score on one model: declared needs, finite numbers of the right shape, an untouched model, one result.

    A score may refuse an awkward model with a typed error; it may not refuse the plain one.
    """
    where = f"score {info.name} on {case}"
    check_row(info)
    require(info.data in DATA_KINDS, f"{where}: data {info.data!r} is not one of {DATA_KINDS}")
    function = info.load()
    parameters = tuple(inspect.signature(function).parameters)
    require(parameters == tuple(info.needs), f"{where}: takes {parameters} but the row says it needs {info.needs}")
    unknown = [need for need in info.needs if need not in GATHERERS]
    require(info.needs and not unknown, f"{where}: needs evidence that nothing gathers: {unknown or 'none at all'}")
    require(info.rounds >= 1, f"{where}: {info.rounds} rounds")

    model = case.build()
    model.train()
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.25)
    addresses = prunable(model)
    for train in (False, True):
        try:
            with untouched(model, where):
                found = scores_of(info, case, model, train=train)
        except PrunusError as error:
            require(case is not MLP, f"{where}: refuses the plain model: {error}")
            require(len(str(error)) > 20, f"{where}: refuses without saying why")
            return
        for name, address in addresses.items():
            score = found[name]
            require(score.shape == address.shape, f"{where}: {name!r} has shape {tuple(score.shape)}")
            require(score.dtype in (torch.float32, torch.float64), f"{where}: {name!r} is {score.dtype}")
            require(bool(torch.isfinite(score).all()), f"{where}: {name!r} has NaN or infinite scores")
            if info.non_negative:
                require(bool((score >= 0).all()), f"{where}: {name!r} has negative scores, the row says it has not")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            again = scores_of(info, case, model, train=train)
        require(
            all(same_bits(found[n], again[n]) for n in found),
            f"{where}: the same seed gives other scores (train={train})",
        )
    if "noise" in info.needs:
        other = scores_of(info, case, model, seed=1)
        require(any(not torch.equal(found[n], other[n]) for n in found), f"{where}: another seed gives the same noise")
    if info.data != "none" and case is MLP:
        _refuses(
            InvalidValue, lambda: prunus.prune(model, 0.5, score=info.name, measure=False), f"{where} without data"
        )


def _refuses(kind: type[PrunusError], call: Callable[[], object], where: str) -> PrunusError:
    try:
        call()
    except kind as error:
        return error
    except Exception as error:
        raise AssertionError(f"{where}: raises {type(error).__name__} instead of {kind.__name__}: {error}") from error
    raise AssertionError(f"{where}: is accepted, {kind.__name__} was due")


# -- budgets ------------------------------------------------------------------------------------------------------

LAYERS: tuple[Address, ...] = (
    Address(name="stem.conv.weight", shape=(8, 3, 3, 3), kind="conv", family="conv"),
    Address(name="body.conv.weight", shape=(12, 8, 3, 3), kind="conv", family="conv"),
    Address(name="body.expand.weight", shape=(20, 12), family="expand"),
    Address(name="body.shrink.weight", shape=(12, 20), family="shrink"),
    Address(name="head.weight", shape=(5, 12), family="head"),
)


def problem_of(
    chosen: Budget,
    density: float,
    *,
    addresses: Sequence[Address] = LAYERS,
    what: Unit | None = None,
    dead: float = 0.0,
    level: bool = False,
    seed: int = 0,
) -> Problem:
    """Return a problem on random (or all equal) scores of which the share `dead` is pruned already."""
    generator = torch.Generator().manual_seed(seed)

    def draw(a: Address) -> Tensor:
        score = torch.ones(a.shape) if level else torch.rand(a.shape, generator=generator) * len(a.name)
        return score.masked_fill(torch.rand(a.shape, generator=generator) < dead, -torch.inf)

    table = {a.name: a for a in addresses}
    scores = {n: draw(a) for n, a in table.items()}
    return Problem(
        addresses=table,
        scores=scores,
        keep=keep_count(sum(a.size for a in addresses), 1 - density),
        unit=what or Weight(),
        ratio_scores={
            s: {n: torch.rand(a.shape, generator=generator) for n, a in table.items()} for s in chosen.needs_scores
        },
        distortion=lambda masks: sum(float(scores[n].clamp_min(0).square()[~m].sum()) for n, m in masks.items()),
    )


def check_budget(info: BudgetInfo) -> None:
    """One budget: exact totals, the best of each tensor, the dead stay dead, ties go to the earlier, units whole."""
    check_row(info)
    where = f"budget {info.name}"
    chosen = budget(info.name)
    require(isinstance(chosen, Budget), f"{where}: the row does not build a Budget")
    require(budget({"name": info.name}) == chosen, f"{where}: building it twice gives different choices")
    _refuses(PrunusError, lambda: budget({"name": info.name, "no_such_option": 1}), f"{where} with an unknown option")

    for density in (0.3, 0.55, 0.8, 1.0):
        for dead in (0.0, 0.1):
            if density * 1.2 > 1 - dead and dead:
                continue
            problem = problem_of(chosen, density, dead=dead)
            _check_division(problem, chosen, f"{where} at density {density} with {dead:.0%} dead")
    _check_ties(problem_of(chosen, 0.5, level=True), chosen, where)
    _check_units(chosen, where)

    bad = problem_of(chosen, 0.5)
    bad.scores["head.weight"].view(-1)[3] = torch.nan
    _refuses(NonFinite, lambda: decide(bad, chosen), f"{where} with a NaN score")
    scarce = problem_of(chosen, 0.9, dead=0.5)
    _refuses(Infeasible, lambda: decide(scarce, chosen), f"{where} asked for more than is left")


def _check_division(problem: Problem, chosen: Budget, where: str) -> None:
    before = {n: s.clone() for n, s in problem.scores.items()}
    masks = decide(problem, chosen)
    require(list(masks) == list(problem.addresses), f"{where}: masks of other tensors, or in another order")
    require(all(torch.equal(before[n], s) for n, s in problem.scores.items()), f"{where}: changed the scores")
    require(masks == decide(problem, chosen), f"{where}: deciding twice gives different masks")
    for name, address in problem.addresses.items():
        mask, score = masks[name], problem.scores[name]
        require(mask.shape == address.shape and mask.dtype == torch.bool, f"{where}: {name!r} has no proper mask")
        require(not bool((mask & (score == -torch.inf)).any()), f"{where}: {name!r} revives pruned entries")
        if isinstance(chosen, RowWise):
            _check_rows(address.rows(mask), address.rows(score), problem.density, f"{where}, {name!r}")
        elif mask.any() and not mask.all():
            worst, best = float(score[mask].min()), float(score[~mask].max())
            require(worst >= best, f"{where}: {name!r} drops {best} but keeps {worst}")
    if not isinstance(chosen, RowWise):
        require(masks.kept == problem.keep, f"{where}: keeps {masks.kept} instead of {problem.keep}")
    if type(chosen).densities is not Budget.densities:
        wished = chosen.densities(problem)
        require(all(0 <= d <= 1 + 1e-9 for d in wished), f"{where}: wishes densities outside [0, 1]: {wished}")


def _check_rows(mask: Tensor, score: Tensor, density: float, where: str) -> None:
    length = mask.shape[1]
    wanted = length - math.floor((1 - density) * length + 1e-9)
    alive = (score > -torch.inf).sum(1)
    require(torch.equal(mask.sum(1), alive.clamp(max=wanted)), f"{where}: rows do not keep {wanted} of {length} each")
    low = score.masked_fill(~mask, torch.inf).min(1).values
    high = score.masked_fill(mask, -torch.inf).max(1).values
    require(bool((low >= high).all()), f"{where}: a row drops a better entry than it keeps")


def _check_ties(problem: Problem, chosen: Budget, where: str) -> None:
    for name, mask in decide(problem, chosen).items():
        rows = problem.addresses[name].rows(mask) if isinstance(chosen, RowWise) else mask.reshape(1, -1)
        for row in rows:
            count = int(row.sum())
            require(bool(row[:count].all()), f"{where}: equal scores of {name!r} do not keep the earlier positions")


def _check_units(chosen: Budget, where: str) -> None:
    for dead in (0.0, 0.6):
        pattern = problem_of(chosen, 0.5, what=NM(2, 4), dead=dead)
        for name, mask in decide(pattern, chosen).items():
            score = pattern.scores[name]
            wanted = brute_force_pattern(score, pattern.addresses[name], 2, 4) & (score > -torch.inf)
            require(torch.equal(mask, wanted), f"{where}: breaks the 2:4 pattern of {name!r} with {dead:.0%} dead")
    for what in (Row(), Block(2, 3)):
        problem = problem_of(chosen, 0.6, what=what)
        try:
            masks = decide(problem, chosen)
        except InvalidValue:
            require(isinstance(chosen, RowWise), f"{where}: refuses {what}")
            continue
        require(0 < masks.kept <= problem.keep, f"{where}: keeps {masks.kept} of {problem.keep} with unit {what}")
        slack = sum(int(what.sizes(a).max()) for a in problem.addresses.values())
        require(masks.kept > problem.keep - slack, f"{where}: wastes {problem.keep - masks.kept} with unit {what}")
        for name, address in problem.addresses.items():
            share = what.pool(masks[name].float(), address)
            whole = (share < 1e-6) | (share > 1 - 1e-6)
            require(bool(whole.all()), f"{where}: splits a unit {what} of {name!r}")


# -- methods ------------------------------------------------------------------------------------------------------

OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
STEPS = 12
STEPS_PER_EPOCH = 3
SPARSITY = 0.6


def short(info: MethodInfo, **choices: Any) -> Method:
    """Return the method with an interval that fits a training of a dozen steps."""
    maker = info.load()
    known = {f.name: f for f in fields(maker)}
    options: dict[str, Any] = {}
    if "every" in known:
        options["every"] = "2ba"
    if "sparsity" in known and known["sparsity"].default is not None:
        options["sparsity"] = SPARSITY
    return maker(**{**options, **choices})


class Loop:
    """A plain training loop on one case, with a method attached in one line."""

    def __init__(
        self,
        method: Method | None,
        case: Case = MLP,
        optimizer: str = "sgd",
        *,
        steps: int = STEPS,
        seed: int = 0,
        masks: Masks | None = None,
        model_seed: int = 0,
    ):
        self.case = case
        self.model = case.build(model_seed)
        self.optimizer = OPTIMIZERS[optimizer]([p for p in self.model.parameters() if p.is_floating_point()])
        self.handle: Sparsifier = prunus.sparsify(
            self.model,
            self.optimizer,
            method,
            steps=steps,
            steps_per_epoch=min(steps, STEPS_PER_EPOCH),
            seed=seed,
            masks=masks,
        )
        self.done = 0

    def step(self) -> None:
        """Take one step on the batch that belongs to it."""
        x, y = self.case.batch(self.done)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x).float(), y).backward()
        self.optimizer.step()
        self.done += 1

    def run(self, steps: int = STEPS) -> Loop:
        """Take several steps."""
        for _ in range(steps):
            self.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        """Return the masked parameters."""
        return {n: p.detach() for n, p in parameters_of(self.model, self.handle.masks).items()}

    def state(self, name: str) -> list[Tensor]:
        """Return the optimizer state of one masked parameter."""
        return list(state_tensors(self.optimizer, parameters_of(self.model, [name])[name]))  # type: ignore[arg-type]


def expected_kept(loop: Loop) -> int:
    """Return how many weights the method must keep in the end."""
    method, addresses = loop.handle.method, loop.handle.addresses
    pattern = unit(getattr(method, "unit", "weight"))
    if isinstance(pattern, NM):
        return sum(pattern.kept(a) for a in addresses.values())
    assert method is not None
    return keep_count(sum(a.size for a in addresses.values()), method.sparsity)


def check_zeros(loop: Loop, where: str) -> None:
    """Pruned entries are exactly zero in weights and, unless dense weights train behind, in optimizer state."""
    handle = loop.handle
    for name, weight in loop.weights().items():
        hole = ~handle.masks[name]
        require(bool((weight[hole] == 0).all()), f"{where}: {name!r} has weights at pruned places at step {loop.done}")
        if handle.masks_state():
            for state in loop.state(name):
                require(bool((state[hole] == 0).all()), f"{where}: optimizer state of {name!r} survives pruning")


def check_method(info: MethodInfo) -> None:
    """One method: filled columns; step methods also in training, saving, resuming, refusing."""
    check_row(info)
    require(info.kind in ("step", "procedure"), f"{info.name}: kind {info.kind!r} is neither step nor procedure")
    require(info.speedup in ("specific", "universal"), f"{info.name}: speedup {info.speedup!r} is not known")
    if info.kind != "step":
        return
    where = f"method {info.name}"
    described = short(info).describe()
    require(json.loads(json.dumps(described)) == described, f"{where}: describe() is not JSON-ready")
    for optimizer in OPTIMIZERS:
        check_training(info, optimizer)
    check_resume(info)
    check_seeds(info)
    check_detach(info)
    check_short_trainings(info)
    check_bad_sparsities(info)


def check_training(info: MethodInfo, optimizer: str) -> None:
    """Zeros after every step, clean growth, nested or constant where the kind of method says so, exact in the end."""
    where = f"method {info.name} with {optimizer}"
    loop = Loop(short(info), optimizer=optimizer)
    method = loop.handle.method
    check_zeros(loop, where)
    for _ in range(STEPS):
        before, dense = loop.handle.masks, method.trains_dense(loop.handle)  # type: ignore[union-attr]
        loop.step()
        after = loop.handle.masks
        require(loop.handle.step == loop.done, f"{where}: counts {loop.handle.step} steps after {loop.done}")
        require(before <= loop.handle.explored and after <= loop.handle.explored, f"{where}: explored misses masks")
        check_zeros(loop, where)
        for name, weight in loop.weights().items():
            grown = after[name] & ~before[name]
            if not grown.any() or dense:
                continue
            require(bool((weight[grown] == 0).all()), f"{where}: weights of {name!r} do not grow from zero")
            for state in loop.state(name):
                require(bool((state[grown] == 0).all()), f"{where}: state of grown weights of {name!r} is not clean")
        if isinstance(method, Gradual):
            require(after <= before, f"{where}: masks are not nested at step {loop.done}")
        if isinstance(method, Regrow) and type(method).after is Regrow.after:
            counts = [r.kept for r in after.table()]
            require(counts == [r.kept for r in before.table()], f"{where}: counts per layer move at step {loop.done}")
    kept, wanted = loop.handle.masks.kept, expected_kept(loop)
    require(kept == wanted, f"{where}: keeps {kept} in the end, {wanted} were asked for")
    if isinstance(method, Regrow):
        require(loop.handle.explored.kept > kept, f"{where}: never exchanged a weight")


def snapshot(loop: Loop) -> dict[str, Any]:
    """Return everything a checkpoint holds, copied, with the JSON part through text."""
    state = loop.handle.state_dict()
    return {
        "model": {n: t.clone() for n, t in loop.model.state_dict().items()},
        "optimizer": copy.deepcopy(loop.optimizer.state_dict()),
        "handle": {
            "tensors": {n: t.clone() for n, t in state["tensors"].items()},
            "values": json.loads(json.dumps(state["values"])),
        },
    }


def same_state(a: Loop, b: Loop, where: str) -> None:
    """Weights, masks, explored, memory and optimizer state of two loops are equal bit for bit."""
    for name, value in a.model.state_dict().items():
        require(same_bits(value, b.model.state_dict()[name]), f"{where}: {name!r} differs")
    require(a.handle.masks == b.handle.masks, f"{where}: masks differ")
    require(a.handle.explored == b.handle.explored, f"{where}: explored masks differ")
    require(set(a.handle.memory) == set(b.handle.memory), f"{where}: memory has other keys")
    for key, value in a.handle.memory.items():
        require(same_bits(value, b.handle.memory[key]), f"{where}: memory {key!r} differs")
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        left, right = a.optimizer.state.get(p, {}), b.optimizer.state.get(q, {})
        require(set(left) == set(right), f"{where}: optimizer state has other keys")
        for key, value in left.items():
            same = same_bits(value, right[key]) if isinstance(value, Tensor) else value == right[key]
            require(same, f"{where}: optimizer state {key!r} differs")


def check_resume(info: MethodInfo) -> None:
    """A run cut anywhere and continued from its saved state equals the run that was never cut, bit for bit."""
    whole = Loop(short(info), optimizer="adam").run()
    for cut in (1, 7, 8):
        where = f"method {info.name} resumed after step {cut}"
        first = Loop(short(info), optimizer="adam").run(cut)
        saved = snapshot(first)
        second = Loop(short(info), optimizer="adam", model_seed=3)
        second.model.load_state_dict(saved["model"])
        second.optimizer.load_state_dict(saved["optimizer"])
        second.handle.load_state_dict(saved["handle"])
        second.done = cut
        same_state(first, second, where + ", at once")
        second.run(STEPS - cut)
        same_state(whole, second, where)
    other = Loop(short(info), optimizer="adam", steps=STEPS + 2)
    before = other.handle.masks.digest(), other.handle.step
    _refuses(InvalidValue, lambda: other.handle.load_state_dict(saved["handle"]), f"{where} in a longer training")
    require(before == (other.handle.masks.digest(), other.handle.step), f"{where}: a refused state changed the handle")


def check_seeds(info: MethodInfo) -> None:
    """One seed, one result; the global random state is left alone; other seeds matter where positions are random."""
    where = f"method {info.name}"
    loops = []
    for disturbance in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(disturbance)
            before = _random_states()
            loops.append(Loop(short(info)).run())
            require(before == _random_states(), f"{where}: drew from the global random state")
    same_state(*loops, f"{where} run twice")
    other = Loop(short(info), seed=1).run()
    method = other.handle.method
    if isinstance(method, Regrow) or getattr(method, "score", "") == "random":
        require(other.handle.masks != loops[0].handle.masks, f"{where}: another seed gives the same masks")
    else:
        same_state(loops[0], other, f"{where} with another seed, which it should not depend on")


def check_detach(info: MethodInfo) -> None:
    """After detach nothing is held any more: pruned weights move, steps are not counted."""
    loop = Loop(short(info)).run(8)
    loop.handle.detach()
    masks, step = loop.handle.masks, loop.handle.step
    loop.run(2)
    require(loop.handle.masks is masks and loop.handle.step == step, f"method {info.name}: goes on after detach")
    moved = any(bool((w[~masks[n]] != 0).any()) for n, w in loop.weights().items())
    require(moved, f"method {info.name}: pruned weights are still held after detach")


def check_short_trainings(info: MethodInfo) -> None:
    """With its own defaults, a training of a few steps is refused, or reaches the target: nothing in between."""
    refused = 0
    for steps in (1, 2, 3, 5):
        where = f"method {info.name} with default choices in {steps} steps"
        try:
            loop = Loop(short(info, **_defaults(info)), steps=steps)
        except ScheduleTooShort as error:
            refused += 1
            require("longer" in str(error), f"{where}: does not say that longer training helps: {error}")
            continue
        loop.run(steps)
        kept, wanted = loop.handle.masks.kept, expected_kept(loop)
        require(kept == wanted, f"{where}: is accepted but keeps {kept} instead of {wanted}")
        if isinstance(loop.handle.method, Regrow):
            require(loop.handle.explored.kept > kept, f"{where}: is accepted but never exchanges a weight")
    model = MLP.build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for steps in (0, -3, 2.5, True, "10"):
        with untouched(model, f"method {info.name} refused for steps={steps!r}"):
            _refuses(
                InvalidValue,
                lambda steps=steps: prunus.sparsify(model, optimizer, short(info), steps=steps),  # type: ignore[misc]
                f"method {info.name} with steps={steps!r}",
            )
    # An interval longer than the training must be noticed by whoever has one (one-shot cuts need no interval).
    if "every" in {f.name for f in fields(info.load())} and getattr(info.load(), "curve", "") != "oneshot":
        _refuses(
            ScheduleTooShort,
            lambda: Loop(short(info, every="50ba"), steps=10),
            f"method {info.name} with an interval of 50 steps in a training of 10",
        )


def _defaults(info: MethodInfo) -> dict[str, Any]:
    return {f.name: f.default for f in fields(info.load()) if f.name == "every"}


BAD_SPARSITIES: tuple[Any, ...] = ("90%", 1.0, -0.1, math.nan, 90, True, math.inf, None)


def check_bad_sparsities(info: MethodInfo) -> None:
    """Impossible sparsities are refused with the value in the message, and nothing is changed or attached."""
    model = MLP.build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for value in BAD_SPARSITIES:
        if value is None and short(info).sparsity is None:
            continue  # a pattern decides
        where = f"method {info.name} with sparsity={value!r}"
        with untouched(model, where):
            error = _refuses(
                InvalidValue,
                lambda value=value: prunus.sparsify(  # type: ignore[misc]
                    model, optimizer, short(info, sparsity=value), steps=STEPS, steps_per_epoch=STEPS_PER_EPOCH
                ),
                where,
            )
        named = repr(value) in str(error) or (isinstance(value, float) and f"{value:g}" in str(error))
        require(named, f"{where}: the message does not name it: {error}")
        attached = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        require(attached == 0, f"{where}: left hooks on the optimizer")


def check_method_on(info: MethodInfo, case: Case) -> None:
    """A step method trains an awkward model for a few steps without breaking it, with zeros held."""
    if info.kind != "step":
        return
    where = f"method {info.name} on {case}"
    steps = 5
    loop = Loop(short(info), case, steps=steps)
    for _ in range(steps):
        loop.step()
        check_zeros(loop, where)
    output = loop.model(case.batch()[0])
    require(bool(torch.isfinite(output.float()).all()), f"{where}: outputs are not finite any more")
    masks = loop.handle.masks
    require(masks.kept > 0, f"{where}: nothing is left")
    require(set(masks) == set(prunable(loop.model)), f"{where}: masks other tensors than the prunable ones")
    require(loop.handle.masks.parameters(unwrap(loop.model)) is not None, f"{where}: masks do not fit")


# -- files --------------------------------------------------------------------------------------------------------


def _damaged(read: Callable[[bytes], object], data: bytes, where: str) -> None:
    try:
        read(data)
    except DamagedFile:
        return
    except Exception as error:
        raise AssertionError(f"{where}: raises {type(error).__name__} ({error}) instead of DamagedFile") from error
    raise AssertionError(f"{where}: is read as if nothing had happened")


def check_bytes(data: bytes, read: Callable[[bytes], object], where: str, *, every: int = 1) -> None:
    """No single flipped bit, and no truncation or extension, goes unnoticed."""
    for position in range(0, len(data) * 8, every):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << (position % 8)
        _damaged(read, bytes(flipped), f"{where} with bit {position} flipped")
    for length in range(0, len(data), max(1, len(data) // 64)):
        _damaged(read, data[:length], f"{where} cut to {length} bytes")
    for extra in (b"\0", b" ", data):
        _damaged(read, data + extra, f"{where} with {len(extra)} bytes added")


def check_masks_file(masks: Masks, folder: Path, *, masks_type: type[Masks] = Masks) -> None:
    """Saving and loading give equal masks; a missing or damaged file says so and names the path."""
    path = folder / "masks.safetensors"
    masks.save(path)
    loaded = masks_type.load(path)
    require(loaded == masks and list(loaded) == list(masks), "masks do not survive saving and loading")
    require(loaded.digest() == masks.digest(), "the digest changes with saving and loading")
    require(all(m.dtype == torch.bool for m in loaded.values()), "loaded masks are not bool")
    data = path.read_bytes()
    require(masks.to_bytes() == data, "the same masks give other bytes the second time")
    packed = sum(-(-m.numel() // 8) for m in masks.values())
    require(len(data) < packed + 600 + 120 * len(masks), f"{len(data)} bytes for {packed} bytes of bits: not packed")
    check_bytes(data, masks_type.from_bytes, "a mask file")
    missing = folder / "nowhere" / "masks.safetensors"
    error = _refuses(DamagedFile, lambda: masks_type.load(missing), "a missing mask file")
    require(str(missing) in str(error), "a missing mask file is not named")
    path.write_bytes(data[:40])
    error = _refuses(DamagedFile, lambda: masks_type.load(path), "a truncated mask file")
    require(str(path) in str(error), "a truncated mask file is not named")


def check_model_file(
    model: nn.Module, masks: Masks, fresh: Callable[[], nn.Module], folder: Path, *, every: int = 1
) -> None:
    """A packed model comes back bit for bit; damage is noticed and leaves the model that was to be filled alone."""
    masks.apply(model)
    path = folder / "model.safetensors"
    data = pack(model, masks)
    path.write_bytes(data)
    target, loaded = load(path, fresh(), with_masks=True)
    require(loaded == masks, "masks do not survive the model file")
    for name, value in unwrap(model).state_dict().items():
        back = unwrap(target).state_dict()[name]
        same = torch.equal(value, back) if name in masks else same_bits(value, back)  # -0 at pruned places becomes 0
        require(same and value.dtype == back.dtype, f"{name!r} does not survive the model file")
    witness = fresh()

    def read(broken: bytes) -> object:
        with mock.patch.object(Path, "read_bytes", return_value=broken):  # thousands of real files take long
            return load(path, witness)

    with untouched(witness, "reading damaged model files"):
        check_bytes(data, read, "a model file", every=every)


def projected_lstm_notice() -> pytest.MarkDecorator:
    """Return the mark that silences torch's own notice about projected LSTMs on CPUs."""
    return pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
