"""Rules of operators that multiply and sum: convolutions, matrix products, attention."""

from __future__ import annotations

from prunus.graph.coupler import Coupler, rule, tensors
from prunus.graph.elements import Ids
from prunus.graph.ir import Node, Value


@rule(
    "convolution",
    "_convolution",
    "convolution_overrideable",
    "mkldnn_convolution",
    "cudnn_convolution",
    "_slow_conv2d_forward",
    "thnn_conv2d",
    "conv2d",
    "conv1d",
    "conv3d",
    "conv_transpose2d",
)
def convolution(c: Coupler, n: Node) -> None:
    """Output channel <-> axis 0 of the weight, input channel <-> axis 1 (exchanged when transposed).

    With groups, an input channel is (group, offset in the group) and so is an output channel: whole groups can go with
    both sides, or the same offset in every group.
    """
    x, weight = tensors(n, "input", "self")[0], tensors(n, "weight")[0]
    y = n.outputs[0]
    assert y is not None
    transposed = bool(n.args.get("transposed", n.op.startswith("conv_transpose")))
    groups = int(n.args.get("groups", 1))
    spatial = len(weight.shape) - 2
    xs, ws = c.of(x), c.of(weight)
    for ids in (*xs[-spatial:], *ws[2:]):
        c.fix(ids, "spatial positions")
    channel = len(x.shape) - spatial - 1
    first, second = ws[0], ws[1]  # with groups: (group, offset) on axis 0, offset on axis 1
    outputs: Ids | None
    if groups == 1:
        inputs, outputs = (first, second) if transposed else (second, first)
    else:
        group, offset = c.split(first, [groups, weight.shape[0] // groups])
        inner = second
        if transposed:
            inputs = first
            outputs = c.merge([(group, groups), (inner, weight.shape[1])])
        else:
            outputs = first
            inputs = c.merge([(group, groups), (inner, weight.shape[1])])
        del offset
    if inputs is not None or xs[channel] is not None:
        c.same(xs[channel], inputs, "input channels that cannot be cut")
    if inputs is not None and not (c.is_zero(x, channel) or c.is_zero(weight, 0 if transposed else 1)):
        c.fix(inputs, "summed over, but a removed position would not be zero")
    made_zero = c.is_zero(weight, 1 if transposed else 0)
    for bias in tensors(n, "bias"):
        outputs = c.same(outputs, c.of(bias)[0], "bias of channels that cannot be cut")
        made_zero = made_zero and c.is_zero(bias, 0)
        c.mark(bias, 0, "bias")
    c.mark(weight, 0, "input" if transposed else "output")
    c.mark(weight, 1, "output" if transposed else "input")
    axes = list(xs[:channel]) + [outputs] + [None] * spatial
    zero = [*c.zero[x.index][:channel], made_zero, *[False] * spatial]
    c.put(y, axes, zero)
    kernel = 1
    for size in weight.shape[2:]:
        kernel *= size
    places = 1
    for size in (x if transposed else y).shape[-spatial:]:
        places *= size
    lead = 1
    for size in y.shape[:channel]:
        lead *= size
    through = (xs[channel], x.shape[channel]) if transposed else (outputs, y.shape[channel])
    c.cost(lead * places * kernel, through, (second, weight.shape[1]))


def _contract(c: Coupler, a: Value, axis_a: int, b: Value, axis_b: int) -> None:
    """Tie the two axes that are summed over; exact only if removed terms are zero on one side."""
    ids_a, ids_b = c.of(a)[axis_a], c.of(b)[axis_b]
    if ids_a is None and ids_b is None:
        return
    tied = c.same(ids_a, ids_b, "multiplied with an axis that cannot be cut")
    if tied is not None and not (c.is_zero(a, axis_a) or c.is_zero(b, axis_b)):
        c.fix(tied, "summed over, but a removed position would not be zero")


@rule("mm", "addmm", "bmm", "baddbmm", "matmul_2d", "_addmm_activation")
def matrix_product(c: Coupler, n: Node) -> None:
    """(..., n, k) x (..., k, m): k is tied and summed; a batch axis is tied and marks heads."""
    a, b = (
        tensors(n, "self", "mat1", "mat2", "batch1", "batch2")[-2:]
        if n.op != "baddbmm"
        else tensors(n, "batch1", "batch2")
    )
    y = n.outputs[0]
    assert y is not None
    batched = len(a.shape) == 3
    xs, ws = c.of(a), c.of(b)
    _contract(c, a, -1, b, -2)
    lead: list[Ids | None] = []
    zero: list[bool] = []
    if batched:
        ids = xs[0]
        if xs[0] is not None or ws[0] is not None:
            ids = c.same(xs[0], ws[0], "multiplied with a batch axis that cannot be cut")
            if a.index not in c.constant and b.index not in c.constant:
                c.elements.head(ids)
        lead, zero = [ids], [c.is_zero(a, 0) or c.is_zero(b, 0)]
    axes = [*lead, xs[-2], ws[-1]]
    zero = [*zero, c.is_zero(a, len(a.shape) - 2), c.is_zero(b, len(b.shape) - 1)]
    for bias in tensors(n, "self", "input") if n.op in ("addmm", "baddbmm", "_addmm_activation") else []:
        for back in range(1, len(bias.shape) + 1):
            if bias.shape[-back] == y.shape[-back] and y.shape[-back] > 1:
                ids, mine = c.of(bias)[-back], axes[-back]
                if ids is not None or mine is not None:
                    axes[-back] = c.same(mine, ids, "bias of an axis that cannot be cut")
                zero[-back] = zero[-back] and c.is_zero(bias, len(bias.shape) - back)
            elif y.shape[-back] > 1 and bias.shape[-back] == 1:
                zero[-back] = False
            c.mark(bias, len(bias.shape) - back, "bias")
        for back in range(len(bias.shape) + 1, len(y.shape) + 1):
            zero[-back] = False
    for v, inner, outer in ((a, -1, -2), (b, -2, -1)):
        c.mark(v, len(v.shape) + inner, "input")
        c.mark(v, len(v.shape) + outer, "output")
    c.put(y, axes, zero)
    c.cost(
        1,
        *zip(lead, y.shape[:-2], strict=True),
        (axes[-2], y.shape[-2]),
        (xs[-1], a.shape[-1]),
        (axes[-1], y.shape[-1]),
    )


@rule("_grouped_mm", "_scaled_grouped_mm")
def grouped_product(c: Coupler, n: Node) -> None:
    """(rows, k) x (experts, k, m): every row meets the weight of its own expert; experts are picked by number."""
    a, b = tensors(n, "self", "mat2")[:2]
    y = n.outputs[0]
    assert y is not None
    xs, ws = c.of(a), c.of(b)
    _contract(c, a, -1, b, -2)
    for ids in (*xs[:-1], *ws[:-2]):
        c.fix(ids, "rows are dealt out to experts by number")
    outputs = ws[-1]
    for bias in tensors(n, "bias"):
        outputs = c.same(outputs, c.of(bias)[-1], "bias of an axis that cannot be cut")
    c.mark(b, len(b.shape) - 2, "input")
    c.mark(b, len(b.shape) - 1, "output")
    c.put(y, [*[None] * (len(y.shape) - 1), outputs], [*[False] * (len(y.shape) - 1), c.is_zero(b, len(b.shape) - 1)])
    rows = a.shape[0] if len(a.shape) == 2 else a.shape[0] * a.shape[1]
    c.cost(rows, (xs[-1], a.shape[-1]), (outputs, y.shape[-1]))


@rule("mv", "dot", "addmv")
def vector_product(c: Coupler, n: Node) -> None:
    """A product with a vector sums over the last axis."""
    a, b = tensors(n, "self", "mat", "vec", "tensor")[-2:]
    _contract(c, a, -1, b, -1)
    if n.op == "mv":
        c.put(n.outputs[0], c.of(a)[:-1], c.zero[a.index][:-1])


@rule(
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)
def attention(c: Coupler, n: Node) -> None:
    """(B, H, L, E), (B, H, S, E), (B, H, S, V) -> (B, H, L, V); query heads may be a multiple of key heads."""
    query, key, value = (tensors(n, k)[0] for k in ("query", "key", "value"))
    y = n.outputs[0]
    assert y is not None
    q, k, v = c.of(query), c.of(key), c.of(value)
    if n.args.get("scale") is None:
        for ids in (q[-1], k[-1]):
            c.fix(ids, "attention scales scores by the size of this axis")
    _contract(c, query, -1, key, -1)
    if k[-2] is not None or v[-2] is not None:
        c.fix(c.same(k[-2], v[-2], "keys that cannot be cut"), "softmax over keys")
    lead: list[Ids | None] = []
    for i in range(len(y.shape) - 2):
        ids, theirs = q[i], c.same(k[i], v[i], "values that cannot be cut") if k[i] is not v[i] else k[i]
        here, there = query.shape[i], key.shape[i]
        if here != there and there > 1:
            repeats = c.elements.fresh(here // there)
            theirs = c.merge([(theirs, there), (repeats, here // there)])
        if there > 1 or here == there:
            ids = ids if ids is None and theirs is None else c.same(ids, theirs, "heads that cannot be cut")
        c.elements.head(ids)
        lead.append(ids)
    for mask in tensors(n, "attn_mask", "attn_bias"):
        for back in range(1, len(mask.shape) + 1):
            ids = c.of(mask)[-back]
            if back <= 2:
                c.fix(ids, "positions of an attention mask")
            elif mask.shape[-back] > 1 and (ids is not None or lead[-back + 2] is not None):
                lead[-back + 2] = c.same(lead[-back + 2], ids, "heads of an attention mask that cannot be cut")
    heads_zero = (
        [c.is_zero(value, i) for i in range(len(lead))] if len(value.shape) == len(y.shape) else [False] * len(lead)
    )
    c.put(y, [*lead, q[-2], v[-1]], [*heads_zero, False, c.is_zero(value, len(value.shape) - 1)])
    lengths = query.shape[-2] * key.shape[-2]
    outer = list(zip(lead, y.shape[:-2], strict=True))
    c.cost(lengths, *outer, (q[-1], query.shape[-1]))
    c.cost(lengths, *outer, (v[-1], value.shape[-1]))
