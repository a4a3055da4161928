"""Walk an ONNX graph in order and know of every value its type, its shape in plain numbers, and small contents.

Shapes come from `onnx`'s own inference of single operators. What is computed from sizes alone (chains of Shape, Gather
and Concat that end in a Reshape) is computed here with `onnx`'s reference implementation; it is also remembered which
sizes such numbers come from, since an attention that divides by the root of a size depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Shape = tuple[int, ...]
Sources = frozenset[tuple[str, int]]
STANDARD = ("", "ai.onnx")
_MOVES = {"Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Identity", "Cast", "Reshape", "Split", "Flatten"}
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
_LIKE_INPUT = {
    "GroupNormalization",
    "Gelu",
    "Swish",
    "RMSNormalization",
    "MeanVarianceNormalization",
    "SimplifiedLayerNormalization",
}
_LARGEST_KNOWN = 1 << 16


class Walk:
    """Types, shapes and small contents, node by node.

    Args:
        model: a model as `prunus.graph.onnx_file.load_model` returns it.
        inputs: shape of every input.
        given: shapes found otherwise (by running the model), used where inference finds none.

    Attributes:
        shapes: shape of every value seen so far; None where it depends on data.
        types: number of the element type (`onnx.TensorProto`), where known.
        known: contents that do not depend on inputs, where small.
        sources: for known contents computed from sizes, per element the (value, axis) they come from.
    """

    def __init__(
        self, model: ModelProto, inputs: Mapping[str, Shape], given: Mapping[str, Shape] | None = None
    ) -> None:
        import onnx

        self.shapes: dict[str, Shape | None] = {}
        self.types: dict[str, int] = {}
        self.known: dict[str, NDArray[Any]] = {}
        self.sources: dict[str, list[Sources]] = {}
        self.given = dict(given or {})
        self._opsets = list(model.opset_import)
        self._versions = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
        self._ir = model.ir_version
        self._declared = {v.name: v.type for v in (*model.graph.value_info, *model.graph.output)}
        for tensor in model.graph.initializer:
            self.store(tensor)
        for item in model.graph.input:
            if item.name not in self.shapes:
                self.shapes[item.name] = inputs.get(item.name)
                self.types[item.name] = item.type.tensor_type.elem_type
        for sparse in model.graph.sparse_initializer:
            self.shapes[sparse.values.name] = tuple(sparse.dims)
            self.types[sparse.values.name] = sparse.values.data_type
        self._onnx = onnx

    def store(self, tensor: Any) -> None:
        """Learn an initialiser."""
        import onnx

        self.shapes[tensor.name] = tuple(tensor.dims)
        self.types[tensor.name] = tensor.data_type
        size = int(np.prod(tensor.dims, dtype=np.int64))
        if size <= 1 or (size <= _LARGEST_KNOWN and not self.floating(tensor.name)):
            self.known[tensor.name] = onnx.numpy_helper.to_array(tensor)

    def floating(self, name: str) -> bool:
        """Return whether a value holds floating-point or complex numbers (True where its type is not known)."""
        kind = self.types.get(name, 0)
        # undefined, float, float16, double, complex64, complex128, bfloat16
        return kind in (0, 1, 10, 11, 14, 15, 16)

    def visit(self, node: NodeProto) -> None:
        """Learn what one node returns; its inputs were visited before."""
        if node.domain in STANDARD:
            if node.op_type == "Shape" and self.shapes.get(node.input[0]) is not None:
                self._sizes(node)
                return
            if self._compute(node):
                return
        inferred = self._infer(node)
        for name in node.output:
            if not name:
                continue
            kind, shape = inferred.get(name, (0, None))
            if shape is None and node.op_type in _LIKE_INPUT and node.domain in STANDARD:
                kind, shape = self.types.get(node.input[0], 0), self.shapes.get(node.input[0])
            if shape is None:
                declared = self._declared.get(name)
                if declared is not None and declared.HasField("tensor_type"):
                    kind = kind or declared.tensor_type.elem_type
                    shape = _plain(declared.tensor_type)
            if shape is None:
                shape = self.given.get(name)
            self.shapes[name] = shape
            self.types[name] = kind

    def _sizes(self, node: NodeProto) -> None:
        name, shape = node.input[0], self.shapes[node.input[0]]
        assert shape is not None
        attributes = {a.name: a.i for a in node.attribute}
        begin, end = attributes.get("start", 0), attributes.get("end", len(shape))
        places = list(range(len(shape)))[begin:end]
        self._know(node.output[0], np.array([shape[i] for i in places], np.int64))
        self.sources[node.output[0]] = [frozenset({(name, i)}) for i in places]

    def _know(self, name: str, array: NDArray[Any]) -> None:
        self.known[name] = array
        self.shapes[name] = array.shape
        self.types[name] = self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype)

    def _compute(self, node: NodeProto) -> bool:
        """Compute a node whose inputs are all known, if that is cheap; return whether it was done."""
        given = [n for n in node.input if n]
        if not given or node.op_type in _RANDOM or any(n not in self.known for n in given):
            return False
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            return False
        if node.op_type in ("ConstantOfShape", "Expand", "Tile"):
            sized = self.known[node.input[0 if node.op_type == "ConstantOfShape" else 1]]
            if sized.size and float(np.prod(np.maximum(sized, 1), dtype=np.float64)) > _LARGEST_KNOWN:
                return False
            if node.op_type == "ConstantOfShape" and node.input[0] in self.sources and self._fills_floats(node):
                return False  # a tensor that follows sizes of the network, not a number
        try:
            found = self._run(node, {n: self.known[n] for n in given})
        except Exception:  # whatever the reference cannot compute is inferred instead
            return False
        if any(not isinstance(a, np.ndarray | np.generic) for a in found):
            return False
        sources = self._followed(node, given, found)
        for name, array in zip(node.output, found, strict=False):
            if name:
                self._know(name, np.asarray(array))
                if sources is not None:
                    self.sources[name] = (
                        sources
                        if node.op_type != "Split"
                        else [frozenset().union(*sources)] * len(np.asarray(array).reshape(-1))
                    )
        return True

    def _fills_floats(self, node: NodeProto) -> bool:
        kinds = [a.t.data_type for a in node.attribute if a.name == "value"]
        return not kinds or kinds[0] in (1, 10, 11, 16)

    def _run(self, node: NodeProto, feeds: Mapping[str, NDArray[Any]]) -> list[Any]:
        from onnx.reference import ReferenceEvaluator

        helper = self._onnx.helper
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for n, a in feeds.items()
            ],
            [self._onnx.ValueInfoProto(name=n) for n in node.output if n],
        )
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir)
        with np.errstate(all="ignore"):
            return list(ReferenceEvaluator(model).run(None, dict(feeds)))

    def _followed(self, node: NodeProto, given: list[str], found: list[Any]) -> list[Sources] | None:
        """Return which sizes each element of a computed result comes from; None when from none."""
        if not any(n in self.sources for n in given):
            return None
        moved = given if node.op_type == "Concat" else given[:1]
        lists = {n: self.sources.get(n) or [frozenset()] * self.known[n].size for n in given}
        if node.op_type in _MOVES and not any(n in self.sources for n in given if n not in moved):
            # The same move on the numbers of the elements tells where each went.
            flat: list[Sources] = []
            feeds: dict[str, NDArray[Any]] = {n: self.known[n] for n in given}
            for name in moved:
                feeds[name] = np.arange(len(flat), len(flat) + self.known[name].size).reshape(self.known[name].shape)
                flat += lists[name]
            if node.op_type in ("Cast", "Identity"):
                return flat
            if node.op_type != "Split" and len(set(moved)) == len(moved):
                return [flat[int(i)] for i in np.asarray(self._run(node, feeds)[0]).reshape(-1)]
        union: Sources = frozenset().union(*(s for n in given for s in lists[n]))
        return [union] * max(np.asarray(found[0]).size, 1)

    def _infer(self, node: NodeProto) -> dict[str, tuple[int, Shape | None]]:
        """Ask onnx for the types that one node returns; nothing for operators it does not know."""
        onnx = self._onnx
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            schema = onnx.defs.get_schema(node.op_type, self._versions.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            return {}
        types, data = {}, {}
        for name in {n for n in node.input if n}:
            kind = self.types.get(name, 0)
            if not kind:
                return {}
            types[name] = onnx.helper.make_tensor_type_proto(kind, self.shapes.get(name))
            if name in self.known and self.known[name].size <= 1024:
                data[name] = onnx.numpy_helper.from_array(self.known[name], name)
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=self._opsets, ir_version=self._ir
            )
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
            return {}
        return {
            n: (t.tensor_type.elem_type, _plain(t.tensor_type)) for n, t in found.items() if t.HasField("tensor_type")
        }


def _plain(kind: Any) -> Shape | None:
    """Return the shape of a tensor type if it is fixed."""
    if not kind.HasField("shape"):
        return None
    sizes = kind.shape.dim
    return tuple(d.dim_value for d in sizes) if all(d.HasField("dim_value") for d in sizes) else None


def input_shapes(
    model: ModelProto, arrays: Mapping[str, NDArray[Any]] | None, sizes: Mapping[str, int] | None
) -> dict[str, Shape]:
    """Return a shape in plain numbers for every input.

    Args:
        arrays: inputs to take shapes from.
        sizes: symbolic axis -> its size; by default the first axis of an input is 1, further ones 64 (16 in inputs of
            fewer than four axes).

    Raises:
        Unsupported: an input is a sequence, a map or optional.
        InvalidValue: an axis named in `sizes` does not exist, a size is not a whole number from 1 up, or an input has
            no declared rank and no array.
    """
    from prunus.errors import InvalidValue, Unsupported, did_you_mean
    from prunus.graph.onnx_file import inputs_of

    given = dict(sizes or {})
    for name, size in given.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidValue(f"size {size!r} of axis {name!r} must be a whole number from 1 up.")
    chosen: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    for name, kind in inputs_of(model).items():
        if not kind.HasField("tensor_type"):
            raise Unsupported(f"input {name!r} is no tensor; models whose inputs are tensors can be pruned.")
        tensor = kind.tensor_type
        if arrays is not None and name in arrays:
            shapes[name] = tuple(arrays[name].shape)
            chosen |= {d.dim_param: n for d, n in zip(tensor.shape.dim, shapes[name], strict=False) if d.dim_param}
            continue
        if not tensor.HasField("shape"):
            raise InvalidValue(f"input {name!r} has no declared shape; give an array for it (inputs=).")
        shape = []
        for place, axis in enumerate(tensor.shape.dim):
            if axis.HasField("dim_value"):
                shape.append(axis.dim_value)
                continue
            usual = 1 if place == 0 else 64 if len(tensor.shape.dim) >= 4 else 16
            shape.append(given.get(axis.dim_param, chosen.get(axis.dim_param, usual)))
            if axis.dim_param:
                chosen[axis.dim_param] = shape[-1]
        shapes[name] = tuple(shape)
    for name in given:
        if name not in chosen:
            raise InvalidValue(f"no input has an axis {name!r}.{did_you_mean(name, chosen)}")
    return shapes
