"""Programs of one network for all batch sizes, shapes and threads that come along. Needs no torch."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.errors import InvalidValue
from prunus.runtime.build import Built, build
from prunus.runtime.network import Network
from prunus.runtime.tune import Tuner

Array = NDArray[np.float32]
_KEPT = 8  # batch sizes and shapes whose programs are kept


class Pool:
    """A network for inputs of any batch size; programs are built when a size is first seen, each run by one thread.

    Args:
        network: what to compute.
        rows: whether inputs are rows of features with any leading axes; otherwise images (N, C, H, W).
        tuner: picks kernels.
        lanes: 1 or 16 to lay images out so, None for 16 where there are at least 16 small ones.
    """

    def __init__(self, network: Network, *, rows: bool, tuner: Tuner | None = None, lanes: int | None = None) -> None:
        self.network, self.rows, self.lanes = network, rows, lanes
        self.tuner = tuner or Tuner()
        self._lock = threading.Lock()
        self._free: OrderedDict[Any, list[Built]] = OrderedDict()

    def inner(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of an input without batch."""
        return (int(shape[-1]),) if self.rows else tuple(int(s) for s in shape[1:])

    def batch(self, shapes: Sequence[Sequence[int]]) -> int:
        """Return how many images or rows inputs of these shapes hold.

        Raises:
            InvalidValue: they disagree.
        """
        sizes = {math.prod(shape[:-1] if self.rows else shape[:1]) for shape in shapes}
        if len(sizes) > 1:
            raise InvalidValue(f"inputs of unlike batch sizes: {[tuple(shape) for shape in shapes]}.")
        return int(sizes.pop())

    def shapes(self, shapes: Sequence[Sequence[int]]) -> list[list[Any]]:
        """Return the shapes of the outputs for inputs of these shapes, batch included.

        Raises:
            InvalidValue: the inputs do not fit the weights.
        """
        leading = list(shapes[0][:-1] if self.rows else shapes[0][:1])
        found = self.network.shapes([self.inner(shape) for shape in shapes])
        return [[*leading, *found[name]] for name in self.network.outputs]

    def run(self, inputs: Sequence[Array], threads: int, outputs: Sequence[Array]) -> None:
        """Fill outputs, of the shapes that `shapes` returns; all are C-contiguous float32. Any thread may call it.

        Raises:
            InvalidValue: the inputs do not fit the weights, or each other.
        """
        key = self._key(inputs, threads)
        if key[0] == 0:
            return
        built = self._taken(key)
        try:
            built.run(inputs, threads, outputs)
        finally:
            self._given_back(key, built)

    def timed(self, inputs: Sequence[Array], threads: int) -> tuple[Built, NDArray[np.float64]]:
        """Return the program for such inputs and the seconds that each of its steps takes."""
        key = self._key(inputs, threads)
        built = self._taken(key)
        try:
            return built, built.timed(inputs, threads)
        finally:
            self._given_back(key, built)

    def _key(self, inputs: Sequence[Array], threads: int) -> Any:
        shapes = [x.shape for x in inputs]
        return self.batch(shapes), tuple(self.inner(shape) for shape in shapes), threads

    def _taken(self, key: Any) -> Built:
        """Return a program that no other thread is running."""
        with self._lock:
            free = self._free.get(key)
            if free:
                self._free.move_to_end(key)
                return free.pop()
        batch, inner, threads = key
        tuner = Tuner(
            threads,
            instruction_set=self.tuner.instruction_set,
            timing=self.tuner.timing,
            found=self.tuner.found,
            on_stage=self.tuner.tell,
        )
        return build(self.network, inner, batch, lanes=self._lanes(batch, inner), tuner=tuner)

    def _given_back(self, key: Any, built: Built) -> None:
        with self._lock:
            self._free.setdefault(key, []).append(built)
            self._free.move_to_end(key)
            while len(self._free) > _KEPT:
                self._free.popitem(last=False)

    def _lanes(self, batch: int, inner: tuple[tuple[int, ...], ...]) -> int:
        if self.rows:
            return 1
        if self.lanes is not None:
            return self.lanes
        small = max(math.prod(s[1:]) for s in inner) <= 64 * 64
        return 16 if small and batch >= 16 else 1

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_free")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._free = threading.Lock(), OrderedDict()
