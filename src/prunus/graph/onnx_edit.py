"""Carry a cut out on an ONNX model: slice its weights, change the sizes it spells out, prove it in onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunus.errors import InvalidValue, MaskMismatch, Unsupported, did_you_mean
from prunus.graph.couple import Coupling, Keep
from prunus.graph.onnx_file import Arrays, Session, check, inputs_of, opset_of
from prunus.graph.onnx_graph import OnnxGraph, Reader
from prunus.graph.onnx_ops import slice_ranges
from prunus.graph.onnx_shapes import STANDARD, Shape, Walk
from prunus.graph.plan import Plan, difference
from prunus.randomness import generator

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


class _Trouble(Exception):
    """A node does not come out as the cut predicts."""

    def __init__(self, node: NodeProto, reason: str) -> None:
        super().__init__(f"{node.op_type} {node.name or node.output[0]!r} {reason}")
        self.node = node


@dataclass(frozen=True)
class _Cut:
    """What is needed to edit nodes: shapes and kept positions after the cut."""

    source: OnnxGraph
    shapes: list[Shape]
    coupling: Coupling
    gone: NDArray[np.bool_]

    def shape(self, name: str) -> Shape | None:
        """Return the predicted shape of a named value; None for values that are no part of the network."""
        value = self.source.values.get(name)
        return None if value is None or name in self.source.unsized else self.shapes[value.index]

    def old(self, name: str) -> Shape:
        """Return the shape of a named value before the cut."""
        return self.source.values[name].shape

    def before(self, name: str, axis: int, position: int) -> int:
        """Return how many positions of an axis stay among the first ones."""
        stays = self.coupling.stays(self.source.values[name], axis, self.gone)
        return position if stays is None else int(stays[:position].sum())


def fit_onnx(source: OnnxGraph, coupling: Coupling, keep: Keep) -> Plan:
    """Return the plan for `keep`, without the families whose removal a node of the model does not survive.

    Those are left whole and named in `Plan.blocked`.
    """
    blocked: dict[str, str] = {}
    keep = dict(keep)
    while True:
        plan = Plan.from_keep(coupling, keep)
        keep = {name: keep[name] for name in plan.families}
        try:
            _edited(source, coupling, keep)
            return plan.with_blocked(blocked)
        except _Trouble as trouble:
            if not keep:
                raise Unsupported(f"the model cannot be rewritten: {trouble}") from trouble
            names = {n for n in (*trouble.node.input, *trouble.node.output) if n in source.values}
            guilty = coupling.families_on([source.values[n] for n in names]) & keep.keys()
            for name in guilty or set(keep):
                blocked[name] = str(trouble)
                del keep[name]


def cut_onnx(source: OnnxGraph, coupling: Coupling, plan: Plan) -> ModelProto:
    """Return the really smaller model; the given one is untouched.

    Args:
        source: the model as read.
        coupling: `couple(source.graph)`.
        plan: made for this model, see `fit_onnx`.

    Raises:
        MaskMismatch: the plan belongs to another model.
        Unsupported: a node does not survive the cut (never for plans from `fit_onnx`).
    """
    _check_plan(source, coupling, plan)
    try:
        model = _edited(source, coupling, _masks(coupling, plan))
    except _Trouble as trouble:
        raise Unsupported(f"the cut does not fit the model: {trouble}") from trouble
    return check(model, "the cut model")


def mask_onnx(source: OnnxGraph, plan: Plan) -> ModelProto:
    """Return the model in full size with everything the plan removes set to zero."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    cuts = _per_tensor(plan)
    for tensor in model.graph.initializer:
        if tensor.name in cuts and tensor.name not in source.scales:
            array = onnx.numpy_helper.to_array(tensor).copy()
            for axis, kept in cuts[tensor.name]:
                gone = np.ones(array.shape[axis], dtype=bool)
                gone[kept] = False
                np.moveaxis(array, axis, 0)[gone] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return model


