"""Rules of element-wise operators, reductions, norms, pooling and table look-ups."""

from __future__ import annotations

from prunus.graph.coupler import Axes, Coupler, dims, rule, tensors
from prunus.graph.ir import Node, Value

# f(0) = 0, or the result is the first operand times or clamped to something.
_KEEPS_ZERO = """
    relu relu6 gelu silu mish hardswish tanh leaky_relu elu celu selu abs neg sqrt sin sinh asin asinh erf expm1
    log1p clone detach alias lift_fresh lift _to_copy to contiguous dropout feature_dropout alpha_dropout
    native_dropout floor ceil round trunc frac sign sgn tan atan softshrink hardshrink tanhshrink square positive
    real imag conj conj_physical resolve_conj resolve_neg _conj _neg_view nan_to_num softsign rrelu rrelu_with_noise
    _fused_dropout view_of detach_copy lift_fresh_copy
""".split()  # noqa: SIM905
_LOSES_ZERO = """
    sigmoid hardsigmoid exp exp2 cos cosh log log2 log10 softplus rsqrt reciprocal logical_not bitwise_not isnan
    isinf isfinite log_sigmoid log_sigmoid_forward acos acosh atanh erfc lgamma digamma logit erfinv sinc signbit
    bernoulli_p
""".split()  # noqa: SIM905
_ANY = ["mul", "multiply", "logical_and", "bitwise_and", "__and__"]
_ALL = [
    "add",
    "sub",
    "subtract",
    "rsub",
    "maximum",
    "minimum",
    "where",
    "lerp",
    "addcmul",
    "addcdiv",
    "fmax",
    "fmin",
    "logical_or",
    "bitwise_or",
    "__or__",
    "hypot",
    "logical_xor",
    "bitwise_xor",
]
_FIRST = [
    "div",
    "divide",
    "true_divide",
    "floor_divide",
    "pow",
    "prelu",
    "_prelu_kernel",
    "clamp",
    "clamp_min",
    "clamp_max",
    "hardtanh",
    "remainder",
    "fmod",
    "glu_part",
    "clip",
]
_NONE = [
    "threshold",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "masked_fill",
    "isclose",
    "atan2",
    "copysign",
    "polar",
    "complex",
    "logaddexp",
    "xlogy",
    "nextafter",
    "bitwise_left_shift",
    "bitwise_right_shift",
    "heaviside",
]


@rule(*_KEEPS_ZERO, *_LOSES_ZERO, *_ANY, *_ALL, *_FIRST, *_NONE)
def elementwise(c: Coupler, n: Node) -> None:
    """Operands are aligned from the right; axes of size 1 are broadcast, the others are tied."""
    y = n.outputs[0]
    assert y is not None
    if n.op in ("prelu", "_prelu_kernel"):
        _prelu(c, n, y)
        return
    operands = list(n.inputs())
    rank = len(y.shape)
    result: Axes = [None] * rank
    zero = [False] * rank
    number = n.op in _ALL and any(
        isinstance(a, int | float) and not isinstance(a, bool) and a != 0
        for k, a in n.args.items()
        if k in ("other", "self", "value")
    )
    clamped = n.op in ("clamp", "clamp_min", "clamp_max", "hardtanh", "clip") and not _spans_zero(n)
    powered = n.op == "pow" and not (isinstance(n.args.get("exponent"), int | float) and n.args["exponent"] > 0)
    for back in range(1, rank + 1):
        size = y.shape[-back]
        if size == 1:
            continue
        meeting = [v for v in operands if len(v.shape) >= back and v.shape[-back] == size]
        ids = [c.of(v)[-back] for v in meeting]
        if all(i is None for i in ids):
            continue
        first = ids[0]
        for other in ids[1:]:
            first = c.same(first, other, "combined with a tensor that cannot be cut there")
        result[-back] = first
        flags = [c.is_zero(v, len(v.shape) - back) for v in meeting]
        if n.op in _KEEPS_ZERO or n.op in _ANY:
            zero[-back] = any(flags)
        elif n.op in _ALL:
            zero[-back] = all(flags) and len(meeting) == len(operands) and not number
        elif n.op in _FIRST:
            zero[-back] = meeting[0] is operands[0] and flags[0] and not clamped and not powered
    c.put(y, result, zero)
    for extra in n.outputs[1:]:
        if extra is not None and extra.shape == y.shape:
            c.put(extra, result)


def _spans_zero(n: Node) -> bool:
    """Return whether zero lies within the limits of a clamp."""
    least, most = n.args.get("min", n.args.get("min_val")), n.args.get("max", n.args.get("max_val"))
    if isinstance(least, Value) or isinstance(most, Value):
        return False
    return (least is None or least <= 0) and (most is None or most >= 0)


