"""The native library: found and loaded, memory with bounds, programs that run alone, side by side and after a fork."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from prunus.errors import InvalidValue
from prunus.runtime.library import Memory, Program, engine, why_not
from prunus.runtime.records import Copy, Pointwise, Record

if why_not():
    pytest.skip(why_not(), allow_module_level=True)

SOURCE = Path(__file__).resolve().parent.parent / "src"


def python(code: str, *, limit: float = 120.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds this checkout."""
    paths = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=limit,
    )


def copied(x: np.ndarray, y: np.ndarray, *, x_step: int = 1) -> Copy:
    """Return what copies every `x_step`-th column of the planes [p, r, c] of x to y."""
    planes, rows, columns = y.shape
    return Copy(
        planes=planes,
        rows=rows,
        columns=columns,
        lanes=1,
        x_plane=x.strides[0],
        y_plane=y.strides[0],
        x_row=x.strides[1],
        y_row=y.strides[1],
        x_step=x_step * x.strides[2],
        y_step=y.strides[2],
        x=x,
        y=y,
    )


def combined(a: np.ndarray, b: np.ndarray, y: np.ndarray, *, op: int) -> Pointwise:
    """Return what computes a op b on planes of whole vectors of 16 floats."""
    planes, floats = y.shape
    return Pointwise(
        planes=planes,
        op=op,
        lanes=1,
        tiles=1,
        a_plane=a.strides[0],
        b_plane=b.strides[0],
        y_plane=y.strides[0],
        widths=np.array([floats // 16], np.int32),
        offsets=np.zeros(1, np.int64),
        a=a,
        b=b,
        y=y,
    )


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def two_steps(seed: int, planes: int = 37) -> tuple[list[Record], np.ndarray, np.ndarray]:
    """Return steps that copy, then add; where the result will be; and what it has to be."""
    x, b = numbers(planes, 1, 96, seed=seed), numbers(planes, 96, seed=seed + 1)
    middle, y = np.zeros((planes, 1, 96), np.float32), np.zeros((planes, 96), np.float32)
    return [copied(x, middle), combined(middle.reshape(planes, 96), b, y, op=1)], y, x.reshape(planes, 96) + b


# -- loading --


def test_the_sets_end_with_the_portable_one_and_are_known_by_number() -> None:
    found = engine()
    assert found.sets[-1] == "portable"
    assert len(set(found.sets)) == len(found.sets)
    assert found.number(None) == 0
    assert [found.number(name) for name in found.sets] == list(range(len(found.sets)))
    with pytest.raises(InvalidValue, match="portable"):
        found.number("sse9")
    with pytest.raises(InvalidValue, match="sse9"):
        Program([], instruction_set="sse9")


def test_the_library_is_loaded_without_torch() -> None:
    done = python("import sys; from prunus.runtime.library import engine; engine(); assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_environment_names_another_library() -> None:
    code = "from prunus.runtime.library import engine; print(engine().path)"
    done = python(code, PRUNUS_ENGINE=str(engine().path))
    assert done.stdout.strip() == str(engine().path), done.stderr


@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_library_that_is_missing_or_damaged_is_named_with_a_typed_error(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "other.so"
    if content is not None:
        path.write_bytes(content)
    code = (
        "from prunus.errors import Unsupported\n"
        "from prunus.runtime.library import engine, why_not\n"
        "try:\n    engine()\n"
        "except Unsupported as error:\n    assert why_not() in str(error); print(error)"
    )
    done = python(code, PRUNUS_ENGINE=str(path))
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout


# -- memory --


@pytest.mark.parametrize("size", [1, 64, 4097, (2 << 20) + 8])
def test_memory_is_zeroed_and_takes_views_up_to_its_last_byte(size: int) -> None:
    memory = Memory(size)
    whole = memory.array(0, (memory.size,), np.uint8)
    assert memory.size >= size
    assert not whole.any()
    whole[:] = 7
    last = memory.array(memory.size - 4, (1,), np.uint8)
    assert last[0] == 7
    last[0] = 8
    assert whole[-4] == 8


def test_views_outside_of_the_memory_are_refused() -> None:
    memory = Memory(256)
    assert memory.array(256, (0,)).size == 0
    for offset, shape in ((-4, (1,)), (0, (65,)), (252, (2,)), (256, (1,)), (0, (1 << 40, 1 << 10))):
        with pytest.raises(ValueError, match="outside"):
            memory.array(offset, shape)


def test_a_view_keeps_its_memory_alive() -> None:
    memory = Memory(1 << 20)
    view = memory.array(4096, (8, 16))
    view[:] = 3
    del memory
    gc.collect()
    others = [Memory(1 << 20) for _ in range(4)]
    assert (view == 3).all()
    assert not any(m.array(0, (16,)).any() for m in others)


def test_more_memory_than_there_is_raises() -> None:
    with pytest.raises(MemoryError, match="bytes"):
        Memory(1 << 60)


# -- programs --


@pytest.mark.parametrize("name", engine().sets)
def test_copy_takes_every_second_column_into_padded_planes(name: str) -> None:
    x = numbers(5, 7, 70)
    padded = np.zeros((5, 9, 40), np.float32)
    inner = padded[:, 1:8, 2:37]
    record = copied(x, padded, x_step=2)
    record.rows, record.columns, record.y = 7, 35, inner.ctypes.data  # views with gaps are given by their start
    Program([record], instruction_set=name).run()
    expected = np.zeros_like(padded)
    expected[:, 1:8, 2:37] = x[:, :, ::2]
    np.testing.assert_array_equal(padded, expected)


def test_an_array_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        Copy(x=np.zeros((4, 4), np.float32)[:, ::2])


@pytest.mark.parametrize("name", engine().sets)
@pytest.mark.parametrize(("op", "expected"), [(1, np.add), (2, np.multiply), (3, np.subtract)])
def test_pointwise_is_arithmetic_of_float32(name: str, op: int, expected: np.ufunc) -> None:
    a, b = numbers(3, 64), numbers(3, 64, seed=1)
    y = np.zeros_like(a)
    Program([combined(a, b, y, op=op)], instruction_set=name).run()
    np.testing.assert_array_equal(y, expected(a, b))


def test_steps_run_in_order_and_are_timed() -> None:
    steps, y, expected = two_steps(0)
    seconds = Program(steps).timed()
    np.testing.assert_array_equal(y, expected)
    assert seconds.shape == (2,)
    assert (seconds > 0).all()
    # The other way round, the sum is taken of what was never copied.
    steps, y, expected = two_steps(0)
    Program(steps[::-1]).run()
    assert not np.array_equal(y, expected)


def test_an_empty_program_runs() -> None:
    Program([]).run(4)
    assert Program([]).timed().shape == (0,)


@pytest.mark.parametrize("threads", [-1, 0, 1, 2, 3, 8, 64, 1000])
def test_the_number_of_threads_does_not_change_the_result(threads: int) -> None:
    steps, y, expected = two_steps(2)
    program = Program(steps)
    for _ in range(20):
        y[:] = 0
        program.run(threads)
        np.testing.assert_array_equal(y, expected)


def test_programs_run_side_by_side() -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        steps, y, expected = two_steps(10 * seed)
        program = Program(steps)
        for turn in range(300):
            y[:] = 0
            program.run(2)
            if not np.array_equal(y, expected):
                wrong.append(f"thread {seed}, turn {turn}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, sys
sys.path.insert(0, {tests!r})
from test_engine_library import Program, two_steps

steps, y, expected = two_steps(3)
program = Program(steps)
program.run(4)
for _ in range(3):
    child = os.fork()
    if child == 0:
        y[:] = 0
        for _ in range(50):
            program.run(4)
        os._exit(0 if (y == expected).all() else 3)
    program.run(4)
    assert os.waitpid(child, 0)[1] == 0
assert (y == expected).all()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_parent_and_child_go_on_after_a_fork() -> None:
    done = python(FORK.format(tests=str(Path(__file__).parent)))
    assert done.stdout.strip() == "done", done.stderr
