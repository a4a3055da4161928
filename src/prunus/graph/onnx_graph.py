"""Read an ONNX model into the same graph of operators and values that a module gives."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunus.graph.coupler import Coupler, rule
from prunus.graph.ir import Graph, Node, Value
from prunus.graph.onnx_file import Arrays, Session, load_model, opset_of
from prunus.graph.onnx_shapes import STANDARD, Shape, Walk, input_shapes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Translation = Callable[["Reader", "NodeProto"], None]
OPERATORS: dict[str, Translation] = {}
# Operators that can go on counting what was removed, by the names that torch gives them.
COUNTABLE = {"ReduceMean": "mean", "LayerNormalization": "layer_norm", "RMSNormalization": "rms_norm"}


def operator(*names: str) -> Callable[[Translation], Translation]:
    """Register a function as the translation of the named ONNX operators."""

    def register(function: Translation) -> Translation:
        for name in names:
            OPERATORS[name] = function
        return function

    return register


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX model as a graph.

    Attributes:
        model: the model in the form that is edited (see `prunus.graph.onnx_file.load_model`).
        graph: its operators with the names and arguments of the ATen ones.
        values: ONNX name -> value of the graph.
        shapes: shape of every input for which it was read.
        scales: initialisers that a mask must leave as they are: variances of batch norms.
        unsized: names of values whose shapes are not known.
    """

    model: ModelProto
    graph: Graph
    values: dict[str, Value]
    shapes: dict[str, Shape]
    scales: frozenset[str]
    unsized: frozenset[str]

    @property
    def full_precision(self) -> bool:
        """Whether no weight is stored with 16 bits."""
        return not any(t.data_type in (10, 16) for t in self.model.graph.initializer)


class Reader:
    """Builds the graph while the nodes of a model are visited in order."""

    def __init__(self, model: ModelProto, walk: Walk) -> None:
        self.graph = Graph(source="onnx")
        self.walk = walk
        self.values: dict[str, Value] = {}
        self.opset = opset_of(model)
        self.node = ""
        self.scales: set[str] = set()
        self.stored = {t.name: t for t in model.graph.initializer}
        self.inputs = {i.name for i in model.graph.input} - set(self.stored)

    def value(self, name: str) -> Value:
        """Return the value of an ONNX name; numbers computed from sizes are tied to what they were computed from."""
        found = self.values.get(name)
        if found is not None:
            return found
        shape = self.walk.shapes.get(name)
        kind = "parameter" if name in self.stored else "input" if name in self.inputs else "constant"
        floating = self.walk.floating(name)
        if kind == "parameter" and not floating:
            kind = "constant"
        made = self.graph.value(shape or (), kind, name if kind != "constant" else "", floating)
        self.values[name] = made
        sources = {s for each in self.walk.sources.get(name, ()) for s in each}
        if sources:
            origins = sorted(s for s in sources if s[0] in self.values)
            args = {"tensors": [self.values[n] for n, _ in origins], "dims": [i for _, i in origins]}
            self.graph.nodes.append(Node("size_as_number", args, (made,), self.node))
        return made

    def inputs_of(self, node: NodeProto) -> list[Value | None]:
        """Return the values of a node's inputs, None for those left out."""
        return [self.value(n) if n else None for n in node.input]

    def attribute(self, node: NodeProto, name: str, default: Any = None) -> Any:
        """Return an attribute in plain form."""
        import onnx

        for attribute in node.attribute:
            if attribute.name == name:
                found = onnx.helper.get_attribute_value(attribute)
                return found.decode() if isinstance(found, bytes) else found
        return default

    def constant(self, node: NodeProto, place: int, name: str = "") -> NDArray[Any] | None:
        """Return what an input holds, or an attribute of that `name` in older operator sets; None when not known."""
        if name:
            found = self.attribute(node, name)
            if found is not None:
                return np.asarray(found)
        if place < len(node.input) and node.input[place]:
            return self.walk.known.get(node.input[place])
        return None

    def integers(self, node: NodeProto, place: int, name: str = "") -> list[int] | None:
        """Return the whole numbers an input or attribute holds; None when absent or not known."""
        found = self.constant(node, place, name)
        return None if found is None else [int(i) for i in found.reshape(-1)]

    def scalar(self, name: str) -> float | None:
        """Return a single known number that does not follow a size, else None."""
        array = self.walk.known.get(name)
        if array is None or array.size != 1 or name in self.walk.sources or array.dtype.kind not in "fiub":
            return None
        return array.reshape(-1)[0].item()

    def shape(self, node: NodeProto, place: int = 0) -> Shape:
        """Return the shape of an output."""
        shape = self.walk.shapes[node.output[place]]
        assert shape is not None
        return shape

    def emit(self, op: str, args: dict[str, Any], shape: Sequence[int], floating: bool = True) -> Value:
        """Add an operator whose result has no name in the model."""
        made = self.graph.value(tuple(shape), floating=floating)
        self.graph.nodes.append(Node(op, args, (made,), self.node))
        return made

    def finish(self, node: NodeProto, op: str, args: dict[str, Any]) -> None:
        """Add the operator that returns the outputs of a node."""
        outputs: list[Value | None] = []
        for name in node.output:
            if not name:
                outputs.append(None)
                continue
            # A value of unknown shape is there without axes, so that what it depends on counts as used.
            made = self.graph.value(self.walk.shapes[name] or (), floating=self.walk.floating(name))
            self.values[name] = made
            outputs.append(made)
        self.graph.nodes.append(Node(op, args, tuple(outputs), self.node, spelled=COUNTABLE.get(node.op_type, "")))

    def view(self, x: Value, shape: Sequence[int]) -> Value:
        """Add a view; nothing when the shape is the same."""
        return x if x.shape == tuple(shape) else self.emit("view", {"self": x, "size": list(shape)}, shape, x.floating)

    def permute(self, x: Value, order: Sequence[int]) -> Value:
        """Add a permutation of axes."""
        return self.emit("permute", {"self": x, "dims": list(order)}, [x.shape[i] for i in order], x.floating)

    def without_rule(self, node: NodeProto, why: str = "") -> None:
        """Add a node whose inputs keep all their axes."""
        domain = "" if node.domain in STANDARD else f"{node.domain}."
        inner = [self.value(n) for n in _captured(node) if n in self.values or n in self.stored]
        args = {"inputs": [v for v in self.inputs_of(node) if v is not None] + inner}
        self.finish(node, f"onnx.{domain}{node.op_type}{why}", args)

    def read(self, node: NodeProto) -> None:
        """Visit one node of the model."""
        self.node = node.name or (node.output[0] if node.output else node.op_type)
        self.walk.visit(node)
        if all(not n or n in self.walk.known for n in node.output):
            return  # a number, not a part of the network
        sized = all(not n or self.walk.shapes.get(n) is not None for n in (*node.input, *node.output))
        translate = OPERATORS.get(node.op_type) if node.domain in STANDARD else None
        if not sized:
            self.without_rule(node, " (of unknown shape)")
        elif translate is None:
            self.without_rule(node)
        else:
            translate(self, node)


