"""How many hidden units are switched off: the dynamic dead-neuron rate.

Source: Liu, Ghosh, Tan and Motani, "AP: Selective activation for de-sparsifying pruned neural networks", TMLR 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunus.errors import InvalidValue, NonFinite
from prunus.measure.forwarding import batch_size, call, device_of, evaluating, inputs_of, to_device

# A unit behind one of these is off when its output is exactly zero.
RECTIFIERS: frozenset[Callable[..., Any]] = frozenset(
    [F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6]
)
# These are rectifiers when their floor is zero; nn.ReLU6 is built on them.
CLIPPED: frozenset[Callable[..., Any]] = frozenset([F.hardtanh, F.hardtanh_])
# These have no flat side, or no exact zero: a unit counts as off when its pre-activation is negative.
SMOOTH: frozenset[Callable[..., Any]] = frozenset(
    (
        *(F.gelu, F.silu, F.mish, F.elu, F.elu_, F.selu, F.selu_, F.celu, F.celu_, F.hardswish, F.softplus),
        *(F.leaky_relu, F.leaky_relu_, F.prelu, F.rrelu, F.rrelu_, Tensor.prelu, torch.prelu),
        *(torch.selu, torch.selu_, torch.celu, torch.celu_, torch.rrelu, torch.rrelu_),
    )
)


@dataclass(frozen=True)
class LayerActivity:
    """Activity behind one activation function.

    Attributes:
        units: activation values per example (channels times positions).
        off: share of (example, unit) pairs that are off.
        always_off: share of units that were off for every example seen (static dead units); None when the number of
            units differs between batches (sequences of different lengths).
        kind: "zero output" for ReLU and ReLU6, "negative input" for GELU and the other smooth functions.
    """

    units: int
    off: float
    always_off: float | None
    kind: str


@dataclass(frozen=True)
class Activity:
    """Activity of a whole network.

    Attributes:
        dead_rate: dynamic dead-neuron rate: the share of (example, unit) pairs that are off, over all layers.
        always_off: share of units off for every example seen; None when a layer's is None.
        layers: one entry per activation, named after the module that computes it, in order of first use; a second
            use inside the same module is "name#2".
        n: how many examples.
    """

    dead_rate: float
    always_off: float | None
    layers: dict[str, LayerActivity]
    n: int


def activity(model: nn.Module, batches: Iterable[Any]) -> Activity:
    """Measure how many hidden units are off, in eval mode and without gradients; modes are restored.

    A unit is one value behind an activation function: a neuron of a linear layer, or a channel at one position of a
    convolution. The rate averages over examples and units, so a layer weighs as much as it has units. Activation
    modules and functional calls (`F.relu(x)`, `torch.relu`, `x.relu()`) are both seen; `clamp(min=0)` is not.
    For functions without a flat side (GELU, SiLU, leaky ReLU, ...) the share of negative pre-activations is taken.

    Args:
        model: any module that runs eagerly; a compiled or scripted one hides its activations.
        batches: yields x, (x, y) or (x, y, ids); moved to the device of the model.

    Raises:
        InvalidValue: no examples, or no activation function was seen.
        NonFinite: an activation is NaN.
    """
    device = device_of(model)
    watch = _Watch()
    n = 0
    with ExitStack() as stack, evaluating(model), torch.inference_mode():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(watch.entering(name)).remove)
            stack.callback(module.register_forward_hook(watch.leaving, always_call=True).remove)
        for batch in batches:
            x = to_device(inputs_of(batch), device)
            if batch_size(x) == 0:
                continue
            watch.begin()
            with watch:
                call(model, x)
            n += batch_size(x)
    if n == 0:
        raise InvalidValue("no examples to measure activity on: the batches were empty.")
    if not watch.tallies:
        raise InvalidValue(
            "no activation function was seen in the forward pass; the rate is defined for ReLU-like functions, "
            "called as modules or through torch.nn.functional in a model that runs eagerly."
        )
    return watch.result(n)


def dead_neuron_rate(model: nn.Module, batches: Iterable[Any]) -> float:
    """Return `activity(model, batches).dead_rate`: between 0 (all units on, always) and 1 (all off)."""
    return activity(model, batches).dead_rate


def _floor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the lower limit in a call of hardtanh(input, min_val=-1.0, max_val=1.0)."""
    return float(args[1] if len(args) > 1 else kwargs.get("min_val", -1.0))


class _Tally:
    """Counts for one activation."""

    def __init__(self, kind: str):
        self.kind = kind
        self.off = 0
        self.total = 0
        self.units = 0
        self.always: Tensor | None = None
        self.ragged = False

    def add(self, off: Tensor) -> None:
        """Count a bool tensor of shape (batch, ...)."""
        self.off += int(off.sum())
        self.total += off.numel()
        units = off.numel() // len(off)
        always = off.reshape(len(off), units).all(dim=0)
        if self.always is None:
            self.always = always
        elif len(self.always) == units:
            self.always &= always
        else:
            self.ragged = True
        self.units = max(self.units, units)

    def result(self) -> LayerActivity:
        assert self.always is not None
        always_off = None if self.ragged else int(self.always.sum()) / self.units
        return LayerActivity(self.units, self.off / self.total, always_off, self.kind)


class _Watch(TorchFunctionMode):
    """Sees every activation function that is called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.tallies: dict[str, _Tally] = {}
        self.path: list[str] = []
        self.calls: dict[str, int] = {}

    def begin(self) -> None:
        """Start counting the calls of a new forward pass."""
        self.calls = {}
        self.path = []

    def entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.path.append(name)

        return hook

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self.path.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RECTIFIERS or (func in CLIPPED and _floor(args, kwargs) == 0.0):
            output = func(*args, **kwargs)
            self._see(output, output == 0, "zero output")
            return output
        if func in SMOOTH:
            # Before the call: it may overwrite its input.
            before = args[0] if args else kwargs["input"]
            self._see(before, before < 0, "negative input")
        return func(*args, **kwargs)

    def _see(self, values: Tensor, off: Tensor, kind: str) -> None:
        where = self.path[-1] if self.path else ""
        self.calls[where] = self.calls.get(where, 0) + 1
        number = self.calls[where]
        name = where or "model"
        name = name if number == 1 else f"{name}#{number}"
        if off.ndim == 0 or len(off) == 0:
            return
        if bool(torch.isnan(values).any()):
            raise NonFinite(f"the activations of {name!r} contain NaN; the weights or the inputs are broken.")
        self.tallies.setdefault(name, _Tally(kind)).add(off)

    def result(self, n: int) -> Activity:
        layers = {name: tally.result() for name, tally in self.tallies.items()}
        total = sum(t.total for t in self.tallies.values())
        units = sum(l.units for l in layers.values())
        always: float | None = 0.0
        for layer in layers.values():
            always = None if always is None or layer.always_off is None else always + layer.always_off * layer.units
        return Activity(
            dead_rate=sum(t.off for t in self.tallies.values()) / total,
            always_off=None if always is None else always / units,
            layers=layers,
            n=n,
        )
