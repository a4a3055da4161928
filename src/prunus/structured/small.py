"""What structured pruning returns, and how its report is filled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunus.files import write_atomic
from prunus.graph.plan import Plan
from prunus.graph.record import arguments
from prunus.structured.report import StructuredReport, gain, sizes, timed
from prunus.structured.saved import pack_small
from prunus.structured.target import Target


@dataclass(frozen=True)
class SmallModel:
    """What structured pruning returns.

    Attributes:
        model: the model, really smaller; an ordinary module of the user's own class.
        plan: the cut as data; `plan.apply(fresh)` repeats it, `plan.verify(model, x)` proves it on the dense model.
        report: dense against small, what was left whole and why.
    """

    model: nn.Module
    plan: Plan
    report: StructuredReport

    def save(self, path: Path | str) -> None:
        """Write plan and weights to one safetensors file; `prunus.load(path, FreshInstance())` rebuilds the model.

        Raises:
            StorageFailed: the file cannot be written; an older one there is unchanged.
        """
        write_atomic(Path(path), pack_small(self.model, self.plan))


@dataclass(frozen=True)
class Facts:
    """What the report says besides what can be measured on the two models.

    Attributes:
        unit: what was removed as one piece.
        target: what was asked for.
        families: name, kind, size, kept of each family.
        macs: multiply-accumulates of one example before and after.
        difference, unprunable, without_rule, notes, seconds, compensation: see `StructuredReport`.
        achieved: of a latency target, in its own units.
    """

    unit: str
    target: Target
    families: tuple[dict[str, Any], ...]
    macs: tuple[int, int]
    difference: float | None
    seconds: float
    notes: Iterable[str] = ()
    unprunable: Mapping[str, str] | None = None
    without_rule: Mapping[str, str] | None = None
    achieved: float | None = None
    compensation: Mapping[str, Any] | None = None


def finished(
    dense: nn.Module | None,
    before: tuple[int, int],
    small: nn.Module,
    plan: Plan,
    example: Any,
    facts: Facts,
    *,
    measure: bool,
) -> SmallModel:
    """Return the small model with its report.

    Args:
        dense: the model before; None when it was cut in place, then time is not compared.
        before: (parameters, bytes) of the model before.
        small: the model after.
        plan: the cut.
        example: one input.
        facts: the rest.
        measure: whether to time the models.
    """
    dense_ms = small_ms = ratio = None
    if measure and not without_numbers(small):
        args, kwargs = arguments(example)
        dense_ms, small_ms, ratio = timed(dense, small, kwargs if kwargs and not args else args)
    parameters, size = sizes(small)
    target, (macs, macs_kept) = facts.target, facts.macs
    units, kept = (sum(row[k] for row in facts.families) for k in ("size", "kept"))
    achieved = facts.achieved
    if not target.timed:
        reached = {
            "sparsity": 1 - kept / units if units else 0.0,
            "macs": macs_kept,
            "params": parameters,
            "bytes": size,
        }
        whole = {"sparsity": 1.0, "macs": macs, "params": before[0], "bytes": before[1]}[target.what]
        share = target.what == "sparsity" or target.amount(whole) != target.asked
        # What was asked for as a share is answered as one.
        achieved = float(reached[target.what]) / (whole if share and whole else 1)
    report = StructuredReport(
        unit=facts.unit,
        units=units,
        units_kept=kept,
        parameters=before[0],
        parameters_kept=parameters,
        macs=macs,
        macs_kept=macs_kept,
        dense_bytes=before[1],
        bytes=size,
        latency_ms=small_ms,
        dense_latency_ms=dense_ms,
        latency_ratio=ratio,
        difference=facts.difference,
        families=facts.families,
        blocked=dict(plan.blocked),
        unprunable=dict(facts.unprunable or {}),
        without_rule=dict(facts.without_rule or {}),
        notes=tuple(facts.notes),
        seconds=facts.seconds,
        sentence=gain(macs, macs_kept, ratio, before[1], size),
        target=target.what,
        asked=float(target.asked),
        achieved=achieved,
        compensation=dict(facts.compensation or {}),
    )
    return SmallModel(small, plan, report)


def without_numbers(model: nn.Module) -> bool:
    """Return whether a model lives on the meta device."""
    return any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def examples_in(example: Any) -> int:
    """Return how many examples one input holds."""
    args, kwargs = arguments(example)
    first = next((a for a in (*args, *kwargs.values()) if hasattr(a, "shape") and len(a.shape)), None)
    return max(1, int(first.shape[0])) if first is not None else 1