def _prelu(c: Coupler, n: Node, y: Value) -> None:
    x, slope = list(n.inputs())[:2]
    axes = list(c.of(x))
    count = max(slope.shape, default=1)
    if count > 1 and len(axes) > 1:
        place = next(i for i, s in enumerate(slope.shape) if s == count)
        axis = 1 if len(slope.shape) == 1 else len(axes) - len(slope.shape) + place
        axes[axis] = c.same(axes[axis], c.of(slope)[place], "slopes of an axis that cannot be cut")
        c.mark(slope, place, "affine")
    c.put(y, axes, c.zero[x.index])


@rule("glu")
def gated(c: Coupler, n: Node) -> None:
    """The two halves of an axis are multiplied, one through a sigmoid."""
    x = next(n.inputs())
    dim = dims(n, "dim", len(x.shape), -1)[0]
    axes = list(c.of(x))
    if axes[dim] is not None:
        half = len(axes[dim]) // 2  # type: ignore[arg-type]
        c.elements.same(axes[dim][:half], axes[dim][half:])  # type: ignore[index]
        axes[dim] = axes[dim][:half]  # type: ignore[index]
    c.put(n.outputs[0], axes, c.zero[x.index])


_REDUCTIONS = """
    sum mean amax amin max min argmax argmin std var var_mean std_mean norm linalg_vector_norm logsumexp prod any
    all median mode kthvalue count_nonzero nansum aminmax cummax cummin linalg_norm
""".split()  # noqa: SIM905


@rule(*_REDUCTIONS)
def reduction(c: Coupler, n: Node) -> None:
    """Reduced axes vanish; one is cut only under a sum whose removed terms are zero."""
    x = next(n.inputs())
    if len(tensors(n, "other")) == 1:
        elementwise(c, n)
        return
    rank = len(x.shape)
    reduced = set(dims(n, "dim", rank) if n.args.get("dim") is not None else range(rank))
    axes, zero = c.of(x), c.zero[x.index]
    for axis in reduced:
        if n.op == "mean":
            c.statistics(x, axis, "mean over the axis")
        elif not (n.op in ("sum", "nansum", "linalg_vector_norm", "norm") and zero[axis]):
            c.fix(axes[axis], f"{n.op} over the axis")
    keepdim = bool(n.args.get("keepdim", False))
    order = [None if i in reduced else i for i in range(rank) if keepdim or i not in reduced]
    stays = n.op in ("sum", "mean", "amax", "amin", "max", "min", "nansum", "linalg_vector_norm", "norm", "std", "var")
    for y in n.outputs:
        if y is not None and len(y.shape) == len(order):
            c.put(
                y,
                [None if i is None else axes[i] for i in order],
                [i is not None and stays and zero[i] for i in order],
            )


@rule(
    "_softmax",
    "softmax",
    "_log_softmax",
    "log_softmax",
    "_safe_softmax",
    "renorm",
    "_fft_c2c",
    "_fft_r2c",
    "_fft_c2r",
    "fft_fftshift",
    "fft_ifftshift",
)
def normalised_over(c: Coupler, n: Node) -> None:
    """Positions of the named axes depend on each other and stay."""
    x, y = next(n.inputs()), n.outputs[0]
    assert y is not None
    axes = list(c.of(x))
    for dim in dims(n, "dim", len(axes)):
        c.fix(axes[dim], f"{n.op.strip('_')} over the axis")
        axes[dim] = None
    c.put(y, axes, [z and n.op.startswith("_fft") for z in c.zero[x.index]])


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_native_batch_norm_legit_functional",
    "miopen_batch_norm",
    "batch_norm",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "_batch_norm_impl_index",
    "native_batch_norm_inference",
)
def batch_norm(c: Coupler, n: Node) -> None:
    """Every channel (axis 1) has its own statistics, scale and shift.

    Statistics taken from the input itself (as standardised weights do, whose output channels are axis 1 and whose other
    axes are flattened into axis 2) can go on counting what was removed; what was removed is zero before, not after.
    """
    x = next(iter(tensors(n, "input")))
    axes = list(c.of(x))
    channels = axes[1] if len(axes) > 1 else None
    parameters = tensors(n, "weight", "bias", "running_mean", "running_var")
    for p in parameters:
        channels = c.same(channels, c.of(p)[0], "batch norm of channels that cannot be cut")
        c.mark(p, 0, "affine")
    statistics = n.args.get("training", n.args.get("train", False)) or not tensors(n, "running_mean")
    zero = list(c.zero[x.index])
    if statistics and n.op != "_native_batch_norm_legit_no_training":
        for i in range(len(axes)):
            if i != 1:
                c.statistics(x, i, "statistics are taken over the axis")
                zero[i] = False
    affine = bool(tensors(n, "weight")) and bool(tensors(n, "bias"))
    axes[1] = channels
    zero[1] = affine or zero[1]
    c.put(n.outputs[0], axes, zero)


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm", "fused_layer_norm")
def layer_norm(c: Coupler, n: Node) -> None:
    """Statistics are taken over the last axes, so cutting those would change what remains."""
    x = next(iter(tensors(n, "input")))
    count = len(n.args["normalized_shape"])
    axes, zero = list(c.of(x)), list(c.zero[x.index])
    for axis in range(len(axes) - count, len(axes)):
        c.statistics(x, axis, "statistics of a layer norm are taken over the axis")
    for p in tensors(n, "weight", "bias"):
        for i in range(count):
            axis = len(axes) - count + i
            axes[axis] = c.same(axes[axis], c.of(p)[i], "layer norm of an axis that cannot be cut")
            c.mark(p, i, "affine")
    affine = bool(tensors(n, "weight"))
    c.put(n.outputs[0], axes, [affine if i >= len(axes) - count else z for i, z in enumerate(zero)])