def verify_onnx(source: OnnxGraph, coupling: Coupling, plan: Plan, inputs: Mapping[str, NDArray[Any]]) -> float:
    """Return how far the small model's outputs are from the masked one's, relative to the largest output.

    Both run in onnxruntime on the CPU; see `prunus.graph.plan.difference`.
    """
    results = []
    for model in (mask_onnx(source, plan), cut_onnx(source, coupling, plan)):
        found = Session(model)(inputs)
        results.append([_tensor(a) for a in found.values() if isinstance(a, np.ndarray)])
    return difference(*results)


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    if array.dtype.kind not in "fiub":
        return torch.zeros(array.shape, dtype=torch.bool)
    return torch.from_numpy(np.ascontiguousarray(array))


def _masks(coupling: Coupling, plan: Plan) -> dict[str, NDArray[np.bool_]]:
    masks = {}
    for name, kept in plan.families.items():
        masks[name] = np.isin(np.arange(coupling[name].size), np.asarray(kept, dtype=np.int64))
    return masks


def _check_plan(source: OnnxGraph, coupling: Coupling, plan: Plan) -> None:
    stored = {t.name: list(t.dims) for t in source.model.graph.initializer}
    for name, shape in plan.shapes.items():
        if name not in stored:
            raise MaskMismatch(f"the model has no initialiser {name!r}.{did_you_mean(name, stored)}")
        if stored[name] != list(shape):
            raise MaskMismatch(
                f"the plan belongs to another model: {name!r} has shape {tuple(stored[name])}, the plan was made for "
                f"{tuple(shape)}."
            )
    strangers = [n for n in plan.families if n not in {f.name for f in coupling.families}]
    if strangers:
        raise MaskMismatch(f"the plan belongs to another model: this one has no family {strangers[0]!r}.")
    found = {k: v.tolist() for k, v in coupling.indices(_masks(coupling, plan)).items()}
    if found != plan.keep:
        raise MaskMismatch("the plan belongs to another model: its families take other positions of the weights.")


def _per_tensor(plan: Plan) -> dict[str, list[tuple[int, list[int]]]]:
    cuts: dict[str, list[tuple[int, list[int]]]] = {}
    for key, kept in plan.keep.items():
        name, _, axis = key.rpartition(":")
        cuts.setdefault(name, []).append((int(axis), kept))
    return cuts


# -- rewriting --------------------------------------------------------------------------------------------------


