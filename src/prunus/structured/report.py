"""The report of a structured cut: what went, what stayed and why, and what was gained, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from prunus.measure.cost import count, dense_bytes
from prunus.measure.latency import latency
from prunus.measure.pruning_report import repeats_within

_NOTICEABLE = 0.95


@dataclass(frozen=True)
class StructuredReport:
    """Dense against really smaller.

    Attributes:
        unit: what was removed as one piece.
        units, units_kept: how many there were and are, over all families that were offered.
        parameters, parameters_kept: over the whole model.
        macs, macs_kept: multiply-accumulates of one example.
        dense_bytes, bytes: size of the state before and after.
        latency_ms, dense_latency_ms, latency_ratio: measured median per call; None when not measured.
        difference: largest relative difference between the removed and the masked model's outputs on the example;
            None when not verified.
        families: name, kind, kept, size of each family that was offered.
        blocked: families asked for but left whole, and the operator that blocked them.
        unprunable: axes of weights that are never cut, and why.
        without_rule: operators without a rule, and the module where each was met; their axes stay.
        notes: how the network was read, where that matters.
        seconds: time of tracing, coupling, scoring, fitting and cutting together.
        sentence: what was gained, in words.
        target, asked, achieved: what was to be reached ("macs", "latency_ms"...), the number asked for, and what came
            of it, as a share where a share was asked for. A latency is that of the search, taken in turns with the
            dense model; `latency_ratio` is measured once more on the result.
        compensation: how kept weights made up for what went: method, inputs it saw ("data", "calibration data",
            "noise" or "weights alone"), batch norms ("measured anew" or "kept"), remaining errors by name, and what was
            skipped and why; empty without one.
    """

    unit: str
    units: int
    units_kept: int
    parameters: int
    parameters_kept: int
    macs: int
    macs_kept: int
    dense_bytes: int
    bytes: int
    latency_ms: float | None
    dense_latency_ms: float | None
    latency_ratio: float | None
    difference: float | None
    families: tuple[dict[str, Any], ...]
    blocked: dict[str, str]
    unprunable: dict[str, str]
    without_rule: dict[str, str]
    notes: tuple[str, ...]
    seconds: float
    sentence: str
    target: str = ""
    asked: float | None = None
    achieved: float | None = None
    compensation: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of parameters that are gone."""
        return 1.0 - self.parameters_kept / self.parameters if self.parameters else 0.0

    @property
    def macs_removed(self) -> float:
        """Share of multiply-accumulates that are gone."""
        return 1.0 - self.macs_kept / self.macs if self.macs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return asdict(self) | {"sparsity": self.sparsity, "macs_removed": self.macs_removed}

    def __str__(self) -> str:
        time_line = "not measured"
        if self.latency_ms is not None:
            dense = f"{self.dense_latency_ms:.3f} -> " if self.dense_latency_ms is not None else ""
            ratio = f" ({self.latency_ratio:.2f}x of dense)" if self.latency_ratio is not None else ""
            time_line = f"{dense}{self.latency_ms:.3f} ms{ratio}"
        exact = (
            "not verified" if self.difference is None else f"removed equals masked to {self.difference:.1e} relative"
        )
        lines = [
            f"kept       {self.units_kept:,} of {self.units:,} units ({self.unit}) in {len(self.families)} families",
            f"parameters {self.parameters:,} -> {self.parameters_kept:,} ({self.sparsity:.1%} gone)",
            f"MACs       {self.macs:,} -> {self.macs_kept:,} ({self.macs_removed:.1%} gone)",
            f"bytes      {self.dense_bytes:,} -> {self.bytes:,}",
            f"latency    {time_line}",
            f"proof      {exact}",
            f"           {self.sentence}",
        ]
        if self.asked is not None and self.achieved is not None:
            lines.insert(0, f"asked      {self.target} {self.asked:,.6g}, reached {self.achieved:,.6g}")
        if self.compensation:
            lines.append(f"made up    {_compensated(self.compensation)}")
        lines += [*(f"note       {note}" for note in self.notes), "families", *_families(self.families)]
        if self.blocked:
            lines += ["left whole, because the cut did not survive", *_reasons(self.blocked)]
        if self.without_rule:
            met = {op: f"first in {module or 'the model itself'}" for op, module in self.without_rule.items()}
            lines += ["operators without a rule (their axes stay)", *_reasons(met)]
        if self.unprunable:
            lines += ["axes that are never cut", *_reasons(self.unprunable)]
        return "\n".join(lines)


