"""MaskSparsity as whole trainings: find a mask, push only its victims to zero, cut them for real, fine-tune.

Source: Pruning-aware Sparse Regularization for Network Pruning (Jiang et al., 2022, arXiv 2201.06776; later Machine
Intelligence Research), from the abstract and the authors' code and scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.errors import Infeasible, InvalidValue, MaskMismatch, NothingPrunable, unknown
from prunus.graph.couple import Coupling, Family
from prunus.masks import Masks
from prunus.methods.mask_sparsity import RULES, MaskSparsity, agreed, norm_scales, scale_masks
from prunus.procedures.common import Outcome, check_sparsity, dense, held_out, length, shorter, whole_epochs
from prunus.procedures.cutting import coupling_of, cut_state, inputs, kept_masks, widths
from prunus.run.stages import Run, State
from prunus.structured.folding import fold_constants

STARTS = ("search", "dense")


def mask_sparsity(
    run: Run,
    *,
    sparsity: float = 0.5,
    keep: Masks | Mapping[str, Any] | str | None = None,
    rule: str = "ratio",
    threshold: float = 0.01,
    share: float = 1e-4,
    strength: float = 5e-4,
    penalty: str = "l1",
    start: str = "search",
    fold: bool = False,
    dense_epochs: int | None = None,
    search_epochs: int | None = None,
    epochs: int | None = None,
    tune_epochs: int | None = None,
    tune_lr: float = 0.1,
) -> Outcome:
    """Train dense, with the penalty on all scales to find a mask, with the penalty on its victims alone; cut; tune.

    Coupled layers of a residual stage vote on what goes (see `prunus.budget.channels.vote`), each being trained with
    its own victims; norm layers whose channels cannot be cut are left out throughout.

    Args:
        run: stages, data, model (with BatchNorm) and training choices.
        sparsity: share of the multiply-accumulates that goes. With rule "ratio" every norm layer gives up the same
            share of its channels, the smallest that reaches it; with the other rules that is the most it may give up. A
            ready mask decides alone.
        keep: a ready mask instead of the search: `Masks` over norm scales (True = the channel stays), a mapping from
            their names to lists of bools, or the path of a mask file. Scales it does not name are left alone.
        rule: "ratio", "threshold" (|scale| > `threshold`) or "energy" (`share` of the squares may go), see
            `prunus.methods.mask_sparsity.scale_masks`.
        threshold, share: of the rule of that name (authors: 0.01 and 1e-4).
        strength, penalty: see `MaskSparsity`.
        start: weights that the masked training starts from: those of the "search" (the authors' scripts) or the "dense"
            ones. A ready mask starts from dense ones.
        fold: fold the constants that shifts of removed channels leave into the next layers (not in the authors' code).
        dense_epochs, search_epochs, epochs, tune_epochs: lengths of dense training, search, masked training and
            fine-tuning; default a quarter of the run's each. No search with 0: the mask is then read off the dense
            scales.
        tune_lr: peak learning rate of fine-tuning, as a share of the run's.

    Raises:
        NothingPrunable: no BatchNorm layer whose channels can be cut.
        MaskMismatch: `keep` does not fit the network.
    """
    check_sparsity(sparsity)
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if start not in STARTS:
        raise unknown("start", start, STARTS)
    quarter = max(1, whole_epochs(run) // 4)
    lengths = [quarter if e is None else e for e in (dense_epochs, search_epochs, epochs, tune_epochs)]
    base, again, last = (shorter(run.training, lengths[i]) for i in (0, 2, 3))
    tuning = shorter(run.training, lengths[3], lr=run.training.lr * tune_lr)
    steps = length(run, base) + length(run, again) + length(run, last)

    trained = dense(run, base)
    coupling = coupling_of(run, trained)
    offered = scaled_families(coupling)
    ready = None if keep is None else given(keep)
    found = trained
    if ready is None and lengths[1]:
        choices = shorter(run.training, lengths[1])
        everything = Masks({n: torch.zeros(len(v), dtype=torch.bool) for n, v in scales_of(offered, trained).items()})
        search = MaskSparsity(strength=strength, penalty=penalty, keep=everything)
        found = run.train("search", start=trained, method=search, training=choices)
        steps += length(run, choices)
    if ready is None:
        described = {"state": found, "goal": sparsity, "rule": rule, "threshold": threshold, "energy": share}
        scales = scales_of(offered, found)
        victims = run.compute(
            "mask", described, lambda: chosen(scales, coupling, offered, sparsity, rule, threshold, share)
        )
        assert isinstance(victims, Masks)
    else:
        victims = check_mask(ready, offered, trained)
    begin = found if start == "search" and ready is None else trained
    method = MaskSparsity(strength=strength, penalty=penalty, keep=victims)
    pushed = run.train("sparse", start=begin, method=method, training=again)
    pushed = State.of(pushed.weights, None, 0, pushed.metrics)  # the weights' masks were all ones

    plan = method.plan(pushed.model(run), coupling)
    folded = fold_constants(pushed.model(run), coupling, plan, inputs(run)) if fold else None
    small = cut_state(run, pushed, plan, model=None if folded is None else folded.model)
    split = held_out(run)
    details: dict[str, Any] = {
        "channels": {f.name: f.size for f in offered},
        "channels_kept": {f.name: f.size for f in offered} | widths(plan),
        "blocked": dict(plan.blocked),
        "before_cut": run.evaluate(pushed, split),
        "after_cut": run.evaluate(small, split),
        "split": split,
        "macs_share": coupling.macs(kept_masks(plan, offered)) / coupling.macs(),
        "mask": victims.digest(),
    }
    if folded is not None:
        details["folded"], details["not_folded"] = dict(folded.constants), dict(folded.skipped)
    state = run.train("tune", start=small, training=tuning)
    return Outcome(state, steps, details)


def scaled_families(coupling: Coupling) -> list[Family]:
    """Return the families of channels that a BatchNorm layer scales and that can be cut.

    Raises:
        NothingPrunable: there are none.
    """
    model = coupling.graph.model
    known = norm_scales(model) if model is not None else {}
    found = [f for f in coupling.primary() if any(slot.tensor in known for slot in f.slots)]
    if not found:
        why = "; ".join(f"{n}: {r}" for n, r in list(coupling.unprunable.items())[:4])
        raise NothingPrunable(f"no BatchNorm layer of this network has channels that can be cut. {why}")
    return found


def scales_of(families: list[Family], state: State) -> dict[str, Tensor]:
    """Return the norm scales of these families in a state, by parameter name."""
    names = dict.fromkeys(
        s.tensor for f in families for s in f.slots if s.role == "affine" and s.tensor.endswith("weight")
    )
    return {n: state.weights[n] for n in names}


def chosen(
    scales: Mapping[str, Tensor],
    coupling: Coupling,
    families: Sequence[Family],
    sparsity: float,
    rule: str,
    threshold: float,
    share: float,
) -> Masks:
    """Return the mask of a rule, in which no layer gives up more than the common ratio that reaches `sparsity`.

    Raises:
        Infeasible: one channel per layer, as far as coupled layers agree on it, is still too much arithmetic.
    """
    floor = scale_masks(scales, "ratio", ratio=least_ratio(scales, coupling, families, sparsity))
    if rule == "ratio":
        return floor
    return floor | scale_masks(scales, rule, threshold=threshold, share=share)


def least_ratio(scales: Mapping[str, Tensor], coupling: Coupling, families: Sequence[Family], sparsity: float) -> float:
    """Return the smallest common share of channels whose removal takes `sparsity` of the multiply-accumulates."""
    dense = coupling.macs()
    steps = sorted({k / len(v) for v in scales.values() for k in range(len(v))})

    def left(ratio: float) -> float:
        return coupling.macs(agreed(scale_masks(scales, "ratio", ratio=ratio), tuple(families))) / dense

    if left(steps[-1]) > 1 - sparsity:
        raise Infeasible(
            f"{left(steps[-1]):.3f} of the multiply-accumulates stay with a single channel per layer, more than "
            f"{1 - sparsity:.3f}; ask for a lower sparsity, or give a mask of your own."
        )
    low, high = -1, len(steps) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(steps[middle]) <= 1 - sparsity else (middle, high)
    return steps[high]


def given(keep: Masks | Mapping[str, Any] | str) -> Masks:
    """Return a ready mask as `Masks`.

    Raises:
        InvalidValue: not masks, nor a mapping from names to bools.
        DamagedFile: the file cannot be read.
    """
    if isinstance(keep, Masks):
        return keep
    if isinstance(keep, str | Path):
        return Masks.load(Path(keep))
    if not isinstance(keep, Mapping):
        raise InvalidValue(f"keep must be Masks, a mapping or the path of a mask file, not {type(keep).__name__}.")
    found = {}
    for name, values in keep.items():
        array = np.asarray(values)
        if array.dtype != np.bool_ or array.ndim != 1:
            raise InvalidValue(f"keep of {name!r} must be a list of bools, True = the channel stays.")
        found[str(name)] = torch.from_numpy(array.copy())
    return Masks(found)


def check_mask(keep: Masks, families: list[Family], state: State) -> Masks:
    """Return `keep` if every entry fits a norm layer that can be cut, and no layer loses all its channels."""
    scales = scales_of(families, state)
    for name, mask in keep.items():
        if name not in scales:
            raise MaskMismatch(
                f"keep names {name!r}, which is no scale of channels that can be cut: {', '.join(scales)}."
            )
        if mask.shape != scales[name].shape:
            raise MaskMismatch(f"keep of {name!r} has shape {tuple(mask.shape)}, not {tuple(scales[name].shape)}.")
        if not bool(mask.any()):
            raise InvalidValue(f"keep of {name!r} leaves no channel; at least one must stay.")
    return keep