def _edited(source: OnnxGraph, coupling: Coupling, keep: Keep) -> ModelProto:
    """Return the model with sliced initialisers and changed sizes, every shape compared with the prediction."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    plan = Plan.from_keep(coupling, keep)
    cuts = _per_tensor(plan)
    for tensor in model.graph.initializer:
        if tensor.name in cuts:
            array = onnx.numpy_helper.to_array(tensor)
            for axis, kept in cuts[tensor.name]:
                array = array.take(kept, axis)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    for item in model.graph.input:  # initialisers may also be listed as inputs with a default
        if item.name in cuts:
            del item.type.tensor_type.shape.dim[:]
            for size in next(t.dims for t in model.graph.initializer if t.name == item.name):
                item.type.tensor_type.shape.dim.add().dim_value = size
    del model.graph.value_info[:]
    cut = _Cut(source, coupling.shapes(keep), coupling, coupling.removed(keep))
    sized = {n: v for n, v in source.values.items() if n not in source.unsized}
    given = {n: cut.shapes[v.index] for n, v in sized.items()}
    before = Reader(source.model, Walk(source.model, source.shapes, {n: v.shape for n, v in sized.items()}))
    walk = Walk(model, source.shapes, given)
    editor = _Editor(model, walk, cut, before)
    nodes = []
    for old in source.model.graph.node:
        before.walk.visit(old)
        node = onnx.NodeProto()
        node.CopyFrom(old)
        for made in editor.edit(node):
            walk.visit(made)
            nodes.append(made)
        for name in node.output:
            wanted, found = cut.shape(name), walk.shapes.get(name)
            if wanted is not None and found is not None and wanted != found:
                raise _Trouble(node, f"gives shape {found} where the cut predicts {wanted}")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {n for node in model.graph.node for n in node.input} | {o.name for o in model.graph.output}
    inner = any(a.HasField("g") or a.graphs for node in model.graph.node for a in node.attribute)
    kept_initialisers = [t for t in model.graph.initializer if inner or t.name in used or t.name not in editor.replaced]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept_initialisers)
    return model


class _Editor:
    """Changes what one node spells out."""

    def __init__(self, model: ModelProto, walk: Walk, cut: _Cut, before: Reader) -> None:
        self.model = model
        self.walk = walk
        self.cut = cut
        self.before = before
        self.names = {n for node in model.graph.node for n in (*node.input, *node.output)} | {
            t.name for t in model.graph.initializer
        }
        self.made: dict[bytes, str] = {}
        self.replaced: set[str] = set()
        self.opset = opset_of(model)

    def edit(self, node: NodeProto) -> Iterator[NodeProto]:
        """Yield the nodes that take the place of one, itself last."""
        change = getattr(self, f"_{node.op_type.lower()}", None)
        if (
            change is not None
            and node.domain in STANDARD
            and node.output
            and self.cut.shape(node.output[0]) is not None
        ):
            yield from change(node)
        yield node

    # Each of these changes its node and yields the nodes to put before it.

    def _conv(self, node: NodeProto) -> Sequence[NodeProto]:
        groups = int(self.before.attribute(node, "group", 1))
        weight = self.cut.shape(node.input[1])
        x = self.cut.shape(node.input[0])
        if groups > 1 and weight is not None and x is not None:
            if node.op_type == "Conv":
                new = x[1] // max(weight[1], 1)
            else:
                new = groups * weight[0] // self.cut.old(node.input[1])[0]
            _set(node, "group", new)
        return ()

    _convtranspose = _conv

    def _reshape(self, node: NodeProto) -> Sequence[NodeProto]:
        wanted = list(self._after(node))
        x = self.walk.shapes.get(node.input[0]) or ()
        now = self.walk.known.get(node.input[1])
        if now is None:
            return ()
        copies = not self.before.attribute(node, "allowzero", 0)
        for place, entry in enumerate(now):
            if entry == -1 or (entry == 0 and copies and place < len(x) and x[place] == wanted[place]):
                wanted[place] = int(entry)  # adapts by itself
        return self._spell(node, 1, now, wanted)

    def _expand(self, node: NodeProto) -> Sequence[NodeProto]:
        now, wanted = self.walk.known.get(node.input[1]), self._after(node)
        if now is None:
            return ()
        tail = wanted[len(wanted) - len(now) :]
        return self._spell(node, 1, now, [1 if e == 1 else w for e, w in zip(now, tail, strict=True)])

    def _constantofshape(self, node: NodeProto) -> Sequence[NodeProto]:
        now = self.walk.known.get(node.input[0])
        return () if now is None else self._spell(node, 0, now, self._after(node))

    def _tile(self, node: NodeProto) -> Sequence[NodeProto]:
        now, x = self.walk.known.get(node.input[1]), self.walk.shapes.get(node.input[0])
        if now is None or x is None:
            return ()
        return self._spell(
            node, 1, now, [a // b if b else int(e) for a, b, e in zip(self._after(node), x, now, strict=True)]
        )

    def _resize(self, node: NodeProto) -> Sequence[NodeProto]:
        if len(node.input) < 4 or not node.input[3]:
            return ()
        now = self.walk.known.get(node.input[3])
        if now is None or len(now) != len(self._after(node)):
            return ()
        return self._spell(node, 3, now, self._after(node))

    def _split(self, node: NodeProto) -> Sequence[NodeProto]:
        axis = int(self.before.attribute(node, "axis", 0))
        wanted = [(self.cut.shape(o) or (0,))[axis % len(self._after(node))] for o in node.output]
        if any(a.name == "split" for a in node.attribute):
            _set(node, "split", wanted)
        elif len(node.input) > 1 and node.input[1]:
            now = self.walk.known.get(node.input[1])
            return () if now is None else self._spell(node, 1, now, wanted)
        return ()

    def _slice(self, node: NodeProto) -> Sequence[NodeProto]:
        ranges = slice_ranges(self.before, node)
        if ranges is None:
            return ()
        starts, ends = [], []
        for axis, start, step in ranges:
            count = self._after(node)[axis]
            if step < 0:  # only whole axes are read backwards
                starts.append(count - 1)
                ends.append(-(1 << 62))
                continue
            # With a step, whole strides go, and the place within a stride stays.
            place = start % step
            starts.append(self.cut.before(node.input[0], axis, start - place) + place)
            ends.append(starts[-1] + (count - 1) * step + 1 if count else starts[-1])
        if any(a.name == "starts" for a in node.attribute):
            _set(node, "starts", starts)
            _set(node, "ends", ends)
            return ()
        made: list[NodeProto] = []
        for place, wanted in ((1, starts), (2, ends)):
            now = self.walk.known.get(node.input[place])
            if now is None:
                raise _Trouble(node, "has ends that depend on data")
            axes = [axis for axis, _, _ in ranges]
            # An end that stands for the last position, and one that already follows the cut, stay as they are.
            size = [(self.cut.shape(node.input[0]) or ())[a] for a in axes]
            kept = [
                int(e) if _end(int(e), s) == _end(w, s) or _covers(int(e), w, s, t) else w
                for e, w, s, (_, _, t) in zip(now, wanted, size, ranges, strict=True)
            ]
            made += self._spell(node, place, now, kept)
        return made

    def _reducemean(self, node: NodeProto) -> Sequence[NodeProto]:
        """A mean goes on dividing by the number of positions there were, the removed ones being zero."""
        import onnx

        old, new = self.cut.old(node.input[0]), self.cut.shape(node.input[0])
        axes = self.before.attribute(node, "axes") or self.before.integers(node, 1) or range(len(old))
        share = float(np.prod([(new or old)[a] / old[a] for a in axes]))
        if not self.cut.coupling.counted or share == 1:
            return ()
        mean = onnx.NodeProto()
        mean.CopyFrom(node)
        mean.name = mean.output[0] = self._name(f"{node.output[0]}_present")
        made = _Chain(self, node.input[0])
        _become(node, "Mul", [mean.output[0], made.number(share)])
        return [mean]

    def _layernormalization(self, node: NodeProto) -> Sequence[NodeProto]:
        """Statistics go on counting the removed positions, which were zero; the norm becomes plain operators."""
        old, new = self.cut.old(node.input[0]), self.cut.shape(node.input[0]) or ()
        axis = int(self.before.attribute(node, "axis", -1)) % len(old)
        if not self.cut.coupling.counted or old[axis:] == new[axis:]:
            return ()
        if any(node.output[1:]):
            raise _Trouble(node, "also returns its statistics")
        whole, present = (float(np.prod(s[axis:], dtype=np.int64)) for s in (old, new))
        chain = _Chain(self, node.input[0])
        axes = tuple(range(axis, len(old)))
        x = centred = chain.wide(node.input[0])
        if node.op_type == "LayerNormalization":
            mean = chain.add("Div", chain.sum(x, axes), chain.number(whole))
            centred = chain.add("Sub", x, mean)
            squares = chain.sum(chain.add("Mul", centred, centred), axes)
            gone = chain.add("Mul", chain.add("Mul", mean, mean), chain.number(whole - present))
            squares = chain.add("Add", squares, gone)
        else:
            squares = chain.sum(chain.add("Mul", x, x), axes)
        epsilon = float(self.before.attribute(node, "epsilon", 1e-5))
        variance = chain.add("Add", chain.add("Div", squares, chain.number(whole)), chain.number(epsilon))
        result = chain.narrow(chain.add("Div", centred, chain.add("Sqrt", variance)))
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias:
            _become(node, "Add", [chain.add("Mul", result, node.input[1]), bias])
        else:
            _become(node, "Mul", [result, node.input[1]])
        return chain.nodes

    _rmsnormalization = _layernormalization

    def _groupnormalization(self, node: NodeProto) -> Sequence[NodeProto]:
        groups = int(self.before.attribute(node, "num_groups"))
        _set(node, "num_groups", groups * (self.cut.shape(node.input[0]) or ())[1] // self.cut.old(node.input[0])[1])
        return ()

    def _attention(self, node: NodeProto) -> Sequence[NodeProto]:
        for place, name in ((0, "q_num_heads"), (1, "kv_num_heads")):
            heads = int(self.before.attribute(node, name, 0))
            new = self.cut.shape(node.input[place])
            if heads and new is not None:
                _set(node, name, heads * new[-1] // self.cut.old(node.input[place])[-1])
        return ()

    def _after(self, node: NodeProto) -> Shape:
        shape = self.cut.shape(node.output[0])
        assert shape is not None
        return shape

    def _spell(self, node: NodeProto, place: int, now: NDArray[Any], wanted: Sequence[int]) -> Sequence[NodeProto]:
        """Give a node other numbers: a new initialiser, or where they are computed, the share that stays of each."""
        import onnx

        if [int(e) for e in now] == [int(w) for w in wanted]:
            return ()
        name = node.input[place]
        computed = name in self.walk.sources or name not in self.before.stored
        if not computed:
            node.input[place] = self._constant(np.asarray(wanted, now.dtype).reshape(now.shape))
            self.replaced.add(name)
            return ()
        if any(e == 0 or e < 0 for e, w in zip(now, wanted, strict=True) if e != w):
            raise _Trouble(node, "computes a size that cannot be changed")
        same = [int(e) == int(w) for e, w in zip(now, wanted, strict=True)]
        up = self._constant(np.array([1 if s else w for s, w in zip(same, wanted, strict=True)], now.dtype))
        down = self._constant(np.array([1 if s else e for s, e in zip(same, now, strict=True)], now.dtype))
        scaled, result = self._name(f"{name}_scaled"), self._name(f"{name}_cut")
        node.input[place] = result
        return [
            onnx.helper.make_node("Mul", [name, up], [scaled], name=scaled),
            onnx.helper.make_node("Div", [scaled, down], [result], name=result),
        ]

    def _constant(self, array: NDArray[Any]) -> str:
        import onnx

        key = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        if key not in self.made:
            name = self.made[key] = self._name("cut_size")
            tensor = onnx.numpy_helper.from_array(array, name)
            self.model.graph.initializer.append(tensor)
            self.walk.store(tensor)
        return self.made[key]

    def _name(self, wish: str) -> str:
        name, number = wish, 1
        while name in self.names:
            name, number = f"{wish}_{number}", number + 1
        self.names.add(name)
        return name


class _Chain:
    """Plain operators put before a node, with numbers in the type of one of its inputs (at least float32)."""

    def __init__(self, editor: _Editor, name: str) -> None:
        import onnx

        self.editor = editor
        self.kind = editor.walk.types[name]
        self.wider = self.kind not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
        self.type = np.dtype(np.float64 if self.kind == onnx.TensorProto.DOUBLE else np.float32)
        self.nodes: list[NodeProto] = []

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        import onnx

        name = self.editor._name(f"counted_{op.lower()}")
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def number(self, value: float) -> str:
        return self.editor._constant(np.array(value, self.type))

    def sum(self, x: str, axes: tuple[int, ...]) -> str:
        return self.add("ReduceSum", x, self.editor._constant(np.array(axes, np.int64)), keepdims=1)

    def wide(self, x: str) -> str:
        return self.add("Cast", x, to=1) if self.wider else x

    def narrow(self, x: str) -> str:
        return self.add("Cast", x, to=self.kind) if self.wider else x


def _become(node: NodeProto, op: str, inputs: Sequence[str]) -> None:
    del node.input[:], node.attribute[:]
    node.op_type = op
    node.input.extend(inputs)


def _end(position: int, size: int) -> int:
    """Return a slice's bound as a position from 0 to size."""
    return min(max(position + size if position < 0 else position, 0), size)


