"""Sizes fixed in a module's code: change them in the call that spells them out, and leave the code alone.

Some forwards compute a size from an axis that is not cut (`x.reshape(batch, tokens, channels)` after heads are gone).
Nothing the module remembers can be edited then. The module's class is extended by one that runs the same forward and,
while it runs, puts the new number into the calls that spell the old one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_SPELLING = {
    "view",
    "reshape",
    "expand",
    "unflatten",
    "split",
    "split_with_sizes",
    "repeat",
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "broadcast_to",
    "narrow",
    "tile",
}


def sizes_itself(function: Any) -> bool:
    """Return whether a torch function takes sizes as arguments."""
    return getattr(function, "__name__", "") in _SPELLING


class _Sizes(TorchFunctionMode):
    """Counts calls that spell sizes, and changes those that were fixed in code."""

    def __init__(self, changes: Mapping[int, Mapping[int, Mapping[int, int]]]) -> None:
        super().__init__()
        self.changes = changes
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if sizes_itself(function):
            self.count += 1
            change = self.changes.get(self.count)
            if change is not None:
                return _call(function, args, kwargs, change)
        return function(*args, **kwargs)


def _call(function: Any, args: Any, kwargs: Any, change: Mapping[int, Mapping[int, int]]) -> Any:
    name = function.__name__
    if name in ("split", "split_with_sizes"):
        sizes = kwargs.pop("split_size_or_sections", kwargs.pop("split_size", None))
        tensor, *rest = args
        if sizes is None:
            sizes, *rest = rest
        axis = int(rest[0] if rest else kwargs.get("dim", 0)) % tensor.dim()
        whole = tensor.shape[axis]
        parts = list(sizes) if not isinstance(sizes, int) else [sizes] * -(-whole // sizes)
        parts = [change.get(place, {}).get(axis, part) for place, part in enumerate(parts)]
        return torch.split(tensor, parts, axis)
    new = change[0]
    if name == "narrow":
        tensor, axis, start, length = list(args) + list(kwargs.values())
        return torch.narrow(tensor, axis, start, new.get(axis % tensor.dim(), length))
    if name == "unflatten":
        tensor, axis, sizes = list(args) + list(kwargs.values())
        offset = axis % tensor.dim()
        return tensor.unflatten(axis, [new.get(offset + i, s) for i, s in enumerate(sizes)])
    made = name in ("zeros", "ones", "full", "empty")
    leading: Sequence[Any] = () if made else args[:1]
    given: Sequence[Any] = args if made else args[1:]
    trailing: Sequence[Any] = ()
    if "size" in kwargs or "shape" in kwargs:
        key = "size" if "size" in kwargs else "shape"
        kwargs = {**kwargs, key: _changed(kwargs[key], new)}
        return function(*args, **kwargs)
    if given and isinstance(given[0], list | tuple | torch.Size):
        given, trailing = given[0], given[1:]
        return function(*leading, _changed(given, new), *trailing, **kwargs)
    return function(*leading, *_changed(given, new), **kwargs)


def _changed(sizes: Any, new: Mapping[int, int]) -> list[Any]:
    # A size left open (-1) adapts by itself.
    return [new[i] if i in new and s != -1 else s for i, s in enumerate(sizes)]


class SpelledSizes:
    """Mixed into the class of a module whose calls need other sizes than its code spells."""

    _cut_sizes: dict[int, dict[int, dict[int, int]]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with the changed sizes."""
        with _Sizes(self._cut_sizes):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


_CLASSES: dict[type, type] = {}


def spell_sizes(module: nn.Module, changes: Mapping[str, int]) -> None:
    """Let `module` run its forward with changed sizes, given as {"call.place.axis": size}."""
    parsed: dict[int, dict[int, dict[int, int]]] = {}
    for key, size in changes.items():
        call, place, axis = map(int, key.split("."))
        parsed.setdefault(call, {}).setdefault(place, {})[axis] = size
    own = type(module)
    if not issubclass(own, SpelledSizes):
        if own not in _CLASSES:
            _CLASSES[own] = type(own.__name__, (SpelledSizes, own), {"__module__": own.__module__})
        module.__class__ = _CLASSES[own]
    module._cut_sizes = parsed  # type: ignore[assignment]
