"""`prunus.compress`: run a pruned model in the engine where that is faster, and say so layer by layer."""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from prunus.errors import InvalidValue, Unsupported
from prunus.graph.record import arguments
from prunus.measure.forwarding import tensors_of
from prunus.parameters import unwrap
from prunus.runtime.library import why_not
from prunus.runtime.network import density
from prunus.runtime.region import EngineRegion
from prunus.runtime.trace import Region, exported, regions
from prunus.runtime.tune import Tuner

ROUNDS = 5


@dataclass(frozen=True)
class LayerReport:
    """One layer of a compressed model.

    Attributes:
        name: path of the module it comes from.
        operator: what it computes.
        density: share of weights that are not zero.
        kernel: how it is carried out.
        milliseconds: of one call, the fastest seen.
        share: of the whole call.
    """

    name: str
    operator: str
    density: float
    kernel: str
    milliseconds: float
    share: float


@dataclass(frozen=True)
class CompressionReport:
    """What became of a model.

    Attributes:
        layers: what the engine computes.
        in_torch: what stays in torch -> why.
        milliseconds: median of a call of the compressed model, on the example.
        dense_milliseconds: of the model as it was.
        difference: largest difference of outputs, relative to the largest output.
        threads: threads both used.
        sentence: what was gained, or why nothing was.
    """

    layers: tuple[LayerReport, ...]
    in_torch: dict[str, str]
    milliseconds: float
    dense_milliseconds: float
    difference: float
    threads: int
    sentence: str

    @property
    def speedup(self) -> float:
        """Time of the model as it was over that of the compressed one."""
        return self.dense_milliseconds / self.milliseconds

    def __str__(self) -> str:
        lines = [self.sentence]
        for layer in self.layers:
            lines.append(
                f"  {layer.name or layer.operator:40s} {layer.operator:13s} density {layer.density:6.1%}  "
                f"{layer.milliseconds:8.3f} ms {layer.share:6.1%}  {layer.kernel}"
            )
        lines += [f"  {name}: {reason}" for name, reason in self.in_torch.items()]
        return "\n".join(lines)


@dataclass
class _Timed:
    """Medians of interleaved calls, in milliseconds."""

    calls: dict[str, Callable[[], Any]]
    rounds: int = ROUNDS
    times: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        if not self.times:
            for call in self.calls.values():
                call()
            for _ in range(self.rounds):
                for key, call in self.calls.items():
                    start = time.perf_counter()
                    call()
                    self.times.setdefault(key, []).append(1e3 * (time.perf_counter() - start))
        return float(np.median(self.times[name]))


