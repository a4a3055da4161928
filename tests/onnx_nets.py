"""Small ONNX networks, each around a few operators, with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Build:
    """Writes an ONNX model node by node."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.stored: list[Any] = []
        self.inputs: list[Any] = []
        self.count = 0

    def input(self, *shape: int | str, kind: int = TensorProto.FLOAT, name: str = "x") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def weight(self, *shape: int, name: str = "", positive: bool = False) -> str:
        values = self.random.standard_normal(shape).astype(np.float32)
        return self.hold(np.abs(values) + 0.5 if positive else values, name)

    def hold(self, array: Any, name: str = "") -> str:
        self.count += 1
        name = name or f"w{self.count}"
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.hold(np.array(numbers, np.int64))

    def add(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        self.count += 1
        names = [f"{op.lower()}{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=names[0], domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def conv(
        self, x: str, inside: int, out: int, size: int = 3, op: str = "Conv", bias: bool = True, **more: Any
    ) -> str:
        groups = more.get("group", 1)
        shape = (out, inside // groups) if op == "Conv" else (inside, out // groups)
        kernel = self.weight(*shape, size, size)
        pads = [size // 2] * 4
        return str(self.add(op, x, kernel, *([self.weight(out)] if bias else []), pads=pads, **more))

    def norm(self, x: str, channels: int) -> str:
        w = [self.weight(channels) for _ in range(3)] + [self.weight(channels, positive=True)]
        return str(self.add("BatchNormalization", x, *w))

    def linear(self, x: str, inside: int, out: int) -> str:
        y = self.add("MatMul", x, self.weight(inside, out))
        return str(self.add("Add", y, self.weight(out)))

    def head(self, x: str, channels: int, classes: int = 3) -> str:
        """Pool, flatten, classify: channels of an image become inputs of a last layer."""
        flat = self.add("Flatten", self.add("GlobalAveragePool", x))
        return str(self.add("Gemm", flat, self.weight(classes, channels), self.weight(classes), transB=1))

    def model(self, *outputs: str, opset: int = 20, ir: int = 9, domains: tuple[str, ...] = ()) -> Any:
        for place, name in enumerate(outputs):
            self.nodes.append(helper.make_node("Identity", [name], [f"y{place}"]))
        given = [onnx.ValueInfoProto(name=f"y{i}") for i in range(len(outputs))]
        for item in given:
            item.type.tensor_type.elem_type = TensorProto.FLOAT
        graph = helper.make_graph(self.nodes, "net", self.inputs, given, self.stored)
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir)
        inferred = onnx.shape_inference.infer_shapes(model)
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
        for item in model.graph.output:
            if not item.type.tensor_type.HasField("shape"):  # behind operators that onnx cannot infer
                item.type.tensor_type.shape.dim.add().dim_param = "rows"
                item.type.tensor_type.shape.dim.add().dim_param = "columns"
        return model


def plain() -> Any:
    """Two convolutions with norm and relu, a residual, a classifier."""
    b = Build()
    x = b.input("batch", 3, 8, 8)
    stem = b.add("Relu", b.norm(b.conv(x, 3, 8, bias=False), 8))
    inner = b.add("Relu", b.norm(b.conv(stem, 8, 12, bias=False), 12))
    return b.model(b.head(b.add("Add", stem, b.conv(inner, 12, 8)), 8))


def grouped() -> Any:
    """Depthwise and grouped convolutions, also transposed ones."""
    b = Build()
    x = b.input(2, 3, 8, 8)
    y = b.add("Clip", b.conv(x, 3, 8), b.hold(np.float32(0)), b.hold(np.float32(6)))
    y = b.conv(y, 8, 8, group=8)
    y = b.conv(b.add("Relu", y), 8, 12, group=4)
    y = b.conv(b.add("LeakyRelu", y), 12, 8, op="ConvTranspose", group=4)
    y = b.conv(b.add("Relu", y), 8, 6, op="ConvTranspose")
    return b.model(b.head(b.add("PRelu", y, b.weight(6, 1, 1)), 6))


def joined() -> Any:
    """Concat, Split with sizes, Slice, Pad on channels, MaxPool, AveragePool."""
    b = Build()
    x = b.input(1, 3, 8, 8)
    left, right = b.conv(x, 3, 6), b.conv(x, 3, 10)
    both = b.add("MaxPool", b.add("Concat", left, right, axis=1), kernel_shape=[2, 2])
    one, two = b.add("Split", both, b.ints(4, 12), outputs=2, axis=1)
    part = b.add("Slice", two, b.ints(2, 0), b.ints(1 << 60, 3), b.ints(1, 2))
    padded = b.add("Pad", one, b.ints(0, 1, 0, 0, 0, 2, 0, 0))
    part = b.add("AveragePool", b.conv(part, 10, 5), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return b.model(b.head(b.conv(padded, 7, 4), 4), b.head(part, 5))


def old() -> Any:
    """The forms of operator set 11: sizes, ends and axes as attributes."""
    b = Build()
    x = b.input(1, 3, 8, 8)
    y = b.add("Clip", b.conv(x, 3, 12), b.hold(np.float32(0)), b.hold(np.float32(6)))
    one, two = b.add("Split", y, outputs=2, axis=1, split=[4, 8])
    flat = b.add("ReduceMean", b.conv(one, 4, 6), axes=[2, 3], keepdims=1)
    flat = b.add("Squeeze", flat, axes=[2, 3])
    flat = b.add("Unsqueeze", b.add("Unsqueeze", flat, axes=[2]), axes=[3])
    two = b.add("GlobalAveragePool", b.conv(two, 8, 6))
    return b.model(b.head(b.add("Add", flat, two), 6), opset=11, ir=6)


def shuffled() -> Any:
    """DepthToSpace in both modes, SpaceToDepth, Resize to sizes that name the channels."""
    b = Build()
    x = b.input(1, 3, 4, 4)
    y = b.add("DepthToSpace", b.conv(x, 3, 16), blocksize=2)
    y = b.conv(b.add("Relu", y), 4, 12)
    y = b.add("DepthToSpace", y, blocksize=2, mode="CRD")
    y = b.conv(b.add("Elu", y), 3, 4)
    y = b.add("SpaceToDepth", y, blocksize=2)
    y = b.conv(y, 16, 5)
    y = b.add("Resize", y, "", "", b.ints(1, 5, 4, 4), mode="nearest")
    return b.model(b.head(y, 5))


def normed() -> Any:
    """Instance norm, group norms with scales per channel, reductions that sum over what is cut."""
    b = Build()
    x = b.input(1, 3, 6, 6)
    y = b.add("InstanceNormalization", b.conv(x, 3, 6), b.weight(6), b.weight(6))
    y = b.conv(b.add("Relu", y), 6, 8)
    y = b.add("GroupNormalization", y, b.weight(8), b.weight(8), num_groups=4)
    y = b.conv(b.add("Relu", y), 8, 6)
    y = b.add("Mul", y, b.add("Sigmoid", b.conv(b.add("GlobalAveragePool", y), 6, 6, size=1)))
    y = b.add("Add", b.head(y, 6), b.add("ReduceSum", y, b.ints(1, 2, 3), keepdims=0))
    return b.model(y, opset=21, ir=10)


def vectors() -> Any:
    """Products of every form, tensors that are expanded, tiled and chosen between."""
    b = Build()
    x = b.input(4, 6)
    y = b.add("Gemm", x, b.weight(6, 10), b.weight(10))
    y = b.add("Where", b.add("Greater", y, b.hold(np.float32(0))), y, b.add("Mul", y, b.hold(np.float32(0.1))))
    y = b.add("Add", y, b.add("Expand", b.weight(1, 10), b.ints(4, 10)))
    y = b.add("Transpose", b.add("MatMul", b.weight(8, 10), b.add("Transpose", y)))
    y = b.add("Pow", b.add("Softplus", y), b.hold(np.float32(2)))
    y = b.add("Reshape", b.add("Concat", y, b.add("Tile", b.weight(4, 1), b.ints(1, 8)), axis=1), b.ints(4, 16))
    y = b.add("Max", y, b.weight(16))
    z = b.add("Einsum", y, b.weight(7, 16), equation="bi,oi->bo")
    z = b.add("Tanh", z)
    return b.model(b.add("Gemm", z, b.weight(3, 7), transB=1))


def attended(dynamic: bool = False, spelled: bool = True) -> Any:
    """Token and position tables, two attentions (spelled out with a constant scale, and packed), a gated block."""
    b = Build()
    width, heads, length = 8, 2, 5
    rows: int | str = "batch" if dynamic else 1
    ids = b.input(rows, "length" if dynamic else length, kind=TensorProto.INT64, name="ids")
    y = b.add("Gather", b.weight(11, width, name="table"), ids)

    def attention(y: str) -> str:
        y = b.add("LayerNormalization", y, b.weight(width), b.weight(width))
        qkv = b.linear(y, width, 3 * width)
        q, k, v = b.add("Split", qkv, b.ints(width, width, width), outputs=3, axis=2)
        if dynamic:
            shape = b.add("Shape", q)
            lead = [b.add("Gather", shape, b.hold(np.int64(i))) for i in (0, 1)]
            lead = [b.add("Unsqueeze", s, b.ints(0)) for s in lead]
            size = b.add("Concat", *lead, b.ints(heads), b.ints(width // heads), axis=0)
            back = b.add("Concat", *lead, b.ints(width), axis=0)
        else:
            size, back = b.ints(0, 0, heads, width // heads), b.ints(1, length, width)
        q, k, v = (b.add("Transpose", b.add("Reshape", t, size), perm=[0, 2, 1, 3]) for t in (q, k, v))
        scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
        if dynamic:
            last = b.add("Slice", b.add("Shape", q), b.ints(-1), b.ints(1 << 60))
            scores = b.add("Div", scores, b.add("Sqrt", b.add("Cast", last, to=TensorProto.FLOAT)))
        else:
            scores = b.add("Mul", scores, b.hold(np.float32(0.5)))
        mixed = b.add("MatMul", b.add("Softmax", scores), v)
        return b.linear(b.add("Reshape", b.add("Transpose", mixed, perm=[0, 2, 1, 3]), back), width, width)

    y = b.add("Add", y, attention(y))
    if not spelled:
        inner = b.add("LayerNormalization", y, b.weight(width), b.weight(width))
        q, k, v = (b.linear(inner, width, width) for _ in range(3))
        mixed = b.add("Attention", q, k, v, q_num_heads=2, kv_num_heads=2, scale=0.5)
        y = b.add("Add", y, b.linear(mixed, width, width))
    inner = b.add("LayerNormalization", y, b.weight(width), b.weight(width))
    wide = b.linear(inner, width, 24)
    left, right = b.add("Split", wide, b.ints(12, 12), outputs=2, axis=-1)
    y = b.add("Add", y, b.linear(b.add("Mul", b.add("Gelu", left), right), 12, width))
    first = b.add("Gather", y, b.hold(np.int64(0)), axis=1)
    opset = 20 if spelled else 23
    return b.model(b.linear(first, width, 3), opset=opset, ir=9 if spelled else 10)


def unknown(domain: str = "com.microsoft") -> Any:
    """An operator without a rule between two layers, and layers that it does not touch."""
    b = Build()
    x = b.input(2, 6)
    y = b.add("Gemm", x, b.weight(6, 8, name="before"), b.weight(8))
    y = b.add("QuickGelu" if domain == "com.microsoft" else "Mystery", y, domain=domain)
    y = b.add("Gemm", y, b.weight(8, 6, name="after"), b.weight(6))
    z = b.add("Relu", b.add("Gemm", x, b.weight(6, 10, name="free"), b.weight(10)))
    z = b.add("Gemm", z, b.weight(10, 6, name="reader"), b.weight(6))
    return b.model(b.add("Add", y, z), domains=(domain,))


def recurrent() -> Any:
    """An LSTM, whose axes stay, behind a layer, whose axes reach it, and one that is free."""
    b = Build()
    x = b.input(4, 1, 6)
    y = b.linear(b.add("Relu", b.linear(x, 6, 9)), 9, 5)
    y = b.add("LSTM", y, b.weight(1, 16, 5), b.weight(1, 16, 4), outputs=3, hidden_size=4)[0]
    return b.model(b.linear(b.add("Squeeze", y, b.ints(1)), 4, 3))


NETS: dict[str, Any] = {
    "plain": plain,
    "grouped": grouped,
    "joined": joined,
    "old": old,
    "shuffled": shuffled,
    "normed": normed,
    "vectors": vectors,
    "attended": attended,
    "attended-dynamic": lambda: attended(dynamic=True),
    "attended-operator": lambda: attended(spelled=False),
    "unknown": unknown,
    "recurrent": recurrent,
}
