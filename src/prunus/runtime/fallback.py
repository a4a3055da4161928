"""Without the native engine: linear layers in torch's own sparse format, where that is faster."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from prunus.measure.latency import latency

DENSEST = 0.5  # a layer with more kept weights is not even tried


class SparseLinear(nn.Module):
    """A linear layer whose weight is stored in compressed sparse rows.

    Args:
        weight: (out, in).
        bias: (out,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its sparse layout a beta feature
            kept = weight.detach().to_sparse_csr()
            # Indices of 32 bits make the products about twice as fast.
            rows, columns = kept.crow_indices().int(), kept.col_indices().int()
            self.weight = torch.sparse_csr_tensor(rows, columns, kept.values(), size=weight.shape)
        self.bias = None if bias is None else bias.detach().clone()

    def extra_repr(self) -> str:
        """Show sizes and how many weights are kept."""
        out, inputs = self.weight.shape
        return f"{inputs}, {out}, kept={self.weight.values().numel()}"

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b for x of shape (..., in)."""
        rows = x.reshape(-1, x.shape[-1])
        made = (self.weight @ rows.t()).t()
        made = made if self.bias is None else made + self.bias
        return made.reshape(*x.shape[:-1], self.weight.shape[0])


def sparse_linears(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Replace linear layers of `model` that are faster with sparse weights, in place.

    Args:
        model: in eval mode; called once with the arguments to see what its layers read.

    Returns:
        Path of each replaced layer -> (milliseconds dense, milliseconds sparse), medians of interleaved calls.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    for path, module in model.named_modules():
        if type(module) is nn.Linear and float((module.weight != 0).float().mean()) <= DENSEST:

            def look(_: nn.Module, given: tuple[Any, ...], path: str = path) -> None:
                seen.setdefault(path, given[0])

            handles.append(module.register_forward_pre_hook(look))
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    replaced: dict[str, tuple[float, float]] = {}
    for path, x in seen.items():
        dense: Any = model.get_submodule(path)
        sparse = SparseLinear(dense.weight, dense.bias)
        times = latency({"dense": dense, "sparse": sparse}, x, repeats=7, warmup=1)
        if times["sparse"].median < times["dense"].median:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, sparse)
            replaced[path] = 1e3 * times["dense"].median, 1e3 * times["sparse"].median
    return replaced
