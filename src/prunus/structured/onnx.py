"""Structured pruning of ONNX models in one call: read, couple axes, score units, spend a budget, cut, prove."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunus.errors import InvalidValue, MaskMismatch, Unsupported
from prunus.graph.couple import Family, couple
from prunus.graph.fit import EXACT
from prunus.graph.onnx_edit import calls, checked_inputs, cut_onnx, fit_onnx, random_inputs, verify_onnx
from prunus.graph.onnx_file import Arrays, Session, load_model, save_model
from prunus.graph.onnx_graph import read_onnx
from prunus.graph.plan import Plan
from prunus.structured.onnx_scores import unit_scores_onnx
from prunus.structured.prune import coupled, rolled_back
from prunus.structured.report import StructuredReport, gain, timed
from prunus.structured.select import Kept, Limits, by_share, check_share, to_target
from prunus.structured.target import as_amount

if TYPE_CHECKING:
    from onnx import ModelProto

UNITS = ("channel", "head")
EXACT_HALF = 2e-2  # relative difference that counts as rounding where weights have 16 bits


@dataclass(frozen=True)
class SmallOnnx:
    """What pruning an ONNX model returns.

    Attributes:
        model: the model, really smaller, checked by onnx.
        plan: the cut as data; `apply_onnx(model_or_path, plan)` repeats it on the dense model.
        report: dense against small, what was left whole and why.
    """

    model: ModelProto
    plan: Plan
    report: StructuredReport

    def save(self, path: Path | str) -> None:
        """Write the small model as an ONNX file.

        Raises:
            StorageFailed: the file cannot be written; an older one there is unchanged.
        """
        save_model(self.model, path)


def prune_onnx(
    source: Path | str | ModelProto,
    sparsity: float | None = None,
    *,
    macs: float | int | None = None,
    params: float | int | None = None,
    unit: str = "channel",
    score: str = "magnitude",
    pool: str = "sum",
    normalise: str = "mean",
    scope: str = "local",
    minimum: int | float = 1,
    round_to: int = 1,
    protect: Sequence[str] | str = (),
    norms: str = "auto",
    inputs: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    verify: bool = True,
    measure: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> SmallOnnx:
    """Remove channels or heads of an ONNX model, with everything coupled to them.

    The result is proved in onnxruntime: it gives what the model of full size gives with the removed weights at zero.
    Args:
        source: path of an ONNX file, or a loaded model; untouched.
        sparsity: share of units to remove, in [0, 1). Give exactly one of sparsity, macs, params.
        macs, params: what may remain: a share in (0, 1], or an amount.
        unit: "channel" or "head" (only heads of attentions).
        score: "magnitude", "magnitude-squared", "random", or "wanda" (needs inputs).
        pool, normalise: how scores of elements become one per unit, see `prunus.structured.importance.pooled`.
        scope: "local", "global" or "isomorphic", see `prunus.structured.select.by_share`.
        minimum: fewest units that stay in a family: a count, or a share.
        round_to: kept units are a multiple of this.
        protect: shell patterns of initialisers whose families stay whole.
        norms: what becomes of axes over which layer norms take statistics: "whole" leaves them alone, "counted" cuts
            them and goes on counting what went (the norm becomes plain operators), "anew" takes statistics of what
            remains, which is another function and is not proved; "auto" is "whole" unless too little could be cut then.
        inputs: input name -> array, used for shapes, for the proof, and to calibrate scores that look at activations.
            The first axis may hold the examples of many calls. Default: random ones.
        sizes: symbolic axis -> its size, where the model leaves axes open and no inputs are given; by default the
            first axis is 1 and others 64 (16 in inputs of fewer than four axes).
        seed: of random scores and inputs.
        verify: prove the cut; families whose removal changes the outputs are rolled back alone and named.
        measure: time both models.
        on_stage: called with a sentence when a stage of the work begins, to show progress.

    Returns:
        `SmallOnnx` with `.model`, `.plan`, `.report`, `.save(path)`.

    Raises:
        MissingExtra: onnx or onnxruntime is not installed.
        DamagedFile: not a valid ONNX file, or its external weights are missing.
        InvalidValue: no such file, contradictory options, or inputs that do not fit.
        Infeasible: the target cannot be reached.
        Unsupported: an operator set that is too old, a model above 2 GiB, a score that needs gradients, or one that
            onnxruntime cannot run although it has to.
        NothingPrunable, NonFinite, UnknownName: as their names say.
    """
    given = {"sparsity": sparsity, "macs": macs, "params": params}
    if sum(v is not None for v in given.values()) != 1:
        asked = [k for k, v in given.items() if v is not None]
        raise InvalidValue(f"give exactly one of {', '.join(given)}; got {asked}.")
    if unit not in UNITS:
        raise InvalidValue(f"unit {unit!r} must be one of {', '.join(UNITS)}.")
    protect = (protect,) if isinstance(protect, str) else tuple(protect)
    tell = on_stage or (lambda text: None)
    start = time.perf_counter()
    tell("reading the model and what its axes share")
    batches: list[Arrays] = []
    if inputs is not None:
        source = load_model(source)
        batches = calls(source, checked_inputs(source, inputs))
    read = read_onnx(source, inputs=batches[0] if batches else None, sizes=sizes)
    coupling, families, protected = coupled(read.graph, unit, protect, norms, sparsity)
    limits = Limits(minimum, round_to, protected)
    tell(f"scoring {sum(f.size for f in families):,} {unit}s in {len(families)} families by {score}")
    scores = unit_scores_onnx(read, families, score, pool=pool, normalise=normalise, batches=batches, seed=seed)

    def chosen(possible: Sequence[Family]) -> Kept:
        if sparsity is not None:
            return by_share(possible, scores, check_share("sparsity", sparsity), limits, scope)
        what, cost = ("macs", coupling.macs) if macs is not None else ("params", coupling.parameters)
        target = as_amount(what, given[what], cost({}))  # type: ignore[arg-type]
        return to_target(possible, scores, cost, target, limits, scope, what=what)

    tell("choosing what stays, and rewriting the model")
    plan = fit_onnx(read, coupling, _arrays(chosen(families)))
    if plan.blocked and sparsity is None:
        # What was blocked stays whole, so the others are chosen again to reach the target.
        left = [f for f in families if f.name not in plan.blocked]
        plan = fit_onnx(read, coupling, _arrays(chosen(left))).with_blocked(plan.blocked)
    example = batches[0] if batches else random_inputs(read.model, read.shapes, seed)
    difference = None
    if verify:
        tell("proving that removing equals masking")
        try:
            difference, plan = rolled_back(
                coupling,
                plan,
                lambda part: verify_onnx(read, coupling, part, example),
                exact=norms != "anew",
                tolerance=EXACT if read.full_precision else EXACT_HALF,
            )
        except Unsupported as error:
            reason = str(error).rstrip(".")
            raise Unsupported(f"{reason}. Nothing can be proved then; verify=False cuts without proof.") from error
    small = cut_onnx(read, coupling, plan)
    seconds = time.perf_counter() - start
    dense_ms = small_ms = ratio = None
    if measure:
        tell("timing both models")
        dense_ms, small_ms, ratio = timed(Session(read.model), Session(small), (example,))  # type: ignore[arg-type]
    rows = max((len(a) for a in example.values() if a.ndim), default=1) if _one_batch(example) else 1
    keep = {n: np.isin(np.arange(coupling[n].size), kept) for n, kept in plan.families.items()}
    before, after = coupling.macs() // rows, coupling.macs(keep) // rows
    dense_size, size = read.model.ByteSize(), small.ByteSize()
    table: tuple[dict[str, Any], ...] = tuple(
        {"name": f.name, "kind": f.kind, "size": f.size, "kept": len(plan.families.get(f.name, range(f.size)))}
        for f in families
    )
    report = StructuredReport(
        unit=unit,
        units=sum(f.size for f in families),
        units_kept=sum(row["kept"] for row in table),
        parameters=coupling.parameters(),
        parameters_kept=coupling.parameters(keep),
        macs=before,
        macs_kept=after,
        dense_bytes=dense_size,
        bytes=size,
        latency_ms=small_ms,
        dense_latency_ms=dense_ms,
        latency_ratio=ratio,
        difference=difference,
        families=table,
        blocked=dict(plan.blocked),
        unprunable=coupling.unprunable,
        without_rule=coupling.without_rule,
        notes=tuple(coupling.graph.notes),
        seconds=seconds,
        sentence=gain(before, after, ratio, dense_size, size),
    )
    return SmallOnnx(small, plan, report)


def apply_onnx(
    source: Path | str | ModelProto, plan: Plan, *, norms: str = "auto", sizes: Mapping[str, int] | None = None
) -> ModelProto:
    """Return the small model that `plan` (from `prune_onnx`, or a file it was saved to) makes of the dense one.

    Args:
        source: the dense model; untouched.
        plan: the cut.
        norms: as the plan was made with; "auto" finds out whether axes of norms were cut and counted.
        sizes: see `prune_onnx`.

    Raises:
        MaskMismatch: the plan belongs to another model, or was applied before.
    """
    read = read_onnx(source, sizes=sizes)
    if norms != "auto":
        return cut_onnx(read, couple(read.graph, norms=norms), plan)
    try:
        return cut_onnx(read, couple(read.graph), plan)
    except MaskMismatch:
        return cut_onnx(read, couple(read.graph, norms="counted"), plan)


def _arrays(kept: Kept) -> dict[str, Any]:
    return {name: mask.numpy() for name, mask in kept.items()}


def _one_batch(example: Arrays) -> bool:
    return len({len(a) for a in example.values() if a.ndim}) == 1
