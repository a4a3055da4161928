"""Masking an expert: no token is sent there, because the router's logit for it is minus infinity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = {F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


class _Silence(TorchFunctionMode):
    """Sets columns of the product with a router's weight to minus infinity."""

    def __init__(self, shape: tuple[int, ...], gone: Tensor) -> None:
        super().__init__()
        self.shape, self.gone = shape, gone

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _PRODUCTS:
            operands = [tuple(a.shape) for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
            if self.shape in operands[1:2] or self.shape[::-1] in operands[1:2]:
                return result.index_fill(-1, self.gone.to(result.device), float("-inf"))
        return result


class Silenced:
    """Mixed into the class of a router of which some outputs are never chosen."""

    _silent: tuple[tuple[int, ...], Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward without the silent outputs."""
        with _Silence(*self._silent):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


_CLASSES: dict[type, type] = {}


def silence(module: nn.Module, weight: str, gone: Sequence[int]) -> None:
    """Let the logits that `module` computes with its parameter `weight` (experts, features) be -inf for `gone`."""
    own = type(module)
    if not issubclass(own, Silenced):
        if own not in _CLASSES:
            _CLASSES[own] = type(own.__name__, (Silenced, own), {"__module__": own.__module__})
        module.__class__ = _CLASSES[own]
    shape = tuple(module.get_parameter(weight).shape)
    module._silent = (shape, torch.as_tensor(list(gone), dtype=torch.int64))  # type: ignore[assignment]
