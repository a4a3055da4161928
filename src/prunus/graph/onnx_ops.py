"""ONNX operators in terms of the ATen operators that have rules: one short translation each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from prunus.errors import DamagedFile
from prunus.graph.ir import Value
from prunus.graph.onnx_graph import Reader, operator

if TYPE_CHECKING:
    from onnx import NodeProto

# -- element by element -----------------------------------------------------------------------------------------

_SAME = """Relu:relu LeakyRelu:leaky_relu Elu:elu Celu:celu Selu:selu Sigmoid:sigmoid HardSigmoid:hardsigmoid
 HardSwish:hardswish Mish:mish Tanh:tanh Softplus:softplus Softsign:softsign Gelu:gelu Erf:erf Exp:exp Log:log
 Sqrt:sqrt Neg:neg Abs:abs Ceil:ceil Floor:floor Round:round Sign:sign Sin:sin Cos:cos Tan:tan Asin:asin Acos:acos
 Atan:atan Sinh:sinh Cosh:cosh Asinh:asinh Acosh:acosh Atanh:atanh Not:logical_not BitwiseNot:bitwise_not
 Reciprocal:reciprocal Identity:alias Cast:_to_copy CastLike:_to_copy Dropout:dropout IsNaN:isnan IsInf:isinf
 ThresholdedRelu:threshold Swish:silu Add:add Sub:sub Mul:mul Div:div And:logical_and Or:logical_or
 Xor:logical_xor BitwiseAnd:bitwise_and BitwiseOr:bitwise_or BitwiseXor:bitwise_xor Equal:eq Less:lt Greater:gt
 LessOrEqual:le GreaterOrEqual:ge Mod:remainder PRelu:prelu Where:where"""
_ELEMENTWISE = dict(pair.split(":") for pair in _SAME.split())
_NAMES = ("self", "other", "third")


@operator(*_ELEMENTWISE)
def elementwise(r: Reader, n: NodeProto) -> None:
    """Single numbers become plain ones, unless all operands are; slopes are aligned from the right."""
    op = _ELEMENTWISE[n.op_type]
    names = list(n.input[:1]) if n.op_type in ("Dropout", "CastLike") else list(n.input)
    rank = len(r.shape(n))
    args: dict[str, Any] = {}
    for key, name in zip(_NAMES, names, strict=False):
        number = r.scalar(name) if len(names) > 1 and n.op_type != "Where" else None
        args[key] = r.value(name) if number is None else number
    if n.op_type == "PRelu":
        slope = r.value(n.input[1])
        args = {"self": r.value(n.input[0]), "weight": r.view(slope, [1] * (rank - len(slope.shape)) + [*slope.shape])}
    if op in ("div", "remainder") and not isinstance(args["self"], Value):
        op, args = "reciprocal", {"self": args["other"]}  # a number over zero is not zero
    r.finish(n, op, args)


@operator("Pow")
def power(r: Reader, n: NodeProto) -> None:
    """A known exponent tells whether zero stays zero."""
    exponent = r.scalar(n.input[1])
    r.finish(n, "pow", {"self": r.value(n.input[0]), "exponent": r.value(n.input[1]) if exponent is None else exponent})


@operator("Clip")
def clip(r: Reader, n: NodeProto) -> None:
    """A lower end above zero makes zeros nonzero."""
    ends = []
    for place, name in ((1, "min"), (2, "max")):
        array = r.constant(n, place, name)
        given = place < len(n.input) and bool(n.input[place])
        ends.append(None if array is None and not given else 1.0 if array is None else float(array.reshape(-1)[0]))
    r.finish(n, "clamp", {"self": r.value(n.input[0]), "min": ends[0], "max": ends[1]})


@operator("Sum", "Mean", "Max", "Min")
def variadic(r: Reader, n: NodeProto) -> None:
    """Several operands are combined one after the other."""
    op = {"Max": "maximum", "Min": "minimum"}.get(n.op_type, "add")
    values = [v for v in r.inputs_of(n) if v is not None]
    total = values[0]
    for value in values[1:-1]:
        total = r.emit(op, {"self": total, "other": value}, np.broadcast_shapes(total.shape, value.shape))
    if len(values) == 1:
        r.finish(n, "alias", {"self": total})
    else:
        r.finish(n, op, {"self": total, "other": values[-1]})


@operator("Shrink")
def shrink(r: Reader, n: NodeProto) -> None:
    """Small numbers become zero."""
    r.finish(n, "softshrink", {"self": r.value(n.input[0])})


# -- products ---------------------------------------------------------------------------------------------------


@operator("Conv", "ConvTranspose")
def convolution(r: Reader, n: NodeProto) -> None:
    """The layout of ONNX weights is that of ATen."""
    x, weight, *bias = r.inputs_of(n)
    args = {"input": x, "weight": weight, "bias": bias[0] if bias else None}
    groups = int(r.attribute(n, "group", 1))
    assert x is not None
    assert weight is not None
    wanted = weight.shape[0] if n.op_type == "ConvTranspose" else weight.shape[1] * groups
    _agree(n, x.shape[1], wanted, "channels")
    r.finish(n, "convolution", {**args, "transposed": n.op_type == "ConvTranspose", "groups": groups})


def _agree(n: NodeProto, given: int, wanted: int, what: str) -> None:
    # onnx's own inference does not compare these.
    if given != wanted:
        where = f"{n.op_type} {n.name or n.output[0]!r}"
        raise DamagedFile(
            f"the shapes of the model contradict each other: {where} reads {wanted} {what} and gets {given}."
        )


@operator("Gemm")
def gemm(r: Reader, n: NodeProto) -> None:
    """Transposed operands become nodes of their own."""
    a, b, *bias = r.inputs_of(n)
    assert a is not None
    assert b is not None
    a = r.permute(a, [1, 0]) if r.attribute(n, "transA", 0) else a
    b = r.permute(b, [1, 0]) if r.attribute(n, "transB", 0) else b
    _agree(n, a.shape[1], b.shape[0], "features")
    if bias and bias[0] is not None:
        r.finish(n, "addmm", {"self": bias[0], "mat1": a, "mat2": b})
    else:
        r.finish(n, "mm", {"self": a, "mat2": b})


@operator("MatMul")
def matmul(r: Reader, n: NodeProto) -> None:
    """Leading axes are flattened into the rows of one product, or into the batch of a batched one."""
    a, b = r.value(n.input[0]), r.value(n.input[1])
    if len(a.shape) == 1 or len(b.shape) == 1:
        a = r.view(a, [1, *a.shape]) if len(a.shape) == 1 else a
        b = r.view(b, [*b.shape, 1]) if len(b.shape) == 1 else b
    y = _product(r, a, b)
    r.finish(n, "view", {"self": y, "size": list(r.shape(n))})


def _product(r: Reader, a: Value, b: Value) -> Value:
    if len(b.shape) == 2:
        rows = int(np.prod(a.shape[:-1]))
        y = r.emit("mm", {"self": r.view(a, [rows, a.shape[-1]]), "mat2": b}, [rows, b.shape[1]])
        return r.view(y, [*a.shape[:-1], b.shape[1]])
    if len(a.shape) == 2:
        # (W X)^T = X^T W^T keeps the weight a matrix.
        last = [*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2]
        return r.permute(_product(r, r.permute(b, last), r.permute(a, [1, 0])), last)
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    flat = []
    for x in (a, b):
        whole = (*lead, *x.shape[-2:])
        if x.shape != whole:
            x = r.emit("expand", {"self": x, "size": list(whole)}, whole)
        flat.append(r.view(x, [int(np.prod(lead)), *x.shape[-2:]]))
    y = r.emit("bmm", {"self": flat[0], "mat2": flat[1]}, [flat[0].shape[0], a.shape[-2], b.shape[-1]])
    return r.view(y, [*lead, *y.shape[1:]])


@operator("Einsum")
def einsum(r: Reader, n: NodeProto) -> None:
    """Two operands whose letters all differ within each: batch, rows, sums and columns of one batched product."""
    equation = str(r.attribute(n, "equation", "")).replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    operands = inputs.split(",")
    whole = "".join(operands)
    if not arrow or len(operands) != 2 or "." in equation or any(len(set(o)) != len(o) for o in operands):
        r.without_rule(n)
        return
    left, right = operands
    if any(c not in output and not (c in left and c in right) for c in whole):
        r.without_rule(n)
        return
    a, b = r.value(n.input[0]), r.value(n.input[1])
    size = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
    batch = [c for c in left if c in right and c in output]
    summed = [c for c in left if c in right and c not in output]
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]

    def count(letters: list[str]) -> int:
        return int(np.prod([size[c] for c in letters], dtype=np.int64))

    a = r.permute(a, [left.index(c) for c in (*batch, *rows, *summed)])
    b = r.permute(b, [right.index(c) for c in (*batch, *summed, *columns)])
    lead = [count(batch)] if batch else []
    a, b = r.view(a, [*lead, count(rows), count(summed)]), r.view(b, [*lead, count(summed), count(columns)])
    y = r.emit("bmm" if batch else "mm", {"self": a, "mat2": b}, [*lead, count(rows), count(columns)])
    order = [*batch, *rows, *columns]
    y = r.view(y, [size[c] for c in order])
    r.finish(n, "permute", {"self": y, "dims": [order.index(c) for c in output]})


@operator("Attention")
def attention(r: Reader, n: NodeProto) -> None:
    """Scaled-dot-product attention; heads inside the last axis are brought to the front first."""
    if any(n.output[1:]) or any(n.input[4:]):
        r.without_rule(n)
        return
    inputs = r.inputs_of(n)
    packed = len(inputs[0].shape) == 3  # type: ignore[union-attr]
    values = []
    for place, x in enumerate(inputs[:3]):
        assert x is not None
        if packed:
            heads = int(r.attribute(n, "q_num_heads" if place == 0 else "kv_num_heads", 1))
            x = r.view(x, [x.shape[0], x.shape[1], heads, x.shape[2] // heads])
            x = r.permute(x, [0, 2, 1, 3])
        values.append(x)
    query, key, value = values
    args = {"query": query, "key": key, "value": value, "scale": r.attribute(n, "scale")}
    args["attn_mask"] = inputs[3] if len(inputs) > 3 else None
    if not packed:
        r.finish(n, "scaled_dot_product_attention", args)
        return
    y = r.emit("scaled_dot_product_attention", args, [*query.shape[:3], value.shape[3]])
    r.finish(n, "view", {"self": r.permute(y, [0, 2, 1, 3]), "size": list(r.shape(n))})


# -- norms ------------------------------------------------------------------------------------------------------


@operator("BatchNormalization")
def batch_norm(r: Reader, n: NodeProto) -> None:
    """Running statistics are buffers; with training mode they are not used."""
    x, weight, bias, mean, variance = r.inputs_of(n)[:5]
    assert x is not None
    for statistic in (weight, bias, mean, variance):
        _agree(n, x.shape[1], statistic.shape[0] if statistic is not None else 0, "channels")
    for statistic in (mean, variance):
        if statistic is not None and statistic.stored:
            statistic.kind = "buffer"
    if variance is not None and variance.stored:
        r.scales.add(variance.name)
    args = {"input": x, "weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
    r.finish(n, "native_batch_norm", args | {"training": bool(r.attribute(n, "training_mode", 0))})


@operator("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_norm(r: Reader, n: NodeProto) -> None:
    """Scale and shift are aligned with the last axes."""
    x, weight, *bias = r.inputs_of(n)
    assert x is not None
    axis = int(r.attribute(n, "axis", -1)) % len(x.shape)
    count = len(x.shape) - axis
    args: dict[str, Any] = {"input": x, "normalized_shape": list(x.shape[axis:])}
    for key, value in (("weight", weight), ("bias", bias[0] if bias else None)):
        if value is not None:
            args[key] = r.view(value, value.shape[-count:]) if len(value.shape) != count else value
    r.finish(n, "native_layer_norm", args)


@operator("InstanceNormalization")
def instance_norm(r: Reader, n: NodeProto) -> None:
    """Every channel is a group of its own."""
    x, weight, bias = r.inputs_of(n)
    assert x is not None
    r.finish(n, "native_group_norm", {"input": x, "weight": weight, "bias": bias, "group": x.shape[1]})


@operator("GroupNormalization")
def group_norm(r: Reader, n: NodeProto) -> None:
    """Scale and shift belong to channels."""
    x, weight, bias = r.inputs_of(n)
    r.finish(
        n, "native_group_norm", {"input": x, "weight": weight, "bias": bias, "group": r.attribute(n, "num_groups")}
    )


# -- moving axes ------------------------------------------------------------------------------------------------


@operator("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def view(r: Reader, n: NodeProto) -> None:
    """Only the resulting shape matters."""
    r.finish(n, "view", {"self": r.value(n.input[0]), "size": list(r.shape(n))})


@operator("Transpose")
def transpose(r: Reader, n: NodeProto) -> None:
    """Without an order, axes are reversed."""
    x = r.value(n.input[0])
    r.finish(n, "permute", {"self": x, "dims": list(r.attribute(n, "perm", list(reversed(range(len(x.shape))))))})


@operator("Expand")
def expand(r: Reader, n: NodeProto) -> None:
    """Axes of size 1 are repeated."""
    r.finish(n, "expand", {"self": r.value(n.input[0]), "size": list(r.shape(n))})


@operator("Tile")
def tile(r: Reader, n: NodeProto) -> None:
    """The whole is repeated along axes."""
    r.finish(n, "repeat", {"self": r.value(n.input[0])})


@operator("Concat")
def concat(r: Reader, n: NodeProto) -> None:
    """Parts follow each other."""
    r.finish(n, "cat", {"tensors": r.inputs_of(n), "dim": int(r.attribute(n, "axis", 0))})


@operator("Split")
def split(r: Reader, n: NodeProto) -> None:
    """Pieces of one axis."""
    axis = int(r.attribute(n, "axis", 0))
    sizes = [r.shape(n, i)[axis] for i in range(len(n.output))]
    r.finish(n, "split_with_sizes", {"self": r.value(n.input[0]), "split_sizes": sizes, "dim": axis})


@operator("Slice")
def slices(r: Reader, n: NodeProto) -> None:
    """One axis after the other; a whole axis read backwards is a flip."""
    x = r.value(n.input[0])
    ranges = slice_ranges(r, n)
    if ranges is None:
        r.without_rule(n)
        return
    ranges = [g for g in ranges if (g[1], g[2]) != (0, 1) or r.shape(n)[g[0]] != x.shape[g[0]]]
    shape = list(x.shape)
    for place, (axis, start, step) in enumerate(ranges):
        size = r.shape(n)[axis]
        if step < 0 and (step != -1 or size != x.shape[axis]):
            r.without_rule(n)
            return
        shape[axis] = size
        args: dict[str, Any] = {
            "self": x,
            "dim": axis,
            "start": start,
            "end": start + (size - 1) * step + 1,
            "step": step,
        }
        op = "slice"
        if step < 0:
            op, args = "flip", {"self": x, "dims": [axis]}
        if place == len(ranges) - 1:
            r.finish(n, op, args)
            return
        x = r.emit(op, args, shape, x.floating)
    r.finish(n, "alias", {"self": x})


def slice_ranges(r: Reader, n: NodeProto) -> list[tuple[int, int, int]] | None:
    """Return (axis, first position, step) of every sliced axis; None when they depend on data."""
    shape = r.walk.shapes[n.input[0]]
    assert shape is not None
    starts, ends = r.integers(n, 1, "starts"), r.integers(n, 2, "ends")
    if starts is None or ends is None:
        return None
    axes = r.integers(n, 3, "axes") or list(range(len(starts)))
    steps = r.integers(n, 4) or [1] * len(starts)
    result = []
    for axis, start, step in zip(axes, starts, steps, strict=True):
        axis %= len(shape)
        size = shape[axis]
        start = start + size if start < 0 else start
        result.append((axis, min(max(start, 0), size - 1 if step < 0 else size), step))
    return result


@operator("Gather")
def gather(r: Reader, n: NodeProto) -> None:
    """One position by number, a table look-up, or positions by index."""
    x, axis = r.value(n.input[0]), int(r.attribute(n, "axis", 0))
    axis %= len(x.shape)
    index = r.walk.known.get(n.input[1])
    if index is not None and index.ndim == 0:
        r.finish(n, "select", {"self": x, "dim": axis, "index": int(index)})
        return
    indices = r.value(n.input[1])
    if axis == 0 and len(x.shape) == 2 and x.stored and index is None:
        r.finish(n, "embedding", {"weight": x, "indices": indices})
    elif not indices.shape:
        r.finish(n, "select", {"self": x, "dim": axis, "index": 0})
    else:
        r.finish(n, "index", {"self": x, "indices": [*[None] * axis, indices]})


@operator("GatherElements", "ScatterElements", "CumSum", "TopK", "ArgMax", "ArgMin")
def by_position(r: Reader, n: NodeProto) -> None:
    """One axis is read or written by number or order."""
    op = {
        "GatherElements": "gather", "ScatterElements": "scatter", "CumSum": "cumsum", "TopK": "topk",
        "ArgMax": "argmax", "ArgMin": "argmin",
    }[n.op_type]  # fmt: skip
    x = r.value(n.input[0])
    axis = int(r.attribute(n, "axis", -1 if op == "topk" else 0))
    if op == "cumsum":
        given = r.integers(n, 1)
        if given is None:
            r.without_rule(n)
            return
        axis = given[0]
    args: dict[str, Any] = {"self": x, "dim": axis}
    if op in ("gather", "scatter"):
        args["index"] = r.value(n.input[1])
    if op == "scatter":
        args["src"] = r.value(n.input[2])
    if op.startswith("arg"):
        args["keepdim"] = bool(r.attribute(n, "keepdims", 1))
    r.finish(n, op, args)


@operator("ScatterND")
def scatter_nd(r: Reader, n: NodeProto) -> None:
    """The first axes are written by number; what is written has the others."""
    data, indices, updates = r.inputs_of(n)
    assert indices is not None
    args = {"self": data, "indices": [indices] * indices.shape[-1], "values": updates}
    r.finish(n, "index_put", args)


@operator("Pad")
def pad(r: Reader, n: NodeProto) -> None:
    """ATen lists (before, after) from the last axis on."""
    x = r.value(n.input[0])
    amounts = r.integers(n, 1, "pads")
    if amounts is None:
        r.without_rule(n)
        return
    rank = len(x.shape)
    axes = [i % rank for i in r.integers(n, 3) or range(rank)]
    around = dict(zip(axes, zip(amounts[: len(axes)], amounts[len(axes) :], strict=True), strict=True))
    listed = [a for i in reversed(range(rank)) for a in around.get(i, (0, 0))]
    if str(r.attribute(n, "mode", "constant")) != "constant":
        r.finish(n, "pad", {"self": x, "pad": listed})
        return
    value = r.constant(n, 2, "value")
    given = len(n.input) > 2 and bool(n.input[2])
    number = (1.0 if given else 0.0) if value is None else float(value.reshape(-1)[0])
    r.finish(n, "constant_pad_nd", {"self": x, "pad": listed, "value": number})


@operator("DepthToSpace", "SpaceToDepth")
def depth_to_space(r: Reader, n: NodeProto) -> None:
    """Mode CRD is a pixel shuffle; in mode DCR places come before channels, so they are exchanged first."""
    x, factor = r.value(n.input[0]), int(r.attribute(n, "blocksize"))
    batch, channels, *size = x.shape
    if n.op_type == "SpaceToDepth":
        shape = r.shape(n)
        y = r.emit("pixel_unshuffle", {"self": x, "downscale_factor": factor}, shape)
        y = r.permute(r.view(y, [batch, channels, factor**2, *shape[2:]]), [0, 2, 1, 3, 4])
        r.finish(n, "view", {"self": y, "size": list(shape)})
        return
    if str(r.attribute(n, "mode", "DCR")) == "DCR":
        x = r.permute(r.view(x, [batch, factor**2, channels // factor**2, *size]), [0, 2, 1, 3, 4])
        x = r.view(x, [batch, channels, *size])
    r.finish(n, "pixel_shuffle", {"self": x, "upscale_factor": factor})


@operator("Trilu")
def triangle(r: Reader, n: NodeProto) -> None:
    """A triangle of the last two axes."""
    r.finish(n, "triu" if r.attribute(n, "upper", 1) else "tril", {"self": r.value(n.input[0])})


@operator("ConstantOfShape")
def filled(r: Reader, n: NodeProto) -> None:
    """Every position holds the same number."""
    import onnx

    number = 0.0
    for attribute in n.attribute:
        if attribute.name == "value":
            number = float(onnx.numpy_helper.to_array(attribute.t).reshape(-1)[0])
    r.finish(n, "zeros" if number == 0 else "full", {"size": list(r.shape(n))})


# -- over axes --------------------------------------------------------------------------------------------------

_REDUCTIONS = {
    "ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "amax", "ReduceMin": "amin", "ReduceProd": "prod",
    "ReduceL1": "norm", "ReduceL2": "norm", "ReduceLogSumExp": "logsumexp", "ReduceSumSquare": "sum",
    "ReduceLogSum": "sum",
}  # fmt: skip


@operator(*_REDUCTIONS)
def reduction(r: Reader, n: NodeProto) -> None:
    """Without axes all are reduced, or none where the model says so."""
    x = r.value(n.input[0])
    given = r.attribute(n, "axes")
    if given is None and len(n.input) > 1 and n.input[1]:
        given = r.integers(n, 1)
        if given is None:
            r.without_rule(n)
            return
    if not given and r.attribute(n, "noop_with_empty_axes", 0):
        r.finish(n, "square" if n.op_type == "ReduceSumSquare" else "abs", {"self": x})
        return
    keep = bool(r.attribute(n, "keepdims", 1))
    axes = list(given) if given else list(range(len(x.shape)))
    if n.op_type == "ReduceSumSquare":
        x = r.emit("square", {"self": x}, x.shape)
    args = {"self": x, "dim": axes, "keepdim": keep}
    if n.op_type == "ReduceLogSum":
        y = r.emit("sum", args, r.shape(n))
        r.finish(n, "log", {"self": y})
    else:
        r.finish(n, _REDUCTIONS[n.op_type], args)


@operator("Softmax", "LogSoftmax", "Hardmax", "LpNormalization")
def softmax(r: Reader, n: NodeProto) -> None:
    """Before operator set 13, all axes from the named one on are normalised together."""
    x = r.value(n.input[0])
    old = r.opset < 13 and n.op_type != "LpNormalization"
    axis = int(r.attribute(n, "axis", 1 if old else -1)) % len(x.shape)
    dims = list(range(axis, len(x.shape))) if old else [axis]
    r.finish(n, "_log_softmax" if n.op_type == "LogSoftmax" else "_softmax", {"self": x, "dim": dims})


_POOLS = {
    "MaxPool": "max_pool{}d_with_indices", "AveragePool": "avg_pool{}d", "LpPool": "avg_pool{}d",
    "GlobalAveragePool": "adaptive_avg_pool{}d", "GlobalMaxPool": "adaptive_max_pool{}d",
    "GlobalLpPool": "adaptive_avg_pool{}d",
}  # fmt: skip


@operator(*_POOLS)
def pool(r: Reader, n: NodeProto) -> None:
    """All axes behind the channels are spatial."""
    x = r.value(n.input[0])
    spatial = len(x.shape) - 2
    if not 1 <= spatial <= 3:
        r.without_rule(n)
        return
    r.finish(n, _POOLS[n.op_type].format(spatial), {"self": x})


@operator("Resize", "Upsample")
def resize(r: Reader, n: NodeProto) -> None:
    """Only spatial axes change their size."""
    x, shape = r.value(n.input[0]), r.shape(n)
    spatial = len(x.shape) - 2
    if not 1 <= spatial <= 3 or shape[:2] != x.shape[:2]:
        r.without_rule(n)
        return
    r.finish(n, f"upsample_nearest{spatial}d", {"self": x})


@operator("GridSample")
def grid_sample(r: Reader, n: NodeProto) -> None:
    """Channels are sampled at the same places."""
    r.finish(n, "grid_sampler", {"input": r.value(n.input[0]), "grid": r.value(n.input[1])})