class Compressed(nn.Module):
    """A model for inference, parts of which run in the engine.

    Attributes:
        report: what became of each layer.
        inner: the graph of regions and of what stays in torch.
        sizes: shapes without batch that the inputs need to have; None if any that the weights can read will do.
    """

    def __init__(self, inner: nn.Module, sizes: list[tuple[int, ...]] | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.sizes = sizes
        self.report: CompressionReport | None = None
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; it has no gradients.

        Raises:
            InvalidValue, Unsupported: inputs of another type, device or shape than the engine can read.
        """
        given = list(tensors_of((args, kwargs)))
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            raise Unsupported("a compressed model has no gradients; call it under torch.no_grad().")
        if self.sizes is not None and [tuple(x.shape[1:]) for x in given] != self.sizes:
            raise InvalidValue(
                f"parts of the model run in torch as they were read, for inputs of {self.sizes} (without batch), not "
                f"{[tuple(x.shape[1:]) for x in given]}; compress it again with an example of that size."
            )
        with torch.no_grad():
            return self.inner(*args, **kwargs)

    def train(self, mode: bool = True) -> Compressed:
        """Refuse training; eval is what it is in already."""
        if mode:
            raise Unsupported("a compressed model is for inference; train the model it was made from.")
        return self


def compress(
    model: nn.Module,
    example: Any,
    *,
    engine: str = "auto",
    instruction_set: str | None = None,
    timing: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> Compressed:
    """Return a module for inference that runs pruned layers, and what lies between them, in the sparse engine.

    Batch norms are folded, activations and residual sums fused, kernels chosen by timing on this machine, with as many
    threads as torch has now. A region that torch computes faster stays in torch. Weights that are zero are dropped:
    call it after pruning. The model itself is untouched.

    Args:
        model: pruned by masks, or smaller, or dense; float32 on the CPU. Its eval mode is what runs.
        example: one input, as for `prunus.prune`; the batch size it has is the one that kernels are chosen for, others
            work too.
        engine: "auto", or "always" to keep regions in the engine even where torch is faster.
        instruction_set: one of those of `prunus doctor`; None for the best.
        timing: choose kernels, and between engine and torch, by timing; otherwise by rules of thumb.
        on_stage: called with a sentence when a part of the work begins.

    Returns:
        `Compressed`: a module with `.report`.

    Raises:
        InvalidValue: the model cannot run the example, or is not on the CPU or not float32.
        Unsupported: there is no native engine here, or torch.export cannot read the model.
    """
    if engine not in ("auto", "always"):
        raise InvalidValue(f'engine is "auto" or "always", not {engine!r}.')
    bare = unwrap(model)
    for name, tensor in (*bare.named_parameters(), *bare.named_buffers()):
        if tensor.device.type != "cpu":
            raise Unsupported(f"the engine computes on the CPU, {name!r} is on {tensor.device}; move the model.")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InvalidValue(f"the engine computes in float32, {name!r} is {tensor.dtype}; call model.float().")
    if why_not():
        raise Unsupported(f"the native engine is not there: {why_not()}.")
    tell = on_stage or (lambda text: None)
    args, kwargs = arguments(example)
    dense = copy.deepcopy(bare).eval()
    tell("reading the model")
    graph, found, reasons = regions(exported(dense, example))
    tuner = Tuner(torch.get_num_threads(), instruction_set=instruction_set, timing=timing, on_stage=on_stage)
    made = {region.name: EngineRegion(region.network, rows=region.rows, tuner=tuner) for region in found}
    with torch.inference_mode():
        inputs = _inputs_of(graph, {r.name: r for r in found}, args, kwargs)
        for region in found:
            if region.name not in inputs:
                continue
            tell(f"preparing {len(region.network.layers)} layers")
            mine, given = made[region.name], inputs[region.name]
            read = [given[i] for i in region.places]
            mine.compute(read)
            if engine == "auto" and timing:
                timed = _Timed({"engine": partial(mine, *read), "torch": partial(region.graph, *given)})
                ours, theirs = timed.median("engine"), timed.median("torch")
                if ours > theirs:
                    reasons[_named(region)] = f"faster in torch ({theirs:.3f} ms, {ours:.3f} ms in the engine)"
                    del made[region.name]
        for region in found:
            if region.name in made:
                _replace(graph, region, made[region.name])
        graph.graph.eliminate_dead_code()
        graph.delete_all_unused_submodules()
        graph.recompile()
        whole = all(node.op != "call_function" or node.target is operator.getitem for node in graph.graph.nodes)
        sizes = None if whole and made else [tuple(x.shape[1:]) for x in tensors_of((args, kwargs))]
        result = Compressed(graph, sizes)
        tell("comparing with the model as it was")
        result.report = _report(result, dense, args, kwargs, made, inputs, found, reasons)
    return result


def _named(region: Region) -> str:
    labels = [layer.label for layer in region.network.layers if layer.weight is not None]
    return f"{labels[0]} to {labels[-1]}" if len(labels) > 1 else labels[0] if labels else region.name


def _inputs_of(
    graph: fx.GraphModule, found: dict[str, Region], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """Return what each region is called with on the example."""
    seen: dict[str, tuple[Any, ...]] = {}
    handles = []
    for name in found:
        hook = getattr(graph, name).register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, given) and None
        )
        handles.append(hook)
    try:
        graph(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _replace(graph: fx.GraphModule, region: Region, mine: EngineRegion) -> None:
    """Call the engine where the graph calls the region, without the weights, which the engine holds."""
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target == region.name:
            node.args = tuple(node.args[i] for i in region.places)
    setattr(graph, region.name, mine)


def _report(
    result: Compressed,
    dense: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    made: dict[str, EngineRegion],
    inputs: dict[str, tuple[Any, ...]],
    found: list[Region],
    reasons: dict[str, str],
) -> CompressionReport:
    wanted, got = (list(tensors_of(m(*args, **kwargs))) for m in (dense, result))
    difference = 0.0
    for a, b in zip(wanted, got, strict=True):
        if a.numel() and a.is_floating_point():
            difference = max(difference, float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    timed = _Timed({"dense": lambda: dense(*args, **kwargs), "compressed": lambda: result(*args, **kwargs)})
    before, after = timed.median("dense"), timed.median("compressed")
    threads = torch.get_num_threads()
    layers: list[LayerReport] = []
    for region in found:
        if region.name not in made:
            continue
        read = [inputs[region.name][i] for i in region.places]
        program, seconds = made[region.name].timed(read)
        spent: dict[str, float] = {}
        for label, second in zip(program.steps, seconds, strict=True):
            spent[label] = spent.get(label, 0.0) + float(second)
        whole = max(sum(spent.values()), 1e-12)
        for layer in region.network.layers:
            name = layer.label or layer.name
            if name in spent:
                kernel = program.choices.get(name, "")
                second = spent.pop(name)
                layers.append(LayerReport(name, layer.op, density(layer), kernel, 1e3 * second, second / whole))
    gain = before / after
    if not layers:
        sentence = (
            "Nothing runs in the engine: " + ("; ".join(list(reasons.values())[:2]) or "no layer that it knows") + "."
        )
    elif gain >= 1.02:
        sentence = (
            f"{gain:.2f} times as fast as dense torch ({after:.2f} ms against {before:.2f} ms, {threads} threads)."
        )
    else:
        sentence = (
            f"No faster than dense torch ({after:.2f} ms against {before:.2f} ms, {threads} threads): "
            "too few weights are zero, or too little of the model runs in the engine."
        )
    return CompressionReport(tuple(layers), reasons, after, before, difference, threads, sentence)


__all__ = ["Compressed", "CompressionReport", "LayerReport", "compress"]
