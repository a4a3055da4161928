"""Carrying out a recipe in a run folder: every cell, then the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.data.examples import Splits
from prunus.data.load import load
from prunus.files import canonical_json, sha256_bytes
from prunus.measure.latency import latency, using_threads
from prunus.models.create import create
from prunus.report.write import write
from prunus.run.cells import Cell, carry_out, cells, result_of
from prunus.run.plan import plan
from prunus.run.recipe import Recipe, named
from prunus.run.stages import Run
from prunus.run.store import Store

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Finished:
    """What `execute` returns.

    Attributes:
        folder: the run folder.
        results: as `prunus.report.summary` describes.
        reports: "json", "md", "html" -> path.
        seconds: wall-clock time of this process's work.
    """

    folder: Path
    results: dict[str, Any]
    reports: dict[str, Path]
    seconds: float


def default_folder(recipe: Recipe, parent: Path | str = "runs") -> Path:
    """Return the folder of a recipe: its title and a hash of all its values, so that the same recipe resumes."""
    title = "".join(c if c.isalnum() else "-" for c in recipe.title.lower()).strip("-") or "run"
    return Path(parent) / f"{title}-{sha256_bytes(canonical_json(recipe.to_dict()))[:8]}"


def load_data(recipe: Recipe) -> Splits:
    """Read the recipe's data set (raises as `prunus.data.load.load`)."""
    options = named(recipe.data, "data")
    return load(options.pop("name"), **options)


def root_runs(recipe: Recipe, splits: Splits, store: Store | None, **hooks: Any) -> Callable[[int], Run]:
    """Return a function from a seed to its run."""
    options = named(recipe.model, "model")
    name = options.pop("name")

    def make_model(seed: int) -> torch.nn.Module:
        return create(name, num_classes=splits.num_classes, input_shape=splits.input_shape, seed=seed, **options)

    made: dict[int, Run] = {}

    def of(seed: int) -> Run:
        if seed not in made:
            made[seed] = Run(
                store,
                splits=splits,
                make_model=make_model,
                training=recipe.training,
                seed=seed,
                name_prefix=f"seed-{seed}/",
                include=recipe.include,
                exclude=recipe.exclude,
                checkpoint_seconds=recipe.checkpoint_seconds,
                **hooks,
            )
        return made[seed]

    return of


def execute(
    recipe: Recipe,
    folder: Path | str,
    *,
    on_plan: Callable[[dict[str, int]], None] | None = None,
    on_step: Callable[[str, int, int, float | None], None] | None = None,
    on_cell: Callable[[dict[str, Any], int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Finished:
    """Run a recipe to its end in `folder`, continuing whatever is there of it already.

    Args:
        recipe: what to do.
        folder: the run folder; made when missing.
        on_plan: called once with the steps of every training stage that is not finished yet.
        on_step: called as (stage, steps done, last step, loss or None).
        on_cell: called with each result row, its number and the number of all.
        should_stop: asked after each step; then the state is saved and `Stopped` raised.

    Raises:
        RecipeChanged: the folder was made by another recipe.
        RunLocked: another process works in it.
        Stopped: `should_stop` said so.
        DataMissing, DataDamaged, DamagedFile, StorageFailed, NonFinite and what recipes raise.
    """
    with using_threads(recipe.threads):
        return _execute(recipe, Path(folder), on_plan, on_step, on_cell, should_stop)


def _execute(
    recipe: Recipe,
    folder: Path,
    on_plan: Callable[[dict[str, int]], None] | None,
    on_step: Callable[[str, int, int, float | None], None] | None,
    on_cell: Callable[[dict[str, Any], int, int], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Finished:
    started = time.perf_counter()
    splits = load_data(recipe)
    wanted = cells(recipe)
    # Planning comes first: a schedule that does not fit its training stops the run before anything is written.
    steps = plan(wanted, root_runs(recipe, splits, None))
    with Store.create(folder, recipe.to_dict()) as store:
        roots = root_runs(recipe, splits, store, on_progress=on_step, should_stop=should_stop)
        if on_plan is not None:
            done = store.finished()
            on_plan({name: count for name, count in steps.items() if name not in done})
        rows = []
        for number, cell in enumerate(wanted, start=1):
            row = result_of(cell, roots(cell.seed))
            rows.append(row)
            if on_cell is not None:
                on_cell(row, number, len(wanted))
        results = gather_results(recipe, splits, rows, store)
        seconds = time.perf_counter() - started
        timing = measure_timing(wanted, roots, rows, seconds)
        reports = write(store.folder, results, timing)
    return Finished(folder, results, reports, seconds)


def gather_results(recipe: Recipe, splits: Splits, rows: list[dict[str, Any]], store: Store) -> dict[str, Any]:
    """Return the results as the report takes them; nothing in them depends on time or on interruptions."""
    best = recipe.training.checkpoint_best
    return {
        "title": recipe.title,
        "task": {
            "data": named(recipe.data, "data")["name"],
            "model": named(recipe.model, "model")["name"],
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
            "num_classes": splits.num_classes,
            "epochs": recipe.training.epochs,
            "checkpoint": "best on validation" if best else "last",
        },
        "recipe": recipe.to_dict(),
        "environment": store.environment,
        # Not the words typed: those differ between a run and its resumption, this redoes either.
        "command": "prunus run recipe.json",
        "cells": rows,
    }


def measure_timing(
    wanted: Sequence[Cell], roots: Callable[[int], Run], rows: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """Return wall-clock figures of this machine: the run, and one forward pass dense against the sparsest network."""
    timing: dict[str, Any] = {"this session, seconds": round(seconds, 1)}
    pruned = [c for c in wanted if c.sparsity > 0]
    if not pruned:
        return timing
    cell = max(pruned, key=lambda c: c.sparsity)
    root = roots(cell.seed)
    sparse = carry_out(cell, root).state.model(root).eval()
    x = torch.stack([root.splits.test[i][0] for i in range(min(64, len(root.splits.test)))])
    x = root.splits.test.normalise(x).to(root.device)
    times = latency({"dense": root.model, "pruned": sparse}, x, repeats=15, warmup=3)
    ratio = times["pruned"].ratio
    verdict = (
        f"{ratio:.2f}x of the dense time: zeros alone do not make torch's dense kernels faster"
        if ratio > 0.95
        else f"{ratio:.2f}x of the dense time"
    )
    return timing | {
        "threads": torch.get_num_threads(),
        f"forward pass of {len(x)} examples, dense, ms": round(times["dense"].median * 1e3, 3),
        f"forward pass of {len(x)} examples, {cell.label} at {cell.sparsity:.0%}, ms": round(
            times["pruned"].median * 1e3, 3
        ),
        "speed": verdict,
    }
