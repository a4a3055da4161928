"""From single results to rows: one row per method and sparsity, with intervals over seeds and plain findings.

`results` is a plain JSON-ready dictionary:

    {"title": str, "task": {...}, "recipe": {...}, "environment": {...}, "command": str,
     "cells": [{"method": str, "sparsity": float, "seed": int, "accuracy": float, ...}, ...],
     "claims": [str], "notes": [str]}

Only `cells` is needed, and of a cell only `method`, `sparsity` (share of zeros asked for, 0 for the dense network) and
`seed`. A cell whose `accuracy` is missing or null counts as planned but not finished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunus.errors import InvalidValue
from prunus.measure.statistics import Interval, format_interval, interval, overlap, paired_difference


@dataclass(frozen=True)
class Layer:
    """Kept and total weights of one layer, averaged over seeds."""

    name: str
    kept: float
    total: float

    @property
    def density(self) -> float:
        """Share of weights kept."""
        return self.kept / self.total if self.total else 1.0


@dataclass(frozen=True)
class Row:
    """All seeds of one method at one sparsity. What no cell tells is None.

    Attributes:
        method: name of the method.
        sparsity: share of zeros that was asked for.
        accuracy: test accuracy over the finished seeds, None when none is finished.
        seeds: finished seeds, ascending.
        missing: seeds that other rows have (or the results name) and this one has not finished.
        accuracies: seed -> accuracy of the finished seeds.
        validation_accuracy: as `accuracy`, on held-out training data.
        loss: test loss over the finished seeds.
        kept: kept prunable weights, mean over seeds (a whole number when all seeds agree).
        total: prunable weights.
        kept_all: kept parameters of all kinds, mean over seeds.
        total_all: all parameters.
        mac_share: multiply-accumulates left, as a share of the dense ones.
        steps: optimizer steps the procedure spent in total, mean over seeds.
        layers: per layer, in the order of the model.
    """

    method: str
    sparsity: float
    accuracy: Interval | None
    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    accuracies: dict[int, float]
    validation_accuracy: Interval | None
    loss: Interval | None
    kept: float | None
    total: float | None
    kept_all: float | None
    total_all: float | None
    mac_share: float | None
    steps: float | None
    layers: tuple[Layer, ...]

    @property
    def complete(self) -> bool:
        """True when no seed is missing."""
        return not self.missing

    @property
    def realised(self) -> float | None:
        """Share of zeros that came out, among prunable weights."""
        return None if self.kept is None or not self.total else 1.0 - self.kept / self.total

    @property
    def dense(self) -> bool:
        """True for the network that nothing was asked to be removed from."""
        return self.sparsity == 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON-ready values."""
        values = asdict(self)
        values["accuracies"] = {str(seed): accuracy for seed, accuracy in self.accuracies.items()}
        values["realised_sparsity"] = self.realised
        return values


def summarise(results: Mapping[str, Any]) -> list[Row]:
    """Group the cells by method and sparsity.

    Methods keep the order of their first appearance, sparsities ascend within a method.

    Raises:
        InvalidValue: no cells, a cell without method, sparsity or seed, or two cells for the same three.
    """
    groups: dict[str, dict[float, dict[int, Mapping[str, Any]]]] = {}
    planned = {int(seed) for seed in results.get("seeds") or ()}
    for number, cell in enumerate(_cells(results)):
        for key in ("method", "sparsity", "seed"):
            if cell.get(key) is None:
                raise InvalidValue(f"cell {number} of the results has no {key!r}; every cell needs one.")
        seed, sparsity = int(cell["seed"]), float(cell["sparsity"])
        if not 0.0 <= sparsity <= 1.0:
            raise InvalidValue(f"cell {number} has sparsity {sparsity}; it is a share between 0 and 1.")
        seeds = groups.setdefault(str(cell["method"]), {}).setdefault(sparsity, {})
        if seed in seeds:
            raise InvalidValue(f"two cells for method {cell['method']!r}, sparsity {sparsity} and seed {seed}.")
        seeds[seed] = cell
        planned.add(seed)
    return [
        _row(method, sparsity, dict(sorted(seeds.items())), planned)
        for method, by_sparsity in groups.items()
        for sparsity, seeds in sorted(by_sparsity.items())
    ]


