"""Rules of operators that move, cut, join and repeat axes."""

from __future__ import annotations

import numpy as np

from prunus.graph.coupler import CREATES, Axes, Coupler, dims, rule, tensors
from prunus.graph.elements import Ids
from prunus.graph.ir import Node, Value


def _first(node: Node) -> Value:
    return next(node.inputs())


@rule("t", "transpose", "permute", "numpy_T", "swapaxes", "movedim", "adjoint", "mT")
def permutation(c: Coupler, n: Node) -> None:
    """Axes change places."""
    x = _first(n)
    rank = len(x.shape)
    if n.op == "permute":
        order = dims(n, "dims", rank)
    elif n.op in ("t", "numpy_T"):
        order = list(reversed(range(rank)))
    else:
        a, b = (dims(n, k, rank)[0] for k in ("dim0", "dim1"))
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
    axes, zero, origin = c.of(x), c.zero[x.index], c.origin.get(x.index)
    c.put(
        n.outputs[0],
        [axes[i] for i in order],
        [zero[i] for i in order],
        [origin[i] for i in order] if origin is not None else None,
    )


@rule("unsqueeze", "squeeze", "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "as_strided")
def view(c: Coupler, n: Node) -> None:
    """A view factors axes and flattens them: axes are matched from the left by the number of positions they span."""
    x, y = _first(n), n.outputs[0]
    assert y is not None
    if n.op == "as_strided" or "dtype" in n.args or x.shape.count(0) or np.prod(x.shape) != np.prod(y.shape):
        c.fix_all([x], f"{n.op} reads memory in its own way")
        return
    axes, zero, origin = c.of(x), c.zero[x.index], c.origin.get(x.index)
    result: Axes = [None] * len(y.shape)
    result_zero = [False] * len(y.shape)
    result_origin: list[tuple[Value, int] | None] = [None] * len(y.shape)
    for old, new in match_axes(x.shape, y.shape):
        if len(old) == 1 and len(new) == 1:
            result[new[0]], result_zero[new[0]] = axes[old[0]], zero[old[0]]
            result_origin[new[0]] = origin[old[0]] if origin is not None else None
            continue
        flat = c.merge([(axes[i], x.shape[i]) for i in old])
        kept = all(zero[i] for i in old if axes[i] is not None)
        for place, ids in zip(new, c.split(flat, [y.shape[i] for i in new]), strict=True):
            result[place], result_zero[place] = ids, kept
    c.put(y, result, result_zero, result_origin if origin is not None else None)


def match_axes(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest groups of old and new axes that span the same positions; axes of size 1 are left out."""
    left = [i for i, s in enumerate(old) if s != 1]
    right = [i for i, s in enumerate(new) if s != 1]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = [left[i]], [right[j]]
        size_a, size_b = old[left[i]], new[right[j]]
        i, j = i + 1, j + 1
        while size_a != size_b:
            if size_a < size_b:
                a.append(left[i])
                size_a *= old[left[i]]
                i += 1
            else:
                b.append(right[j])
                size_b *= new[right[j]]
                j += 1
        groups.append((a, b))
    return groups


@rule("expand", "expand_as", "broadcast_to")
def expand(c: Coupler, n: Node) -> None:
    """Axes of size 1 are repeated: all positions are alike, so the new axis may shrink with what it meets."""
    x, y = _first(n), n.outputs[0]
    assert y is not None
    axes, zero = c.of(x), c.zero[x.index]
    extra = len(y.shape) - len(x.shape)
    result: Axes = []
    result_zero: list[bool] = []
    for i, size in enumerate(y.shape):
        old = i - extra
        if old >= 0 and x.shape[old] == size:
            result.append(axes[old])
            result_zero.append(zero[old])
        else:
            result.append(c.elements.fresh(size) if 1 < size <= 1 << 14 else None)
            result_zero.append(False)
    origin = c.origin.get(x.index)
    carried = None
    if origin is not None:
        carried = [origin[i - extra] if i >= extra and x.shape[i - extra] == s else None for i, s in enumerate(y.shape)]
    c.put(y, result, result_zero, carried)


@rule("repeat", "tile")
def repeat(c: Coupler, n: Node) -> None:
    """Axes are tiled."""
    x, y = _first(n), n.outputs[0]
    assert y is not None
    axes, zero = c.of(x), c.zero[x.index]
    extra = len(y.shape) - len(x.shape)
    result: Axes = []
    for i, size in enumerate(y.shape):
        ids = axes[i - extra] if i >= extra else None
        if ids is not None:
            result.append(np.tile(ids, size // len(ids)))
        else:
            alike = i < extra or x.shape[i - extra] == 1
            result.append(c.elements.fresh(size) if alike and 1 < size <= 1 << 14 else None)
    c.put(y, result, [False] * extra + list(zero))


@rule("cat", "concat", "concatenate")
def cat(c: Coupler, n: Node) -> None:
    """Positions of the parts follow each other."""
    parts = [v for v in tensors(n, "tensors") if 0 not in v.shape]
    y = n.outputs[0]
    assert y is not None
    parts = [v for v in parts if len(v.shape) == len(y.shape)]
    dim = dims(n, "dim", len(y.shape), 0)[0]
    result: Axes = []
    zeros: list[bool] = []
    for axis in range(len(y.shape)):
        columns = [c.of(v)[axis] for v in parts]
        zeros.append(all(c.is_zero(v, axis) for v, ids in zip(parts, columns, strict=True) if ids is not None))
        if axis == dim:
            result.append(_joined(c, columns, [v.shape[axis] for v in parts]))
            continue
        first = columns[0]
        for other in columns[1:]:
            first = c.same(first, other, "joined with a tensor that cannot be cut there")
        result.append(first)
    c.put(y, result, zeros)


def _joined(c: Coupler, columns: Axes, sizes: list[int]) -> Ids | None:
    if all(ids is None for ids in columns):
        return None
    made = []
    for ids, size in zip(columns, sizes, strict=True):
        if ids is None:
            ids = c.elements.fresh(size)
            c.fix(ids, "part of a concatenation that cannot be cut")
        made.append(ids)
    return np.concatenate(made)


@rule("stack")
def stack(c: Coupler, n: Node) -> None:
    """Parts are tied position by position along a new axis."""
    parts, y = tensors(n, "tensors"), n.outputs[0]
    assert y is not None
    dim = dims(n, "dim", len(y.shape), 0)[0]
    result: Axes = []
    zeros: list[bool] = []
    for axis in range(len(parts[0].shape)):
        first = c.of(parts[0])[axis]
        for other in parts[1:]:
            first = c.same(first, c.of(other)[axis], "stacked with a tensor that cannot be cut there")
        result.append(first)
        zeros.append(all(c.is_zero(v, axis) for v in parts))
    result.insert(dim, None)
    zeros.insert(dim, False)
    c.put(y, result, zeros)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split")
def split(c: Coupler, n: Node) -> None:
    """Pieces of an axis; equal pieces stay equal, so their positions are tied offset by offset."""
    x = _first(n)
    dim = dims(n, "dim", len(x.shape), 0)[0]
    axes, zero = c.of(x), c.zero[x.index]
    pieces = [o for o in n.outputs if o is not None]
    whole = axes[dim]
    start = 0
    first: Ids | None = None
    equal = len({p.shape[dim] for p in pieces}) == 1
    for piece in pieces:
        size = piece.shape[dim]
        ids = None if whole is None else whole[start : start + size]
        start += size
        if ids is not None and equal:
            if first is not None:
                c.elements.same(ids, first)
            first = ids if first is None else first
        c.put(piece, [ids if i == dim else a for i, a in enumerate(axes)], zero)


@rule("select", "unbind")
def select(c: Coupler, n: Node) -> None:
    """One position of an axis is picked by number, so that axis is not cut."""
    x = _first(n)
    dim = dims(n, "dim", len(x.shape), 0)[0]
    axes, zero = list(c.of(x)), list(c.zero[x.index])
    c.fix(axes[dim], "positions are picked by number")
    for y in n.outputs:
        c.put(y, axes[:dim] + axes[dim + 1 :], zero[:dim] + zero[dim + 1 :])


@rule("slice", "narrow", "slice_scatter")
def slices(c: Coupler, n: Node) -> None:
    """A range of an axis; with a step, positions between steps stay together."""
    x, y = _first(n), n.outputs[0]
    assert y is not None
    dim = dims(n, "dim", len(x.shape), 0)[0]
    axes, zero = list(c.of(x)), c.zero[x.index]
    ids, size = axes[dim], x.shape[dim]
    if n.op == "slice_scatter":
        c.fix(ids, "written by position")
        for other in tensors(n, "src"):
            for a, b in zip(c.of(other), axes, strict=True):
                c.same(a, b, "written into a tensor that cannot be cut there")
        c.put(y, axes)
        return
    start = n.args.get("start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    step = n.args.get("step") or 1
    if ids is not None:
        if step == 1:
            axes[dim] = ids[start : start + y.shape[dim]]
        elif size % step == 0:
            _, inner = c.elements.factor(ids, size // step)
            c.fix(inner, "read with a step")
            axes[dim] = ids[start::step][: y.shape[dim]]
        else:
            c.fix(ids, "read with a step that does not divide it")
            axes[dim] = None
    c.put(y, axes, zero)


@rule("flip", "roll")
def flip(c: Coupler, n: Node) -> None:
    """Reversing an axis reverses its positions; rolling by a number of positions fixes it."""
    x = _first(n)
    axes = list(c.of(x))
    for dim in dims(n, "dims", len(x.shape)):
        ids = axes[dim]
        if n.op == "flip" and ids is not None:
            axes[dim] = ids[::-1].copy()
        else:
            c.fix(ids, "rolled by a number of positions")
            axes[dim] = None
    c.put(n.outputs[0], axes, c.zero[x.index])


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "pad")
def pad(c: Coupler, n: Node) -> None:
    """Positions are added before and after; padded ones are made by position and stay."""
    x, y = _first(n), n.outputs[0]
    assert y is not None
    amounts = n.args.get("pad", n.args.get("padding", []))
    axes, zero = list(c.of(x)), c.zero[x.index]
    for k in range(len(amounts) // 2):
        axis = len(x.shape) - 1 - k
        before, after = int(amounts[2 * k]), int(amounts[2 * k + 1])
        ids = axes[axis]
        if ids is None or (before == 0 and after == 0):
            continue
        if n.op != "constant_pad_nd" or before < 0 or after < 0:
            c.fix(ids, "padded with its own values or cropped")
            axes[axis] = None
        else:
            axes[axis] = _joined(c, [None, ids, None], [before, len(ids), after])
    c.put(y, axes, zero if n.args.get("value") in (None, 0, 0.0) else False)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def pixel_shuffle(c: Coupler, n: Node) -> None:
    """Channels are factored into channels and places (pixel shuffle), or into groups that are dealt out."""
    x, y = _first(n), n.outputs[0]
    assert y is not None
    channels = len(x.shape) - 3
    axes, zero = list(c.of(x)), c.zero[x.index]
    for ids in axes[channels + 1 :]:
        c.fix(ids, "spatial positions")
    ids = axes[channels]
    if ids is not None:
        if n.op == "pixel_shuffle":
            factor = int(n.args["upscale_factor"]) ** 2
            ids, inner = c.elements.factor(ids, len(ids) // factor)
            c.fix(inner, "places of a pixel shuffle")
        elif n.op == "pixel_unshuffle":
            ids = np.repeat(ids, int(n.args["downscale_factor"]) ** 2)
        else:
            groups = int(n.args["groups"])
            outer, inner = c.elements.factor(ids, groups)
            c.fix(outer, "groups of a channel shuffle")
            ids = np.ascontiguousarray(ids.reshape(groups, -1).T).reshape(-1)
    c.put(y, [*axes[:channels], ids, None, None], zero)


@rule("im2col", "col2im")
def unfold(c: Coupler, n: Node) -> None:
    """Channels and kernel places share one axis, channels outermost."""
    x, y = _first(n), n.outputs[0]
    assert y is not None
    axes, zero = list(c.of(x)), c.zero[x.index]
    for ids in axes[2:]:
        c.fix(ids, "spatial positions")
    ids = axes[1]
    if ids is not None:
        if n.op == "im2col":
            ids = np.repeat(ids, y.shape[1] // x.shape[1])
        else:
            ids, inner = c.elements.factor(ids, y.shape[1])
            c.fix(inner, "places of a kernel")
    c.put(y, [axes[0], ids, *[None] * (len(y.shape) - 2)], [zero[0], zero[1], *[False] * (len(y.shape) - 2)])


@rule("unfold")
def windows(c: Coupler, n: Node) -> None:
    """Overlapping windows along an axis."""
    x, y = _first(n), n.outputs[0]
    assert y is not None
    dim = dims(n, "dimension", len(x.shape))[0]
    axes = list(c.of(x))
    c.fix(axes[dim], "cut into windows")
    axes[dim] = None
    c.put(y, [*axes, None], [*c.zero[x.index], False])


@rule("index", "_unsafe_index")
def index(c: Coupler, n: Node) -> None:
    """Indexed axes are read by number and stay; the others pass."""
    x, y = next(iter(tensors(n, "self"))), n.outputs[0]
    assert y is not None
    axes, zero = c.of(x), c.zero[x.index]
    given = n.args.get("indices") or []
    places = [i for i, index in enumerate(given) if isinstance(index, Value)]
    for i in places:
        c.fix(axes[i], "read by index")
    c.fix_all(tensors(n, "indices"), "used as an index")
    masks = any(len(given[i].shape) != 1 and not given[i].floating and _is_mask(given[i], x, i) for i in places)
    rank = max((len(given[i].shape) for i in places), default=0)
    rest = [i for i in range(len(x.shape)) if i not in places]
    if masks or len(y.shape) != rank + len(rest):
        c.fix_all([x], "read by a mask")
        return
    together = places == list(range(places[0], places[-1] + 1)) if places else True
    before = [i for i in rest if i < places[0]] if places and together else []
    after = [i for i in rest if i not in before]
    order: list[int | None] = [*before, *[None] * rank, *after]
    c.put(
        y,
        [None if i is None else axes[i] for i in order],
        [False if i is None else zero[i] for i in order],
    )


def _is_mask(index: Value, x: Value, place: int) -> bool:
    return len(index.shape) > 1 and index.shape == x.shape[place : place + len(index.shape)]


@rule(
    "index_select",
    "gather",
    "scatter",
    "scatter_add",
    "index_add",
    "index_copy",
    "take_along_dim",
    "sort",
    "topk",
    "argsort",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "scatter_reduce",
    "index_fill",
    "searchsorted",
)
def by_position(c: Coupler, n: Node) -> None:
    """One axis is read or written by number or order and stays; the others pass."""
    x = _first(n)
    dim = dims(n, "dim", len(x.shape), -1)[0] if x.shape else 0
    axes = list(c.of(x))
    if axes:
        c.fix(axes[dim], "read by number or order")
        axes[dim] = None
    others = [v for v in tensors(n, "index", "src", "source") if v is not x]
    for other in others:
        if len(other.shape) == len(axes):
            for axis, ids in enumerate(c.of(other)):
                if axis == dim:
                    c.fix(ids, "read by number or order")
                elif axes[axis] is not None or ids is not None:
                    axes[axis] = c.same(axes[axis], ids, "read with an index that cannot be cut there")
        else:
            c.fix_all([other], "used as an index")
    for y in n.outputs:
        if y is not None:
            whole = len(y.shape) == len(axes)
            c.put(y, axes if whole else [None] * len(y.shape), False)


@rule("index_put", "masked_scatter", "_index_put_impl")
def index_put(c: Coupler, n: Node) -> None:
    """Positions are written by number: indexed axes and what is written stay."""
    x = _first(n)
    axes = list(c.of(x))
    given = n.args.get("indices") or [None] * 0
    values = tensors(n, "values", "source")
    touched = [i for i, index in enumerate(given) if isinstance(index, Value)] or list(range(len(axes)))
    for i in touched:
        c.fix(axes[i], "written by index")
        axes[i] = None
    for value in values:
        for back in range(1, len(value.shape) + 1):
            ids = c.of(value)[-back]
            mine = axes[-back] if back <= len(axes) else None
            if ids is not None or mine is not None:
                c.same(mine, ids, "written by index")
    c.put(n.outputs[0], axes)


@rule("copy")
def copy(c: Coupler, n: Node) -> None:
    """One tensor takes the values of another; both are tied where neither is repeated."""
    into, source = tensors(n, "self")[0], tensors(n, "src")[0]
    axes, zero = list(c.of(into)), list(c.zero[into.index])
    for back in range(1, len(source.shape) + 1):
        ids, mine = c.of(source)[-back], axes[-back]
        if source.shape[-back] == into.shape[-back] and source.shape[-back] != 1:
            axes[-back] = c.same(mine, ids, "copied into a tensor that cannot be cut there")
            zero[-back] = c.is_zero(source, len(source.shape) - back)
    c.put(n.outputs[0], axes, zero)


_FILLED = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
CREATES.update((*_FILLED, "expand", "expand_as", "broadcast_to", "repeat", "tile"))


@rule(*_FILLED)
def filled(c: Coupler, n: Node) -> None:
    """Every position holds the same number, so the tensor may shrink with what it meets."""
    y = n.outputs[0]
    if y is not None:
        axes = [c.elements.fresh(s) if 1 < s <= 1 << 14 else None for s in y.shape]
        c.put(y, axes, n.op in ("zeros", "new_zeros"))


@rule("zeros_like", "ones_like", "full_like", "empty_like", "fill", "zero", "bernoulli", "normal", "uniform")
def alike(c: Coupler, n: Node) -> None:
    """The same axes, filled."""
    x = _first(n)
    c.put(n.outputs[0], c.of(x), n.op in ("zeros_like", "zero"))


@rule("tril", "triu", "diagonal", "diag_embed", "diag")
def triangle(c: Coupler, n: Node) -> None:
    """The last two axes (or the two given) are compared position by position and stay."""
    x, y = _first(n), n.outputs[0]
    assert y is not None
    axes = list(c.of(x))
    if n.op in ("tril", "triu"):
        for ids in axes[-2:]:
            c.fix(ids, "a triangle of positions")
        c.put(y, [*axes[:-2], None, None], c.zero[x.index])
    else:
        c.fix_all([x], "a diagonal of positions")


@rule("view_as_real", "view_as_complex")
def complex_parts(c: Coupler, n: Node) -> None:
    """Real and imaginary parts become, or were, the last axis."""
    x = _first(n)
    axes, zero = list(c.of(x)), list(c.zero[x.index])
    if n.op == "view_as_real":
        c.put(n.outputs[0], [*axes, None], [*zero, False])
    else:
        c.fix(axes[-1], "real and imaginary parts")
        c.put(n.outputs[0], axes[:-1], zero[:-1])
