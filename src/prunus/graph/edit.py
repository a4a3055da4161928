"""Carry a cut out on Python modules: slice stored tensors, then make the numbers that modules remember agree."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prunus.errors import MaskMismatch, did_you_mean
from prunus.graph.attention import HeadwiseAttention

Indices = Mapping[str, "np.ndarray[Any, np.dtype[np.int64]]"]


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their first names."""
    parameters, buffers = parameters_and_buffers(model)
    return parameters | buffers


def parameters_and_buffers(
    model: nn.Module, *, every_name: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (parameters, buffers) by name in one walk, each tensor under its first name or under all it has."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=not every_name):
        prefix = f"{path}." if path else ""
        for store, into in zip((module._parameters, module._buffers), found, strict=True):
            for key, tensor in store.items():
                if tensor is not None and (every_name or id(tensor) not in seen):
                    seen.add(id(tensor))
                    into[prefix + key] = tensor
    return found


def unsaved(model: nn.Module) -> set[str]:
    """Return the names of buffers that are not part of the state dict."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def sliced(model: nn.Module, indices: Indices) -> dict[int, Tensor]:
    """Return the kept slices of tensors, by the id of the tensor they replace.

    Raises:
        MaskMismatch: the model has no tensor of such a name.
    """
    tensors = stored_tensors(model)
    per_tensor: dict[str, list[tuple[int, Any]]] = {}
    for key, kept in indices.items():
        name, _, place = key.rpartition(":")
        if name not in tensors:
            raise MaskMismatch(f"the model has no tensor {name!r}.{did_you_mean(name, tensors)}")
        per_tensor.setdefault(name, []).append((int(place), kept))
    made: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, cuts in per_tensor.items():
            old = tensors[name]
            new = old.detach()
            # The axis that loses most goes first, so that the others copy less.
            for axis, kept in sorted(cuts, key=lambda cut: len(cut[1]) / old.shape[cut[0]]):
                new = new.index_select(axis, torch.as_tensor(np.asarray(kept), device=new.device))
            made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    return made


def put(model: nn.Module, made: Mapping[int, Tensor]) -> None:
    """Put tensors in place of those with the given ids, under every name they have, and refresh what holds them."""
    new = {id(t) for t in made.values()}
    touched: list[Any] = []
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                if value is not None and id(value) in made:
                    store[key] = made[id(value)]  # type: ignore[assignment]
                    touched.append(module)
                elif value is not None and id(value) in new:
                    touched.append(module)
    for module in dict.fromkeys(touched):
        refresh(module)


def refresh(module: Any) -> None:
    """Set what torch's own layers remember about their size from the tensors they now hold."""
    if isinstance(module, _ConvTransposeNd):
        module.in_channels = module.weight.shape[0]
        module.out_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, _ConvNd):
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        vectors: list[Any] = [t for t in (module.weight, module.bias, module.running_mean) if t is not None]
        module.num_features = len(vectors[0]) if vectors else module.num_features
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight) if module.weight is not None else module.num_channels
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.MultiheadAttention):
        rows = module.in_proj_weight if module.in_proj_weight is not None else module.k_proj_weight
        width = len(rows) // 3 if module.in_proj_weight is not None else len(rows)
        module.num_heads = width // module.head_dim
        # torch's encoder layers take a fused path of their own, which assumes all heads, unless this is off.
        module._qkv_same_embed_dim = False
        module.__class__ = HeadwiseAttention
    elif isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        module.hidden_size = cast(Tensor, module.weight_hh_l0).shape[0] // gates
        module.input_size = cast(Tensor, module.weight_ih_l0).shape[1]
        if module.proj_size:
            module.proj_size = cast(Tensor, module.weight_hr_l0).shape[0]
        module._flat_weights = [getattr(module, n) if hasattr(module, n) else None for n in module._flat_weights_names]
        module.flatten_parameters()
    elif isinstance(module, nn.RNNCellBase):
        gates = {"LSTMCell": 4, "GRUCell": 3}.get(type(module).__name__, 1)
        module.hidden_size, module.input_size = module.weight_hh.shape[0] // gates, module.weight_ih.shape[1]
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        module.nf = module.weight.shape[1]
        if hasattr(module, "nx"):
            module.nx = module.weight.shape[0]


_MANAGED = (
    _ConvNd, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding, nn.PReLU, nn.MultiheadAttention,
    nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip


def managed(module: nn.Module) -> bool:
    """Return whether `refresh` knows everything the module remembers about its size."""
    return isinstance(module, _MANAGED) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def matching(module: nn.Module, number: int) -> list[str]:
    """Return where a module, or a settings object it holds, remembers `number`: "name", "name.2", "config.name"."""
    found: list[str] = []
    if managed(module):
        return found
    for name, value in vars(module).items():
        if name.startswith("_") or name in ("training", "dump_patches"):
            continue
        found += _spelled(name, value, number)
        if not isinstance(value, nn.Module | Tensor | type) and hasattr(value, "__dict__") and not callable(value):
            for inner, held in vars(value).items():
                if not inner.startswith("_"):
                    found += [f"{name}.{spelling}" for spelling in _spelled(inner, held, number)]
    return found


def _spelled(name: str, value: Any, number: int) -> list[str]:
    if type(value) is int:
        return [name] if value == number else []
    if isinstance(value, list | tuple | torch.Size) and len(value) <= 16:
        return [f"{name}.{i}" for i, v in enumerate(value) if type(v) is int and v == number]
    return []


def set_attribute(module: nn.Module, spelling: str, number: int) -> None:
    """Set a number where `matching` found it; settings objects are copied first, because modules share them."""
    name, *rest = spelling.split(".")
    if not rest:
        setattr(module, name, number)
        return
    held = getattr(module, name)
    if rest[0].isdigit():
        setattr(module, name, _with_item(held, int(rest[0]), number))
        return
    held = copy.copy(held)
    inner = getattr(held, rest[0])
    setattr(held, rest[0], number if len(rest) == 1 else _with_item(inner, int(rest[1]), number))
    setattr(module, name, held)


def _with_item(sequence: Any, position: int, number: int) -> Any:
    changed = list(sequence)
    changed[position] = number
    return changed if isinstance(sequence, list) else tuple(changed)


def replace_by_identity(model: nn.Module, paths: Iterable[str]) -> None:
    """Put the identity of the first argument in place of modules."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        takes = inspect.signature(type(model.get_submodule(path)).forward).parameters
        setattr(holder, name, nn.Identity() if len(takes) == 2 else Passing())


class Passing(nn.Identity):
    """Returns the first of its arguments; in place of blocks that are called with masks or positions besides."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `input`."""
        return input
