"""Linear layers with few rows of x on the native engine: every layout, instruction set and storage against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import InvalidValue, UnknownName
from prunus.runtime import gemv, library
from prunus.runtime.gemv import NAMES, Kernel, candidates, pack
from prunus.runtime.records import ACTIVATIONS

needs_engine = pytest.mark.skipif(bool(library.why_not()), reason=f"no native engine: {library.why_not()}")
SETS = () if library.why_not() else library.engine().sets
BLOCKS = {"select": (32, 64), "nm": (1, 2)}
KERNELS = [Kernel(name, half, block) for name in NAMES for half in (False, True) for block in BLOCKS.get(name, (0,))]

each_set = pytest.mark.parametrize("instruction_set", SETS or ["none"])
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.name}{k.block or ''}{'-half' * k.half}")


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even, by float64 arithmetic."""
    wide = values.astype(np.float64)
    _, exponent = np.frexp(wide)
    unit = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
    return (np.rint(wide / unit) * unit).astype(np.float32)


def allowed(mask: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Remove what "nm" cannot keep."""
    if kernel.name != "nm":
        return mask
    blocks = np.pad(mask, ((0, 0), (0, -mask.shape[1] % 4))).reshape(len(mask), -1, 4)
    return (blocks & (blocks.cumsum(2) <= kernel.block)).reshape(len(mask), -1)[:, : mask.shape[1]]


def product(weight: np.ndarray, mask: np.ndarray, x: np.ndarray, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """Return x times the kept weights in float64, and the largest error that float32 sums may have."""
    kept = np.where(mask, bfloat16(weight) if kernel.half else weight, 0).astype(np.float64)
    bound = np.abs(x.astype(np.float64)) @ np.abs(kept).T * (weight.shape[1] + 4) * 2.0**-24
    return x.astype(np.float64) @ kept.T, bound + 1e-30


def run(weight: np.ndarray, kernel: Kernel, mask: np.ndarray, x: np.ndarray, where: str, **given: Any) -> np.ndarray:
    threads = given.pop("threads", 1)
    y = np.full((*x.shape[:-1], len(weight)), np.nan, np.float32)
    library.Program([pack(weight, kernel, mask).record(x, y, **given)], instruction_set=where).run(threads)
    return y


def drawn(rows: int, columns: int, density: float, batch: int = 1, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    return weight, rng.random((rows, columns)) < density, rng.standard_normal((batch, columns)).astype(np.float32)


@needs_engine
@each_set
@each_kernel
def test_products(kernel: Kernel, instruction_set: str) -> None:
    shapes = [(1, 1), (1, 70), (17, 33), (3, 255), (20, 256), (35, 257), (32, 64), (40, 517)]
    for rows, columns in shapes:
        for density in (0.0, 0.02, 0.1, 0.5, 1.0):
            weight, mask, x = drawn(rows, columns, density, batch=2)
            mask = allowed(mask, kernel)
            expected, bound = product(weight, mask, x, kernel)
            y = run(weight, kernel, mask, x, instruction_set)
            assert (np.abs(y - expected) <= bound).all(), (rows, columns, density)


@needs_engine
@each_set
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pattern(instruction_set: str, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 300))
    kernel = data.draw(st.sampled_from(KERNELS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # Rows and columns of their own densities: empty and full ones beside each other.
    odds = np.outer(rng.choice([0, 0.1, 0.5, 1, 3], rows), rng.choice([0, 0.3, 1], columns))
    mask = allowed(rng.random((rows, columns)) < odds, kernel)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    batch = data.draw(st.integers(1, 19))
    # Rows of x start anywhere a float may, and end where nothing may be read.
    gap, start = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 15))
    held = np.full(start + batch * (columns + gap), np.nan, np.float32)
    x = held[start:].reshape(batch, columns + gap)[:, :columns]
    x[:] = rng.standard_normal((batch, columns))
    expected, bound = product(weight, mask, x, kernel)
    threads = data.draw(st.sampled_from([1, 2]))
    y = run(weight, kernel, mask, x, instruction_set, threads=threads)
    assert (np.abs(y - expected) <= bound).all()


@needs_engine
@each_set
@each_kernel
def test_several_tasks_and_threads(kernel: Kernel, instruction_set: str) -> None:
    weight, mask, x = drawn(500, 600, 0.4, batch=3)
    mask = allowed(mask, kernel)
    expected, bound = product(weight, mask, x, kernel)
    packed = pack(weight, kernel, mask)
    y = np.zeros((3, 500), np.float32)
    record = packed.record(x, y)
    assert record.chunks > 1
    program = library.Program([record], instruction_set=instruction_set)
    first = None
    for threads in (1, 2, 3):
        y[:] = np.nan
        program.run(threads)
        assert (np.abs(y - expected) <= bound).all()
        first = y.copy() if first is None else first
        np.testing.assert_array_equal(y, first)


@needs_engine
@each_set
@each_kernel
def test_removed_weights_contribute_nothing(kernel: Kernel, instruction_set: str) -> None:
    """Infinite and NaN inputs reach exactly the rows that keep a weight for them."""
    weight, mask, x = drawn(37, 203, 0.2, batch=4)
    weight[::5, ::7] = 0.0
    mask = allowed(mask, kernel)
    x[1, [0, 40, 202]] = np.inf
    x[2, 77] = -np.inf
    x[3, [5, 160]] = np.nan
    stored = bfloat16(weight) if kernel.half else weight
    with np.errstate(invalid="ignore"):
        terms = np.where(mask[None], stored[None] * x[:, None, :], np.float32(0)).astype(np.float64)
        expected = terms.sum(2)
    y = run(weight, kernel, mask, x, instruction_set)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isposinf(y), np.isposinf(expected))
    np.testing.assert_array_equal(np.isneginf(y), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(y[finite], expected[finite], rtol=1e-4, atol=1e-4)
    # Both kinds of rows are there: those that an infinity reaches, and those that it does not.
    assert finite[1:].any()
    assert not finite[1:].all()


@needs_engine
@each_set
@each_kernel
def test_kept_zeros_and_special_weights(kernel: Kernel, instruction_set: str) -> None:
    weight = np.array([[0.0, 1.0], [-0.0, 0.0], [np.inf, 0.0], [np.nan, 0.0], [2.0, 0.0], [1e-44, 0.0]], np.float32)
    mask = np.array([[True, False], [True, False], [True, False], [True, False], [False, False], [True, False]])
    for x, expected in (
        ([np.inf, np.inf], [np.nan, np.nan, np.inf, np.nan, 0.0, np.nan if kernel.half else np.inf]),
        ([1.0, np.nan], [0.0, 0.0, np.inf, np.nan, 0.0, 0.0 if kernel.half else 1e-44]),
        ([np.nan, 1.0], [np.nan, np.nan, np.nan, np.nan, 0.0, np.nan]),
    ):
        y = run(weight, kernel, mask, np.array(x, np.float32), instruction_set)
        np.testing.assert_array_equal(y, np.array(expected, np.float32))


@needs_engine
@each_set
@pytest.mark.parametrize("kernel", [Kernel("csr"), Kernel("select", block=32), Kernel("dense")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_residual_activation(kernel: Kernel, activation: str, instruction_set: str) -> None:
    weight, mask, x = drawn(45, 60, 0.3, batch=3)
    mask[:20] &= np.random.default_rng(3).random((20, 60)) < 0.3  # rows of select change places
    rng = np.random.default_rng(4)
    bias = rng.standard_normal(45).astype(np.float32)
    residual = rng.standard_normal((3, 45)).astype(np.float32)
    y = run(weight, kernel, mask, x, instruction_set, bias=bias, residual=residual, activation=activation, slope=0.1)
    z = product(weight, mask, x, kernel)[0] + bias + residual
    logistic = 1 / (1 + np.exp(-z))
    expected = {
        "none": z,
        "relu": np.maximum(z, 0),
        "relu6": np.clip(z, 0, 6),
        "hardswish": z * np.clip(z + 3, 0, 6) / 6,
        "hardsigmoid": np.clip(z + 3, 0, 6) / 6,
        "silu": z * logistic,
        "gelu": z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
        "gelu_tanh": 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "sigmoid": logistic,
        "tanh": np.tanh(z),
        "leaky_relu": np.where(z > 0, z, 0.1 * z),
    }[activation]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)


@needs_engine
@each_set
def test_residual_may_be_y(instruction_set: str) -> None:
    weight, mask, x = drawn(20, 30, 0.5, batch=2)
    y = np.ones((2, 20), np.float32)
    packed = pack(weight, Kernel("csr"), mask)
    library.Program([packed.record(x, y, residual=y)], instruction_set=instruction_set).run()
    np.testing.assert_allclose(y, product(weight, mask, x, Kernel("csr"))[0] + 1, rtol=1e-5, atol=1e-5)


@needs_engine
@each_set
@each_kernel
def test_nothing_to_do(kernel: Kernel, instruction_set: str) -> None:
    bias = np.arange(5, dtype=np.float32)
    for columns in (0, 3):
        weight = np.zeros((5, columns), np.float32)
        y = run(weight, kernel, weight != 0, np.full(columns, np.inf, np.float32), instruction_set, bias=bias)
        np.testing.assert_array_equal(y, bias)
    none = np.zeros((0, 4), np.float32)
    assert run(none, kernel, none != 0, np.ones((2, 4), np.float32), instruction_set).shape == (2, 0)
    weight, mask, x = drawn(5, 4, 0.0, batch=0)
    assert run(weight, kernel, mask, x, instruction_set).shape == (0, 5)


@needs_engine
@each_set
@each_kernel
def test_writes_only_its_rows(kernel: Kernel, instruction_set: str) -> None:
    weight, mask, x = drawn(21, 40, 0.25, batch=3)
    held = np.full((3, 64), 7.0, np.float32)
    y = held[:, 8:29]
    library.Program([pack(weight, kernel, allowed(mask, kernel)).record(x, y)], instruction_set=instruction_set).run()
    assert (held[:, :8] == 7).all()
    assert (held[:, 29:] == 7).all()
    assert (y != 7).all()


@needs_engine
@each_set
def test_more_columns_than_short_indices_hold(instruction_set: str) -> None:
    weight, mask, x = drawn(3, 70_001, 0.002)
    mask[:, -1] = True
    for kernel in KERNELS:
        kept = allowed(mask, kernel)
        expected, bound = product(weight, kept, x, kernel)
        assert (np.abs(run(weight, kernel, kept, x, instruction_set) - expected) <= bound).all(), kernel


def test_bfloat16_rounds_to_nearest() -> None:
    rng = np.random.default_rng(0)
    values = np.ldexp(rng.standard_normal(1000), rng.integers(-120, 120, 1000)).astype(np.float32)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], np.float32)
    for given_ in (values, ties):
        stored = gemv._stored(given_, True)
        np.testing.assert_array_equal((stored.astype(np.uint32) << 16).view(np.float32), bfloat16(given_))


def test_exact_slots_leave_nothing_over() -> None:
    """4 of 32 and 8 of 64 need as many slots as there are weights and no remainder."""
    rng = np.random.default_rng(0)
    for kept, period, block in ((4, 32, 32), (8, 32, 32), (2, 16, 32), (8, 64, 64), (4, 32, 64)):
        ranks = rng.random((32, 512 // period, period)).argsort(2)
        mask = (ranks < kept).reshape(32, 512)
        packed = pack(rng.standard_normal((32, 512)).astype(np.float32), Kernel("select", block=block), mask)
        assert (packed.arrays["slots"] == kept * block // period).all()
        assert packed.arrays["rest_values"].size == 0
        assert packed.order is None


def test_bytes_and_halves() -> None:
    weight, mask, _ = drawn(256, 512, 0.1)
    for kernel in KERNELS:
        kept = allowed(mask, kernel)
        full, half = (pack(weight, Kernel(kernel.name, h, kernel.block), kept).bytes for h in (False, True))
        assert half < full
        assert full >= 4 * kept.sum()
    assert pack(weight, Kernel("dense"), mask).bytes == weight.nbytes
    assert pack(weight, Kernel("csr"), mask).bytes == 6 * mask.sum() + 8 * 257


def test_candidates_follow_the_pattern() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((256, 512)).astype(np.float32)

    def first(mask: np.ndarray, where: str = "avx512") -> str:
        return candidates(weight, mask, where)[0].name

    columns = np.repeat(rng.random((16, 512)) < 0.1, 16, axis=0)
    assert first(columns) == first(columns, "avx2") == first(columns, "portable") == "columns16"
    rows = np.repeat(rng.random((256, 32)) < 0.2, 16, axis=1)
    assert first(rows) == first(rows, "portable") == "row16"
    two = (rng.random((256, 128, 4)).argsort(2) < 2).reshape(256, 512)
    assert Kernel("nm", block=2) in candidates(weight, two)
    assert first(two, "avx2") == "nm"
    assert not any(k.name == "nm" for k in candidates(weight, two, "portable"))
    scattered = rng.random((256, 512)) < 0.1
    assert first(scattered) == "select"
    assert first(scattered, "avx2") == first(scattered, "portable") == "csr"
    assert first(np.ones((256, 512), bool), "avx2") == "dense"
    assert first(np.zeros((256, 512), bool)) == "csr"
    for name in ("avx2", "portable"):
        assert not {k.name for k in candidates(weight, scattered, name)} & {"select", "bitmask"}
    assert all(k.half for k in candidates(weight, scattered, half=True))
    for mask in (columns, rows, two, scattered):
        for kernel in candidates(weight, mask):
            pack(weight, kernel, mask)  # none is refused
    assert candidates(np.zeros((0, 7), np.float32)) == candidates(np.zeros((7, 0), np.float32)) == [Kernel("csr")]


def test_mask_defaults_to_what_is_not_zero() -> None:
    weight, mask, _ = drawn(20, 50, 0.3)
    weight[~mask] = 0
    for kernel in (Kernel("csr"), Kernel("select", block=32), Kernel("bitmask")):
        one, other = pack(weight, kernel), pack(weight, kernel, mask)
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name])


def test_bad_input() -> None:
    weight, mask, x = drawn(8, 12, 0.5, batch=2)
    with pytest.raises(UnknownName, match="there are csr"):
        Kernel("fast")
    with pytest.raises(InvalidValue, match="32 or 64"):
        Kernel("select", block=16)
    with pytest.raises(InvalidValue, match="takes block 0"):
        Kernel("csr", block=32)
    for bad in (weight.astype(np.float64), weight[0], weight.tolist()):
        with pytest.raises(InvalidValue, match="float32"):
            pack(bad, Kernel("csr"), mask)  # type: ignore[arg-type]
        with pytest.raises(InvalidValue, match="float32"):
            candidates(bad, mask)  # type: ignore[arg-type]
    for wrong in (mask[:4], mask.astype(np.int8)):
        with pytest.raises(InvalidValue, match="mask"):
            pack(weight, Kernel("csr"), wrong)
    with pytest.raises(InvalidValue, match="of 4 columns"):
        pack(weight, Kernel("nm", block=1), np.ones_like(mask))
    packed = pack(weight, Kernel("csr"), mask)
    y = np.zeros((2, 8), np.float32)
    fixed = y.copy()
    fixed.flags.writeable = False
    both = np.zeros(40, np.float32)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((x[:, :5], y), {}, "12 columns"),
        ((x.astype(np.float64), y), {}, "float32"),
        ((x, y[:1]), {}, "as many"),
        ((np.asfortranarray(x), y), {}, "side by side"),
        ((x, fixed), {}, "written"),
        ((np.zeros(49, np.int8)[1:].view(np.float32), y[0]), {}, "contiguous"),
        ((both[:12], both[8:16]), {}, "overlap"),
        ((x, y, np.zeros(7, np.float32)), {}, "bias"),
        ((x, y, [0.0] * 8), {}, "bias"),
        ((x, y), {"residual": y[:1]}, "residual"),
        ((x, y), {"residual": np.zeros((2, 16), np.float32)[:, :8]}, "strides"),
    ]
    for positional, named, text in cases:
        with pytest.raises(InvalidValue, match=text):
            packed.record(*positional, **named)
    with pytest.raises(UnknownName, match="activation"):
        packed.record(x, y, activation="swish")
