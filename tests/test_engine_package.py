"""Packages of the engine: what was saved runs again without torch, and whatever else a file may hold is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunus.errors import DamagedFile, InvalidValue, StorageFailed
from prunus.runtime import package
from prunus.runtime.build import build
from prunus.runtime.container import LARGEST_HEADER, Malformed, pack_arrays, sealed, unpack_arrays
from prunus.runtime.library import engine, why_not
from prunus.runtime.network import Layer, Network
from prunus.runtime.package import Package, Runtime, load, pack, read, save, unpack
from prunus.runtime.tune import Tuner

if why_not():
    pytest.skip(why_not(), allow_module_level=True)

SOURCE = Path(__file__).resolve().parent.parent / "src"
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def drawn(*shape: int, density: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * (rng.random(shape) < density)).astype(np.float32)


def plain(stride: int = 1, padding: int = 1, groups: int = 1) -> dict[str, Any]:
    return {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (1, 1), "groups": groups}


def images() -> Package:
    """Return a small network of images with every kind of operator."""
    window = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    layers = (
        Layer("input", "x"),
        Layer("convolution", "a", ("x",), drawn(8, 3, 3, 3), drawn(8), None, "relu", options=plain(2), label="stem"),
        Layer("convolution", "b", ("a",), drawn(8, 8, 3, 3, density=0.1), None, "a", "silu", options=plain()),
        Layer("convolution", "c", ("b",), drawn(8, 1, 3, 3, density=0.5), options=plain(groups=8), label="größer"),
        Layer("max_pool", "d", ("c",), options=window),
        Layer("average_pool", "e", ("c",), options=window),
        Layer("concatenate", "f", ("d", "e")),
        Layer("mean", "g", ("f",)),
        Layer("multiply", "h", ("f", "g")),
        Layer("add", "i", ("h", "f"), activation="leaky_relu", slope=0.1),
        Layer("mean", "j", ("i",)),
        Layer("flatten", "k", ("j",)),
        Layer("linear", "l", ("k",), drawn(10, 16, density=0.3), drawn(10), label="head"),
        Layer("activation", "m", ("l",), activation="tanh"),
    )
    return Package(Network(layers, ("m", "d")), ((3, 16, 16),), False)


def rows() -> Package:
    layers = (
        Layer("input", "x"),
        Layer("input", "y"),
        Layer("linear", "a", ("x",), drawn(32, 48, density=0.2), drawn(32), "y", "gelu"),
        Layer("linear", "b", ("a",), drawn(7, 32, density=0.1, seed=1)),
    )
    return Package(Network(layers, ("b",)), ((48,), (32,)), True)


IMAGES, ROWS = images(), rows()
BYTES = {"images": pack(IMAGES), "rows": pack(ROWS)}


def given_to(made: Package, batch: int, seed: int = 0) -> list[np.ndarray]:
    return [drawn(batch, *shape, seed=seed + number) for number, shape in enumerate(made.shapes)]


def words_of(data: bytes) -> dict[str, Any]:
    return json.loads(unpack_arrays(data)[1]["prunus"])


def with_words(data: bytes, words: Any) -> bytes:
    """Return a file with other words, whose hash is right."""
    arrays, _ = unpack_arrays(data)
    return pack_arrays(arrays, {"prunus": words if isinstance(words, str) else json.dumps(words)})


# -- there and back --


@pytest.mark.parametrize("made", [IMAGES, ROWS], ids=["images", "rows"])
def test_what_is_read_is_what_was_saved(made: Package, tmp_path: Path) -> None:
    path = tmp_path / "net.prunus"
    size = save(path, made.network, made.shapes, rows=made.rows)
    assert size == path.stat().st_size
    found = read(path)
    assert (found.shapes, found.rows, found.network.outputs) == (made.shapes, made.rows, made.network.outputs)
    for mine, theirs in zip(made.network.layers, found.network.layers, strict=True):
        assert replace(mine, weight=None, bias=None).__dict__ == replace(theirs, weight=None, bias=None).__dict__
        for a, b in ((mine.weight, theirs.weight), (mine.bias, theirs.bias)):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                np.testing.assert_array_equal(a, b)
    assert pack(found) == path.read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 5, 17])
@pytest.mark.parametrize("made", [IMAGES, ROWS], ids=["images", "rows"])
@pytest.mark.parametrize("name", engine().sets)
def test_a_package_computes_what_the_network_does(made: Package, batch: int, name: str) -> None:
    inputs = given_to(made, batch)
    built = build(made.network, made.shapes, batch, tuner=Tuner(instruction_set=name))
    wanted = built.run(inputs)
    found = Runtime(unpack(pack(made)), 1, name)(*inputs)
    for a, b in zip(wanted, found if isinstance(found, list) else [found], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 0.96, 0.98, 1.0])
def test_a_weight_takes_the_smaller_of_its_two_forms(density: float) -> None:
    weight = drawn(64, 50, density=density)
    network = Network((Layer("input", "x"), Layer("linear", "a", ("x",), weight)), ("a",))
    data = pack(Package(network, ((50,),), True))
    start = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - start == min(weight.nbytes, 4 * np.count_nonzero(weight) + weight.size // 8)
    np.testing.assert_array_equal(unpack(data).network.layers[1].weight, weight)


def test_numbers_that_are_none_are_weights_like_others() -> None:
    weight = drawn(8, 8, density=0.3)
    weight[0, :3] = np.nan, np.inf, -np.inf
    network = Network((Layer("input", "x"), Layer("linear", "a", ("x",), weight)), ("a",))
    found = unpack(pack(Package(network, ((8,),), True))).network.layers[1].weight
    np.testing.assert_array_equal(found, weight)


def test_the_safetensors_package_reads_the_container() -> None:
    reader = pytest.importorskip("safetensors.numpy")
    arrays, _ = unpack_arrays(BYTES["images"])
    theirs = reader.load(BYTES["images"])
    assert theirs.keys() == arrays.keys()
    assert all(np.array_equal(theirs[name], arrays[name]) for name in arrays)


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "safetensors"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np
from prunus.runtime.package import load

x = np.load(sys.argv[2])
np.save(sys.argv[3], load(sys.argv[1], threads=2)(x)[0])
"""


