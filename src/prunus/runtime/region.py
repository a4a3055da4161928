"""One region of a model as a torch operator that the engine computes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, Unsupported
from prunus.runtime.build import Built
from prunus.runtime.network import Network
from prunus.runtime.pool import Pool
from prunus.runtime.tune import Tuner

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
        self.network, self.rows = network, rows
        self.pool = Pool(network, rows=rows, tuner=tuner, lanes=lanes)
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
        return self.pool.shapes([x.shape for x in inputs])

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
        self.pool.run([as_numpy(x) for x in inputs], torch.get_num_threads(), [o.numpy() for o in outputs])
        return outputs

    def timed(self, inputs: Sequence[Tensor]) -> tuple[Built, np.ndarray[Any, np.dtype[np.float64]]]:
        """Return the program for such inputs and the seconds that each of its steps takes."""
        return self.pool.timed([as_numpy(x) for x in inputs], torch.get_num_threads())

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__.copy()
        return {k: v for k, v in state.items() if k != "number"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = next(_numbers)
        _REGIONS[self.number] = self


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a float32 array of a tensor's values."""
    return tensor.detach().float().contiguous().numpy()