def _cells(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    cells: Sequence[Mapping[str, Any]] = results.get("cells") or ()
    if not cells:
        raise InvalidValue("the results hold no cells, so there is nothing to report.")
    return cells


def _row(method: str, sparsity: float, cells: dict[int, Mapping[str, Any]], planned: set[int]) -> Row:
    accuracies = {seed: float(c["accuracy"]) for seed, c in cells.items() if _number(c, "accuracy") is not None}
    finished = [cells[seed] for seed in accuracies]
    # An unfinished cell may already know its sizes, which do not depend on how training ends.
    known = finished or list(cells.values())
    macs, effective = _mean(known, "macs"), _mean(known, "effective_macs")
    return Row(
        method=method,
        sparsity=sparsity,
        accuracy=interval(accuracies.values()) if accuracies else None,
        seeds=tuple(accuracies),
        missing=tuple(sorted(planned - set(accuracies))),
        accuracies=accuracies,
        validation_accuracy=_interval(finished, "validation_accuracy"),
        loss=_interval(finished, "loss"),
        kept=_mean(known, "kept"),
        total=_mean(known, "total"),
        kept_all=_mean(known, "kept_all"),
        total_all=_mean(known, "total_all"),
        mac_share=effective / macs if macs and effective is not None else None,
        steps=_mean(known, "steps"),
        layers=_layers(known),
    )


def _number(cell: Mapping[str, Any], key: str) -> float | None:
    value = cell.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _values(cells: Sequence[Mapping[str, Any]], key: str) -> list[float] | None:
    """Return one number per cell, or None when a cell does not tell."""
    values = [_number(cell, key) for cell in cells]
    return [v for v in values if v is not None] if cells and None not in values else None


def _mean(cells: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = _values(cells, key)
    return None if values is None else math.fsum(values) / len(values)


def _interval(cells: Sequence[Mapping[str, Any]], key: str) -> Interval | None:
    values = _values(cells, key)
    return None if values is None else interval(values)


def _layers(cells: Sequence[Mapping[str, Any]]) -> tuple[Layer, ...]:
    tables = [{layer["name"]: layer for layer in cell.get("layers") or ()} for cell in cells]
    names = list(dict.fromkeys(name for table in tables for name in table))
    layers = []
    for name in names:
        found = [table[name] for table in tables if name in table]
        kept, total = (math.fsum(layer[key] for layer in found) / len(found) for key in ("kept", "total"))
        layers.append(Layer(str(name), kept, total))
    return tuple(layers)


def sparsities(rows: Sequence[Row]) -> list[float]:
    """Return the sparsities of the pruned rows, ascending, each once."""
    return sorted({row.sparsity for row in rows if not row.dense})


def percent(share: float) -> str:
    """Return a share in percent with as many digits as it needs: 0.9 -> "90 %", 0.985 -> "98.5 %"."""
    return f"{round(100.0 * share, 4):g} %"


def findings(rows: Sequence[Row]) -> list[str]:
    """Return plain sentences: the best method at each sparsity, and whether the seeds can tell it from the next.

    Two methods count as told apart when the 95 % interval of their difference, paired by seed, does not contain 0.
    """
    sentences = []
    dense = next((row for row in rows if row.dense and row.accuracy is not None), None)
    if dense is not None:
        sentences.append(f"The dense network reaches {_reached(dense)} test accuracy.")
    for sparsity in sparsities(rows):
        finished = [row for row in rows if row.sparsity == sparsity and row.accuracy is not None]
        ranked = sorted(finished, key=_mean_of, reverse=True)
        if not ranked:
            sentences.append(f"At {percent(sparsity)} sparsity no run is finished.")
            continue
        best = ranked[0]
        best_of = " is best:" if len(ranked) > 1 else " reaches"
        text = f"At {percent(sparsity)} sparsity {best.method}{best_of} {_reached(best)}."
        if len(ranked) > 1:
            text += f" {_versus(best, ranked[1])}"
        if dense is not None:
            text += f" {_difference(best, dense, 'the dense network')}"
        sentences.append(text)
    unfinished = [f"{row.method} at {percent(row.sparsity)}" for row in rows if not row.complete]
    if unfinished:
        sentences.append(f"Not all seeds are finished for {', '.join(unfinished)}.")
    return sentences


def _mean_of(row: Row) -> float:
    return row.accuracy.mean if row.accuracy is not None else -math.inf


def _reached(row: Row) -> str:
    """Return "97.1 ± 0.4 % (3 seeds)"."""
    assert row.accuracy is not None
    if row.accuracy.single:
        return f"{100 * row.accuracy.mean:.2f} % (single seed)"
    return f"{format_interval(row.accuracy)} % ({row.accuracy.n} seeds)"


def _versus(best: Row, second: Row) -> str:
    """Say whether the intervals of the two best overlap, and what the seeds say in pairs."""
    assert best.accuracy is not None
    assert second.accuracy is not None
    shared = overlap(best.accuracy, second.accuracy)
    relation = "" if shared is None else "; intervals overlap" if shared else "; intervals do not overlap"
    reached = _reached(second).replace(")", f"{relation})")
    return f"Next is {second.method} with {reached}. {_difference(best, second, second.method)}"


def _difference(a: Row, b: Row, name: str) -> str:
    """Say how far `a` is from `b`, seed by seed."""
    seeds = sorted(set(a.accuracies) & set(b.accuracies))
    if len(seeds) < 2:
        points = 100.0 * (_mean_of(a) - _mean_of(b))
        return f"Difference to {name}: {_signed(points)} points, which cannot be judged without two shared seeds."
    gap = paired_difference([a.accuracies[s] for s in seeds], [b.accuracies[s] for s in seeds])
    assert gap.half is not None
    told = "told apart" if abs(gap.mean) > gap.half else "not told apart"
    return f"Seed by seed against {name}: {_signed(100 * gap.mean)} ± {100 * gap.half:.2f} points, {told}."


def _signed(points: float) -> str:
    """Return a number with its sign and two digits, with a true minus sign and no signed zero."""
    text = f"{points:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\u2212")