def _covers(end: int, wanted: int, size: int, step: int) -> bool:
    """Return whether two upper bounds of a slice with a step read the same positions."""
    found = _end(end, size)
    return step > 1 and wanted <= found < wanted + step


def _set(node: NodeProto, name: str, value: Any) -> None:
    import onnx

    for place, attribute in enumerate(node.attribute):
        if attribute.name == name:
            del node.attribute[place]
            break
    node.attribute.append(onnx.helper.make_attribute(name, value))


# -- inputs -----------------------------------------------------------------------------------------------------


def random_inputs(model: ModelProto, shapes: Mapping[str, Shape], seed: int = 0) -> Arrays:
    """Return inputs to prove a cut with: normal numbers, token numbers that the tables hold, and ones for the rest."""
    import onnx

    tables: dict[str, int] = {}
    stored = {t.name: tuple(t.dims) for t in model.graph.initializer}
    same = {
        n.output[0]: n.input[0] for n in model.graph.node if n.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze")
    }
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in stored:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            name = node.input[1]
            while name in same:
                name = same[name]
            rows = stored[node.input[0]][axis]
            tables[name] = min(tables.get(name, rows), rows)
    result: Arrays = {}
    for name, kind in inputs_of(model).items():
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
        random = np.random.default_rng(int(torch.randint(1 << 31, (1,), generator=generator(seed, "onnx input", name))))
        if np.issubdtype(dtype, np.integer):
            high = tables.get(name)
            array = random.integers(0, high, shapes[name]) if high else np.ones(shapes[name])
        elif dtype == np.bool_:
            array = np.ones(shapes[name])
        else:
            array = random.standard_normal(shapes[name])
        result[name] = array.astype(dtype)
    return result


