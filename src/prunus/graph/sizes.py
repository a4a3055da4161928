"""Sizes fixed in a module's code: change them in the call that spells them out, and leave the code alone.

Some forwards compute a size from an axis that is not cut (`x.reshape(batch, tokens, channels)` after heads are gone).
Nothing the module remembers can be edited then. The module's class is extended by one that runs the same forward and,
while it runs, puts the new number into the calls that spell the old one.

The same way keeps means and norms over a cut axis exact: what was removed was zero, so it still counts in the
statistics, and the mean of C positions of which some are gone is their sum over C.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
    "__getitem__",
    "mean",
    "layer_norm",
    "rms_norm",
    "batch_norm",
}


def spells(function: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a call takes sizes as arguments, or statistics over axes.

    Reading by index counts only with slices spelled as numbers, and batch norm only without stored statistics: what a
    module computes once and remembers is often read by index, so such calls differ from one forward to the next.
    """
    name = getattr(function, "__name__", "")
    if name not in _SPELLING:
        return False
    if name == "__getitem__":
        return any(True for _ in ranges_of(*args))
    return name != "batch_norm" or bool(averaged_axes(function, args, kwargs))


def averaged_axes(function: Any, args: Any, kwargs: Any) -> tuple[int, ...]:
    """Return the axes over which a mean or the statistics of a norm are taken, as non-negative numbers."""
    name = getattr(function, "__name__", "")
    if not args or not isinstance(args[0], torch.Tensor):
        return ()
    rank = args[0].dim()
    if name == "mean":
        given = kwargs.get("dim", args[1] if len(args) > 1 else None)
        listed = range(rank) if given is None else given if isinstance(given, list | tuple) else [given]
        return tuple(int(d) % rank for d in listed) if rank else ()
    if name in ("layer_norm", "rms_norm"):
        shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
        return tuple(range(rank - len(shape), rank))
    if name == "batch_norm" and kwargs.get("running_mean", args[1] if len(args) > 1 else None) is None:
        return tuple(axis for axis in range(rank) if axis != 1)
    return ()


def left_open(function: Any, args: Any, kwargs: Any) -> frozenset[int]:
    """Return the axes of the result whose size a view or reshape call leaves open (-1)."""
    if getattr(function, "__name__", "") not in ("view", "reshape"):
        return frozenset()
    sizes = kwargs.get("size", kwargs.get("shape", args[1:]))
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple | torch.Size):
        sizes = sizes[0]
    return frozenset(i for i, s in enumerate(sizes) if isinstance(s, int) and s == -1)


def ranges_of(tensor: Any, index: Any) -> Iterator[tuple[int, int, int]]:
    """Yield (axis, start, stop) of each slice of `tensor[index]` whose ends are spelled as numbers, resolved."""
    for axis, part in _axes_of(tensor, index):
        spelled = isinstance(part, slice) and (isinstance(part.start, int) or isinstance(part.stop, int))
        if spelled and part.step in (None, 1):
            start, stop, _ = part.indices(tensor.shape[axis])
            yield axis, start, max(stop, start)


def _axes_of(tensor: Any, index: Any) -> Iterator[tuple[int, Any]]:
    """Yield (axis, part) for the parts of an index that stand for axes, until one that is a tensor or a list."""
    parts = index if isinstance(index, tuple) else (index,)
    count = sum(1 for p in parts if p is not None and p is not Ellipsis)
    axis = 0
    for part in parts:
        if part is None:
            continue
        if part is Ellipsis:
            axis += tensor.dim() - count
            continue
        if not isinstance(part, int | slice):
            return
        yield axis, part
        axis += 1


class _Sizes(TorchFunctionMode):
    """Counts calls that spell sizes, each function by itself, and changes those that were fixed in code."""

    def __init__(self, changes: Mapping[str, Mapping[Any, Mapping[int, int]]]) -> None:
        super().__init__()
        self.changes = changes
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if spells(function, args, kwargs):
            name = str(function.__name__)  # without str, compilers do not know the name of a method as a constant
            self.counts[name] += 1
            change = self.changes.get(f"{name}.{self.counts[name]}")
            # Without numbers there is nothing to count, and the call as it stands has the right shape.
            if change is not None and not ("count" in change and args[0].is_meta):
                return _call(function, args, kwargs, change)
        return function(*args, **kwargs)


def _call(function: Any, args: Any, kwargs: Any, change: Mapping[Any, Mapping[int, int]]) -> Any:
    name = function.__name__
    if "count" in change:
        return _counted(name, args, kwargs, change["count"])
    if name == "__getitem__":
        tensor, index = args
        return tensor[_index(tensor, index, change)]
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


