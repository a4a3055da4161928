"""Running a model with every module watched: what each is given, makes and takes; for `prunus.profile`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunus.measure.cost import layer_costs, own_macs
from prunus.measure.forwarding import call, device_of, evaluating, tensors_of
from prunus.runtime.library import Memory
from prunus.runtime.region import EngineRegion

REST = "(between layers)"


@dataclass
class Seen:
    """What was observed of one layer."""

    name: str
    operator: str
    parameters: int = 0
    nonzeros: int = 0
    macs: int = 0
    effective: int = 0
    executed: int = 0
    weight_bytes: int = 0
    moved: int | None = 0
    shape: tuple[int, ...] | None = None
    seconds: float = 0.0
    kernel: str = ""


def nonzero(model: nn.Module) -> dict[str, Tensor]:
    """Return where weights are not zero, for the parameters with two axes and more that have zeros."""
    found = {n: p.detach() != 0 for n, p in model.named_parameters() if p.ndim > 1}
    buffers = dict(model.named_buffers())
    for name in found:
        # Under torch.nn.utils.prune the dense weight is the parameter, and the mask a buffer.
        mask = buffers.get(name.removesuffix("_orig") + "_mask") if name.endswith("_orig") else None
        if mask is not None:
            found[name] = found[name] & (mask != 0)
    return {n: m for n, m in found.items() if not bool(m.all())}


class Watch:
    """A model whose modules are timed, as a function of its inputs."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.modules = dict(model.named_modules())
        self.wait = device_of(model).type != "cpu"
        self.taken: list[dict[str, float]] = []
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        self.moved: dict[str, int] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        self.example = inputs
        self.total = 0  # multiply-accumulates of one example
        self._look = True
        with evaluating(model), torch.no_grad():
            self(inputs) if not isinstance(inputs, tuple | Mapping) else call(self, inputs)
        self._look = False
        self.taken.clear()
        self.called = set(self.moved)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and note what each module took, without its submodules."""
        stack: list[list[float]] = []
        own: dict[str, float] = {}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            stack.append([self._now(), 0.0])

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            start, inner = stack.pop()
            spent = self._now() - start
            path = self.paths[id(module)]
            own[path] = own.get(path, 0.0) + max(0.0, spent - inner)
            if stack:
                stack[-1][1] += spent
            if self._look:
                self._note(path, args, kwargs, output)

        with ExitStack() as hooks:
            for module in self.modules.values():
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            result = self.model(*args, **kwargs)
        self.taken.append(own)
        return result

    def _now(self) -> float:
        if self.wait:
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _note(self, path: str, args: Any, kwargs: Any, output: Any) -> None:
        made = list(tensors_of(output))
        self.shapes[path] = tuple(made[0].shape) if len(made) == 1 and path not in self.shapes else None
        given = list(tensors_of((args, kwargs)))
        self.moved[path] = self.moved.get(path, 0) + sum(t.numel() * t.element_size() for t in (*given, *made))
        if isinstance(self.modules[path], EngineRegion):
            self.inputs[path] = given

    def regions(self) -> dict[str, EngineRegion]:
        """Return the parts of the engine that were called, by path."""
        return {p: m for p, m in self.modules.items() if isinstance(m, EngineRegion) and p in self.called}

    def _row(self, path: str, *, owns: bool) -> str:
        """Return the path of the row that a module counts towards."""
        while path:
            module = self.modules.get(path)
            if module is not None and path in self.called and (owns or next(module.children(), None) is None):
                return path
            path = path.rpartition(".")[0]
        only = next(self.model.children(), None) is None
        return "" if only or owns else REST

    def rows(self, kept: Mapping[str, Tensor], *, count_macs: bool) -> dict[str, Seen]:
        """Return what is known of each layer before it is timed."""
        owners: dict[str, str] = {}
        for name, _ in self.model.named_parameters():
            owners[name] = self._row(name.rpartition(".")[0], owns=True)
        owning = set(owners.values()) | {self._row(p, owns=False) for p in self.called}
        found = {
            path: Seen(path or type(module).__name__, type(module).__name__, shape=self.shapes.get(path))
            for path, module in self.modules.items()
            if path in owning
        }
        found[REST] = Seen(REST, "", moved=None)
        for path, seen in found.items():
            if path != REST:
                seen.moved = self.moved.get(path, 0)
        for name, parameter in self.model.named_parameters():
            seen = found[owners[name]]
            stays = int(kept[name].sum()) if name in kept else parameter.numel()
            seen.parameters += parameter.numel()
            seen.nonzeros += stays
            if seen.moved is not None:
                seen.moved += parameter.numel() * parameter.element_size()
        if count_macs:
            for name, cost in layer_costs(self.model, self.example).items():
                other = name if name in kept else f"{name}_orig"
                share = int(kept[other].sum()) if other in kept else cost.parameters
                row = owners.get(name) or owners.get(f"{name}_orig") or self._row(name.rpartition(".")[0], owns=True)
                found.setdefault(row, Seen(row, "", moved=None))
                found[row].macs += cost.macs
                found[row].effective += cost.positions * share
            self._products(found)
        order = {path: number for number, path in enumerate([*self.modules, REST])}
        return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))

    def _products(self, found: dict[str, Seen]) -> None:
        """Add what modules multiply beyond their weights, such as activations with each other."""
        self.total = 0
        for path, macs in own_macs(self.model, self.example).items():
            self.total += macs
            more = macs - (found[path].macs if path in found else 0)
            if more > 0 and path:
                module = type(self.modules[path]).__name__
                seen = found.setdefault(path, Seen(path, module, moved=None, shape=self.shapes.get(path)))
                seen.macs += more
                seen.effective += more

    def share(self, found: dict[str, Seen], engine: Mapping[str, EngineRegion]) -> None:
        """Give each row the median over rounds of the seconds that its modules took."""
        inside: dict[str, list[Seen]] = {}
        for key, seen in found.items():
            for path in engine:
                if key.startswith(f"{path}\0"):
                    inside.setdefault(path, []).append(seen)
        for path in self.called:
            spent = statistics.median(own.get(path, 0.0) for own in self.taken)
            if path in inside:
                steps = sum(s.seconds for s in inside[path]) or 1.0
                for seen in inside[path]:
                    seen.seconds *= spent / steps
                continue
            key = path if path in found else REST
            found[key].seconds += spent


def with_engine(
    found: dict[str, Seen], path: str, region: EngineRegion, inputs: list[Tensor], size: int
) -> tuple[dict[str, Seen], int]:
    """Replace the row of an engine region by one row for each of its layers, timed step by step.

    Returns:
        The rows, and the bytes of memory that the engine holds to run the region at this size.
    """
    program, seconds = region.timed(inputs)
    memory = sum(m.size for m in {id(m): m for m in program.keep if isinstance(m, Memory)}.values())
    spent: dict[str, float] = {}
    for label, second in zip(program.steps, seconds, strict=True):
        spent[label] = spent.get(label, 0.0) + float(second)
    rows = list(inputs[0].shape[:-1]) if region.rows else [inputs[0].shape[0]]
    each = int(np.prod(rows)) // size  # rows or images per example
    given = [(int(x.shape[-1]),) if region.rows else tuple(int(s) for s in x.shape[1:]) for x in inputs]
    shapes = region.network.shapes(given)
    made: dict[str, Seen] = {}
    for layer in region.network.layers:
        name = layer.label or layer.name
        # A module may be called several times, and so be several layers under one label.
        key = f"{path}\0{name}"
        while key in made:
            key += "'"
        shape = shapes[layer.name]
        values = int(np.prod(shape))
        read = sum(int(np.prod(shapes[n])) for n in layer.reads)
        seen = Seen(name, layer.op, shape=(*rows, *shape), kernel=program.choices.get(name, "engine"))
        seen.moved = 4 * each * size * (values + read)
        seen.seconds = spent.pop(name, 0.0)
        if layer.weight is not None:
            kept = int(np.count_nonzero(layer.weight))
            bias = 0 if layer.bias is None else int(layer.bias.size)
            outputs = int(layer.weight.shape[0])
            positions = each * values // outputs
            seen.parameters, seen.nonzeros = int(layer.weight.size) + bias, kept + bias
            seen.macs, seen.effective = positions * int(layer.weight.size), positions * kept
            seen.executed = seen.effective
            seen.moved += 4 * (kept + bias)
        if layer.op != "input" or seen.seconds:
            made[key] = seen
    if left := sum(spent.values()):
        made[f"{path}\0output"] = Seen("output", "output", seconds=left, moved=None, kernel="engine")
    result: dict[str, Seen] = {}
    for key, seen in found.items():
        result |= made if key == path else {key: seen}
    return result, memory


def beside_engine(model: nn.Module, inputs: Any, size: int) -> int:
    """Return the multiply-accumulates of one example that a model spends in torch; its counter sees no other."""
    with FlopCounterMode(display=False) as counter, evaluating(model), torch.no_grad():
        call(model, inputs)
    return counter.get_total_flops() // 2 // size
