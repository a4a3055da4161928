"""`sparsify` in hand-written loops: identical masks and bits to trainings in which every method is written out."""

from __future__ import annotations

import copy
import math
import runpy
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus
from loop_reference import (
    METHODS,
    STEPS,
    assert_same,
    backward,
    batch,
    by_hand,
    method,
    network,
    weights_of,
)
from prunus.errors import Unsupported
from prunus.hold import Hold, bare_optimizer

EXAMPLES = Path(__file__).parents[1] / "examples"

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam-amsgrad-foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, centered=True, momentum=0.5),
}


@pytest.fixture(autouse=True)
def one_thread():
    """These nets are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start_of(handle, name):
    """Random starts are handed to the training written by hand; the others it must find itself."""
    return {n: m.clone() for n, m in handle.masks.items()} if name in ("RigL", "GraNet") else None


def pair(name, make=OPTIMIZERS["momentum"], dtype=torch.float64, **options):
    """Return a model with the method attached, and a twin with the same weights and nothing attached."""
    model, twin = network(dtype), network(dtype)
    optimizer = make(model.parameters())
    handle = prunus.sparsify(model, optimizer, method(name), steps=STEPS, **options)
    return model, optimizer, handle, twin, make(twin.parameters()), start_of(handle, name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_under_every_optimizer_equals_it_written_by_hand(name, kind):
    model, optimizer, handle, twin, other, start = pair(name, OPTIMIZERS[kind])
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
    keep = by_hand(twin, other, name, lambda step: backward(twin, step), start=start)
    assert handle.step == STEPS
    assert_same(model, handle.masks, twin, keep)
    if name != "ISSP":
        assert all(bool((p[~handle.masks[n]] == 0).all()) for n, p in weights_of(model).items())


@pytest.mark.parametrize("broken", ["gradients", "state"])
def test_the_comparison_notices_what_is_not_masked(broken, monkeypatch):
    if broken == "gradients":
        monkeypatch.setattr(Hold, "_mask_gradients", lambda self: None)
    monkeypatch.setattr("prunus.hold.state_tensors", lambda optimizer, parameter: ())
    model, optimizer, handle, twin, other, start = pair("RigL")
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
    keep = by_hand(twin, other, "RigL", lambda step: backward(twin, step), start=start)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(model, handle.masks, twin, keep)


@pytest.mark.parametrize("name", METHODS)
def test_accumulated_gradients_give_the_masks_of_the_big_batch(name):
    model, optimizer, handle, twin, other, start = pair(name)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in zip(*(t.chunk(4) for t in batch(step))):
            (F.cross_entropy(model(x), y) / 4).backward()
        optimizer.step()
    keep = by_hand(twin, other, name, lambda step: backward(twin, step), start=start)
    # Sums in another order: float64 dust, which must not reach the masks.
    assert_same(model, handle.masks, twin, keep, rtol=1e-10)


def backward_in_autocast(model, step, dtype=torch.bfloat16, scale=1.0):
    model.zero_grad()
    x, y = batch(step, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        loss = F.cross_entropy(model(x), y)
    (loss * scale).backward()


@pytest.mark.parametrize("name", METHODS)
def test_bf16_autocast(name):
    model, optimizer, handle, twin, other, start = pair(name, dtype=torch.float32)
    for step in range(STEPS):
        backward_in_autocast(model, step)
        optimizer.step()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    keep = by_hand(twin, other, name, lambda step: backward_in_autocast(twin, step), start=start)
    assert_same(model, handle.masks, twin, keep)


@pytest.mark.parametrize("kind", ["momentum", "adamw-fused"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_skipped_by_the_gradient_scaler_does_not_count(name, kind):
    """Infinite gradients at two steps, one of them where an exchange would have been due.

    A fused optimizer is called even then and unscales inside its kernel: the method must not see either.
    """
    overflow = {2, 6}
    model, optimizer, handle, twin, other, start = pair(name, OPTIMIZERS[kind], torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(STEPS + len(overflow)):
        optimizer.zero_grad()
        x, y = batch(step, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if step in overflow:
            model[3].weight.grad[0, 0] = math.inf
        before, masks = handle.step, handle.masks.digest()
        weights = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        if step in overflow:
            assert handle.step == before
            assert handle.masks.digest() == masks
            assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    assert handle.step == STEPS

    scale = 2.0**10

    def fill(step):
        nonlocal scale
        if step in overflow:
            scale /= 2
            return False
        backward_in_autocast(twin, step, torch.float16, scale)
        for p in twin.parameters():
            p.grad /= scale
        return True

    keep = by_hand(twin, other, name, fill, start=start, steps=STEPS + len(overflow))
    assert_same(model, handle.masks, twin, keep)


def test_the_gradient_scaler_may_unscale_first_to_clip():
    model, optimizer, handle, twin, other, start = pair("RigL", OPTIMIZERS["adamw-fused"], torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(step, dtype=torch.float32)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()

    def fill(step):
        backward(twin, step)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)

    assert_same(model, handle.masks, twin, by_hand(twin, other, "RigL", fill, start=start))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", METHODS)
def test_compiled_models(name, when):
    check_compiled(name, when, "eager", 0.0)


@pytest.mark.parametrize("name", ["RigL", "SRSTE"])
def test_models_compiled_with_their_backward_pass(name):
    check_compiled(name, "after", "aot_eager", 0.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ on the path")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("name", METHODS)
def test_models_compiled_to_machine_code(name):
    check_compiled(name, "after", "inductor", 1e-9)


def check_compiled(name, when, backend, rtol):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, twin = network(), network()
    compiled = torch.compile(model, backend=backend)
    optimizer, other = (OPTIMIZERS["momentum"](m.parameters()) for m in (model, twin))
    # Attached to the wrapper or to the module inside: names and masks are the module's own.
    handle = prunus.sparsify(compiled if when == "after" else model, optimizer, method(name), steps=STEPS)
    start = start_of(handle, name)
    for step in range(STEPS):
        backward(compiled, step)
        optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "changing masks must not compile again"
    keep = by_hand(twin, other, name, lambda step: backward(twin, step), start=start)
    assert_same(model, handle.masks, twin, keep, rtol=rtol)


@pytest.mark.parametrize("name", METHODS)
def test_parameter_groups_frozen_and_foreign_parameters(name):
    """Two groups with rates of their own; the middle layer belongs to no optimizer; the last has a frozen bias."""

    def prepare(model):
        model[5].bias.requires_grad_(False)
        groups = [
            {"params": [model[0].weight], "lr": 0.2, "weight_decay": 0.01},
            {"params": [model[0].bias, model[5].weight, model[5].bias]},
        ]
        return model, torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    model, optimizer = prepare(network())
    twin, other = prepare(network())
    foreign = model[3].weight.detach().clone()
    handle = prunus.sparsify(model, optimizer, method(name), steps=STEPS)
    start = start_of(handle, name)
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
    keep = by_hand(twin, other, name, lambda step: backward(twin, step), start=start)
    assert_same(model, handle.masks, twin, keep)
    if name in ("Static", "GMP"):
        assert torch.equal(model[3].weight, foreign * handle.masks["3.weight"])


SCHEDULES = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "warmup": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.StepLR(o, 4),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", METHODS)
def test_learning_rate_schedules(name, kind):
    """Schedulers replace `optimizer.step` by a counting wrapper; attaching before or after them is the same."""
    model, twin = network(), network()
    optimizer, other = (OPTIMIZERS["momentum"](m.parameters()) for m in (model, twin))
    schedule = SCHEDULES[kind](optimizer)
    handle = prunus.sparsify(model, optimizer, method(name), steps=STEPS)
    start = start_of(handle, name)
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        schedule.step()
    reference = SCHEDULES[kind](other)
    fill = lambda step: backward(twin, step)  # noqa: E731
    keep = by_hand(twin, other, name, fill, start=start, after=reference.step)
    assert_same(model, handle.masks, twin, keep)


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_that_exist_only_inside_a_closure(name, how):
    model, optimizer, handle, twin, other, start = pair(name, OPTIMIZERS["adam"])
    for step in range(STEPS):

        def closure(step=step):
            backward(model, step)
            return torch.tensor(float(step))

        returned = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
        assert float(returned) == step
    keep = by_hand(twin, other, name, lambda step: backward(twin, step), start=start)
    assert_same(model, handle.masks, twin, keep)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_with_a_fixed_mask(search):
    model, twin = network(), network()

    def make(m):
        return torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4, line_search_fn=search)

    def closure_for(m, keep=None):
        def closure():
            backward(m, 0)
            for n, w in weights_of(m).items() if keep else ():
                w.grad[~keep[n]] = 0.0
            return F.cross_entropy(m(batch(0)[0]), batch(0)[1]).detach()

        return closure

    optimizer, other = make(model), make(twin)
    handle = prunus.sparsify(model, optimizer, method("Static"), steps=3)
    keep = {n: m.clone() for n, m in handle.masks.items()}
    for n, w in weights_of(twin).items():
        w.data[~keep[n]] = 0.0
    losses = [float(optimizer.step(closure_for(model))) for _ in range(3)]
    for _ in range(3):
        other.step(closure_for(twin, keep))
    assert handle.step == 3
    assert losses[-1] < losses[0]
    assert_same(model, handle.masks, twin, keep)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "Static"])
def test_lbfgs_refuses_methods_that_move_masks(name):
    model = network()
    with pytest.raises(Unsupported, match=f"LBFGS.*{name}"):
        prunus.sparsify(model, torch.optim.LBFGS(model.parameters()), method(name), steps=STEPS)


@pytest.mark.parametrize("name", METHODS)
def test_continuing_in_a_fresh_process_state(name):
    """Model, optimizer and handle saved after 7 of 12 steps and put into new objects go on bit for bit."""
    model, optimizer, handle, twin, other, start = pair(name, OPTIMIZERS["adam"])
    for step in range(7):
        backward(model, step)
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    model, optimizer = network(seed=1), None
    optimizer = OPTIMIZERS["adam"](model.parameters())
    handle = prunus.sparsify(model, optimizer, method(name), steps=STEPS)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    handle.load_state_dict(saved[2])
    for step in range(7, STEPS):
        backward(model, step)
        optimizer.step()
    keep = by_hand(twin, other, name, lambda step: backward(twin, step), start=start)
    assert_same(model, handle.masks, twin, keep)


def test_detached_handles_leave_the_loop_alone():
    model, optimizer, handle, twin, other, _ = pair("Static")
    handle.detach()
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), model.parameters()):
            mine.copy_(theirs)
    for step in range(3):
        for m, o in ((model, optimizer), (twin, other)):
            backward(m, step)
            o.step()
    assert_same(model, {}, twin, {})
    assert handle.step == 0


def test_wrappers_are_looked_through_and_lookalikes_are_not():
    inner = torch.optim.SGD(network().parameters(), lr=0.1)

    class AcceleratedOptimizer(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    class LightningOptimizer:
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.__class__ = type("LightningSGD", (LightningOptimizer, torch.optim.SGD), {})

    class Lookahead(torch.optim.SGD):
        """A real optimizer that happens to own another one: its own step is what the loop calls."""

        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, lr=0.1)
            self.optimizer = optimizer

    assert bare_optimizer(inner) is inner
    assert bare_optimizer(AcceleratedOptimizer(inner)) is inner
    assert bare_optimizer(AcceleratedOptimizer(LightningOptimizer(inner))) is inner
    outer = Lookahead(inner)
    assert bare_optimizer(outer) is outer
    with pytest.raises(prunus.errors.InvalidValue, match="object is not a torch optimizer"):
        bare_optimizer(object())


def test_the_example_prunes_in_one_added_line():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"](epochs=2)
    assert outcome.sparsity == pytest.approx(0.9, abs=1e-3)
    assert outcome.accuracy > 0.5