def test_a_package_runs_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "net.prunus").write_bytes(BYTES["images"])
    (x,) = given_to(IMAGES, 3)
    np.save(tmp_path / "x.npy", x)
    paths = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-c", WITHOUT_TORCH, *(str(tmp_path / n) for n in ("net.prunus", "x.npy", "y.npy"))]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wanted = Runtime(IMAGES, 2)(x)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), wanted[0])


# -- calling --


def test_inputs_with_gaps_empty_batches_and_leading_axes() -> None:
    runtime = Runtime(IMAGES, 1)
    wide = drawn(2, 3, 16, 32)
    for a, b in zip(runtime(wide[..., ::2]), runtime(np.ascontiguousarray(wide[..., ::2])), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [y.shape for y in runtime(np.zeros((0, 3, 16, 16), np.float32))] == [(0, 10), (0, 8, 4, 4)]
    assert runtime(drawn(2, 3, 20, 28))[0].shape == (2, 10)
    runtime = Runtime(ROWS, 1)
    x, y = given_to(ROWS, 6)
    found = runtime(x.reshape(2, 3, 48), y.reshape(2, 3, 32))
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, runtime(x, y).reshape(2, 3, 7))  # type: ignore[union-attr]
    assert runtime(np.zeros((4, 0, 48), np.float32), np.zeros((4, 0, 32), np.float32)).shape == (4, 0, 7)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "1 inputs"),
        ([np.zeros((1, 3, 16, 16))], "float32"),
        ([np.zeros((1, 3, 16, 16), ">f4")], "float32"),
        ([[1.0, 2.0]], "list"),
        ([np.zeros((3, 16, 16), np.float32)], "batch, 3, 16, 16"),
        ([np.float32(1)], "numpy arrays"),
        ([np.array(1, np.float32)], "batch"),
        ([np.zeros((1, 4, 16, 16), np.float32)], "reads 3 channels"),
        ([np.zeros((1, 3, 0, 16), np.float32)], "batch"),
        ([np.zeros((1, 3, 1, 1), np.float32)], "larger inputs"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs: list[Any], says: str) -> None:
    runtime = Runtime(IMAGES, 1)
    with pytest.raises(InvalidValue, match=says):
        runtime(*inputs)
    runtime(*given_to(IMAGES, 1))


