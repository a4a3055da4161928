"""A torch model becomes engine networks and what is left between them.

The model is exported, operators that the engine knows are gathered into regions, and each region is turned into a
`Network` with batch norms folded and activations and residual sums fused into the layers before them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase
from torch.utils._pytree import tree_map

from prunus.errors import InvalidValue, Unsupported
from prunus.graph.record import arguments
from prunus.runtime.network import Array, Layer, Network, folded

aten = torch.ops.aten

_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.gelu.default: "gelu",
    aten.leaky_relu.default: "leaky_relu",
    aten.hardtanh.default: "relu6",
    aten.relu6.default: "relu6",
}
_IN_PLACE = {
    aten.relu_.default: aten.relu.default,
    aten.silu_.default: aten.silu.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.tanh_.default: aten.tanh.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.dropout_.default: aten.dropout.default,
}
_NOTHING = {aten.dropout.default, aten.feature_dropout.default, aten.contiguous.default, aten.clone.default}
_VIEWS = {aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.transpose.int, aten.permute.default,
          aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.expand.default,
          aten.detach.default, aten.alias.default}  # fmt: skip


_SLICE = (("dim", 0), ("start", None), ("end", None), ("step", 1))


class NotForEngine(Exception):
    """A region that the engine does not compute after all."""


def exported(model: nn.Module, example: Any) -> fx.GraphModule:
    """Return the model's graph of ATen operators, for batches of any size where the model allows it.

    Raises:
        Unsupported: torch.export cannot read the model.
        InvalidValue: the model cannot run the example.
    """
    return _exported(model, example, _module)  # type: ignore[no-any-return]


def program_of(model: nn.Module, example: Any) -> torch.export.ExportedProgram:
    """Return the exported program itself, for batches of any size where the model allows it; raises as `exported`."""
    return _exported(model, example, lambda program: program)  # type: ignore[no-any-return]


def _exported(model: nn.Module, example: Any, finish: Callable[[Any], Any]) -> Any:
    args, kwargs = arguments(example)
    with torch.no_grad():
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise InvalidValue(f"the model cannot run the example ({type(error).__name__}: {error}).") from error
        reason = ""
        batch = _batch_of((*args, *kwargs.values()))
        if batch:
            # torch.export takes sizes of 1 for constants, so a single example is doubled.
            twice = [tree_map(lambda v: _doubled(v, batch), part) for part in (args, kwargs)]
            auto = torch.export.Dim.AUTO
            free = {n: {0: auto} if _has_batch(v, batch) else None for n, v in _named(model, args, kwargs).items()}
            try:
                program = torch.export.export(model, *twice, dynamic_shapes=free, strict=False)
                if batch > 1 or any_batch(program):
                    return finish(program)
                reason = "the model's code fixes the batch size"
            except Exception as error:  # whatever a model's code raises
                reason = str(error)
        try:
            return finish(torch.export.export(model, args, kwargs, strict=False))
        except Exception as error:
            reason = f"{type(error).__name__}: {error or reason}".splitlines()[0]
    raise Unsupported(f"torch.export cannot read {type(model).__name__}: {reason}")


def any_batch(program: torch.export.ExportedProgram) -> bool:
    """Return whether an exported program leaves the first size of all its inputs open."""
    users = program.graph_signature.user_inputs
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    return bool(shapes) and all(len(shape) and not is_concrete_int(shape[0]) for shape in shapes)


def _module(program: Any) -> fx.GraphModule:
    """Return the module of an exported program without its checks of inputs, which the engine does itself."""
    module: fx.GraphModule = program.module(check_guards=False)
    module._forward_pre_hooks.clear()
    return module


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names that the forward gives them."""
    import inspect

    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return dict(bound.arguments)


def _doubled(value: Any, batch: int) -> Any:
    return torch.cat([value, value]) if batch == 1 and _has_batch(value, batch) else value


def _batch_of(values: tuple[Any, ...]) -> int:
    """Return the batch size of the example, 0 if its tensors have none in common. One is no sign of a batch."""
    sizes = {v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim}
    return sizes.pop() if len(sizes) == 1 else 0


