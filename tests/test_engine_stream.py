"""The engine's networks against float64 numpy: every layout, instruction set and number of threads. Needs no torch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import InvalidValue
from prunus.runtime.library import engine, why_not
from prunus.runtime.network import Layer, Network, density, folded
from prunus.runtime.pack import chunks_of, filling, pack
from prunus.runtime.planes import Geometry, split, tiles
from prunus.runtime.records import ACTIVATIONS
from prunus.runtime.tune import Tuner

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no native engine: {why_not()}")
if not why_not():
    from prunus.runtime.build import build

SETS = engine().sets if not why_not() else ()


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


REFERENCE = {
    "none": lambda x: x,
    "relu": lambda x: np.where(np.isnan(x), x, np.maximum(x, 0)),
    "relu6": lambda x: np.where(np.isnan(x), x, np.clip(x, 0, 6)),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "silu": lambda x: x * (1 + np.tanh(x / 2)) / 2,
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "sigmoid": lambda x: (1 + np.tanh(x / 2)) / 2,
    "tanh": np.tanh,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.1 * x),
}


def windows(x: np.ndarray, kernel, stride, padding, dilation, fill: float = 0.0) -> np.ndarray:
    """Return (n, c, rows, columns, kernel rows, kernel columns) of a padded x."""
    (kr, kc), (sr, sc), (pr, pc), (dr, dc) = kernel, stride, padding, dilation
    wide = np.pad(x, ((0, 0), (0, 0), (pr, pr), (pc, pc)), constant_values=fill)
    rows = (wide.shape[2] - dr * (kr - 1) - 1) // sr + 1
    columns = (wide.shape[3] - dc * (kc - 1) - 1) // sc + 1
    out = np.empty((*x.shape[:2], rows, columns, kr, kc))
    for r, c in itertools.product(range(kr), range(kc)):
        out[..., r, c] = wide[:, :, r * dr : r * dr + sr * rows : sr, c * dc : c * dc + sc * columns : sc][
            :, :, :rows, :columns
        ]
    return out


def reference(network: Network, *given: np.ndarray) -> list[np.ndarray]:
    values: dict[str, np.ndarray] = {}
    waiting = iter(given)
    for layer in network.layers:
        i, o = [values[n] for n in layer.inputs], layer.options
        if layer.op == "input":
            y = next(waiting).astype(np.float64)
        elif layer.op == "convolution":
            cut = windows(i[0], layer.weight.shape[2:], o["stride"], o["padding"], o["dilation"])
            parts = np.split(cut, o["groups"], 1)
            kernels = np.split(layer.weight.astype(np.float64), o["groups"])
            y = np.concatenate([np.einsum("nchwrs,mcrs->nmhw", p, k) for p, k in zip(parts, kernels, strict=True)], 1)
        elif layer.op == "linear":
            y = i[0] @ layer.weight.T.astype(np.float64)
        elif layer.op == "max_pool":
            y = windows(i[0], o["kernel"], o["stride"], o["padding"], o["dilation"], -np.inf).max((4, 5))
        elif layer.op == "average_pool":
            y = windows(i[0], o["kernel"], o["stride"], o["padding"], o["dilation"]).mean((4, 5))
        elif layer.op == "mean":
            y = i[0].mean((2, 3), keepdims=True)
        elif layer.op == "add":
            y = i[0] + i[1]
        elif layer.op == "multiply":
            y = i[0] * i[1]
        elif layer.op == "concatenate":
            y = np.concatenate(i, 1)
        elif layer.op == "flatten":
            y = i[0].reshape(len(i[0]), -1)
        else:
            y = i[0]
        if layer.bias is not None:
            y = y + layer.bias.reshape(-1, *[1] * (y.ndim - 2))
        if layer.residual is not None:
            y = y + values[layer.residual]
        values[layer.name] = REFERENCE[layer.activation](y)
    return [values[n] for n in network.outputs]


def close(network: Network, *given: np.ndarray, lanes: int = 1, tuner: Tuner | None = None) -> None:
    shapes = [x.shape[1:] for x in given]
    tuner = tuner or Tuner()
    built = build(network, shapes, len(given[0]), lanes=lanes, tuner=tuner)
    wanted = reference(network, *given)
    for _ in range(2):  # the second run finds memory as the first left it
        for got, want in zip(built.run(given, tuner.threads), wanted, strict=True):
            assert got.shape == want.shape
            scale = max(1e-6, abs(want).max(initial=0))
            assert abs(got - want).max(initial=0) <= 1e-5 * scale


def convolution(
    rng, name, source, inputs, outputs, kernel=(3, 3), *, stride=(1, 1), padding=None, dilation=(1, 1), groups=1,
    sparsity=0.8, activation="none", residual=None, bias=True,
):  # fmt: skip
    weight = rng.standard_normal((outputs, inputs // groups, *kernel)).astype(np.float32)
    weight[rng.random(weight.shape) < sparsity] = 0
    padding = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True)) if padding is None else padding
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shift = rng.standard_normal(outputs).astype(np.float32) if bias else None
    return Layer("convolution", name, (source,), weight, shift, residual, activation, 0.1, options)


def single(layer: Layer) -> Network:
    return Network((Layer("input", "x"), layer), (layer.name,))


@given(
    seed=st.integers(0, 1000),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    groups=st.sampled_from([1, 1, 2, 3]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 35)),
    images=st.sampled_from([1, 2, 5, 16, 17]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    lanes=st.sampled_from([1, 16]),
    threads=st.sampled_from([1, 2]),
    which=st.integers(0, 2),
    block=st.sampled_from([None, 1, 2, 4, 8, 16]),
    cache=st.sampled_from([0, 512]),
)
@settings(max_examples=250, deadline=None)
def test_convolutions_equal_their_definition(
    seed,
    channels,
    groups,
    kernel,
    stride,
    padding,
    dilation,
    size,
    images,
    sparsity,
    lanes,
    threads,
    which,
    block,
    cache,
):
    rng = np.random.default_rng(seed)
    outputs = channels[1] * groups * (block or 1)
    layer = convolution(
        rng, "y", "x", channels[0] * groups, outputs, kernel, stride=stride, padding=padding, dilation=dilation,
        groups=groups, sparsity=sparsity, activation="relu",
    )  # fmt: skip
    extents = [n + 2 * p - d * (k - 1) - 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    x = rng.standard_normal((images, channels[0] * groups, *size)).astype(np.float32)
    if min(extents) < 0:
        with pytest.raises(InvalidValue, match="larger inputs"):
            build(single(layer), [x.shape[1:]], images)
        return

    class Fixed(Tuner):
        def pick(self, key, candidates, make):
            if block is None:
                return super().pick(key, candidates, make)
            width = next(c for c in candidates if c[0] != "rows")[1]
            return (block, width, cache), make((block, width, cache))

    close(single(layer), x, lanes=lanes, tuner=Fixed(threads, instruction_set=SETS[which % len(SETS)]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SETS)
def test_activations(activation, name):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(200) * 4, [0.0, -0.0, 30, -30, 100, -100, 1e-8]]).astype(np.float32)
    x = x[None, :]
    layer = Layer("activation", "y", ("x",), activation=activation, slope=0.1)
    built = build(single(layer), [x.shape[1:]], 1, tuner=Tuner(instruction_set=name))
    got = built.run([x])[0]
    assert abs(got - REFERENCE[activation](x.astype(np.float64))).max() < 3e-6 * 100
    assert abs(got - REFERENCE[activation](x.astype(np.float64)))[abs(x) < 10].max() < 2e-6
    odd = np.array([[np.nan, np.inf, 1.0]], np.float32)
    built = build(single(layer), [(3,)], 1, tuner=Tuner(instruction_set=name))
    got = built.run([odd])[0]
    assert np.isnan(got[0, 0])
    if activation not in ("relu6", "hardsigmoid", "sigmoid", "tanh"):
        assert got[0, 1] == np.inf


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("images", [1, 3, 16, 20])
@pytest.mark.parametrize("size", [(32, 32), (33, 29), (56, 56)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_of_every_operator(lanes, images, size, threads):
    rng = np.random.default_rng(1)
    pool = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "kernel": (3, 3)}
    average = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "kernel": (3, 3)}
    last = rng.standard_normal((10, 32)).astype(np.float32)
    layers = (
        Layer("input", "x"),
        convolution(rng, "a", "x", 3, 16, (7, 7), stride=(2, 2), activation="relu"),
        Layer("max_pool", "m", ("a",), options=pool),
        convolution(rng, "b", "m", 16, 16, activation="silu"),
        convolution(rng, "c", "b", 16, 16, (1, 1), residual="m", activation="relu"),
        convolution(rng, "d", "c", 16, 16, groups=16, sparsity=0, activation="gelu"),
        convolution(rng, "e", "d", 16, 32, stride=(2, 2), activation="hardswish"),
        Layer("mean", "s", ("e",)),
        convolution(rng, "s1", "s", 32, 8, (1, 1), activation="relu"),
        convolution(rng, "s2", "s1", 8, 32, (1, 1), activation="sigmoid"),
        Layer("multiply", "t", ("e", "s2")),
        convolution(rng, "f", "t", 32, 32, dilation=(2, 2), activation="leaky_relu"),
        Layer("concatenate", "g", ("t", "f")),
        Layer("average_pool", "h", ("g",), options=average),
        convolution(rng, "i", "h", 64, 32, (1, 1), groups=2, activation="tanh"),
        Layer("add", "j", ("i", "t"), activation="relu6"),
        Layer("mean", "k", ("j",)),
        Layer("flatten", "l", ("k",)),
        Layer("linear", "y", ("l",), last, np.ones(10, np.float32)),
    )
    x = rng.standard_normal((images, 3, *size)).astype(np.float32)
    close(Network(layers, ("y", "g")), x, lanes=lanes, tuner=Tuner(threads))


@given(
    seed=st.integers(0, 1000),
    rows=st.sampled_from([1, 2, 15, 16, 17, 33, 100]),
    sizes=st.tuples(st.integers(1, 70), st.sampled_from([1, 3, 16, 24, 33])),
    sparsity=st.sampled_from([0.0, 0.7, 1.0]),
    threads=st.sampled_from([1, 2]),
    which=st.integers(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_linear_layers_with_residuals(seed, rows, sizes, sparsity, threads, which):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((sizes[1], sizes[0])).astype(np.float32)
    weight[rng.random(weight.shape) < sparsity] = 0
    back = rng.standard_normal((sizes[0], sizes[1])).astype(np.float32)
    layers = (
        Layer("input", "x"),
        Layer("linear", "h", ("x",), weight, rng.standard_normal(sizes[1]).astype(np.float32), activation="gelu"),
        Layer("linear", "y", ("h",), back, None, residual="x", activation="relu"),
    )
    x = rng.standard_normal((rows, sizes[0])).astype(np.float32)
    close(Network(layers, ("y",)), x, tuner=Tuner(threads, instruction_set=SETS[which % len(SETS)]))


@given(seed=st.integers(0, 1000), threads=st.integers(1, 4), lanes=st.sampled_from([1, 16]), size=st.integers(9, 40))
@settings(max_examples=40, deadline=None)
def test_chains_of_layers_that_run_tile_by_tile(seed, threads, lanes, size):
    """Residuals of residuals, written over where nobody else reads them, beside windows that reach into other tiles."""
    rng = np.random.default_rng(seed)
    layers = [Layer("input", "x"), convolution(rng, "v0", "x", 3, 16)]
    for number in range(12):
        source = f"v{number}"
        older = [f"v{n}" for n in range(number + 1)]
        kernel = [(1, 1), (3, 3)][int(rng.random() < 0.3)]
        residual = str(rng.choice(older)) if rng.random() < 0.6 else None
        if rng.random() < 0.3:
            source = str(rng.choice(older[-3:]))
        layers.append(
            convolution(
                rng, f"v{number + 1}", source, 16, 16, kernel, residual=residual,
                activation=str(rng.choice(["none", "relu", "tanh"])), bias=bool(rng.random() < 0.5),
            )
        )  # fmt: skip
        layers[-1].weight[:] *= 0.3
    network = Network(tuple(layers), ("v12", "v9"))
    x = rng.standard_normal((2, 3, size, size)).astype(np.float32)
    built = build(network, [x.shape[1:]], 2, lanes=lanes, tuner=Tuner(threads))
    wanted = reference(network, x)
    for _ in range(3):
        for got, want in zip(built.run([x], threads), wanted, strict=True):
            assert abs(got - want).max() <= 2e-5 * max(1, abs(want).max())


def test_bottlenecks_are_joined():
    rng = np.random.default_rng(8)
    layers = (
        Layer("input", "x"),
        convolution(rng, "a", "x", 16, 8, (1, 1)),
        convolution(rng, "b", "a", 8, 8),
        convolution(rng, "c", "b", 8, 16, (1, 1), residual="x"),
        convolution(rng, "d", "c", 16, 8, (1, 1)),
        convolution(rng, "e", "d", 8, 8),
    )
    built = build(Network(layers, ("e",)), [(16, 28, 28)], 1)
    joined = {label: record.joined for label, record in zip(built.steps, built.program.records, strict=True)}
    assert joined == {"x": False, "a": False, "b": True, "c": True, "d": False, "e": False, "output": False}


def test_arrays_of_the_caller_are_read_and_written_in_place_and_nothing_else():
    rng = np.random.default_rng(7)
    first, second = (rng.standard_normal(shape).astype(np.float32) for shape in ((200, 24), (8, 200)))
    layers = (
        Layer("input", "x"),
        Layer("linear", "h", ("x",), first, activation="relu"),
        Layer("linear", "y", ("h",), second),
        Layer("linear", "z", ("h",), second, residual="y"),
    )
    network = Network(layers, ("z", "y"))
    for rows in (1, 3, 40):
        built = build(network, [(24,)], rows)
        around = np.full((rows + 2, 8), 7, np.float32), np.full((rows + 2, 8), 7, np.float32)
        wide = rng.standard_normal(rows * 24 + 1).astype(np.float32)[1:]  # not aligned to vectors
        x = wide.reshape(rows, 24)
        kept = x.copy()
        built.run([x], 1, [a[1:-1] for a in around])
        assert np.array_equal(x, kept)
        for got, want in zip(around, reference(network, x), strict=True):
            assert (got[[0, -1]] == 7).all()
            assert abs(got[1:-1] - want).max() <= 1e-5 * abs(want).max()


def test_results_do_not_depend_on_threads_or_repetition():
    rng = np.random.default_rng(2)
    network = single(convolution(rng, "y", "x", 32, 64, sparsity=0.9, activation="silu"))
    x = rng.standard_normal((2, 32, 28, 28)).astype(np.float32)
    first = build(network, [x.shape[1:]], 2, tuner=Tuner(1)).run([x], 1)[0]
    for threads in (2, 3, 4):
        built = build(network, [x.shape[1:]], 2, tuner=Tuner(threads))
        for _ in range(3):
            # The same sums in the same order, whoever computes them.
            assert np.array_equal(built.run([x], threads)[0], first)


def test_timing_picks_a_kernel_that_computes_the_same():
    rng = np.random.default_rng(3)
    network = single(convolution(rng, "y", "x", 16, 32, sparsity=0.9))
    x = rng.standard_normal((1, 16, 20, 20)).astype(np.float32)
    tuner = Tuner(timing=True)
    close(network, x, tuner=tuner)
    assert len(tuner.found) == 1
    key, chosen = next(iter(tuner.found.items()))
    again = Tuner(timing=True, found={key: list(chosen)})
    close(network, x, tuner=again)
    assert again.found == tuner.found


def test_kept_weights_carry_nan_and_infinity_and_pruned_ones_do_not():
    weight = np.zeros((2, 2, 1, 1), np.float32)
    weight[0, 0] = 1
    options = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    network = single(Layer("convolution", "y", ("x",), weight, options=options, activation="relu"))
    x = np.ones((1, 2, 4, 4), np.float32)
    x[0, 0, 0, 0], x[0, 0, 0, 1], x[0, 1] = np.nan, np.inf, np.inf
    got = build(network, [(2, 4, 4)], 1).run([x])[0]
    assert np.isnan(got[0, 0, 0, 0])
    assert got[0, 0, 0, 1] == np.inf
    assert (got[0, 1] == 0).all()


def test_pools_of_negative_numbers_and_nan():
    options = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "kernel": (3, 3)}
    network = single(Layer("max_pool", "y", ("x",), options=options))
    x = -1 - np.random.default_rng(4).random((1, 3, 9, 9)).astype(np.float32)
    for lanes in (1, 16):
        close(network, x, lanes=lanes)
    x[0, 0, 4, 4] = np.nan
    for name in SETS:
        got = build(network, [(3, 9, 9)], 1, tuner=Tuner(instruction_set=name)).run([x])[0]
        assert np.isnan(got[0, 0, 2, 2])
        assert not np.isnan(got[0, 1]).any()


def test_streams_hold_every_kept_weight_once():
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((16, 40)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.7] = 0
    row, tap = (i.astype(np.int64) for i in np.nonzero(weight))
    for block, parts in itertools.product((1, 2, 4, 8, 16), (1, 3)):
        part = np.arange(40) * parts // 40
        packed = pack(row, tap, weight[row, tap], np.arange(40) * 64, part, 16, block)
        dense = np.zeros((16, 40))
        width = 16 if block == 1 else 4 + 4 * block
        for number, (group, begin, end) in enumerate(packed.rows):
            for entry in packed.entries.reshape(-1, width)[begin:end]:
                if block == 1:
                    offsets, values = entry[:8].view("<i4"), entry[8:].view("<f4")
                    for offset, value in zip(offsets, values, strict=True):
                        dense[group, offset // 64] += value
                        assert part[offset // 64] == number // packed.groups
                else:
                    dense[group * block : (group + 1) * block, entry[:4].view("<i4")[0] // 64] += entry[4:].view("<f4")
        assert np.array_equal(dense.astype(np.float32), weight)
        bounds = chunks_of(packed, 3)
        assert bounds[0] == 0
        assert bounds[-1] == packed.groups
        assert (np.diff(bounds) >= 0).all()
    assert filling(np.ones((4, 3), np.float32), 4) == 1
    assert filling(np.eye(4, dtype=np.float32), 2) == 0.5


@given(vectors=st.integers(1, 300), most=st.integers(1, 14))
def test_tiles_are_whole_and_of_known_widths(vectors, most):
    parts = split(vectors, most)
    assert sum(parts) == vectors
    assert max(parts) <= most
    assert set(parts) <= {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14}


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    margins=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    lanes=st.sampled_from([1, 16]),
)
def test_tiles_cover_every_position_once_and_nothing_else(size, margins, lanes):
    g = Geometry.make(1, *size, images=1, lanes=lanes, top=margins[0], left=margins[1])
    cut = tiles(g, g, 8)
    written = np.zeros(g.plane + 64, int)
    for number, (width, start) in enumerate(zip(cut.widths, cut.y, strict=True)):
        for vector in range(width):
            if lanes == 16:
                written[g.origin + start // 64 + vector] += 1
                continue
            bits = 0xFFFF if cut.masks is None else int(cut.masks[number, vector])
            for lane in range(16):
                written[g.origin + start // 4 + vector * 16 + lane] += bits >> lane & 1
    wanted = np.zeros_like(written)
    for r, c in itertools.product(range(size[0]), range(size[1])):
        wanted[g.origin + r * g.pitch + c] = 1
    assert np.array_equal(written, wanted)
    assert g.at(-margins[0], -margins[1]) >= 0


def test_folding_and_density():
    rng = np.random.default_rng(6)
    layer = convolution(rng, "y", "x", 3, 4, sparsity=0.5, bias=False)
    scale, shift = rng.standard_normal((2, 4)).astype(np.float32)
    x = rng.standard_normal((2, 3, 5, 5)).astype(np.float32)
    plain = reference(single(layer), x)[0] * scale[:, None, None] + shift[:, None, None]
    assert np.allclose(reference(single(folded(layer, scale, shift)), x)[0], plain, atol=1e-5)
    assert density(layer) == pytest.approx((layer.weight != 0).mean())


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ([(4, 8, 8)], "reads 3 channels"),
        ([(3, 8)], "reads 3 channels"),
        ([(3, 8, 8), (3, 8, 8)], "takes 1 inputs, 2"),
    ],
)
def test_shapes_that_do_not_fit(shapes, says):
    network = single(convolution(np.random.default_rng(0), "y", "x", 3, 4))
    with pytest.raises(InvalidValue, match=says):
        build(network, shapes, 1)


def test_a_residual_of_another_shape_is_refused():
    rng = np.random.default_rng(0)
    layer = convolution(rng, "y", "x", 3, 4, residual="x")
    with pytest.raises(InvalidValue, match="adds"):
        build(single(layer), [(3, 8, 8)], 1)
