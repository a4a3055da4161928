"""The report of one pruning: dense against pruned, with a plain sentence about what was gained and what was not."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from prunus.masks import Masks
from prunus.measure.cost import count, dense_bytes, effective_macs, layer_costs, packed_bytes
from prunus.measure.forwarding import call, evaluating
from prunus.measure.latency import latency

_SECONDS_TO_MEASURE = 1.0
_NOTICEABLE = 0.95


@dataclass(frozen=True)
class PruningReport:
    """Dense against pruned.

    Attributes:
        unit: what was pruned as one piece.
        kept, total: prunable weights kept and in all.
        kept_all, total_all: the same over all parameters.
        macs, effective_macs: multiply-accumulates of one example through prunable layers, dense and counting only
            kept weights; None without an example.
        dense_bytes, packed_bytes: size of the state stored dense, and as bitmaps with kept values.
        latency_ms, dense_latency_ms, latency_ratio: measured median per call, pruned over dense; None when not
            measured.
        layers: name, kept, total, macs of each prunable tensor.
        skipped: tensors left out, and why.
        sentence: what was gained, in words.
        warnings: what looks wrong (layers that lost every weight).
    """

    unit: str
    kept: int
    total: int
    kept_all: int
    total_all: int
    macs: int | None
    effective_macs: int | None
    dense_bytes: int
    packed_bytes: int
    latency_ms: float | None
    dense_latency_ms: float | None
    latency_ratio: float | None
    layers: tuple[dict[str, Any], ...]
    skipped: dict[str, str]
    sentence: str
    warnings: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros among prunable weights."""
        return 1.0 - self.kept / self.total

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return asdict(self) | {"sparsity": self.sparsity}

    def __str__(self) -> str:
        macs = (
            "not counted (no example)" if self.macs is None else f"{self.macs:,} -> {self.effective_macs:,} effective"
        )
        time_line = "not measured (no example)"
        if self.latency_ms is not None:
            dense = f"{self.dense_latency_ms:.3f} -> " if self.dense_latency_ms is not None else ""
            ratio = f" ({self.latency_ratio:.2f}x of dense)" if self.latency_ratio is not None else ""
            time_line = f"{dense}{self.latency_ms:.3f} ms{ratio}"
        width = max(len(layer["name"]) for layer in self.layers)
        lines = [
            f"kept       {self.kept:,} of {self.total:,} prunable weights "
            f"(sparsity {self.sparsity:.2%}, unit {self.unit})",
            f"           {self.kept_all:,} of {self.total_all:,} parameters in all",
            f"MACs       {macs}",
            f"bytes      {self.dense_bytes:,} dense -> {self.packed_bytes:,} packed",
            f"latency    {time_line}",
            f"           {self.sentence}",
            *(f"warning    {warning}" for warning in self.warnings),
            "layers",
            *(_layer_line(layer, width) for layer in self.layers),
        ]
        if self.skipped:
            lines += ["left out", *(f"  {name}: {reason}" for name, reason in self.skipped.items())]
        return "\n".join(lines)


def _layer_line(layer: Mapping[str, Any], width: int) -> str:
    share = layer["kept"] / layer["total"]
    return f"  {layer['name']:<{width}}  {layer['kept']:>12,} / {layer['total']:>12,}  {share:8.2%}"


def _collapsed(masks: Masks) -> tuple[str, ...]:
    return tuple(
        f"{row.name!r} lost all of its {row.total:,} weights, which cuts the net there; use budget='lamp', "
        "'erk' or {'name': 'global', 'minimum': ...}."
        for row in masks.table()
        if row.kept == 0 and row.total > 0
    )


def repeats_within(model: nn.Module, example: Any) -> int:
    """Return how many interleaved rounds fit the time that a report may take."""
    with evaluating(model):
        call(model, example)
        start = time.perf_counter()
        call(model, example)
        once = time.perf_counter() - start
    return max(5, min(50, int(_SECONDS_TO_MEASURE / (2 * once + 1e-6))))


def _sentence(masks: Masks, unit: str, ratio: float | None, dense: int, packed: int) -> str:
    size = f"the packed file is {packed / dense:.2f}x the dense one"
    if ratio is None:
        return f"Speed was not compared; {size}."
    if ratio <= _NOTICEABLE:
        return f"One call takes {ratio:.2f}x the dense time; {size}."
    kind = {"row": "whole rows are zero but still there", "weight": "zeros are scattered"}.get(
        unit, "zeros form a pattern"
    )
    return (
        f"No speed gain here ({ratio:.2f}x of the dense time): {kind}, and torch's dense kernels multiply them all the "
        f"same; {size}."
    )


def compare(
    dense: nn.Module | None,
    pruned: nn.Module,
    masks: Masks,
    skipped: Mapping[str, str],
    *,
    example: Any = None,
    unit: str = "weight",
    measure: bool = True,
) -> PruningReport:
    """Measure `pruned` (with `masks` applied) against `dense` on one example.

    Args:
        dense: the model before pruning, or None when it is gone (pruned in place): then time is not compared.
        pruned: the model after it.
        masks: what was kept.
        skipped: tensors left out, and why.
        example: an input, or an object with `.args` and `.kwargs`; None leaves MACs and latency empty.
        unit: what was pruned as one piece.
        measure: whether to run the models at all.
    """
    if hasattr(example, "args") and hasattr(example, "kwargs"):
        example = example.args if example.args else dict(example.kwargs)
    macs = after = None
    millis = dense_millis = ratio = None
    per_layer: Mapping[str, Any] = {}
    if example is not None and measure:
        costs = layer_costs(pruned, example)
        per_layer = {n: c.macs for n, c in costs.items()}
        densities = {row.name: row.density for row in masks.table() if row.name in costs}
        macs, after = sum(c.macs for c in costs.values()), effective_macs(costs, densities)
        candidates = {"dense": dense, "pruned": pruned} if dense is not None else {"pruned": pruned}
        times = latency(candidates, example, repeats=repeats_within(pruned, example), warmup=2)  # type: ignore[arg-type]
        millis = times["pruned"].median * 1e3
        if dense is not None:
            dense_millis, ratio = times["dense"].median * 1e3, times["pruned"].ratio
    numbers = count(pruned, masks)
    stored, packed = dense_bytes(pruned), packed_bytes(pruned, masks)
    return PruningReport(
        unit=unit,
        kept=masks.kept,
        total=masks.total,
        kept_all=numbers.nonzeros,
        total_all=numbers.parameters,
        macs=macs,
        effective_macs=after,
        dense_bytes=stored,
        packed_bytes=packed,
        latency_ms=millis,
        dense_latency_ms=dense_millis,
        latency_ratio=ratio,
        layers=tuple(
            {"name": r.name, "kept": r.kept, "total": r.total, "macs": per_layer.get(r.name)} for r in masks.table()
        ),
        skipped=dict(skipped),
        sentence=_sentence(masks, unit, ratio, stored, packed),
        warnings=_collapsed(masks),
    )