def _has_batch(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def without_in_place(graph: fx.GraphModule) -> None:
    """Replace operators that write into their input by ones that do not, where nothing else looks at that memory."""
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _IN_PLACE:
            continue
        written = node.args[0]
        shared = written.op != "call_function" or written.target in _VIEWS
        shared = shared or any(user.target in _VIEWS and order[user] < order[node] for user in written.users)
        if shared:
            continue
        node.target = _IN_PLACE[node.target]
        later = [user for user in written.users if order.get(user, math.inf) > order[node]]
        for user in later:
            user.replace_input_with(written, node)
    graph.recompile()


# -- which operators the engine knows ------------------------------------------------------------------------------


def _dims(value: Any) -> int:
    return value.ndim if isinstance(value, Tensor) else -1


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _is_float(node: Any) -> bool:
    value = _value(node)
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.device.type == "cpu"


def _static(node: Any) -> bool:
    """Whether all sizes but the first are numbers."""
    value = _value(node)
    return isinstance(value, Tensor) and all(isinstance(s, int) for s in value.shape[1:])


def known(node: Any) -> bool:
    """Return whether the engine has an operator for a node."""
    if node.op != "call_function" or not _is_float(node):
        return False
    t, a = node.target, node.args
    if t is aten.conv2d.default:
        return (
            _dims(_value(a[0])) == 4
            and _is_parameter(a[1])
            and _static(node)
            and not isinstance(_option(node, 4, "padding", 0), str)
        )
    if t is aten.linear.default:
        return _dims(_value(a[0])) >= 2 and _is_parameter(a[1])
    if t is aten.batch_norm.default:
        return _dims(_value(a[0])) == 4 and not _option(node, 5, "training", False) and _is_parameter(a[3])
    if t in _ACTIVATIONS:
        if t is aten.hardtanh.default:
            return (_option(node, 1, "min_val", -1), _option(node, 2, "max_val", 1)) == (0, 6)
        return True
    if t in (aten.add.Tensor, aten.mul.Tensor):
        return _alike(node)
    if t is aten.max_pool2d.default:
        return _dims(_value(a[0])) == 4 and not _option(node, 5, "ceil_mode", False)
    if t is aten.avg_pool2d.default:
        padded = any(_pair(_option(node, 3, "padding", 0)))
        counted = _option(node, 5, "count_include_pad", True) or not padded
        whole = not _option(node, 4, "ceil_mode", False) and _option(node, 6, "divisor_override", None) is None
        return _dims(_value(a[0])) == 4 and counted and whole
    if t is aten.adaptive_avg_pool2d.default:
        return _dims(_value(a[0])) == 4 and _pair(a[1]) == (1, 1)
    if t is aten.mean.dim:
        axes = {d % 4 for d in a[1]} if _dims(_value(a[0])) == 4 and a[1] is not None else set()
        return axes == {2, 3}
    if t in (aten.slice.Tensor, aten.pad.default):
        return _dims(_value(a[0])) == 4 and _static(a[0]) and _selection(node) is not None
    if t is aten.cat.default:
        axis = _option(node, 1, "dim", 0)
        return axis == 1 and all(_dims(_value(x)) == 4 for x in a[0])
    if t in (aten.flatten.using_ints, aten.view.default, aten.reshape.default):
        return _flattens(node)
    return t in _NOTHING and _dims(_value(node)) in (2, 4)


def _option(node: Any, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    numbers = tuple(value)
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def _is_parameter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("get_attr", "placeholder") and _value(node) is not None


def _alike(node: Any) -> bool:
    one, other = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or not (_is_float(one) and _is_float(other)):
        return False
    a, b = _value(one).shape, _value(other).shape
    if a == b:
        return len(a) >= 2
    if len(a) != 4 or len(b) != 4:
        return False
    large, small = (a, b) if _is_pixel(b) else (b, a)
    return _is_pixel(small) and large[:2] == small[:2]


def _is_pixel(shape: Any) -> bool:
    return len(shape) == 4 and all(isinstance(s, int) and s == 1 for s in shape[2:])


def _selection(node: Any) -> tuple[int, int, int, int] | None:
    """Return (step of rows, step of columns, channels of zeros before, after) of a slice or pad; None for others."""
    a = node.args
    if node.target is aten.slice.Tensor:
        axis, start, end, step = (_option(node, i + 1, n, d) for i, (n, d) in enumerate(_SLICE))
        whole = isinstance(start, int | None) and not start and (end is None or (isinstance(end, int) and end >= 2**31))
        if not whole or (axis not in (2, 3) and step != 1):
            return None
        return (step if axis == 2 else 1, step if axis == 3 else 1, 0, 0)
    around = list(a[1])
    zero = _option(node, 2, "mode", "constant") == "constant" and not _option(node, 3, "value", None)
    channels = len(around) == 6 and not any(around[:4]) and all(isinstance(n, int) and n >= 0 for n in around)
    return (1, 1, around[4], around[5]) if zero and channels else None


def _flattens(node: Any) -> bool:
    x, y = _value(node.args[0]), _value(node)
    return _dims(x) == 4 and _dims(y) == 2 and _static(node.args[0]) and y.shape[1] == math.prod(x.shape[1:])


class _Known(OperatorSupportBase):
    def is_node_supported(self, submodules: Mapping[str, nn.Module], node: fx.Node) -> bool:
        return known(node)


# -- regions -------------------------------------------------------------------------------------------------------


@dataclass
class Region:
    """Part of a model that the engine computes.

    Attributes:
        name: of the module that stands for it in the graph.
        graph: the same in torch.
        network: what the engine computes.
        places: which of the module's arguments are inputs; the others are weights, which the network holds.
        rows: whether inputs are rows of features with any leading axes, rather than images.
    """

    name: str
    graph: fx.GraphModule
    network: Network
    places: tuple[int, ...]
    rows: bool


def regions(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[Region], dict[str, str]]:
    """Gather what the engine knows into modules of the graph.

    Returns:
        (graph, regions, reasons): the graph calls a module per region, and whatever else in torch; reasons name the
        operators that stay in torch.
    """
    without_in_place(graph)
    weights = {node: _tensor(graph, node) for node in graph.graph.nodes if node.op == "get_attr"}
    for node, tensor in weights.items():
        node.meta.setdefault("val", tensor)
    labels = {node.name: _label(node) for node in graph.graph.nodes}
    partitioner = CapabilityBasedPartitioner(graph, _Known(), allows_single_node_partition=True)
    partitions = [p for p in partitioner.propose_partitions() if any(_weighs(n) for n in p.nodes)]
    fused = partitioner.fuse_partitions(partitions)
    found: list[Region] = []
    reasons: dict[str, str] = {}
    for node in list(fused.graph.nodes):
        if node.op == "call_module" and isinstance(getattr(fused, str(node.target), None), fx.GraphModule):
            inner = getattr(fused, node.target)
            given = [_tensor(fused, a) if a.op == "get_attr" else None for a in node.args]
            try:
                network, places, rows = _converted(inner, given, labels)
            except NotForEngine as error:
                reasons[str(node.target)] = str(error)
                continue
            found.append(Region(str(node.target), inner, network, places, rows))
        elif node.op == "call_function" and node.target is not operator.getitem:
            reasons[_label(node) or node.name] = f"{node.target} runs in torch"
    return fused, found, reasons


def _weighs(node: Any) -> bool:
    return node.target in (aten.conv2d.default, aten.linear.default)


def _tensor(graph: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _label(node: fx.Node) -> str:
    """Return the path of the innermost module that an operator belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [p for p, _ in stack.values()][-1] if stack else ""
    return str(path).removeprefix("L['self'].").removeprefix("L__self___").replace("slice(None, None, None)", "")


def _converted(
    graph: fx.GraphModule, given: list[Any], labels: Mapping[str, str]
) -> tuple[Network, tuple[int, ...], bool]:
    """Return (network, which arguments are inputs, whether they are rows)."""
    made = _Converter(labels)
    constants: dict[fx.Node, Tensor] = {}
    places: list[int] = []
    ranks: set[int] = set()
    number = 0
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if given[number] is not None:
                constants[node] = given[number]
            else:
                places.append(number)
                ranks.add(_dims(_value(node)))
                made.value(node, Layer("input", node.name))
            number += 1
        elif node.op == "call_function":
            made.node(node, constants)
        elif node.op == "output":
            returned = node.args[0] if isinstance(node.args[0], list | tuple) else (node.args[0],)
            network = Network(tuple(made.layers.values()), tuple(made.names[n] for n in returned))
    rows = all(layer.op in ("input", "linear", "add", "multiply", "activation") for layer in network.layers)
    flat = all(len(shape) == 2 for shape in made.linear_inputs)
    if not rows and not (flat and all(n in (2, 4) for n in ranks)):
        raise NotForEngine("it mixes images and rows")
    return network, tuple(places), rows


class _Converter:
    """Turns nodes into layers one by one, merging each into the one before where that is the only reader."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.layers: dict[str, Layer] = {}
        self.names: dict[fx.Node, str] = {}
        self.linear_inputs: list[Any] = []
        self.selections: set[str] = set()  # convolutions that only pick positions and add channels of zeros
        self.labels = labels

    def value(self, node: fx.Node, layer: Layer) -> None:
        self.layers[layer.name] = layer
        self.names[node] = layer.name

    def host(self, node: Any, ops: tuple[str, ...] = ("convolution", "linear")) -> Layer | None:
        """Return the layer that made a node, if the next operator may be merged into it."""
        while isinstance(node, fx.Node) and node.target in _NOTHING and len(node.users) == 1:
            node = node.args[0]
        layer = self.layers[self.names[node]]
        mergeable = layer.op in ops and layer.activation == "none" and len(node.users) == 1
        return layer if mergeable else None

    def node(self, node: Any, constants: Mapping[fx.Node, Tensor]) -> None:
        t, a = node.target, node.args
        label = self.labels.get(node.name, "")

        def array(item: Any) -> Array | None:
            return None if item is None else constants[item].detach().float().contiguous().numpy()

        if t is aten.conv2d.default:
            options = {
                "stride": _pair(_option(node, 3, "stride", 1)),
                "padding": _pair(_option(node, 4, "padding", 0)),
                "dilation": _pair(_option(node, 5, "dilation", 1)),
                "groups": _option(node, 6, "groups", 1),
            }
            bias = array(_option(node, 2, "bias", None))
            self.value(
                node,
                Layer("convolution", node.name, (self.names[a[0]],), array(a[1]), bias, options=options, label=label),
            )
        elif t is aten.linear.default:
            bias = array(_option(node, 2, "bias", None))
            self.linear_inputs.append(_value(a[0]).shape)
            self.value(node, Layer("linear", node.name, (self.names[a[0]],), array(a[1]), bias, label=label))
        elif t is aten.batch_norm.default:
            self._norm(node, array, label)
        elif t in _ACTIVATIONS:
            self._activation(node, label)
        elif t in (aten.add.Tensor, aten.mul.Tensor):
            self._arithmetic(node, label)
        elif t in (aten.max_pool2d.default, aten.avg_pool2d.default):
            kernel = _pair(a[1])
            stride = _option(node, 2, "stride", None)
            options = {
                "kernel": kernel,
                "stride": _pair(stride) if stride else kernel,
                "padding": _pair(_option(node, 3, "padding", 0)),
                "dilation": _pair(_option(node, 4, "dilation", 1)) if t is aten.max_pool2d.default else (1, 1),
            }
            op = "max_pool" if t is aten.max_pool2d.default else "average_pool"
            self.value(node, Layer(op, node.name, (self.names[a[0]],), options=options, label=label))
        elif t in (aten.adaptive_avg_pool2d.default, aten.mean.dim):
            self.value(node, Layer("mean", node.name, (self.names[a[0]],), label=label))
            if _dims(_value(node)) == 2:
                self.value(node, Layer("flatten", f"{node.name}_rows", (node.name,), label=label))
        elif t in (aten.slice.Tensor, aten.pad.default):
            self._selected(node, label)
        elif t is aten.cat.default:
            self.value(node, Layer("concatenate", node.name, tuple(self.names[x] for x in a[0]), label=label))
        elif t in (aten.flatten.using_ints, aten.view.default, aten.reshape.default):
            self.value(node, Layer("flatten", node.name, (self.names[a[0]],), label=label))
        else:
            self.names[node] = self.names[a[0]]

    def _selected(self, node: Any, label: str) -> None:
        """Positions in steps, and channels of zeros, are a convolution whose weights are an identity."""
        selection = _selection(node)
        assert selection is not None
        *steps, before, after = selection
        if selection == (1, 1, 0, 0):
            self.names[node] = self.names[node.args[0]]
            return
        source = self.names[node.args[0]]
        weight = np.eye(_value(node.args[0]).shape[1], dtype=np.float32)
        host = self.host(node.args[0])
        if host is not None and host.name in self.selections and host.residual is None:
            assert host.weight is not None
            steps = [a * b for a, b in zip(steps, host.options["stride"], strict=True)]
            source, weight = host.inputs[0], host.weight[:, :, 0, 0]
            del self.layers[host.name]
        weight = np.pad(weight, ((before, after), (0, 0)))[:, :, None, None]
        options = {"stride": tuple(steps), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
        self.value(node, Layer("convolution", node.name, (source,), weight, options=options, label=label))
        self.selections.add(node.name)

    def _norm(self, node: Any, array: Callable[[Any], Array | None], label: str) -> None:
        """y = gain (x - mean) / sqrt(variance + eps) + shift, folded into what made x if nothing else reads it."""
        x, gain, shift, mean, variance = node.args[:5]
        centre, spread = array(mean), array(variance)
        assert centre is not None
        assert spread is not None
        scale = 1 / np.sqrt(spread.astype(np.float64) + _option(node, 7, "eps", 1e-5))
        given, added = array(gain), array(shift)
        scale = scale if given is None else scale * given
        moved = (0 if added is None else added) - centre * scale
        scale, moved = scale.astype(np.float32), np.asarray(moved, np.float32)
        host = self.host(x)
        if host is not None and host.residual is None:
            self.layers[host.name] = folded(host, scale, moved)
            self.names[node] = host.name
            return
        options = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": len(scale)}
        weight = scale.reshape(-1, 1, 1, 1)
        self.value(node, Layer("convolution", node.name, (self.names[x],), weight, moved, options=options, label=label))

    def _activation(self, node: Any, label: str) -> None:
        kind = _ACTIVATIONS[node.target]
        if kind == "gelu" and _option(node, 1, "approximate", "none") == "tanh":
            kind = "gelu_tanh"
        slope = float(_option(node, 1, "negative_slope", 0.01)) if kind == "leaky_relu" else 0.0
        host = self.host(node.args[0], ("convolution", "linear", "add", "multiply"))
        if host is not None:
            self.layers[host.name] = replace(host, activation=kind, slope=slope)
            self.names[node] = host.name
            return
        self.value(
            node, Layer("activation", node.name, (self.names[node.args[0]],), activation=kind, slope=slope, label=label)
        )

    def _arithmetic(self, node: Any, label: str) -> None:
        one, other = node.args[:2]
        if node.target is aten.add.Tensor and _value(one).shape == _value(other).shape and one is not other:
            order = list(self.layers)
            sides = sorted(((one, other), (other, one)), key=lambda pair: -order.index(self.names[pair[0]]))
            for side, rest in sides:
                host = self.host(side)
                if host is not None and host.residual is None and self.names[rest] != host.name:
                    # Its only reader is this sum, so it may as well run here, when the other term is there.
                    del self.layers[host.name]
                    self.layers[host.name] = replace(host, residual=self.names[rest])
                    self.names[node] = host.name
                    return
        if _is_pixel(_value(one).shape) and not _is_pixel(_value(other).shape):
            one, other = other, one
        op = "add" if node.target is aten.add.Tensor else "multiply"
        self.value(node, Layer(op, node.name, (self.names[one], self.names[other]), label=label))