_NORM_ARGUMENTS = {
    "layer_norm": ("normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("normalized_shape", "weight", "eps"),
    "batch_norm": ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
}


def _counted(name: str, args: Any, kwargs: Any, counts: Mapping[int, int]) -> Any:
    """Return a mean, or a norm, that counts the removed positions of an axis as the zeros they were."""
    x = args[0]
    if name == "mean":
        scale = 1.0
        for axis, whole in counts.items():
            scale *= x.shape[axis] / whole
        return torch.mean(*args, **kwargs) * scale
    given = dict(zip(_NORM_ARGUMENTS[name], args[1:], strict=False)) | kwargs
    if name == "batch_norm":
        axes = tuple(axis for axis in range(x.dim()) if axis != 1)
    else:
        axes = tuple(range(x.dim() - len(given["normalized_shape"]), x.dim()))
    present, whole = 1, 1
    for axis in axes:
        present *= x.shape[axis]
        whole *= counts.get(axis, x.shape[axis])
    weight, bias = given.get("weight"), given.get("bias")
    if name == "batch_norm":  # one number per channel, which is axis 1
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        weight, bias = (None if t is None else t.view(shape) for t in (weight, bias))
    if name != "rms_norm":
        mean = x.sum(axes, keepdim=True) / whole
        centred = x - mean
        variance = (centred.square().sum(axes, keepdim=True) + (whole - present) * mean.square()) / whole
        result = centred * torch.rsqrt(variance + given.get("eps", 1e-5))
    else:
        eps = given.get("eps")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        result = x * torch.rsqrt(x.square().sum(axes, keepdim=True) / whole + eps)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def _index(tensor: Any, index: Any, change: Mapping[Any, Mapping[int, int]]) -> Any:
    parts = list(index) if isinstance(index, tuple) else [index]
    starts, stops = change.get("start", {}), change.get("stop", {})
    for axis, part in _axes_of(tensor, index):
        if axis in starts and isinstance(part, slice):
            ends = (
                starts[axis] if isinstance(part.start, int) else None,
                stops[axis] if isinstance(part.stop, int) else None,
            )
            parts[next(i for i, p in enumerate(parts) if p is part)] = slice(*ends)
    return tuple(parts)


def _changed(sizes: Any, new: Mapping[int, int]) -> list[Any]:
    # A size left open (-1) adapts by itself.
    return [new[i] if i in new and s != -1 else s for i, s in enumerate(sizes)]


class SpelledSizes:
    """Mixed into the class of a module whose calls need other sizes than its code spells."""

    _cut_sizes: dict[str, dict[int | str, dict[int, int]]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with the changed sizes."""
        with _Sizes(self._cut_sizes):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        # The class is made at run time; copies are made from the user's own class.
        return _respelled, (type(self).__mro__[2],), self.__dict__


_CLASSES: dict[type, type] = {}


def _class_of(own: type) -> type:
    if own not in _CLASSES:
        _CLASSES[own] = type(own.__name__, (SpelledSizes, own), {"__module__": own.__module__})
    return _CLASSES[own]


def _respelled(own: type) -> Any:
    made: Any = _class_of(own)
    return made.__new__(made)


def whole_sizes(module: nn.Module, call: str) -> Mapping[int, int]:
    """Return how many positions of each axis a mean or norm of the module counts, where an earlier cut has set that."""
    return getattr(module, "_cut_sizes", {}).get(call, {}).get("count", {})


def spell_sizes(module: nn.Module, changes: Mapping[str, int]) -> None:
    """Let `module` run its forward with changed sizes: {"call.place.axis": size, "call.start.axis": begin of a slice,
    "call.stop.axis": its end, "call.count.axis": positions that a mean or norm counts, removed ones included}.

    A call is called after its function and how many calls of that function precede it, itself included: "view.2".
    """
    parsed: dict[str, dict[int | str, dict[int, int]]] = {}
    for key, size in changes.items():
        call, place, axis = key.rsplit(".", 2)
        what = place if place in ("start", "stop", "count") else int(place)
        parsed.setdefault(call, {}).setdefault(what, {})[int(axis)] = size
    own = type(module)
    for call, change in getattr(module, "_cut_sizes", {}).items():
        for place, sizes in change.items():
            parsed.setdefault(call, {})[place] = sizes | parsed.get(call, {}).get(place, {})
    if not issubclass(own, SpelledSizes):
        module.__class__ = _class_of(own)
    module._cut_sizes = parsed  # type: ignore[assignment]
