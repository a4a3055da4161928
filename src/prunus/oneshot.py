"""`prunus.prune`: choose units, score them, spend a budget; and what comes back, which can be saved and loaded."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn

from prunus.budget.budgets import Budget
from prunus.errors import DamagedFile, InvalidValue, MaskMismatch, unknown
from prunus.evidence import Loss
from prunus.files import write_atomic
from prunus.keep import choose, read_data
from prunus.masks import Masks
from prunus.measure.pruning_report import PruningReport, compare
from prunus.parameters import copied, load_exact, parameters_of, prunable, unwrap
from prunus.structured.registry import UNIT_SCORES
from prunus.structured.saved import FORMAT as SMALL_FORMAT
from prunus.structured.saved import check_fits, content_hash, header_of, rebuild, untied
from prunus.units import Structural, Unit
from prunus.units import unit as unit_of

_FORMAT = "prunus-model-1"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Pruned:
    """What `prune` returns.

    Attributes:
        model: the pruned model; zeros are really in its weights.
        masks: what was kept.
        report: dense against pruned: parameters, nonzeros, MACs, bytes, measured latency, and a plain sentence.
    """

    model: nn.Module
    masks: Masks
    report: PruningReport

    def save(self, path: Path | str) -> None:
        """Write weights and masks to one safetensors file: masked tensors as a bitmap and their kept values.

        Raises:
            StorageFailed: the file cannot be written; an older one there is unchanged.
        """
        write_atomic(Path(path), pack(self.model, self.masks))


def pack(model: nn.Module, masks: Masks) -> bytes:
    """Return the model's state as safetensors bytes, masked tensors as bitmap plus kept values, with a content hash."""
    bare = unwrap(model)
    masks.parameters(bare)
    state, aliases = untied(bare)
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in masks:
            tensors[f"kept:{name}"] = value[masks[name].cpu()].contiguous()
        else:
            tensors[f"full:{name}"] = value.contiguous().clone()
    for name in masks:
        if name in aliases:
            raise MaskMismatch(f"mask {name!r} is another name of {aliases[name]!r}; call it so.")
    tensors |= {f"mask:{n}": bits for n, bits in masks.packed().items()}
    header = {"format": _FORMAT, "shapes": {n: list(m.shape) for n, m in masks.items()}, "aliases": aliases}
    header["sha256"] = content_hash([_FORMAT, header["shapes"], aliases], tensors)
    # One key only: safetensors writes several in random order, and equal models should be equal files.
    return safetensors_save(tensors, metadata={"prunus": json.dumps(header)})


def read_packed(path: Path | str) -> tuple[dict[str, Tensor], Masks]:
    """Return the state dict and masks of a file written by `Pruned.save` (raises `DamagedFile` as `load`)."""
    source = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DamagedFile(f"model file {source} cannot be read: {error.strerror}.") from error
    try:
        tensors = safetensors_load(data)
        header = header_of(data)
        shapes, aliases = header["shapes"], header["aliases"]
        sound = header["format"] == _FORMAT and header["sha256"] == content_hash([_FORMAT, shapes, aliases], tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedFile(f"{source} is not a readable model file ({error}); restore it from a copy.") from error
    if not sound:
        raise DamagedFile(f"{source} does not match its own hash; it was damaged or changed. Restore it from a copy.")
    masks = Masks.unpacked({n: tensors[f"mask:{n}"] for n in shapes}, shapes)
    state = {n.removeprefix("full:"): t for n, t in tensors.items() if n.startswith("full:")}
    for name, mask in masks.items():
        values = tensors[f"kept:{name}"]
        state[name] = torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)
    state |= {n: state[original] for n, original in aliases.items()}
    return state, masks


def _is_small(path: Path | str) -> bool:
    try:
        return bool(header_of(Path(path).read_bytes())["format"] == SMALL_FORMAT)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False  # the reader of masked models says what is wrong with it


def load(path: Path | str, model: Model, *, with_masks: bool = False) -> Any:
    """Put a file written by `Pruned.save` or `SmallModel.save` into `model`, a fresh instance of the same class.

    A file of a smaller model cuts the instance by the plan it holds before filling it.

    Args:
        path: the file.
        model: the instance to fill, in place.
        with_masks: return (model, masks) instead of the model.

    Raises:
        DamagedFile: the file is missing, truncated, or differs from what was written in any bit.
        MaskMismatch: the file belongs to another architecture.
    """
    source = str(path)
    if _is_small(path):
        rebuild(source, Path(path).read_bytes(), model)
        return (model, Masks({})) if with_masks else model
    state, masks = read_packed(path)
    bare = unwrap(model)
    check_fits(source, bare, state, named=type(bare).__name__)
    load_exact(bare, state)
    return (model, masks) if with_masks else model


