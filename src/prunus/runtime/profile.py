"""`prunus.profile`: what a model costs, layer by layer, and how near each layer comes to what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.measure.cost import count, dense_bytes, packed_bytes
from prunus.measure.forwarding import batch_size, call, device_of, evaluating, first_example, to_device
from prunus.measure.latency import latency, using_threads
from prunus.measure.memory import peak_bytes
from prunus.measure.roofline import Peaks, measured_peaks
from prunus.parameters import unwrap
from prunus.runtime.watch import REST, Seen, Watch, beside_engine, nonzero, with_engine

_SECONDS = 2.0  # of timing, roughly
_ROWS = 40  # layers that are spelled out; the rest is summed


@dataclass(frozen=True)
class LayerProfile:
    """One layer.

    Attributes:
        name: path of the module; `REST` for operators between the modules that are listed.
        operator: class of the module, or the engine's operator.
        shape: of the output, with batch; None where there is no single one.
        parameters, nonzeros: of its own tensors, tied ones with their first owner; kept ones.
        macs, effective_macs: multiply-accumulates of one example, all and those of kept weights.
        executed_macs: those that are really carried out: all in torch, those of kept weights in the engine.
        bytes: that one call has to read and write at least, at this batch size: weights, inputs, outputs. None where
            that is unknown.
        milliseconds: its share of the measured latency.
        share: of the whole call.
        gflops: 1e9 floating-point operations that it really carries out per second, two for a multiply-accumulate.
        attainable_gflops: what the roofline allows at its intensity; None without bytes.
        bound: "memory" or "arithmetic": what the roofline says holds it back; "" without bytes.
        kernel: how the engine carries it out; "" in torch.
    """

    name: str
    operator: str
    shape: tuple[int, ...] | None
    parameters: int
    nonzeros: int
    macs: int
    effective_macs: int
    executed_macs: int
    bytes: int | None
    milliseconds: float
    share: float
    gflops: float
    attainable_gflops: float | None
    bound: str
    kernel: str = ""

    @property
    def density(self) -> float:
        """Share of parameters that are kept; 1 without parameters."""
        return self.nonzeros / self.parameters if self.parameters else 1.0


@dataclass(frozen=True)
class Profile:
    """What a model costs. Times are of one call of `batch` examples, MACs of one example.

    Attributes:
        model: name of its class.
        batch, threads: examples per call, and threads that torch and the engine used.
        parameters, nonzeros: all, and less those that are pruned.
        macs, effective_macs, executed_macs: as for a layer, over the whole model.
        dense_bytes: of parameters and persistent buffers.
        packed_bytes: with one bit per weight and the kept values, for each tensor that this makes smaller.
        peak_bytes: most memory of tensors in a call beyond what was there before; with the memory of the engine.
        median_ms, low_ms, high_ms: latency of a call: median and quartiles.
        rounds: timed calls.
        peaks: what the machine can do.
        bytes: that a call has to move at least, over the layers where that is known.
        gflops, attainable_gflops, bound: as for a layer, over the whole model.
        layers: in the order of the model; MACs, parameters and milliseconds add up to those of the model.
    """

    model: str
    batch: int
    threads: int
    parameters: int
    nonzeros: int
    macs: int
    effective_macs: int
    executed_macs: int
    dense_bytes: int
    packed_bytes: int
    peak_bytes: int
    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int
    peaks: Peaks
    bytes: int
    gflops: float
    attainable_gflops: float
    bound: str
    layers: tuple[LayerProfile, ...]

    @property
    def density(self) -> float:
        """Share of parameters that are kept."""
        return self.nonzeros / self.parameters if self.parameters else 1.0

    def intensity(self, layer: LayerProfile | None = None) -> float | None:
        """Return the MACs per byte of a layer, or of the whole model; None where bytes are unknown."""
        moved = self.bytes if layer is None else layer.bytes
        macs = (self if layer is None else layer).executed_macs
        return macs * self.batch / moved if moved else None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        found = asdict(self) | {"density": self.density, "intensity": self.intensity()}
        found["peaks"]["ridge"] = self.peaks.ridge
        found["layers"] = [
            row
            | {"shape": None if layer.shape is None else list(layer.shape)}
            # A property is no field.
            | {"density": layer.density, "intensity": self.intensity(layer)}
            for row, layer in zip(found["layers"], self.layers, strict=True)
        ]
        return found

    def __str__(self) -> str:
        intensity = self.intensity()
        lines = [
            f"{self.model}, batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}",
            f"latency    {self.median_ms:.3f} ms ({self.low_ms:.3f} to {self.high_ms:.3f}, quartiles of {self.rounds})",
            f"parameters {self.parameters:,}, kept {self.nonzeros:,} ({self.density:.2%})",
            f"MACs       {self.macs:,} per example, {self.effective_macs:,} of kept weights, "
            f"{self.executed_macs:,} carried out",
            f"bytes      {self.dense_bytes:,} dense, {self.packed_bytes:,} packed; a call holds up to "
            f"{self.peak_bytes:,} more",
            f"machine    {self.peaks.gflops:,.1f} GFLOP/s, {self.peaks.gigabytes_per_second:,.1f} GB/s; "
            f"memory binds below {self.peaks.ridge:.1f} MAC/byte",
            f"roofline   {self.gflops:,.2f} GFLOP/s at {_number(intensity)} MAC/byte, attainable "
            f"{self.attainable_gflops:,.1f}: bound by {self.bound}",
            *self._table(),
        ]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        shown, left = list(self.layers), []
        if len(shown) > _ROWS:
            longest = {id(x) for x in sorted(shown, key=lambda x: -x.milliseconds)[: _ROWS - 1]}
            shown, left = [x for x in shown if id(x) in longest], [x for x in shown if id(x) not in longest]
        rows = [_HEAD, *(self._cells(layer) for layer in shown)]
        if left:
            ms, share = sum(x.milliseconds for x in left), sum(x.share for x in left)
            cells = [f"and {len(left)} shorter ones", "", "", f"{sum(x.parameters for x in left):,}", ""]
            macs = [f"{sum(getattr(x, what) for x in left):,}" for what in ("macs", "effective_macs")]
            rows.append([*cells, *macs, f"{ms:.3f}", f"{share:.1%}", "", "", "", ""])
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        left_aligned = {0, 1, 2, len(_HEAD) - 2, len(_HEAD) - 1}
        return [
            "  ".join(
                f"{c:<{w}}" if i in left_aligned else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))
            ).rstrip()
            for row in rows
        ]

    def _cells(self, layer: LayerProfile) -> list[str]:
        reached = layer.gflops / layer.attainable_gflops if layer.attainable_gflops else None
        return [
            layer.name,
            layer.operator,
            "" if layer.shape is None else "x".join(map(str, layer.shape)),
            f"{layer.parameters:,}",
            f"{layer.density:.1%}" if layer.parameters else "",
            f"{layer.macs:,}",
            f"{layer.effective_macs:,}",
            f"{layer.milliseconds:.3f}",
            f"{layer.share:.1%}",
            _number(self.intensity(layer)),
            "" if reached is None else f"{reached:.0%}",
            layer.bound,
            layer.kernel,
        ]


_HEAD = ["layer", "operator", "output", "parameters", "density", "MACs", "effective", "ms", "share", "MAC/byte"]
_HEAD += ["of roof", "bound by", "kernel"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def profile(
    model: nn.Module,
    example: Any,
    *,
    batch: int | None = None,
    threads: int | None = None,
    masks: Mapping[str, Tensor] | None = None,
    rounds: int | None = None,
    peaks: Peaks | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Profile:
    """Measure what a model costs: parameters, arithmetic, bytes, time, and where each layer stands on the roofline.

    Latencies are medians over rounds in which the plain model and the model with hooks run in turns; layers share the
    plain one as they share the time seen by the hooks, of which each module gets what its submodules do not. What a
    compressed model runs in the engine is listed as in its report, timed step by step.

    Args:
        model: any module: plain, masked, smaller, or compressed. It runs in eval mode without gradients; modes are
            restored and nothing else is changed.
        example: a tensor, a tuple of arguments or a mapping of keyword arguments, with a batch axis in front.
        batch: repeat the first row of the example so often; None for the example as it is.
        threads: of torch and the engine; None for as many as torch has now.
        masks: parameter name -> bool tensor, True = kept. None: weights of two axes and more that are exactly zero are
            counted as pruned.
        rounds: timed calls; None for about two seconds, between 5 and 50.
        peaks: of this machine, from `prunus.measure.roofline.measured_peaks`; None measures them.
        on_stage: called with a sentence when a part of the work begins.

    Returns:
        `Profile`: readable with `str()`, JSON-ready with `to_dict()`.

    Raises:
        InvalidValue: the example has no rows, the model cannot run it, or batch, threads or rounds are below 1.
        MaskMismatch: a mask has no parameter of its name and shape.
    """
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidValue(f"{name} {value!r} must be a whole number from 1 up.")
    if not isinstance(model, nn.Module):
        raise InvalidValue(f"profile takes a torch module, not {type(model).__name__}.")
    tell = on_stage or (lambda text: None)
    model = unwrap(model)
    inputs = to_device(at_batch(example, batch), device_of(model))
    size = batch_size(inputs)
    kept = nonzero(model) if masks is None else dict(masks)
    numbers = count(model, kept)
    with using_threads(threads) as used:
        tell("running the model once")
        with evaluating(model), torch.no_grad():
            try:
                call(model, inputs)
                start = time.perf_counter()
                call(model, inputs)
            except Exception as error:
                raise InvalidValue(
                    f"the model cannot run the example ({type(error).__name__}: {error}); give one it can read."
                ) from error
        once = time.perf_counter() - start
        watch = Watch(model, inputs)
        tell("counting")
        engine = watch.regions()
        found = watch.rows(kept, count_macs=not engine)
        held = 0
        for path, region in engine.items():
            tell("timing the steps of the engine")
            found, memory = with_engine(found, path, region, watch.inputs[path], size)
            held += memory
        known = sum(seen.macs for seen in found.values())
        macs = known + beside_engine(model, inputs, size) if engine else max(known, watch.total)
        peak = peak_bytes(model, inputs) + held
        tell("timing")
        turns = rounds or max(5, min(50, int(_SECONDS / (2 * once + 1e-6))))
        times = latency({"model": model, "watched": watch}, inputs, repeats=turns, warmup=1)["model"]
        watch.share(found, engine)
        if peaks is None:
            tell("measuring what the machine can do")
            peaks = measured_peaks(used, device=device_of(model))
    rest = found[REST]
    rest.macs += macs - known
    rest.effective = rest.executed = rest.macs
    for seen in found.values():
        if not seen.kernel and seen is not rest:
            seen.executed = seen.macs
    whole = sum(s.seconds for s in found.values()) or 1.0
    layers = tuple(
        _placed(s, size, s.seconds / whole, 1e3 * times.median, peaks)
        for s in found.values()
        if s is not rest or s.seconds or s.macs or s.parameters
    )
    inside = [s for s in found.values() if s.kernel]
    extra, extra_kept = sum(s.parameters for s in inside), sum(s.nonzeros for s in inside)
    executed, moved = sum(x.executed_macs for x in layers), sum(x.bytes or 0 for x in layers)
    intensity = executed * size / moved if moved else 0.0
    packed = sum(min(4 * s.parameters, (s.parameters + 7) // 8 + 4 * s.nonzeros) for s in inside)
    # Tensors that lose few weights are smaller without a bitmap.
    width = {n: p.element_size() for n, p in model.named_parameters(remove_duplicate=False)}
    worth = {n: m for n, m in kept.items() if int((~m).sum()) * width[n] > (m.numel() + 7) // 8}
    return Profile(
        model=type(model).__name__,
        batch=size,
        threads=used,
        parameters=numbers.parameters + extra,
        nonzeros=numbers.nonzeros + extra_kept,
        macs=macs,
        effective_macs=sum(x.effective_macs for x in layers),
        executed_macs=executed,
        dense_bytes=dense_bytes(model) + 4 * extra,
        packed_bytes=packed_bytes(model, worth) + packed,
        peak_bytes=peak,
        median_ms=1e3 * times.median,
        low_ms=1e3 * times.low,
        high_ms=1e3 * times.high,
        rounds=times.repeats,
        peaks=peaks,
        bytes=moved,
        gflops=2e-9 * executed * size / max(times.median, 1e-12),
        attainable_gflops=peaks.attainable(intensity),
        bound=peaks.bound(intensity),
        layers=layers,
    )


def at_batch(example: Any, batch: int | None) -> Any:
    """Return the example with its first row repeated `batch` times; as it is for None.

    Raises:
        InvalidValue: the example has no rows.
    """
    first = first_example(example)
    if batch is None:
        return example
    size = batch_size(example)

    def repeated(value: Any, whole: Any) -> Any:
        if isinstance(value, Tensor):
            shared = value.ndim == 0 or whole.shape[0] != size
            return value if shared else value.repeat(batch, *[1] * (value.ndim - 1))
        if isinstance(value, Mapping):
            return {k: repeated(v, whole[k]) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(repeated(v, w) for v, w in zip(value, whole, strict=True))
        return value

    return repeated(first, example)


def _placed(seen: Seen, size: int, share: float, milliseconds: float, peaks: Peaks) -> LayerProfile:
    """Return a layer with its place on the roofline."""
    mine = share * milliseconds
    intensity = None if not seen.moved else seen.executed * size / seen.moved
    return LayerProfile(
        name=seen.name,
        operator=seen.operator,
        shape=seen.shape,
        parameters=seen.parameters,
        nonzeros=seen.nonzeros,
        macs=seen.macs,
        effective_macs=seen.effective,
        executed_macs=seen.executed,
        bytes=seen.moved or None,
        milliseconds=mine,
        share=share,
        gflops=2e-6 * seen.executed * size / mine if mine > 0 else 0.0,
        attainable_gflops=None if intensity is None else peaks.attainable(intensity),
        bound="" if intensity is None else peaks.bound(intensity),
        kernel=seen.kernel,
    )


__all__ = ["LayerProfile", "Profile", "profile"]
