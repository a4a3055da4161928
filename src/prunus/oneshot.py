"""`prunus.prune`: choose units, score them, spend a budget; and what comes back, which can be saved and loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn

from prunus.budget.allocate import check_fraction
from prunus.budget.budgets import Budget, Problem, budget, decide
from prunus.budget.select import keep_count
from prunus.distributed import agree
from prunus.errors import DamagedFile, InvalidValue, MaskMismatch
from prunus.files import sha256_bytes, write_atomic
from prunus.masks import Masks
from prunus.measure.pruning_report import PruningReport, compare
from prunus.parameters import Prunable, check_finite, parameters_of, prunable, unwrap
from prunus.schedule import exponential
from prunus.scores.registry import SCORES
from prunus.stats import Loss, gather, preserved, read_batch
from prunus.units import NM, Unit, unit

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
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, value in bare.state_dict().items():
        place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.numel() and place in seen:
            aliases[name] = seen[place]  # tied tensors are stored once
            continue
        seen[place] = name
        value = value.detach().cpu()
        if name in masks:
            tensors[f"kept:{name}"] = value[masks[name].cpu()].contiguous()
        else:
            tensors[f"full:{name}"] = value.contiguous().clone()
    tensors |= {f"mask:{n}": bits for n, bits in masks.packed().items()}
    header = {
        "format": _FORMAT,
        "shapes": json.dumps({n: list(m.shape) for n, m in masks.items()}),
        "aliases": json.dumps(aliases),
    }
    header["sha256"] = _content_hash(header, tensors)
    return safetensors_save(tensors, metadata=header)


def _content_hash(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    described = [f"{n}|{t.dtype}|{list(t.shape)}|{sha256_bytes(_bytes(t))}" for n, t in sorted(tensors.items())]
    return sha256_bytes("\n".join([header["format"], header["shapes"], header["aliases"], *described]).encode())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def load(path: Path | str, model: Model, *, with_masks: bool = False) -> Any:
    """Put a file written by `Pruned.save` into `model`, a fresh instance of the same class.

    Args:
        path: the file.
        model: the instance to fill, in place.
        with_masks: return (model, masks) instead of the model.

    Raises:
        DamagedFile: the file is missing, truncated, or differs from what was written in any bit.
        MaskMismatch: the file belongs to another architecture.
    """
    source = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DamagedFile(f"model file {source} cannot be read: {error.strerror}.") from error
    try:
        tensors = safetensors_load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        sound = header["format"] == _FORMAT and header["sha256"] == _content_hash(header, tensors)
        shapes, aliases = json.loads(header["shapes"]), json.loads(header["aliases"])
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
    bare = unwrap(model)
    theirs = {n: tuple(t.shape) for n, t in bare.state_dict().items()}
    mine = {n: tuple(t.shape) for n, t in state.items()}
    different = sorted(n for n in theirs.keys() | mine.keys() if theirs.get(n) != mine.get(n))
    if different:
        first = different[0]
        raise MaskMismatch(
            f"{source} does not fit {type(bare).__name__}: {len(different)} tensors differ, first {first!r} "
            f"(file {mine.get(first, 'absent')}, model {theirs.get(first, 'absent')})."
        )
    bare.load_state_dict(state)
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
    inplace: bool = False,
    measure: bool = True,
) -> Pruned:
    """Prune a model now: score every weight, keep the best, zero the rest.

    `prune(model, 0.9)` keeps the 10 % largest magnitudes of the whole net. The count is exact; equal scores keep
    the earlier position; what was pruned before (`masks`) stays pruned.

    Args:
        model: any module; untouched unless `inplace`.
        sparsity: share of zeros among prunable weights, in [0, 1). Leave out with `keep` or an N:M unit.
        keep: how many weights to keep instead of a share.
        unit: "weight", "2:4" (keep 2 of 4 inputs), "row", "block-4x1".
        score: see `prunus ls scores`.
        budget: see `prunus ls budgets`; default "global" ("row-wise" for Wanda).
        data: batches (inputs, labels) for scores that need them; iterated once.
        batches: use at most this many batches.
        example: one input (tensor with batch axis, or tuple) for shapes, MACs and latency; default: from `data`.
        loss: function of (output, target) giving a scalar; default cross-entropy of logits.
        rounds: scoring rounds with exponentially falling density; default what the score's authors use.
        masks: earlier masks to prune further.
        include, exclude: shell patterns of parameter names (see `prunus.parameters.prunable`).
        seed: for random scores.
        train_mode: score in train mode (batch statistics) instead of eval.
        inplace: prune `model` itself instead of a copy.
        measure: fill MACs and measured latency in the report (needs an example).

    Returns:
        `Pruned` with `.model`, `.masks`, `.report`, `.save(path)`.

    Raises:
        InvalidValue: sparsity outside [0, 1) or given as text, contradictory options, or missing data.
        NothingPrunable, NonFinite, UnknownName, Infeasible: as their names say.
    """
    what, info = _unit(unit), SCORES.entry(score)
    addresses = prunable(model, include=include, exclude=exclude)
    if masks is not None:
        masks.check_same(parameters_of(model, addresses))
    target = _target(addresses, what, sparsity, keep)
    check_finite({n: p.detach() for n, p in parameters_of(model, addresses).items()}, "weight")
    chosen = _budget(budget, info.name)
    device = next(iter(parameters_of(model, addresses).values())).device
    read = _read_data(data, batches, example, device)
    if example is None and read:
        example = read[0]
    original = model
    if not inplace:
        model = copy.deepcopy(model)

    current = masks if masks is not None else Masks.full(model, include=include, exclude=exclude)
    rounds = info.rounds if rounds is None else rounds
    if rounds < 1:
        raise InvalidValue(f"rounds {rounds} must be at least 1.")
    total = addresses.total
    start = 1.0 - current.kept / total
    for number in range(1, rounds + 1):
        last = number == rounds
        keep_now = target if last else keep_count(total, exponential(start, 1.0 - target / total, number / rounds))
        current.apply(model)
        scores, ratio_scores = _scores(
            model, addresses, [info.name, *chosen.needs_scores], read, loss, current, seed, number, train_mode
        )
        problem = Problem(
            addresses=addresses,
            scores=scores,
            keep=keep_now,
            unit=what,
            ratio_scores=ratio_scores,
            distortion=_distortion(model, read, current) if chosen.needs_distortion else None,
        )
        current = agree(decide(problem, chosen) & current)
    current.apply(model)
    report = compare(
        original if not inplace else None,
        model,
        current,
        addresses.skipped,
        example=example,
        unit=str(what),
        measure=measure,
    )
    return Pruned(model, current, report)


def _unit(spec: str | Unit) -> Unit:
    return unit(spec)


def _budget(spec: Any, score: str) -> Budget:
    if spec is None:
        spec = "row-wise" if score == "wanda" else "global"
    return budget(spec)


def _target(addresses: Prunable, what: Unit, sparsity: float | None, keep: int | None) -> int:
    """Return how many elements stay, from a share, a count, or a pattern."""
    total = addresses.total
    if isinstance(what, NM):
        if keep is not None or (
            sparsity is not None and abs(check_fraction("sparsity", sparsity) - 1 + what.density) > 1e-6
        ):
            raise InvalidValue(
                f"pattern {what} fixes the sparsity at {1 - what.density:g}; leave sparsity and "
                "keep out, or give that value."
            )
        return sum(what.kept(a) for a in addresses.values())
    if (sparsity is None) == (keep is None):
        raise InvalidValue("give exactly one of sparsity (a share of zeros in [0, 1)) and keep (a count of weights).")
    if keep is not None:
        if isinstance(keep, bool) or not isinstance(keep, int) or not 0 < keep <= total:
            raise InvalidValue(
                f"keep {keep!r} must be a whole number from 1 to {total}, the number of prunable weights."
            )
        return keep
    assert sparsity is not None
    return keep_count(total, check_fraction("sparsity", sparsity, one_allowed=False))


def _read_data(data: Any, batches: int | None, example: Any, device: torch.device) -> list[Any]:
    if data is None:
        return [read_batch(example, device)] if example is not None else []
    read: list[Any] = []
    for batch in data:
        if batches is not None and len(read) >= batches:
            break
        read.append(read_batch(batch, device))
    if not read:
        raise InvalidValue("data is empty; give at least one batch.")
    return read


def _scores(
    model: nn.Module,
    addresses: Prunable,
    names: Sequence[str],
    read: Sequence[Any],
    loss: Loss | None,
    current: Masks,
    seed: int,
    number: int,
    train_mode: bool,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return the first score, and all of them by name, with pruned entries at -inf."""
    infos = [SCORES.entry(n) for n in names]
    needs = [need for info in infos for need in info.needs]
    evidence = gather(
        model, addresses, needs, data=read, loss=loss, seed=seed + number - 1, round=number, train=train_mode
    )
    result: dict[str, dict[str, Tensor]] = {}
    for info in infos:
        function = info.load()
        result[info.name] = {}
        for name in addresses:
            value = function(**{need: evidence[name][need] for need in info.needs}).to(evidence_device(current, name))
            if current.count(name) < value.numel():
                value = value.masked_fill(~current[name], -torch.inf)
            result[info.name][name] = value
    return result[infos[0].name], {n: result[SCORES.entry(n).name] for n in names[1:]}


def evidence_device(masks: Masks, name: str) -> torch.device:
    """Return the device on which one tensor's scores and mask meet: the mask's."""
    return masks[name].device


def _distortion(model: nn.Module, read: Sequence[Any], current: Masks) -> Any:
    """Return a function from masks of some tensors to the mean squared change of the model's output."""
    if not read:
        raise InvalidValue("a rate-distortion budget compares outputs on calibration inputs; pass data=.")
    parameters = parameters_of(model, current)

    def outputs() -> list[Tensor]:
        with preserved(model), torch.no_grad():
            found = [model(*b.args, **b.kwargs) for b in read]
        return [getattr(o, "logits", o).double() for o in found]

    reference = outputs()

    @torch.no_grad()
    def distortion(masks: Mapping[str, Tensor]) -> float:
        saved = {n: parameters[n].detach().clone() for n in masks}
        try:
            for name, mask in masks.items():
                parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)
            now = outputs()
        finally:
            for name, value in saved.items():
                parameters[name].copy_(value)
        changed = sum(float((a - b).square().sum()) for a, b in zip(now, reference, strict=True))
        return changed / sum(r.numel() for r in reference)

    return distortion
