"""How many bytes of tensors a call holds at most, beyond those that are there before."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunus.measure.forwarding import call, evaluating


class _Watch(TorchDispatchMode):
    """Adds up the storages that operators make, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {_key(v) for v in tree_leaves((args, kwargs)) if _plain(v)}
        for value in tree_leaves(made):
            if _plain(value) and (key := _key(value)) not in given and key not in self.known:
                storage = value.untyped_storage()
                self.known[key] = storage.nbytes()
                self.now += self.known[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return made

    def _freed(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(model: Any, example: Any) -> int:
    """Return the most bytes of tensors that exist at one time during a call and did not before it.

    Operator by operator: what a kernel holds inside itself (workspaces, packed weights) is not seen, nor are tensors
    without strides.

    Args:
        model: module or function; observed in eval mode without gradients, modes are restored.
        example: a tensor, a tuple of arguments or a mapping of keyword arguments, used whole.
    """
    with evaluating(model), torch.no_grad(), _Watch() as watch:
        call(model, example)
    return watch.peak