def _captured(node: NodeProto) -> set[str]:
    """Return the names that graphs inside a node (If, Loop, Scan) may take from outside."""
    found: set[str] = set()
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                found |= {n for n in inner.input if n} | _captured(inner)
            found |= {o.name for o in graph.output}
    return found


def read_onnx(
    source: Path | str | ModelProto,
    *,
    inputs: Arrays | None = None,
    sizes: Mapping[str, int] | None = None,
) -> OnnxGraph:
    """Return the graph of an ONNX model.

    Args:
        source: path or model; untouched.
        inputs: arrays by input name, whose shapes are used where the model leaves axes open.
        sizes: symbolic axis -> its size, see `prunus.graph.onnx_shapes.input_shapes` for defaults.

    Raises:
        InvalidValue, DamagedFile, Unsupported, MissingExtra: see `prunus.graph.onnx_file.load_model`.
    """
    model = load_model(source)
    importlib.import_module("prunus.graph.onnx_ops")
    shapes = input_shapes(model, inputs, sizes)
    reader = _walked(model, shapes, {})
    unknown = [n for node in model.graph.node for n in node.output if n and reader.walk.shapes.get(n) is None]
    if unknown:
        measured = _measured(model, unknown, shapes, inputs)
        if measured:
            reader = _walked(model, shapes, measured)
            reader.graph.notes.append("some shapes depend on values; they are those of one run")
    graph = reader.graph
    for item in model.graph.output:
        if item.name in reader.values:
            graph.outputs.append(reader.values[item.name])
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        graph.notes.append("quantised weights are left alone; prune before quantising")
    unsized = frozenset(n for n in reader.values if reader.walk.shapes.get(n) is None)
    return OnnxGraph(model, graph, reader.values, shapes, frozenset(reader.scales), unsized)


def _walked(model: ModelProto, shapes: Mapping[str, Shape], given: Mapping[str, Shape]) -> Reader:
    reader = Reader(model, Walk(model, shapes, given))
    for name in reader.inputs:
        reader.value(name)
    for node in model.graph.node:
        reader.read(node)
    return reader


def _measured(
    model: ModelProto, names: list[str], shapes: Mapping[str, Shape], inputs: Arrays | None
) -> dict[str, Shape]:
    """Return the shapes of values by running the model once; nothing when onnxruntime cannot."""
    from prunus.errors import InvalidValue, Unsupported
    from prunus.graph.onnx_edit import random_inputs

    try:
        found = Session(model, names)(inputs or random_inputs(model, shapes))
    except (InvalidValue, Unsupported):
        return {}
    return {n: tuple(found[n].shape) for n in names if isinstance(found[n], np.ndarray)}


@rule("size_as_number")
def size_as_number(c: Coupler, n: Node) -> None:
    """A number computed from sizes enters the arithmetic, so those sizes stay."""
    for value, axis in zip(n.args["tensors"], n.args["dims"], strict=True):
        c.fix(c.of(value)[axis], "its size is used as a number")
