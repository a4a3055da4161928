"""Mixtures of experts, recognised by what they store and do, and the plan that takes experts out of them.

One module holds stacked tensors whose first axis is the experts; a weight beside it has as many rows and feeds a choice
of the k largest of that many.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunus.graph.couple import Family, Slot
from prunus.graph.edit import managed, matching, stored_tensors
from prunus.graph.plan import Plan
from prunus.graph.record import arguments, plain_forward

_COUNTS = re.compile(r"(^|\.|_)(num|n)_(\w+_)?experts$")


@dataclass(frozen=True)
class Mixture:
    """One layer of experts.

    Attributes:
        name: path of the module that holds the stacked tensors.
        count: number of experts.
        chosen: how many of them each token visits.
        stacked: names of tensors whose first axis is the experts.
        router: name of the weight that gives the logits, (experts, features).
        beside: other tensors of the router with one number per expert.
    """

    name: str
    count: int
    chosen: int
    stacked: tuple[str, ...]
    router: str
    beside: tuple[str, ...] = ()

    def family(self, shapes: Mapping[str, tuple[int, ...]]) -> Family:
        """Return the experts as units that compete."""
        every = np.arange(self.count, dtype=np.int64)[:, None]
        names = (*self.stacked, self.router, *self.beside)
        roles = {n: "output" if len(shapes[n]) >= 2 else "bias" for n in names}
        slots = tuple(Slot(n, 0, every, roles[n], shapes[n]) for n in names)
        return Family(f"{self.stacked[0]}:0", "expert", self.count, slots, np.arange(self.count))


class _Watch(TorchFunctionMode):
    """Notes products with a stored weight and choices of the largest, with the module that was running."""

    def __init__(self) -> None:
        super().__init__()
        self.path = [""]
        self.events: list[tuple[str, str, tuple[int, ...], int]] = []  # path, what, shape, k

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear or function in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            weight = args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("other"))
            if isinstance(weight, Tensor) and weight.ndim == 2:
                shape = tuple(weight.shape) if function is F.linear else tuple(weight.shape)[::-1]
                self.events.append((self.path[-1], "product", shape, 0))
        elif function in (torch.topk, Tensor.topk):
            k = args[1] if len(args) > 1 else kwargs["k"]
            self.events.append((self.path[-1], "choice", tuple(args[0].shape), int(k)))
        return function(*args, **kwargs)


def _watched(model: nn.Module, example: Any) -> _Watch:
    watch = _Watch()
    args, kwargs = arguments(example)
    with ExitStack() as stack:
        for path, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, path=path: watch.path.append(path))
            leave = module.register_forward_hook(lambda *_: watch.path.pop() and None)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        with plain_forward(model), watch:
            model(*args, **kwargs)
    return watch


def mixtures(model: nn.Module, example: Any) -> tuple[list[Mixture], dict[str, str]]:
    """Return the layers of experts whose experts can be cut, and the others with the reason.

    Args:
        model: run once on the example, in eval mode.
        example: one input.
    """
    events = _watched(model, example).events
    found: list[Mixture] = []
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        sizes_of = {p.shape[0] for p in own.values() if p.ndim}
        if managed(module) or not any(p.ndim >= 3 for p in own.values()) or len(sizes_of) != 1 or sizes_of == {1}:
            continue
        count = sizes_of.pop()
        parent = path.rpartition(".")[0]
        inside = [e for e in events if e[0] == parent or e[0].startswith(f"{parent}.") or not parent]
        at = next((i for i, e in enumerate(inside) if e[1] == "choice" and e[2][-1] == count), None)
        if at is None:
            refused[path] = f"no choice of the largest of {count} was seen beside it, so its experts are not routed"
            continue
        before = [e for e in inside[:at] if e[1] == "product" and e[2][0] == count]
        routers = _holding(model, before[-1][0], before[-1][2]) if before else []
        if len(routers) != 1:
            refused[path] = "the weight that gives the logits of its choice was not found"
            continue
        owner = routers[0].rpartition(".")[0]
        beside = [
            f"{owner}.{n}" if owner else n
            for n, t in (*_own(model.get_submodule(owner), "parameters"), *_own(model.get_submodule(owner), "buffers"))
            if t.ndim == 1 and len(t) == count
        ]
        chosen = max(e[3] for e in inside if e[1] == "choice" and e[2][-1] == count)
        stacked = tuple(f"{path}.{n}" if path else n for n in own)
        found.append(Mixture(path, count, chosen, stacked, routers[0], tuple(beside)))
    return found, refused


def _own(module: nn.Module, kind: str) -> list[tuple[str, Tensor]]:
    return list(getattr(module, f"named_{kind}")(recurse=False))


def _holding(model: nn.Module, path: str, shape: tuple[int, ...]) -> list[str]:
    """Return the parameters of the module at `path` that have this shape."""
    own = _own(model.get_submodule(path), "parameters")
    return [f"{path}.{n}" if path else n for n, p in own if tuple(p.shape) == shape]


def plan_for(model: nn.Module, layers: Sequence[Mixture], kept: Mapping[str, Sequence[int]]) -> Plan:
    """Return the plan that leaves the experts `kept` (family name -> numbers) of each mixture.

    The numbers of experts that modules remember are set: in the layers themselves, and in the modules around them where
    all mixtures are left with one number.
    """
    tensors = stored_tensors(model)
    keep: dict[str, list[int]] = {}
    attributes: dict[str, dict[str, int]] = {}
    routers: list[str] = []
    families: dict[str, list[int]] = {}
    modules = dict(model.named_modules())
    left: set[tuple[int, int]] = set()
    for layer in layers:
        name = f"{layer.stacked[0]}:0"
        stays = [int(i) for i in kept.get(name, range(layer.count))]
        left.add((layer.count, len(stays)))
        if len(stays) == layer.count:
            continue
        families[name] = stays
        routers += [layer.router, *layer.beside]
        for tensor in (*layer.stacked, layer.router, *layer.beside):
            keep[f"{tensor}:0"] = stays
        parent = layer.name.rpartition(".")[0]
        for path in dict.fromkeys((parent, layer.name, layer.router.rpartition(".")[0])):
            _remember(attributes, path, modules[path], layer.count, len(stays))
    if len(left) == 1 and families:
        ((count, number),) = left
        for layer in layers:
            path = layer.name.rpartition(".")[0]
            while path:
                path = path.rpartition(".")[0]
                _remember(attributes, path, modules[path], count, number)
    shapes = {n: list(tensors[n].shape) for n in {key.rpartition(":")[0] for key in keep}}
    return Plan(keep, shapes, attributes, families=families, routers=routers)


def _remember(attributes: dict[str, dict[str, int]], path: str, module: nn.Module, count: int, number: int) -> None:
    # Other sizes may happen to equal the number of experts, so only what is called so is taken for it.
    for spelling in matching(module, count):
        if _COUNTS.search(spelling) and "shared" not in spelling:
            attributes.setdefault(path, {})[spelling] = number