@rule("native_group_norm", "group_norm")
def group_norm(c: Coupler, n: Node) -> None:
    """Statistics are taken within a group of channels: whole groups can go, channels inside one cannot."""
    x = next(iter(tensors(n, "input")))
    groups = int(n.args.get("group", n.args.get("num_groups", 1)))
    axes, zero = list(c.of(x)), list(c.zero[x.index])
    parameters = tensors(n, "weight", "bias")
    channels = axes[1]
    for p in parameters:
        channels = c.same(channels, c.of(p)[0], "group norm of channels that cannot be cut")
        c.mark(p, 0, "affine")
    if channels is not None and c.norms != "anew":
        _, inner = c.elements.factor(channels, groups)
        c.fix(inner, "statistics of a group norm are taken over the channels of a group")
    axes[1] = channels
    for i in range(2, len(axes)):
        c.fix(axes[i], "statistics of a group norm are taken over the axis")
        axes[i] = None
    zero[1] = len(parameters) == 2
    c.put(n.outputs[0], axes, zero)


_POOLS = {
    1: "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
    "_upsample_nearest_exact1d max_pool1d_with_indices lp_pool1d",
    2: "avg_pool2d max_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_avg_pool2d "
    "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa _upsample_nearest_exact2d fractional_max_pool2d mkldnn_max_pool2d max_unpool2d",
    3: "avg_pool3d max_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_avg_pool3d "
    "adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d",
}


def _pool(spatial: int) -> None:
    @rule(*_POOLS[spatial].split())
    def pool(c: Coupler, n: Node) -> None:
        """The last axes are spatial and stay; channels pass one by one."""
        x = next(n.inputs())
        axes = list(c.of(x))
        for i in range(len(axes) - spatial, len(axes)):
            c.fix(axes[i], "spatial positions")
            axes[i] = None
        for y in n.outputs:
            if y is not None and len(y.shape) == len(axes):
                c.put(y, axes, c.zero[x.index])


for _spatial in _POOLS:
    _pool(_spatial)


@rule("grid_sampler_2d", "grid_sampler", "grid_sampler_3d")
def grid_sample(c: Coupler, n: Node) -> None:
    """Channels are sampled at the same places."""
    x, grid = list(n.inputs())[:2]
    axes = list(c.of(x))
    c.fix_all([grid], "sampling places")
    for ids in axes[2:]:
        c.fix(ids, "spatial positions")
    c.put(n.outputs[0], [axes[0], axes[1], *[None] * (len(axes) - 2)], c.zero[x.index])


@rule("embedding")
def embedding(c: Coupler, n: Node) -> None:
    """Rows are looked up by number; features pass."""
    weight = tensors(n, "weight")[0]
    y = n.outputs[0]
    assert y is not None
    axes = c.of(weight)
    c.fix(axes[0], "rows are looked up by number")
    c.mark(weight, 0, "input")
    c.mark(weight, 1, "output")
    c.put(y, [*[None] * (len(y.shape) - 1), axes[1]], [*[False] * (len(y.shape) - 1), c.is_zero(weight, 1)])


@rule(
    "_assert_async",
    "_local_scalar_dense",
    "is_nonzero",
    "record_stream",
    "_fused_sdp_choice",
    "equal",
    "item",
    "is_same_size",
    "_has_compatible_shallow_copy_type",
)
def nothing(c: Coupler, n: Node) -> None:
    """Only looked at."""
