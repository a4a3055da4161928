"""One region of a model as a torch operator that the engine computes."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, Unsupported
from prunus.runtime.build import Built, build
from prunus.runtime.network import Network
from prunus.runtime.tune import Tuner

_KEPT = 8  # batch sizes and shapes whose programs are kept
_REGIONS: weakref.WeakValueDictionary[int, Any] = (
    weakref.WeakValueDictionary()
)  # the operator takes numbers, not modules
_numbers = itertools.count()


@torch.library.custom_op("prunus::region", mutates_args=())
def run_region(inputs: list[Tensor], region: int) -> list[Tensor]:
    """Run a region of the engine by its number; `EngineRegion` is what calls this."""
    return _found(region).compute(inputs)  # type: ignore[no-any-return]


@run_region.register_fake
def _(inputs: list[Tensor], region: int) -> list[Tensor]:
    return [inputs[0].new_empty(shape) for shape in _found(region).shapes(inputs)]


def _found(number: int) -> Any:
    region = _REGIONS.get(number)
    if region is None:
        raise InvalidValue(f"engine region {number} is gone; keep the compressed module while its operator is in use.")
    return region


class EngineRegion(nn.Module):
    """A network of the engine, for any batch size; programs are built when a size is first seen.

    Args:
        network: what to compute.
        rows: whether inputs are rows of features with any leading axes; otherwise images (N, C, H, W).
        tuner: picks kernels; its number of threads is that of torch at each call.
        lanes: 1 or 16 to lay images out so, None for 16 where there are at least 16 small ones.
    """

    def __init__(self, network: Network, *, rows: bool, tuner: Tuner | None = None, lanes: int | None = None) -> None:
        super().__init__()
        self.network, self.rows, self.lanes = network, rows, lanes
        self.tuner = tuner or Tuner()
        self._lock = threading.Lock()
        self._free: OrderedDict[Any, list[Built]] = OrderedDict()
        self.number = next(_numbers)
        _REGIONS[self.number] = self

    def extra_repr(self) -> str:
        """Show what it computes."""
        return f"{len(self.network.layers)} layers, {'rows' if self.rows else 'images'}"

    def forward(self, *inputs: Tensor) -> Any:
        """Return one tensor, or a tuple of them."""
        made = run_region(list(inputs), self.number)
        return made[0] if len(made) == 1 else tuple(made)

    def shapes(self, inputs: Sequence[Tensor]) -> list[list[Any]]:
        """Return the shapes of the outputs, batch included."""
        leading = list(inputs[0].shape[:-1]) if self.rows else [inputs[0].shape[0]]
        shapes = self.network.shapes([self._inner(x) for x in inputs])
        return [[*leading, *shapes[name]] for name in self.network.outputs]

    def _inner(self, x: Tensor) -> tuple[int, ...]:
        return (int(x.shape[-1]),) if self.rows else tuple(int(s) for s in x.shape[1:])

    def compute(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Check inputs and run the program for their size on as many threads as torch uses."""
        for x in inputs:
            if x.device.type != "cpu":
                raise Unsupported(f"the engine computes on the CPU, the input is on {x.device}; move it, or the model.")
            if x.dtype != torch.float32:
                raise InvalidValue(f"the engine reads float32, the input is {x.dtype}; convert it.")
            if torch.is_grad_enabled() and x.requires_grad:
                raise Unsupported("the engine has no gradients; call it under torch.no_grad() or inference_mode().")
        outputs = [torch.empty(shape, dtype=torch.float32) for shape in self.shapes(inputs)]
        batch = self._batch(inputs)
        if batch == 0:
            return outputs
        threads = torch.get_num_threads()
        key = (batch, tuple(self._inner(x) for x in inputs), threads)
        built = self._taken(key)
        try:
            built.run([as_numpy(x) for x in inputs], threads, [o.numpy() for o in outputs])
        finally:
            self._given_back(key, built)
        return outputs

    def timed(self, inputs: Sequence[Tensor]) -> tuple[Built, np.ndarray[Any, np.dtype[np.float64]]]:
        """Return the program for such inputs and the seconds that each of its steps takes."""
        key = (self._batch(inputs), tuple(self._inner(x) for x in inputs), torch.get_num_threads())
        built = self._taken(key)
        try:
            return built, built.timed([as_numpy(x) for x in inputs], key[2])
        finally:
            self._given_back(key, built)

    def _batch(self, inputs: Sequence[Tensor]) -> int:
        sizes = {math.prod(x.shape[:-1] if self.rows else x.shape[:1]) for x in inputs}
        if len(sizes) > 1:
            raise InvalidValue(f"inputs of unlike batch sizes: {[tuple(x.shape) for x in inputs]}.")
        return int(sizes.pop())

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
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__.copy()
        return {k: v for k, v in state.items() if k not in ("_lock", "_free", "number")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock, self._free = threading.Lock(), OrderedDict()
        self.number = next(_numbers)
        _REGIONS[self.number] = self


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a float32 array of a tensor's values."""
    return tensor.detach().float().contiguous().numpy()
