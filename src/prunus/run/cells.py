"""One cell of a run: a method at one sparsity with one seed, from its recipe entry to its result."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prunus.masks import Masks
from prunus.measure.cost import count, effective_macs, layer_costs
from prunus.methods.base import Method
from prunus.methods.registry import METHODS
from prunus.procedures.common import Outcome, dense, length, shorter, whole_epochs
from prunus.run.recipe import Named, Recipe, label_of, named, slug
from prunus.run.stages import Run


@dataclass(frozen=True)
class Cell:
    """A method at one sparsity with one seed.

    Attributes:
        label: the method's name in tables and folders.
        spec: its recipe entry.
        sparsity: share of zeros asked for, 0 for the dense network.
        seed: of everything random.
    """

    label: str
    spec: dict[str, Any]
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's folder below its seed."""
        return slug(self.label) if self.spec["name"] == "dense" else f"{slug(self.label)}-{self.sparsity:g}"


def cells(recipe: Recipe) -> list[Cell]:
    """Return all cells, seed by seed, so that a stopped run has whole seeds to show."""
    found = []
    for seed in recipe.seeds:
        for spec in recipe.methods:
            values = named(spec, "method")
            levels = [0.0] if values["name"] == "dense" else _levels(values, recipe)
            found += [Cell(label_of(spec), values, sparsity, seed) for sparsity in levels]
    return found


def _levels(values: Mapping[str, Any], recipe: Recipe) -> list[float]:
    if "sparsity" in values:
        own = values["sparsity"]
        return [float(s) for s in own] if isinstance(own, list) else [float(own)]
    return list(recipe.sparsities)


def make_method(spec: Named, sparsity: float) -> Method | None:
    """Return the step method of a recipe entry, or None when the entry names a procedure.

    Raises:
        UnknownName: unknown method or option.
        InvalidValue: an option out of range.
    """
    values = named(spec, "method")
    entry = METHODS.entry(values["name"])
    if entry.kind != "step":
        return None
    options = {k: v for k, v in values.items() if k not in ("name", "label", "start", "training", "sparsity")}
    if ("unit" in values and ":" in str(values["unit"])) or entry.unit == "N:M":
        made = METHODS.build(entry.name, **options)  # the pattern fixes the sparsity
    else:
        made = METHODS.build(entry.name, sparsity=sparsity, **options)
    assert isinstance(made, Method)
    return made


def carry_out(cell: Cell, root: Run) -> Outcome:
    """Train what the cell asks for and return its network; everything is a stage, so nothing is done twice."""
    spec = cell.spec
    run = root.within(cell.name)
    if "training" in spec:
        run.training = replace(root.training, **_changes(spec["training"]))
    if spec["name"] == "dense":
        return Outcome(dense(run, run.training), length(run))
    entry = METHODS.entry(spec["name"])
    method = make_method(spec, cell.sparsity)
    if method is None:
        options = {k: v for k, v in spec.items() if k not in ("name", "label", "start", "training", "sparsity")}
        function = entry.load()
        if "sparsity" in inspect.signature(function).parameters or any(
            p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()
        ):
            options["sparsity"] = cell.sparsity
        outcome = function(run, **options)
        assert isinstance(outcome, Outcome)
        return outcome
    start = spec.get("start", "dense" if entry.when.startswith("after training") else "initial")
    if start == "initial":
        return Outcome(run.train("train", method=method), length(run))
    whole = whole_epochs(run)
    first = max(1, round(whole * 2 / 3))
    early, late = shorter(run.training, first), shorter(run.training, max(1, whole - first), lr=run.training.lr / 2)
    trained = dense(run, early)
    return Outcome(
        run.train("train", start=trained, method=method, training=late), length(run, early) + length(run, late)
    )


def _changes(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return training changes, where a new length replaces the other kind of length."""
    result = dict(changes)
    if "steps" in result:
        result.setdefault("epochs", None)
    if "epochs" in result:
        result.setdefault("steps", None)
    return result


def result_of(cell: Cell, root: Run) -> dict[str, Any]:
    """Return the cell's row of results, evaluated once on the test examples."""
    outcome = carry_out(cell, root)
    state = outcome.state

    def work() -> dict[str, Any]:
        measured = root.evaluate(state, "test")
        model = state.model(root)
        masks = state.masks
        numbers = count(model, masks)
        example, _, _ = root.splits.test[0]
        x = example.unsqueeze(0).to(root.device)
        costs = layer_costs(model, x)
        everything = Masks.full(model, include=root.include, exclude=root.exclude)
        table = (masks if masks is not None else everything).table()
        densities = {row.name: row.density for row in table if row.name in costs}
        layers: list[dict[str, Any]] = [{"name": r.name, "kept": r.kept, "total": r.total} for r in table]
        total_macs, total_all = sum(c.macs for c in costs.values()), numbers.parameters
        if state.shape is not None:
            # A network that was made smaller is compared with the run's own, not with itself.
            own = root.model
            kept = {r.name: r.kept for r in table}
            rows = Masks.full(own, include=root.include, exclude=root.exclude).table()
            layers = [{"name": r.name, "kept": kept.get(r.name, 0), "total": r.total} for r in rows]
            total_macs, total_all = sum(c.macs for c in layer_costs(own, x).values()), count(own).parameters
        return {
            "accuracy": measured["accuracy"],
            "loss": measured["loss"],
            "ece": measured.get("ece"),
            "worst_class_accuracy": measured.get("worst_class_accuracy"),
            "validation_accuracy": state.metrics.get("validation_accuracy"),
            "kept": sum(row["kept"] for row in layers),
            "total": sum(row["total"] for row in layers),
            "kept_all": numbers.nonzeros,
            "total_all": total_all,
            "macs": total_macs,
            "effective_macs": effective_macs(costs, densities),
            "steps": outcome.steps,
            "layers": layers,
            "digest": state.digest,
            "details": outcome.details,
        }

    inputs = {"state": state, "details": outcome.details, "steps": outcome.steps, "test": root.splits.test}
    row = root.within(cell.name).compute("result", inputs, work)
    assert isinstance(row, dict)
    return {"method": cell.label, "sparsity": cell.sparsity, "seed": cell.seed} | row
