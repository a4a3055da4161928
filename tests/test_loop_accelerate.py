"""`sparsify` under Hugging Face Accelerate: the bits of trainings written out by hand."""

from __future__ import annotations

import importlib.util
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import prunus
from loop_reference import METHODS, STEPS, assert_same, backward, batch, by_hand, method, network

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs `pip install accelerate`")


@pytest.fixture
def accelerator():
    """A maker of fresh accelerators: Accelerate shares one state per process, which is reset around each test."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield lambda **options: Accelerator(cpu=True, **options)
    reset()


@pytest.fixture(autouse=True)
def one_thread():
    """These nets are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, foreach=True)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def start_of(handle, name):
    return {n: m.clone() for n, m in handle.masks.items()} if name in ("RigL", "GraNet") else None


def prepared(accelerator, name, when, make=sgd, dtype=torch.float64):
    """Return net, its prepared model, the prepared optimizer and the handle, attached before or after `prepare`."""
    net = network(dtype)
    optimizer = make(net.parameters())
    if when == "before":
        handle = prunus.sparsify(net, optimizer, method(name), steps=STEPS)
        model, wrapped = accelerator.prepare(net, optimizer)
    else:
        model, wrapped = accelerator.prepare(net, optimizer)
        handle = prunus.sparsify(model, wrapped, method(name), steps=STEPS)
    assert type(wrapped).__name__ == "AcceleratedOptimizer"
    assert handle.optimizer is optimizer
    return net, model, wrapped, handle


def loss_of(model, step, dtype=torch.float64):
    x, y = batch(step, dtype=dtype)
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", METHODS)
def test_prepared_before_or_after(name, when, make, accelerator):
    accelerator = accelerator()
    net, model, optimizer, handle = prepared(accelerator, name, when, make)
    start = start_of(handle, name)
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, step))
        optimizer.step()
    twin = network()
    keep = by_hand(twin, make(twin.parameters()), name, lambda step: backward(twin, step), start=start)
    assert handle.step == STEPS
    assert_same(net, handle.masks, twin, keep)


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_clipping_and_a_prepared_schedule(name, accelerator):
    """Inside `accumulate`, the wrapper leaves out optimizer, schedule and zero_grad calls; those do not count."""
    accelerator = accelerator(gradient_accumulation_steps=2)
    net, model, optimizer, handle = prepared(accelerator, name, "after")
    start = start_of(handle, name)

    def make_schedule(o):
        return torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS)

    schedule = accelerator.prepare(make_schedule(handle.optimizer))
    for step in range(STEPS):
        for number, (x, y) in enumerate(zip(*(t.chunk(2) for t in batch(step)))):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            assert handle.step == step + number
    twin = network()

    def fill(step):
        twin.zero_grad()
        for x, y in zip(*(t.chunk(2) for t in batch(step))):
            (F.cross_entropy(twin(x), y) / 2).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)

    other = sgd(twin.parameters())
    keep = by_hand(twin, other, name, fill, start=start, after=make_schedule(other).step)
    assert_same(net, handle.masks, twin, keep)


@pytest.mark.parametrize("name", METHODS)
def test_bf16(name, accelerator):
    accelerator = accelerator(mixed_precision="bf16")
    net, model, optimizer, handle = prepared(accelerator, name, "before", adamw, torch.float32)
    start = start_of(handle, name)
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, step, torch.float32))
        optimizer.step()
    twin = network(torch.float32)

    def fill(step):
        twin.zero_grad()
        x, y = batch(step, dtype=torch.float32)
        # Accelerate puts only the forward pass under autocast, and gives its output back in float32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = twin(x)
        F.cross_entropy(output.float(), y).backward()

    keep = by_hand(twin, adamw(twin.parameters()), name, fill, start=start)
    assert_same(net, handle.masks, twin, keep)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_scaler_inside_the_wrapper(name, fused, accelerator):
    """Accelerate replaces `optimizer.step` while its scaler decides; a step skipped for infinite gradients is none."""
    from accelerate.optimizer import AcceleratedOptimizer

    def make(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, fused=fused)

    accelerator()
    net = network(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = AcceleratedOptimizer(make(net.parameters()), scaler=scaler)
    handle = prunus.sparsify(net, optimizer, method(name), steps=STEPS)
    start = start_of(handle, name)
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, step, torch.float32)).backward()
        if step == 5:
            net[5].weight.grad[0, 0] = math.inf
        optimizer.step()
        assert handle.step == step + (step < 5)
    twin = network(torch.float32)

    def fill(step):
        backward(twin, step)
        return step != 5

    keep = by_hand(twin, make(twin.parameters()), name, fill, start=start, steps=STEPS + 1)
    # A scale that is a power of two changes no bit.
    assert_same(net, handle.masks, twin, keep)


def test_the_example_without_accumulation_is_the_plain_example(accelerator, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = runpy.run_path(str(EXAMPLES / "accelerate_loop.py"))
    accumulated = example["main"](epochs=3)
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    single = example["main"](epochs=2, accumulate=1)
    plain = sys.modules["plain_loop"].main(epochs=2)
    sys.modules.pop("plain_loop", None)
    assert vars(single) == vars(plain)
    assert accumulated.sparsity == plain.sparsity
    assert accumulated.accuracy > 0.5
