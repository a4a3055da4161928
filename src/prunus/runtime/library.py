"""Find and load the native library; without one, say why and what to do. Needs no torch.

The environment variable PRUNUS_ENGINE names another library file to load instead; it is there for tests, which run the
engine built with sanitizers that way.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunus.errors import InvalidValue, Unsupported
from prunus.runtime.records import RECORDS, Record, Step

INTERFACE = 2
_NAMES = ("_engine.so", "_engine.dylib")


@dataclass(frozen=True)
class Engine:
    """The loaded library.

    Attributes:
        path: where it is.
        sets: names of the instruction sets that this processor can run, best first.
    """

    path: Path
    sets: tuple[str, ...]
    _library: Any

    def number(self, name: str | None) -> int:
        """Return the number of an instruction set by name, the best for None.

        Raises:
            InvalidValue: this processor does not have it.
        """
        if name is None:
            return 0
        if name not in self.sets:
            raise InvalidValue(f"this processor has no {name!r}; it can run {', '.join(self.sets)}.")
        return self.sets.index(name)


def _candidates() -> list[Path]:
    if named := os.environ.get("PRUNUS_ENGINE"):
        return [Path(named)]
    places = [Path(__file__).parent]
    # An editable installation may keep built files beside other packages.
    import prunus

    places += [Path(p) / "runtime" for p in getattr(prunus, "__path__", [])]
    return [place / name for place in dict.fromkeys(places) for name in _NAMES]


@functools.cache
def _loaded() -> tuple[Engine | None, str]:
    for path in _candidates():
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(os.fspath(path))
        except OSError as error:
            return None, f"{path} cannot be loaded ({error})"
        if library.prunus_interface() != INTERFACE:
            return None, f"{path} was built from another version of prunus; install prunus again"
        library.prunus_instruction_set.restype = ctypes.c_char_p
        library.prunus_layer_bytes.restype = ctypes.c_int64
        library.prunus_allocate.restype = ctypes.c_void_p
        library.prunus_allocate.argtypes = [ctypes.c_int64]
        library.prunus_release.argtypes = [ctypes.c_void_p]
        library.prunus_release.restype = None
        library.prunus_run.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int32,
            ctypes.c_int32,
            ctypes.c_void_p,
        ]
        for record in RECORDS:
            if library.prunus_layer_bytes(record.kind) != ctypes.sizeof(record):  # type: ignore[attr-defined]
                return None, f"{path} was built from another version of prunus; install prunus again"
        sets = tuple(library.prunus_instruction_set(i).decode() for i in range(library.prunus_instruction_sets()))
        return Engine(path, sets, library), ""
    if named := os.environ.get("PRUNUS_ENGINE"):
        return None, f"PRUNUS_ENGINE names {named}, which is not there"
    return None, "prunus was installed without a C++ compiler; install g++ or clang, then install prunus again"


def engine() -> Engine:
    """Return the native engine.

    Raises:
        Unsupported: there is none; the message says why.
    """
    found, why = _loaded()
    if found is None:
        raise Unsupported(f"the native engine is not there: {why}.")
    return found


def why_not() -> str:
    """Return why there is no native engine; empty if there is one."""
    return _loaded()[1]


class Memory:
    """Zeroed memory of the engine, released with the object; `array` views parts of it."""

    def __init__(self, size: int) -> None:
        """`size` in bytes. Raises MemoryError when there is none."""
        self._library = engine()._library
        self.size = max(int(size), 64)
        self.address: int | None = self._library.prunus_allocate(self.size)
        if not self.address:
            raise MemoryError(f"{self.size} bytes for the engine could not be had.")

    def array(self, offset: int, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        """Return a view that keeps this memory alive, `offset` bytes from its start."""
        dtype = np.dtype(dtype)
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset} to {offset + length} are outside of {self.size}")
        held = (ctypes.c_byte * length).from_address(self.address + offset)  # type: ignore[operator]
        held._owner = self  # type: ignore[attr-defined]
        return np.frombuffer(held, dtype=dtype).reshape(tuple(shape))

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._library.prunus_release(self.address)
            self.address = None


class Program:
    """Steps that run in one native call."""

    def __init__(self, records: Sequence[Record], *, instruction_set: str | None = None) -> None:
        self.records = list(records)
        self._engine = engine()
        self._set = self._engine.number(instruction_set)
        self._steps = (Step * max(1, len(self.records)))()
        for step, record in zip(self._steps, self.records, strict=False):
            step.kind, step.layer = record.kind, ctypes.addressof(record)  # type: ignore[attr-defined]
            step.joined = int(record.joined)

    def run(self, threads: int = 1) -> None:
        """Run all steps on at most `threads` threads; other programs that run meanwhile get one thread each."""
        self._engine._library.prunus_run(self._steps, len(self.records), threads, self._set, None)

    def timed(self, threads: int = 1) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Run all steps and return the seconds that each took."""
        seconds = np.zeros(max(1, len(self.records)))
        self._engine._library.prunus_run(self._steps, len(self.records), threads, self._set, seconds.ctypes.data)
        return seconds[: len(self.records)]
