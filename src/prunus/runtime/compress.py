"""`prunus.compress`: run a pruned model in the engine where that is faster, and say so layer by layer."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from prunus.errors import InvalidValue, Unsupported
from prunus.graph.record import arguments
from prunus.measure.forwarding import tensors_of
from prunus.measure.latency import latency
from prunus.parameters import unwrap
from prunus.runtime.fallback import sparse_linears
from prunus.runtime.library import why_not
from prunus.runtime.network import Network, density
from prunus.runtime.package import save
from prunus.runtime.region import EngineRegion
from prunus.runtime.trace import Region, exported, regions
from prunus.runtime.tune import Tuner

ROUNDS = 5
TOLERANCE = 1e-3  # relative; float32 sums in another order stay below 1e-5


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


class Compressed(nn.Module):
    """A model for inference, parts of which run in the engine.

    Attributes:
        report: what became of each layer.
        inner: the graph of regions and of what stays in torch.
        sizes: shapes without batch that the inputs need to have; None if any that the weights can read will do.
        shapes: those of the example.
    """

    def __init__(
        self,
        inner: nn.Module,
        sizes: list[tuple[int, ...]] | None = None,
        shapes: list[tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.sizes, self.shapes = sizes, shapes
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

    def save(self, path: Path | str) -> int:
        """Write the model to a file that `prunus.runtime.package.load` runs without torch; returns its bytes.

        Raises:
            Unsupported: a part of the model runs in torch, or reads or returns what the engine does not make.
            StorageFailed: the file cannot be written; an older one there is unchanged.
        """
        region, network = whole_network(self)
        tuner = region.pool.tuner
        shapes = [region.pool.inner((1, *shape)) for shape in self.shapes or ()]
        return save(
            path,
            network,
            shapes,
            rows=region.rows,
            found=tuner.found,
            threads=torch.get_num_threads(),
            instruction_set=tuner.instruction_set,
        )


def whole_network(model: Compressed) -> tuple[EngineRegion, Network]:
    """Return the region of a model that runs in the engine whole, and its network with inputs in the model's order.

    Raises:
        Unsupported: there is more than that.
    """
    nodes = list(model.inner.graph.nodes) if isinstance(model.inner, fx.GraphModule) else []
    calls = [node for node in nodes if node.op in ("call_module", "call_method", "call_function")]
    calls = [node for node in calls if node.target is not operator.getitem]
    region = model.inner.get_submodule(str(calls[0].target)) if calls and calls[0].op == "call_module" else None
    given = [node for node in nodes if node.op == "placeholder"]
    if len(calls) != 1 or not isinstance(region, EngineRegion) or set(calls[0].args) != set(given):
        reasons = dict(model.report.in_torch) if model.report else {}
        named = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:4])
        raise Unsupported(
            f"only a model that runs in the engine whole can be a package; {named or 'this one has other parts'}. "
            'Compress it with engine="always" if torch was merely faster, or export it as ONNX.'
        )
    returned = next(node for node in nodes if node.op == "output").args[0]
    made = region.network.outputs
    outputs = []
    for node in returned if isinstance(returned, list | tuple) else (returned,):
        picked = isinstance(node, fx.Node) and node.target is operator.getitem and node.args[0] is calls[0]
        if not picked and node is not calls[0]:
            raise Unsupported("only what the engine computes can be returned from a package; the model returns more.")
        outputs.append(made[node.args[1]] if picked else made[0])
    layers = {layer.name: layer for layer in region.network.layers}
    order = [region.network.inputs[calls[0].args.index(node)] for node in given]
    rest = [layer for layer in region.network.layers if layer.op != "input"]
    return region, Network((*(layers[name] for name in order), *rest), tuple(outputs))


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
    call it after pruning. The model itself is untouched. Where there is no native engine, linear layers are stored in
    torch's sparse format if that is faster, and the report says so.

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
        Unsupported: torch.export cannot read the model, or `engine` is "always" and there is none here.
    """
    if engine not in ("auto", "always"):
        raise InvalidValue(f'engine is "auto" or "always", not {engine!r}.')
    bare = unwrap(model)
    for name, tensor in (*bare.named_parameters(), *bare.named_buffers()):
        if tensor.device.type != "cpu":
            raise Unsupported(f"the engine computes on the CPU, {name!r} is on {tensor.device}; move the model.")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InvalidValue(f"the engine computes in float32, {name!r} is {tensor.dtype}; call model.float().")
    if why_not() and engine == "always":
        raise Unsupported(f"the native engine is not there: {why_not()}.")
    tell = on_stage or (lambda text: None)
    args, kwargs = arguments(example)
    dense = copy.deepcopy(bare).eval()
    if why_not():
        return _without_engine(dense, args, kwargs, why_not())
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
                ours, theirs = _medians(partial(mine, *read), partial(region.graph, *given))
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
        result = Compressed(graph, sizes, [tuple(x.shape[1:]) for x in tensors_of((args, kwargs))])
        tell("comparing with the model as it was")
        result.report = _report(result, dense, args, kwargs, made, inputs, found, reasons)
    return result


def _without_engine(dense: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> Compressed:
    """Do what can be done in torch alone."""
    sparse = copy.deepcopy(dense)
    with torch.inference_mode():
        try:
            replaced = sparse_linears(sparse, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InvalidValue(f"the model cannot run the example ({type(error).__name__}: {error}).") from error
        result = Compressed(sparse)
        after, before = _medians(partial(result, *args, **kwargs), partial(dense, *args, **kwargs))
        difference = _difference(dense, result, args, kwargs)
    layers = []
    for path, (_, milliseconds) in replaced.items():
        kept = float((dense.get_submodule(path).weight != 0).float().mean())  # type: ignore[union-attr, operator, arg-type]
        layers.append(LayerReport(path, "linear", kept, "torch CSR", milliseconds, milliseconds / after))
    threads = torch.get_num_threads()
    gain = f"{before / after:.2f} times as fast as dense torch ({after:.2f} against {before:.2f} ms, {threads} threads)"
    sentence = f"Without the native engine ({why}): {gain}; {len(layers)} layers in torch's sparse format."
    rest = {"everything else": "there is no native engine"}
    result.report = CompressionReport(tuple(layers), rest, after, before, difference, threads, sentence)
    return result


def _difference(dense: nn.Module, result: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the largest difference of the outputs, relative to the largest number of each.

    Raises:
        Unsupported: the outputs are not the same; such a model is never returned.
    """
    difference = 0.0
    for a, b in zip(*(list(tensors_of(m(*args, **kwargs))) for m in (dense, result)), strict=True):
        if not a.numel() or not a.is_floating_point():
            continue
        sound = torch.isfinite(a)
        if bool(sound.any()):
            scale = a[sound].abs().max().clamp(min=1e-30)
            difference = max(difference, float((a - b)[sound].abs().nan_to_num(torch.inf).max() / scale))
    if difference > TOLERANCE:
        raise Unsupported(
            f"the compressed model's outputs differ from the model's by {difference:.1e}; it draws at random, or the "
            "engine misreads it. Run the model as it is."
        )
    return difference


def _medians(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float]:
    """Return the milliseconds of a call of each, medians of interleaved rounds."""
    times = latency({"one": one, "other": other}, (), repeats=ROUNDS, warmup=1)
    return 1e3 * times["one"].median, 1e3 * times["other"].median


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
    difference = _difference(dense, result, args, kwargs)
    after, before = _medians(partial(result, *args, **kwargs), partial(dense, *args, **kwargs))
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