def test_inputs_of_unlike_batches_are_named() -> None:
    x, y = given_to(ROWS, 4)
    with pytest.raises(InvalidValue, match="unlike batch"):
        Runtime(ROWS, 1)(x, y[:2])


def test_several_threads_may_call_one_package() -> None:
    runtime = Runtime(IMAGES, 2)
    inputs = [given_to(IMAGES, 1 + i % 3, seed=i)[0] for i in range(8)]
    wanted = [runtime(x)[0] for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(24):
            i = (first + turn) % 8
            if not np.array_equal(runtime(inputs[i])[0], wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_a_number_of_threads_that_is_none(threads: Any) -> None:
    with pytest.raises(InvalidValue, match="threads"):
        Runtime(IMAGES, threads)


def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(InvalidValue, match="sse9"):
        Runtime(IMAGES, 1, "sse9")


# -- choices of kernels --


def test_choices_hold_on_the_processor_they_were_timed_on_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = Tuner(1, timing=True)
    x = given_to(IMAGES, 1)
    built = build(IMAGES.network, IMAGES.shapes, 1, tuner=tuner)
    assert tuner.found
    path = tmp_path / "net.prunus"
    save(path, IMAGES.network, IMAGES.shapes, found=tuner.found)  # type: ignore[arg-type]
    here = load(path)
    assert here.chosen
    assert here.threads == 1
    assert here.pool.tuner.found == tuner.found
    np.testing.assert_array_equal(here(*x)[0], built.run(x)[0])
    for name in engine().sets[1:]:
        other = load(path, instruction_set=name)
        assert not other.chosen
        assert not other.pool.tuner.found
    monkeypatch.setattr(package, "cpu_model", lambda: "another processor")
    elsewhere = load(path)
    assert not elsewhere.chosen
    assert not elsewhere.pool.tuner.found
    assert elsewhere.threads == package._cores()
    np.testing.assert_allclose(elsewhere(*x)[0], here(*x)[0], rtol=1e-4, atol=1e-5)


def test_choices_that_no_kernel_answers_to_are_passed_over() -> None:
    tuner = Tuner(1, timing=True)
    build(IMAGES.network, IMAGES.shapes, 1, tuner=tuner)
    machine = {"cpu": package.cpu_model(), "instruction_set": engine().sets[0], "threads": 1}
    x = given_to(IMAGES, 1)
    wanted = Runtime(IMAGES, 1)(*x)
    for choice in ([], [3, 5, 7], ["rows", "csr", 0], [10**30], [None, 0.5, "x" * 1000]):
        made = replace(IMAGES, found=dict.fromkeys(tuner.found, choice), machine=machine)
        runtime = Runtime(unpack(pack(made)), 1)
        assert runtime.chosen
        np.testing.assert_allclose(runtime(*x)[0], wanted[0], rtol=1e-4, atol=1e-5)


def test_nothing_of_a_machine_is_in_a_file_without_choices() -> None:
    words = words_of(BYTES["images"])
    assert words["machine"] is None
    assert words["found"] == {}
    assert not unpack(BYTES["images"]).machine


# -- damage --


@QUICK
@given(st.sampled_from(["images", "rows"]), st.data())
def test_any_changed_bit_is_noticed(name: str, data: st.DataObject) -> None:
    good = BYTES[name]
    place = data.draw(st.one_of(st.integers(0, 400), st.integers(0, len(good) - 1)))
    bad = bytearray(good)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedFile):
        unpack(bytes(bad))


@QUICK
@given(st.sampled_from(["images", "rows"]), st.data())
def test_bytes_that_are_lost_or_added_are_noticed(name: str, data: st.DataObject) -> None:
    good = BYTES[name]
    at = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(at, len(good)))
    extra = data.draw(st.binary(max_size=40))
    bad = good[:at] + extra + good[end:]
    if bad != good:
        with pytest.raises(DamagedFile):
            unpack(bad)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    for start in (b"", len(data).to_bytes(8, "little")):
        with pytest.raises(DamagedFile):
            unpack(start + data)