def checked_inputs(model: ModelProto, arrays: Mapping[str, Any]) -> Arrays:
    """Return the arrays a caller gave, in the types of the model's inputs.

    Raises:
        InvalidValue: a name the model does not have, a missing input, or an array that does not fit the input.
    """
    import onnx

    if not isinstance(arrays, Mapping):
        raise InvalidValue(f"inputs must map input names to arrays, got {type(arrays).__name__}.")
    wanted = inputs_of(model)
    result: Arrays = {}
    for name, given in arrays.items():
        if name not in wanted:
            raise InvalidValue(
                f"the model has no input {name!r}.{did_you_mean(str(name), wanted)} Its inputs: {', '.join(wanted)}."
            )
        array = np.asarray(given)
        tensor = wanted[name].tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if array.dtype != dtype:
            if not np.can_cast(array.dtype, dtype, "same_kind") or array.dtype.kind not in "fiub":
                raise InvalidValue(f"input {name!r} is {dtype}, the array given for it is {array.dtype}.")
            array = array.astype(dtype)
        axes = tensor.shape.dim if tensor.HasField("shape") else None
        if axes is not None and len(axes) != array.ndim:
            raise InvalidValue(f"input {name!r} has {len(axes)} axes, the array given for it has shape {array.shape}.")
        for place, axis in enumerate(axes or ()):
            # The first axis may hold the examples of several calls.
            if axis.HasField("dim_value") and place and axis.dim_value != array.shape[place]:
                raise InvalidValue(
                    f"axis {place} of input {name!r} has {axis.dim_value} positions, the array given for it "
                    f"{array.shape[place]}."
                )
        if array.size == 0:
            raise InvalidValue(f"the array given for input {name!r} is empty.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InvalidValue(f"the array given for input {name!r} holds NaN or infinity.")
        result[name] = array
    missing = [n for n in wanted if n not in result]
    if missing:
        raise InvalidValue(f"inputs has no array for {', '.join(map(repr, missing))}, which the model needs.")
    return result


def calls(model: ModelProto, arrays: Arrays, at_most: int = 16) -> list[Arrays]:
    """Split arrays along their first axes into the inputs of single calls: as many rows as the model fixes.

    Raises:
        InvalidValue: first axes do not split into the sizes that the model fixes, or into different numbers of calls.
    """
    fixed = {}
    for name, kind in inputs_of(model).items():
        axes = kind.tensor_type.shape.dim
        fixed[name] = axes[0].dim_value if len(axes) and axes[0].HasField("dim_value") else None
    open_rows = {len(a) for n, a in arrays.items() if a.ndim and fixed[n] is None}
    if len(open_rows) > 1 or (open_rows and any(v is not None and arrays[n].ndim for n, v in fixed.items())):
        return [dict(arrays)]  # first axes that are no examples: one call
    parts: dict[str, list[NDArray[Any]]] = {}
    for name, array in arrays.items():
        rows = fixed[name] or at_most
        if array.ndim == 0:
            continue
        if fixed[name] and len(array) % rows:
            raise InvalidValue(
                f"input {name!r} takes {rows} rows per call; the {len(array)} rows given are not a multiple of it."
            )
        parts[name] = [array[i : i + rows] for i in range(0, len(array), rows)]
    counts = {len(p) for p in parts.values()} - {1} or {1}
    if len(counts) > 1:
        sizes = ", ".join(f"{n}: {len(a)}" for n, a in arrays.items() if a.ndim)
        raise InvalidValue(f"inputs hold different numbers of examples ({sizes}).")
    whole = {n: a for n, a in arrays.items() if n not in parts}
    return [whole | {n: p[i if len(p) > 1 else 0] for n, p in parts.items()} for i in range(counts.pop())]
