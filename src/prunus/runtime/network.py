"""What the engine computes: a list of layers on named values, with numpy weights. Needs no torch.

Values are images (channels, height, width) or rows (features,), each for a batch of any size, which is not part of a
shape. A pruned weight is a zero; single ones contribute nothing, even where an activation is infinite or not a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.errors import InvalidValue

Array = NDArray[np.float32]
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """One operator.

    Attributes:
        op: one of `OPERATORS`.
        name: of the value it makes; unique in a network.
        inputs: names of the values it reads.
        weight: of "convolution" (out, in / groups, height, width) or "linear" (out, in), float32.
        bias: (out,), or None.
        residual: name of a value that is added before the activation, or None.
        activation: one of `prunus.runtime.records.ACTIVATIONS`.
        slope: of a leaky ReLU.
        options: numbers of the operator: stride, padding, dilation (pairs), groups, kernel, count_padding.
        label: where it comes from in the model, for reports.
    """

    op: str
    name: str
    inputs: tuple[str, ...] = ()
    weight: Array | None = None
    bias: Array | None = None
    residual: str | None = None
    activation: str = "none"
    slope: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all values it reads."""
        return self.inputs if self.residual is None else (*self.inputs, self.residual)


OPERATORS = (
    "input",
    "convolution",
    "linear",
    "max_pool",
    "average_pool",
    "mean",
    "add",
    "multiply",
    "activation",
    "concatenate",
    "flatten",
)


@dataclass(frozen=True, eq=False)
class Network:
    """Layers in the order they run.

    Attributes:
        layers: each reads only what earlier ones make.
        outputs: names of the values returned.
    """

    layers: tuple[Layer, ...]
    outputs: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(layer.name for layer in self.layers if layer.op == "input")

    def shapes(self, given: Sequence[Shape]) -> dict[str, Shape]:
        """Return the shape of every value, without batch, from those of the inputs.

        Raises:
            InvalidValue: the inputs do not fit the weights, or a layer would have no output.
        """
        if len(given) != len(self.inputs):
            raise InvalidValue(f"the network takes {len(self.inputs)} inputs, {len(given)} were given.")
        found: dict[str, Shape] = {}
        waiting = iter(given)
        for layer in self.layers:
            if layer.op == "input":
                found[layer.name] = tuple(next(waiting))
                continue
            found[layer.name] = shape_of(layer, [found[name] for name in layer.inputs])
            if layer.residual is not None and found[layer.residual] != found[layer.name]:
                raise InvalidValue(f"{layer.label or layer.name} adds {found[layer.residual]} to {found[layer.name]}.")
        return found


def shape_of(layer: Layer, inputs: Sequence[Shape]) -> Shape:
    """Return the shape that a layer makes from its inputs' shapes, all without batch.

    Raises:
        InvalidValue: they do not fit.
    """
    x = inputs[0]
    where = layer.label or layer.name
    if layer.op == "convolution":
        assert layer.weight is not None
        out, per_group, *kernel = layer.weight.shape
        groups = layer.options["groups"]
        if len(x) != 3 or x[0] != per_group * groups:
            raise InvalidValue(f"{where} reads {per_group * groups} channels, it was given {x}.")
        sizes = [
            _extent(n, k, s, p, d, where)
            for n, k, s, p, d in zip(
                x[1:],
                kernel,
                layer.options["stride"],
                layer.options["padding"],
                layer.options["dilation"],
                strict=True,
            )
        ]
        return (out, *sizes)
    if layer.op == "linear":
        assert layer.weight is not None
        if len(x) != 1 or x[0] != layer.weight.shape[1]:
            raise InvalidValue(f"{where} reads {layer.weight.shape[1]} features, it was given {x}.")
        return (layer.weight.shape[0],)
    if layer.op in ("max_pool", "average_pool"):
        o = layer.options
        sizes = [
            _extent(n, k, s, p, d, where)
            for n, k, s, p, d in zip(x[1:], o["kernel"], o["stride"], o["padding"], o["dilation"], strict=True)
        ]
        return (x[0], *sizes)
    if layer.op == "mean":
        return (x[0], 1, 1)
    if layer.op == "flatten":
        return (math.prod(x),)
    if layer.op == "concatenate":
        if any(s[1:] != x[1:] for s in inputs):
            raise InvalidValue(f"{where} joins values of shapes {list(inputs)}.")
        return (sum(s[0] for s in inputs), *x[1:])
    if layer.op in ("add", "multiply"):
        a, b = inputs
        if a == b or (len(b) == 3 and b == (a[0], 1, 1)):
            return a
        raise InvalidValue(f"{where} meets {a} and {b}.")
    return x


def _extent(size: int, kernel: int, stride: int, padding: int, dilation: int, where: str) -> int:
    found = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    if found < 1:
        raise InvalidValue(f"{where} has no output for an input of {size} positions; give larger inputs.")
    return found


def folded(layer: Layer, scale: Array, shift: Array) -> Layer:
    """Return a convolution or linear layer followed by y -> scale * y + shift, as one layer; both shape (out,)."""
    assert layer.weight is not None
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    bias = shift if layer.bias is None else layer.bias * scale + shift
    return replace(layer, weight=weight.astype(np.float32), bias=np.asarray(bias, np.float32))


def density(layer: Layer) -> float:
    """Return the share of weights that are not zero; 1 for a layer without weights."""
    return 1.0 if layer.weight is None or not layer.weight.size else np.count_nonzero(layer.weight) / layer.weight.size