def raw(header: str | bytes, buffer: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return sealed(len(text).to_bytes(8, "little") + text + buffer)


HASH = '"__metadata__":{"prunus":"{}","sha256":"' + "0" * 64 + '"}'


def entry(begin: int, end: int, shape: Any = None, dtype: str = '"U8"') -> str:
    shape = [end - begin] if shape is None else shape
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":[{begin},{end}]}}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (1 << 63).to_bytes(8, "little") + b"{}",
        (LARGEST_HEADER + 1).to_bytes(8, "little") + b" " * 100,
        raw("[" + HASH.partition(":")[2] + "]"),
        raw("{" + HASH + "} {}"),
        raw("{" + HASH + ',"a":NaN}'),
        raw("{" + HASH + ',"a":1e999}'),
        raw("{" + HASH + ',"a":' + "[" * 200_000 + "]" * 200_000 + "}"),
        raw("{" + HASH + ',"a":' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}"),
        raw("{" + HASH + ',"a":' + "9" * 100_000 + "}"),
        raw("{" + HASH + ',"a":\0}'),
        raw(("{" + HASH + "}").encode() + b"\xff"),
        raw(("{" + HASH + ',"a\0":' + entry(0, 4) + "}").encode(), b"abcd"),
        raw("{" + HASH + "," + HASH + "}"),
        raw('{"a":' + entry(0, 4) + ',"a":' + entry(0, 4) + "," + HASH + "}", b"abcd"),
        raw('{"__metadata__":{"sha256":"' + "0" * 64 + '","prunus":1}}'),
        raw("{" + HASH + "}", b"left over"),
        raw("{" + HASH + ',"a":' + entry(0, 8) + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(-4, 0) + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(4, 0) + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(1, 4) + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 3) + ',"b":' + entry(2, 4) + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 4) + ',"b":' + entry(0, 4) + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 4, [3]) + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 4, [2], '"F32"') + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 4, [1 << 40, 1 << 40]) + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 4, [1] * 5 + [4]) + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 4, "[true,4]") + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 4, "[4.0]") + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 4, dtype='"F64"') + "}", b"abcd"),
        raw("{" + HASH + ',"a":' + entry(0, 4, dtype="[]") + "}", b"abcd"),
        raw("{" + HASH + ',"a":[]}', b"abcd"),
    ],
)
def test_headers_made_to_mislead(data: bytes) -> None:
    with pytest.raises(Malformed):
        unpack_arrays(data)
    with pytest.raises(DamagedFile):
        unpack(data)


def test_words_have_limits() -> None:
    with pytest.raises(InvalidValue, match="most"):
        pack_arrays({}, {"prunus": " " * LARGEST_HEADER})
    with pytest.raises(Malformed, match="no hash"):
        sealed(b"\x02\0\0\0\0\0\0\0{}")


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], Any]:
    def changed(words: dict[str, Any]) -> None:
        holder: Any = words
        for part in path[:-1]:
            holder = holder[part]
        holder[path[-1]] = to

    return changed


ATTACKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": change("format", to="prunus-model-1"),
    "version": change("version", to=2),
    "more parts": change("more", to=1),
    "rows": change("rows", to=True),
    "rows is a number": change("rows", to=0),
    "no shapes": change("shapes", to=[]),
    "negative size": change("shapes", to=[[3, -16, 16]]),
    "size zero": change("shapes", to=[[3, 0, 16]]),
    "huge size": change("shapes", to=[[3, 1 << 20, 1 << 20]]),
    "two axes": change("shapes", to=[[3, 16]]),
    "no layers": change("layers", to=[]),
    "layers is none": change("layers", to=None),
    "a layer is a text": change("layers", 3, to="convolution"),
    "operator": change("layers", 3, "op", to="_builder"),
    "operator of python": change("layers", 3, "op", to="_picked"),
    "name twice": change("layers", 3, "name", to="a"),
    "name of no text": change("layers", 3, "name", to=7),
    "name with a line": change("layers", 3, "name", to="c\nd"),
    "reads itself": change("layers", 3, "inputs", to=["c"]),
    "reads later": change("layers", 2, "residual", to="k"),
    "reads two": change("layers", 3, "inputs", to=["a", "b"]),
    "reads rows": change("layers", 13, "op", to="mean"),
    "residual of another shape": change("layers", 12, "residual", to="k"),
    "residual of a pool": change("layers", 4, "residual", to="c"),
    "activation": change("layers", 3, "activation", to="softmax"),
    "activation of a pool": change("layers", 4, "activation", to="relu"),
    "slope": change("layers", 3, "slope", to="0.1"),
    "slope too large": change("layers", 3, "slope", to=10**400),
    "bias is missing": change("layers", 3, "bias", to=True),
    "bias is left": change("layers", 1, "bias", to=False),
    "weight has another shape": change("layers", 1, "weight", to=[8, 3, 9, 1]),
    "weight has another size": change("layers", 2, "weight", to=[8, 8, 3, 4]),
    "weight is huge": change("layers", 2, "weight", to=[1 << 39, 1 << 39, 3, 3]),
    "weight is empty": change("layers", 2, "weight", to=[0, 8, 3, 3]),
    "weight of a pool": change("layers", 4, "weight", to=[8, 8]),
    "weight is gone": change("layers", 2, "weight", to=None),
    "stride zero": change("layers", 1, "options", "stride", to=[0, 2]),
    "stride of one": change("layers", 1, "options", "stride", to=[2]),
    "padding negative": change("layers", 1, "options", "padding", to=[-1, 1]),
    "padding huge": change("layers", 1, "options", "padding", to=[60_000, 60_000]),
    "padding more than the window": change("layers", 4, "options", "padding", to=[2, 2]),
    "dilation huge": change("layers", 1, "options", "dilation", to=[1 << 30, 1]),
    "groups": change("layers", 1, "options", "groups", to=3),
    "no groups": change("layers", 1, "options", "groups", to=0),
    "groups is a pair": change("layers", 1, "options", "groups", to=[1, 1]),
    "an option more": change("layers", 1, "options", "offset", to=4096),
    "option of a text": change("layers", 1, "options", "stride", to="22"),
    "returns nothing": change("outputs", to=[]),
    "returns what is not": change("outputs", to=["z"]),
    "choices are a list": change("found", to=[]),
    "a choice is no list": change("found", to={"a": 1}),
    "a choice is deep": change("found", to={"a": [[1]]}),
    "processor": change("machine", to={"cpu": "x"}),
    "processor of no text": change("machine", to={"cpu": 1, "instruction_set": "avx2", "threads": 1}),
    "no threads": change("machine", to={"cpu": "x", "instruction_set": "avx2", "threads": 0}),
    "threads are true": change("machine", to={"cpu": "x", "instruction_set": "avx2", "threads": True}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_words_made_to_mislead_though_the_hash_is_right(attack: str) -> None:
    words = words_of(BYTES["images"])
    ATTACKS[attack](words)
    with pytest.raises(DamagedFile, match="not a sound package"):
        unpack(with_words(BYTES["images"], words))


def test_masks_that_do_not_fit_their_values() -> None:
    arrays, words = unpack_arrays(BYTES["images"])
    name = next(n for n in arrays if n.endswith(".mask"))
    for spoiled in (arrays[name] ^ 1, arrays[name][:-1], np.concatenate([arrays[name], arrays[name]])):
        with pytest.raises(DamagedFile, match="mask"):
            unpack(pack_arrays(arrays | {name: spoiled}, {"prunus": words["prunus"]}))
    with pytest.raises(DamagedFile, match="no layer"):
        unpack(pack_arrays(arrays | {"99.mask": arrays[name]}, {"prunus": words["prunus"]}))
    # 7 weights leave one bit of the mask, which must be zero.
    weight = np.array([[1, 0, 0, 0, 0, 0, 0]], np.float32)
    data = pack(Package(Network((Layer("input", "x"), Layer("linear", "a", ("x",), weight)), ("a",)), ((7,),), True))
    arrays, words = unpack_arrays(data)
    with pytest.raises(DamagedFile, match="mask"):
        unpack(pack_arrays(arrays | {"1.mask": np.array([128], np.uint8)}, {"prunus": words["prunus"]}))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from([1 << 16, 1 << 31, 1 << 40, 1 << 63, -(1 << 63), 10**30, 0.5, 1e30]),
    st.sampled_from(["", "x", "a", "b", "f", "j", "k", "relu", "none", "mean", "flatten", "max_pool", "add", "input"]),
    st.lists(st.one_of(st.integers(-1, 5), st.sampled_from(["a", "b", "f", "j", "k", 1 << 31])), max_size=4),
)