_ROWS = 24  # families, and different reasons, that are spelled out; the rest is counted


def _families(families: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line per family, the largest first when there are many, and the sum of those left out."""
    if len(families) > _ROWS:
        ordered = sorted(families, key=lambda f: -f["size"])
        shown, rest = ordered[: _ROWS - 1], ordered[_ROWS - 1 :]
    else:
        shown, rest = list(families), []
    width = max((len(f["name"]) for f in shown), default=1)
    lines = [f"  {f['name']:<{width}}  {f['kept']:>6} / {f['size']:>6} {f['kind']}s" for f in shown]
    if rest:
        kept, size = (sum(f[k] for f in rest) for k in ("kept", "size"))
        lines.append(f"  {f'and {len(rest)} smaller ones':<{width}}  {kept:>6} / {size:>6} units; all are in to_dict()")
    return lines


def _reasons(reasons: Mapping[str, str]) -> list[str]:
    """Return one line per reason with the first names it holds for, the most frequent first."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason.splitlines()[0] if reason else "", []).append(name)
    ordered = sorted(names.items(), key=lambda item: -len(item[1]))
    lines = []
    for reason, held in ordered[:_ROWS]:
        more = f" and {len(held) - 2} more" if len(held) > 3 else ""
        lines.append(f"  {', '.join(held[:2] if more else held)}{more}: {reason}")
    if len(ordered) > _ROWS:
        lines.append(f"  and {len(ordered) - _ROWS} other reasons; all are in to_dict()")
    return lines


def _compensated(facts: Mapping[str, Any]) -> str:
    errors, skipped = facts["errors"], facts["skipped"]
    worst = f", worst remaining error {max(errors.values()):.2g}" if errors else ""
    left = f"; {len(skipped)} not compensated" if skipped else ""
    return (
        f"{facts['method']} from {facts['inputs']}, batch norms {facts['batch_norms']}, "
        f"{len(errors)} parts{worst}{left}"
    )


def gain(macs: int, kept: int, ratio: float | None, dense: int, small: int) -> str:
    """Return in one sentence what was gained, or that nothing was, and why."""
    size = f"the model is {small / dense:.2f}x its size" if dense else "the model holds nothing"
    if kept == macs:
        return f"Nothing was removed, so there is no gain; {size}."
    if ratio is None:
        return f"Speed was not compared; {size}."
    if ratio <= _NOTICEABLE:
        return f"One call takes {ratio:.2f}x the dense time; {size}."
    return (
        f"No speed gain here ({ratio:.2f}x of the dense time) although {1 - kept / macs:.0%} of the arithmetic is "
        f"gone: at this input size the time goes into calling operators, not into arithmetic; {size}."
    )


def timed(dense: nn.Module | None, small: nn.Module, example: Any) -> tuple[float | None, float, float | None]:
    """Return (dense milliseconds, small milliseconds, ratio), interleaved; None for a dense model that is gone."""
    candidates = {"dense": dense, "small": small} if dense is not None else {"small": small}
    times = latency(candidates, example, repeats=repeats_within(small, example), warmup=2)  # type: ignore[arg-type]
    mine = times["small"]
    if dense is None:
        return None, mine.median * 1e3, None
    return times["dense"].median * 1e3, mine.median * 1e3, mine.ratio


def sizes(model: nn.Module) -> tuple[int, int]:
    """Return (parameters, bytes of the state)."""
    return count(model).parameters, dense_bytes(model)