def prune(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    keep: int | None = None,
    unit: str | Unit = "weight",
    score: str = "magnitude",
    budget: str | Mapping[str, Any] | Budget | None = None,
    data: Iterable[Any] | None = None,
    batches: int | None = None,
    example: Any = None,
    loss: Loss | None = None,
    rounds: int | None = None,
    masks: Masks | None = None,
    include: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
    seed: int = 0,
    train_mode: bool = False,
    on_round: Callable[[int, int], None] | None = None,
    inplace: bool = False,
    measure: bool = True,
    **structural: Any,
) -> Any:
    """Prune a model now: score every unit, keep the best, zero the rest or remove it for real.

    `prune(model, 0.9)` keeps the 10 % largest magnitudes of the whole net. The count is exact; equal scores keep
    the earlier position; what was pruned before (`masks`) stays pruned. `prune(model, macs=0.5, unit="channel",
    example=x)` removes channels until half the arithmetic is left and returns a really smaller model.

    Args:
        model: any module; untouched unless `inplace`.
        sparsity: share of zeros among prunable weights, in [0, 1). Leave out with `keep` or an N:M unit.
        keep: how many weights to keep instead of a share.
        unit: "weight", "2:4" (keep 2 of 4 inputs), "row", "block-4x1": zeros in place. "channel", "head", "layer",
            "expert": removed, with everything coupled to them; needs `example`.
        score: see `prunus ls scores`.
        budget: see `prunus ls budgets`; default "global" ("row-wise" for Wanda).
        data: batches (inputs, labels) for scores that need them, iterated once; or one batch as a tuple (x, y).
        batches: use at most this many batches.
        example: one input (tensor with batch axis, or tuple) for shapes, MACs and latency; default: from `data`.
        loss: function of (output, target) giving a scalar; default cross-entropy of logits.
        rounds: scoring rounds with exponentially falling density; default what the score's authors use.
        masks: earlier masks to prune further.
        include, exclude: shell patterns of parameter names (see `prunus.parameters.prunable`).
        seed: for random scores.
        train_mode: score in train mode (batch statistics) instead of eval.
        on_round: called as (round, rounds) after each scoring round, to show progress.
        inplace: prune `model` itself instead of a copy.
        measure: fill MACs and measured latency in the report (needs an example).
        structural: for units that are removed: macs, params, bytes, latency, latency_ms (targets instead of
            `sparsity`), scope, pool, normalise, minimum, round_to, protect, norms, compensate, calibration, verify,
            on_stage; see
            `prunus.structured.prune.prune_structured`. The options keep, budget, rounds, masks, include, exclude and
            on_round belong to units that are zeroed.

    Returns:
        `Pruned` with `.model`, `.masks`, `.report`, `.save(path)`; for units that are removed a
        `prunus.structured.prune.SmallModel` with `.model`, `.plan`, `.report`, `.save(path)`.

    Raises:
        InvalidValue: sparsity outside [0, 1) or given as text, contradictory options, or missing data.
        NothingPrunable, NonFinite, UnknownName, Infeasible: as their names say.
    """
    what = unit_of(unit)
    zeroing = {
        "keep": keep, "budget": budget, "rounds": rounds, "masks": masks, "on_round": on_round,
        "include": include or None, "exclude": exclude or None,
    }  # fmt: skip
    if isinstance(what, Structural):
        unwanted = [n for n, v in zeroing.items() if v is not None]
        if unwanted:
            raise InvalidValue(
                f"{unwanted[0]} belongs to units that are zeroed; unit {what} has macs, params, scope, "
                "minimum, round_to, protect... instead."
            )
        from prunus.structured.prune import prune_structured

        known = set(inspect.signature(prune_structured).parameters)
        for name in structural:
            if name not in known:
                raise unknown("option", name, known)
        if data is not None and batches is not None:
            data = itertools.islice(data, batches)
        if example is None and data is not None:
            data = read_data(data, None, None, next(model.parameters()).device)
            example = data[0]
        return prune_structured(
            model, sparsity, unit=what.kind, score=score, data=data, example=example, loss=loss, seed=seed,
            train_mode=train_mode, inplace=inplace, measure=measure, **structural,
        )  # fmt: skip
    if structural:
        raise InvalidValue(
            f"{next(iter(structural))} belongs to units that are removed; unit {what} is zeroed. Ask "
            'for unit="channel" (or "head", "layer"), or leave the option out.'
        )
    if score in UNIT_SCORES:
        info = UNIT_SCORES.entry(score)
        raise InvalidValue(f"score {info.name!r} ranks whole units ({', '.join(info.units)}), not unit {what}.")
    addresses = prunable(model, include=include, exclude=exclude)
    device = next(iter(parameters_of(model, addresses).values())).device
    read = read_data(data, batches, example, device)
    if example is None and read:
        example = read[0]
    original = model
    if not inplace:
        model = copied(model)
    chosen = choose(
        model,
        sparsity,
        keep=keep,
        unit=what,
        score=score,
        budget=budget,
        data=read or None,
        loss=loss,
        rounds=rounds,
        masks=masks,
        include=include,
        exclude=exclude,
        seed=seed,
        train_mode=train_mode,
        on_round=on_round,
    )
    chosen.apply(model)
    report = compare(
        original if not inplace else None,
        model,
        chosen,
        addresses.skipped,
        example=example,
        unit=str(what),
        measure=measure,
    )
    return Pruned(model, chosen, report)
