"""Whether the engine can compute a network, whoever wrote it down; asked before addresses are made. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from prunus.errors import InvalidValue
from prunus.runtime.network import Layer, Network, Shape
from prunus.runtime.records import ACTIVATIONS

_INPUTS = {"input": 0, "add": 2, "multiply": 2}  # all others take one; "concatenate" one or more
_OPTIONS = {
    "convolution": {"stride", "padding", "dilation", "groups"},
    "max_pool": {"kernel", "stride", "padding", "dilation"},
    "average_pool": {"kernel", "stride", "padding", "dilation"},
}
_PLAIN = ("input", "linear", "mean", "add", "multiply", "activation", "concatenate", "flatten")
_OF_ROWS = ("input", "linear", "add", "multiply", "activation")
_ACTIVE = ("convolution", "linear", "add", "multiply", "activation")
_MOST = 1 << 16  # of a stride, padding, dilation, kernel size
_FEATURES = 1 << 21  # times the bytes of the widest tile this still fits 31 bits
_BYTES = 1 << 31  # of a value, per image; the kernels' offsets have 31 bits


def check(network: Network, shapes: Sequence[Shape], *, rows: bool) -> None:
    """Do nothing if the engine can compute a network for inputs of these shapes, without batch.

    Args:
        network: its weights are arrays; everything else may be anything.
        shapes: of the inputs.
        rows: whether inputs are rows of features with any leading axes.

    Raises:
        InvalidValue: it cannot; the message says where and why.
    """
    ranks: dict[str, int] = {}
    given = list(shapes)
    if len(given) != len(network.inputs) or not given:
        raise InvalidValue(f"{len(given)} shapes are given for {len(network.inputs)} inputs.")
    for shape in given:
        if len(shape) not in ((1,) if rows else (1, 3)) or not all(_whole(n, 1, _BYTES) for n in shape):
            raise InvalidValue(f"an input cannot have shape {shape}.")
    waiting = iter(given)
    for layer in network.layers:
        _wants(bool(layer.name) and layer.name not in ranks, layer, "has no name of its own")
        _operator(layer, rows=rows)
        _wants(all(name in ranks for name in layer.reads), layer, "reads what no layer before it makes")
        if layer.op == "input":
            ranks[layer.name] = len(next(waiting))
            continue
        read = {ranks[name] for name in layer.inputs}
        wanted = {"linear": {1}, "add": {1, 3}, "multiply": {1, 3}, "activation": {1, 3}}.get(layer.op, {3})
        _wants(len(read) == 1 and read <= wanted, layer, f"reads values of {sorted(read)} axes")
        ranks[layer.name] = 1 if layer.op in ("linear", "flatten") else read.pop()
    if not network.outputs or not all(name in ranks for name in network.outputs):
        raise InvalidValue("the network returns nothing, or what no layer makes.")
    found = network.shapes(given)
    by_name = {layer.name: layer for layer in network.layers}
    for name, shape in found.items():
        _wants(4 * math.prod(shape) < _BYTES, by_name[name], f"makes a value of shape {shape}, too large")
    for layer in network.layers:
        if layer.op in _OPTIONS:
            channels, *sizes = found[layer.inputs[0]]
            around = [n + 2 * p for n, p in zip(sizes, layer.options["padding"], strict=True)]
            _wants(4 * channels * math.prod(around) < _BYTES, layer, "has too much padding")


def _operator(layer: Layer, *, rows: bool) -> None:
    """Check what belongs to one layer alone."""
    known = layer.op in _OPTIONS or layer.op in _PLAIN
    _wants(known and (not rows or layer.op in _OF_ROWS), layer, f"is {layer.op!r}, no operator that there is")
    count = len(layer.inputs)
    _wants(count == _INPUTS.get(layer.op, 1) or (layer.op == "concatenate" and count > 1), layer, f"has {count} inputs")
    _wants(layer.activation in ACTIVATIONS, layer, f"has activation {layer.activation!r}")
    _wants(layer.activation == "none" or layer.op in _ACTIVE, layer, "has an activation, which it cannot")
    _wants(type(layer.slope) in (int, float) and abs(layer.slope) < 1e30, layer, f"has slope {layer.slope!r}")
    weighs = layer.op in ("convolution", "linear")
    _wants(layer.residual is None or weighs, layer, "has a residual, which it cannot")
    options = layer.options
    _wants(options.keys() == _OPTIONS.get(layer.op, set()), layer, f"has options {sorted(options)}")
    for name, value in options.items():
        if name != "groups":
            _wants(_pair(value, 0 if name == "padding" else 1), layer, f"has {name} {value!r}")
    if layer.op in ("max_pool", "average_pool"):
        windows = [d * (k - 1) + 1 for k, d in zip(options["kernel"], options["dilation"], strict=True)]
        fits = all(2 * p <= w for p, w in zip(options["padding"], windows, strict=True))
        _wants(fits and math.prod(options["kernel"]) <= _FEATURES, layer, "has more padding than window")
    if not weighs:
        _wants(layer.weight is None and layer.bias is None, layer, "has weights, which it cannot")
        return
    weight, bias = layer.weight, layer.bias
    sound = isinstance(weight, np.ndarray) and weight.dtype == np.float32 and weight.size > 0
    _wants(sound, layer, "has no float32 weight")
    assert weight is not None
    _wants(weight.ndim == (4 if layer.op == "convolution" else 2), layer, f"has a weight of shape {weight.shape}")
    _wants(bias is None or (bias.dtype == np.float32 and bias.shape == weight.shape[:1]), layer, "has no fitting bias")
    out, inputs = weight.shape[:2]
    if layer.op == "convolution":
        groups = options["groups"]
        _wants(_whole(groups, 1, out) and out % groups == 0, layer, f"has {groups!r} groups")
        inputs *= groups
        # For images of one pixel, groups are spelled out as a matrix.
        _wants(groups == 1 or out * inputs < 1 << 30, layer, "has too many channels")
        _wants(max(weight.shape[2:]) <= _MOST, layer, "has too large a kernel")
    _wants(max(out, inputs) <= _FEATURES, layer, f"has more than {_FEATURES} features")


def _wants(holds: bool, layer: Layer, otherwise: str) -> None:
    if not holds:
        raise InvalidValue(f"layer {(layer.label or layer.name)[:80]!r} {otherwise}.")


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(least <= value <= most)


def _pair(value: Any, least: int) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(_whole(n, least, _MOST) for n in value)
