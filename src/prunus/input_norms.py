"""Norms of the inputs that weights see, gathered while the model runs.

Weights are recognised where they are used - as the second operand of a linear or convolution function - so that models
which call `F.linear(x, self.layer.weight)` themselves are covered like those that call the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from prunus.errors import InvalidValue, Unsupported
from prunus.evidence import Source, preserved
from prunus.parameters import Address

_PRODUCTS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
}


class _Sums:
    """Running sums of squares per input feature, by weight name."""

    def __init__(self, addresses: Mapping[str, Address]):
        self.addresses = addresses
        self.squares: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.valid: Tensor | None = None

    def add(self, name: str, x: Tensor) -> None:
        """Add the inputs of one use of a weight."""
        address = self.addresses[name]
        x = x.detach().double()
        if address.kind.startswith("conv"):
            x = x.movedim(1 - len(address.shape), -1)
        elif self.valid is not None and x.shape[:-1] in (self.valid.shape, (self.valid.numel(),)):
            x = x.reshape(-1, x.shape[-1])[self.valid.reshape(-1).bool()]  # padding tokens say nothing about the text
        x = x.reshape(-1, x.shape[-1])
        self.squares[name] = self.squares.get(name, torch.zeros((), dtype=x.dtype)) + x.square().sum(0)
        self.counts[name] = self.counts.get(name, 0) + x.shape[0]


class _Watch(TorchFunctionMode):
    """Adds the inputs of every product with a watched weight."""

    def __init__(self, sums: _Sums, names: Mapping[int, str]):
        super().__init__()
        self.sums = sums
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = x = None
        if func in _PRODUCTS:
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            x = kwargs.get("input", args[0] if args else None)
        elif func is torch.addmm and len(args) == 3:  # bias + x W, as layers with (in, out) weights do
            x, weight = args[1], args[2]
        name = self.names.get(id(weight))
        if name is not None and x is not None:
            self.sums.add(name, x)
        return func(*args, **kwargs)


def _owners(source: Source) -> dict[str, list[nn.Module]]:
    """Return the modules that hold each prunable tensor."""
    owners: dict[str, list[nn.Module]] = {n: [] for n in source.addresses}
    ids = {id(p): n for n, p in source.parameters.items()}
    for module in source.model.modules():
        chains = getattr(module, "parametrizations", {}).values()  # spectral norm keeps the weight one level down
        own = [p for holder in (module, *chains) for p in holder.parameters(recurse=False)]
        for parameter in own:
            if id(parameter) in ids and not isinstance(module, ParametrizationList):
                owners[ids[id(parameter)]].append(module)
    return owners


def _check(source: Source, owners: Mapping[str, Sequence[nn.Module]]) -> None:
    for name, address in source.addresses.items():
        if address.kind not in ("linear", "conv", "conv-transpose"):
            raise Unsupported(
                f"input norms are defined for linear and convolution layers; exclude {name!r} ({address.kind}) or use "
                "another score."
            )
        if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in owners[name]):
            raise Unsupported(f"{name!r} is tied to an embedding, whose inputs are token ids; exclude it.")


def _by_hook(sums: _Sums, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, inputs: sums.add(name, inputs[0])


def input_norm(source: Source) -> dict[str, Tensor]:
    """Return the root mean square of every input feature over examples and positions, in the weight's shape.

    A tensor that several layers share sees the inputs of all of them. For convolutions a feature is an input channel.

    Raises:
        Unsupported: a tensor of another kind (recurrent, attention, embedding).
        InvalidValue: no data, or a layer that the data never reaches.
    """
    batches = source.need_batches("an input norm")
    owners = _owners(source)
    _check(source, owners)
    sums = _Sums(source.addresses)
    # Weights that a parametrisation computes anew at each call are not the parameter itself: watch their layers.
    computed = {n for n, modules in owners.items() if any(hasattr(m, "parametrizations") for m in modules)}
    names = {id(p): n for n, p in source.parameters.items() if n not in computed}
    handles = [m.register_forward_pre_hook(_by_hook(sums, n)) for n in computed for m in owners[n]]
    try:
        with preserved(source.model), torch.no_grad(), _Watch(sums, names):
            for batch in batches:
                sums.valid = batch.kwargs.get("attention_mask")
                source.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [n for n in source.addresses if n not in sums.squares]
    if unseen:
        raise InvalidValue(
            f"the layer of {unseen[0]!r} was never run on the data; exclude it or use data that reaches it."
        )
    return {
        n: a.broadcast_inputs((sums.squares[n] / sums.counts[n]).sqrt().float()) for n, a in source.addresses.items()
    }