@QUICK
@given(st.sampled_from(["images", "rows"]), st.data())
def test_other_words_are_refused_or_run(name: str, data: st.DataObject) -> None:
    words = words_of(BYTES[name])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([p for p in places(words) if p[0] != "found"]))
        change(*path, to=data.draw(ANYTHING))(words)
    try:
        made = unpack(with_words(BYTES[name], words))
    except DamagedFile:
        return
    if sum(math.prod(shape) for shape in made.network.shapes(made.shapes).values()) > 1 << 20:
        return
    for batch in (1, 3, 16):
        found = Runtime(made, 2)(*given_to(made, batch))
        shapes = made.network.shapes(made.shapes)
        for y, output in zip(found if isinstance(found, list) else [found], made.network.outputs, strict=True):
            assert y.shape == (batch, *shapes[output])


# -- files --


def test_what_the_engine_cannot_compute_is_not_saved(tmp_path: Path) -> None:
    def saved(*layers: Layer, shape: tuple[int, ...] = (4,)) -> None:
        save(tmp_path / "net.prunus", Network((Layer("input", "x"), *layers), (layers[-1].name,)), [shape], rows=True)

    linear = Layer("linear", "a", ("x",), drawn(3, 4))
    saved(linear)
    before = (tmp_path / "net.prunus").read_bytes()
    for bad in (
        replace(linear, weight=drawn(3, 4).astype(np.float64)),
        replace(linear, weight=drawn(3, 5)),
        replace(linear, weight=drawn(1, 1 << 22)),
        replace(linear, bias=drawn(4)),
        replace(linear, name="x"),
        replace(linear, label="a\x07"),
        replace(linear, activation="leaky_relu", slope=math.nan),
        Layer("softmax", "a", ("x",)),
    ):
        with pytest.raises(InvalidValue):
            saved(bad)
    with pytest.raises(InvalidValue):
        saved(linear, shape=(4, 1))
    with pytest.raises(InvalidValue, match="cannot say"):
        save(tmp_path / "net.prunus", ROWS.network, ROWS.shapes, rows=True, found={"a": [math.inf]})
    assert (tmp_path / "net.prunus").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.prunus"]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.prunus", tmp_path, Path("/dev/zero")):
        with pytest.raises(DamagedFile, match=path.name):
            load(path)
    (tmp_path / "empty.prunus").write_bytes(b"")
    with pytest.raises(DamagedFile, match="empty"):
        load(tmp_path / "empty.prunus")
    with pytest.raises(StorageFailed):
        save(tmp_path / "no" / "net.prunus", ROWS.network, ROWS.shapes, rows=True)
