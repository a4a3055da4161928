"""OBSPA: optimal brain surgery on coupled channels, for pruning without fine-tuning.

Source: Wang, Rachwan, Guennemann and Charpentier, Structurally Prune Anything, arXiv 2403.18955, 2024. The algebra
follows from optimal brain surgery (see `prunus.structured.obs`); which layers count in the score, how many samples are
drawn and from which noise are not verified against the paper, and choices here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, NonFinite, Unsupported, unknown
from prunus.evidence import Batch
from prunus.graph.couple import Coupling, Family, Slot
from prunus.graph.plan import Plan
from prunus.graph.record import arguments
from prunus.keep import read_data
from prunus.measure.forwarding import device_of
from prunus.measure.recalibrate import recalibrate as renew_statistics
from prunus.parameters import Address, check_finite, copied, parameters_of, unwrap
from prunus.randomness import generator
from prunus.structured import obs
from prunus.structured.gram import LIMIT, Gram, columns, columns_of, gather, order
from prunus.structured.removal import Compensated, Keep, as_plan, gone, kept_units

UNIT = 3**0.5  # noise from [-UNIT, UNIT) has mean 0 and variance 1, like standardised inputs
_MEMORY = 1 << 27  # float64 entries of Gram matrices held at once: 1 GiB
_NOISE_BATCH = 64


def noise(
    example: Any, samples: int, *, low: float = -UNIT, high: float = UNIT, seed: int = 0, device: Any = "cpu"
) -> list[Batch]:
    """Return batches of uniform noise in the shape of an example, drawn from [low, high); default unit variance.

    Args:
        example: as `prunus.graph.record.record` takes it; every tensor with the batch axis of the first is redrawn.
        samples: how many.
        seed: key of the draw.
        device: where batches are put.

    Raises:
        InvalidValue: no example, no samples, or an empty range.
        Unsupported: an input that is not floating point, such as token ids.
    """
    if samples < 1 or not low < high:
        raise InvalidValue(f"noise needs samples from 1 up and low < high, got {samples}, {low}, {high}.")
    args, kwargs = arguments(example)
    given = {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
            raise Unsupported(
                f"input {name!r} is no floating-point tensor with a batch axis, so noise is no stand-in; pass data=."
            )
    batches = []
    for start in range(0, samples, _NOISE_BATCH):
        count = min(_NOISE_BATCH, samples - start)
        drawn = {
            name: low
            + (high - low)
            * torch.rand(count, *value.shape[1:], generator=generator(seed, "noise", name, start), dtype=torch.float64)
            for name, value in given.items()
        }
        moved = {name: x.to(device=device, dtype=given[name].dtype) for name, x in drawn.items()}
        batches.append(Batch(tuple(moved[str(i)] for i in range(len(args))), {k: moved[k] for k in kwargs}, None))
    return batches


def compensate(
    model: nn.Module,
    coupling: Coupling,
    keep: Keep,
    *,
    data: Iterable[Any] | None = None,
    example: Any = None,
    seed: int = 0,
    samples: int = 256,
    low: float = -UNIT,
    high: float = UNIT,
    damp: float = 0.01,
    recalibrate: bool | None = None,
    oversize: str = "error",
) -> Compensated:
    """Readjust every layer that loses inputs, so that its outputs stay as near as they can.

    In forward order, each consumer reads its inputs through the prefix as it is by then (columns removed, the others
    readjusted), and its weight becomes W - W_S (G_SS)^-1 G_S,: for the removed columns S. Channels stay alive until
    their last consumer has been readjusted. One pass over the data per consumer, which ends at that consumer;
    ResNet-56 on 32x32 images takes about a third of a second of one core per image.

    Args:
        model: untouched.
        coupling: of this model.
        keep: a plan, or {family name: which units stay}.
        data: batches x, (x, y) or (x, y, ids), from the training distribution or another; no labels are used.
        example: one input; without data, uniform noise of its shape is drawn.
        seed, samples, low, high: of the noise (see `noise`).
        damp: share of the mean diagonal added to each Hessian.
        recalibrate: measure BatchNorm statistics anew with the data at the end. Default: with data yes, with noise no,
            because statistics of noise are not those of any real input.
        oversize: layers with more than 8192 columns are an "error", or keep their weights ("diagonal").

    Raises:
        InvalidValue: neither data nor example, or a value out of range.
        Unsupported: a layer beyond the limit; noise for inputs that are not floating point.
        NonFinite: weights or inputs with NaN or infinity.
    """
    _check_oversize(oversize)
    plan = as_plan(coupling, keep)
    work = copied(unwrap(model))
    batches = _batches(work, data, example, seed=seed, samples=samples, low=low, high=high)
    targets, inward = _cut_consumers(coupling, plan)
    if inward is not None:
        work = inward.mask(work)
    weights = parameters_of(work, targets)
    check_finite(weights, "weight")
    uses = order(work, targets, batches[0]) if targets else {}
    lost = {n: {a: gone(plan, n, a, weights[n].shape[a]).to(weights[n].device) for a in targets[n]} for n in targets}
    skipped = {n: "no matrix product or convolution with it was seen" for n in targets if n not in uses}
    for name, (address, _) in uses.items():
        if targets[name] != {_input_axis(address)}:
            skipped[name] = "cut along an axis that is not the input of its layer"
        elif columns(address) > LIMIT and oversize == "diagonal":
            skipped[name] = f"reads {columns(address)} columns, more than {LIMIT}"
    errors: dict[str, float] = {}
    with torch.no_grad():
        for name in skipped:  # layers behind them must not see what goes
            for axis, positions in lost[name].items():
                weights[name].index_fill_(axis, positions, 0.0)
        for name, use in uses.items():
            if name not in skipped:
                gram = gather(work, {name: use}, batches)[name]
                updated, errors[name] = readjusted(weights[name], gram, lost[name][_input_axis(use[0])], damp)
                weights[name].copy_(updated)
    final = plan.mask(work)
    if recalibrate or (recalibrate is None and data is not None):
        renew_statistics(final, [b.kwargs or (b.args,) for b in batches])
    return Compensated(final, plan, errors, skipped)


def readjusted(weight: Tensor, gram: Gram, removed: Tensor, damp: float = 0.01) -> tuple[Tensor, float]:
    """Return a weight without some of its inputs, the others readjusted, and the share of output energy that is lost.

    Args:
        weight: in its own shape.
        gram: of its inputs, in full.
        removed: positions on the weight's input axis (see `prunus.structured.gram.columns_of`).
        damp: see `prunus.structured.obs.hessian`.
    """
    address = gram.address
    matrix = address.rows(weight).unflatten(0, (address.groups, -1)).double()
    sets = columns_of(address, removed)
    cost = energy = 0.0
    parts = []
    for part, moments, columns_gone in zip(matrix, gram.matrix, sets, strict=True):
        h, dead = obs.hessian(moments, damp)
        g = obs.inverse(h)
        live = part.masked_fill(dead, 0.0)
        cost += float(obs.removal_costs(live, g, columns_gone[None]).sum())
        energy += float(0.5 * ((live @ h) * live).sum())
        parts.append(obs.without(part, g, columns_gone))
    result = address.unrows(torch.cat(parts)).to(weight.dtype)
    if not bool(torch.isfinite(result).all()):
        raise NonFinite(f"the readjusted weight {address.name!r} is not finite; raise damp or give more data.")
    return result, cost / energy if energy else 0.0


def unit_scores(
    model: nn.Module,
    coupling: Coupling,
    *,
    families: Iterable[str] | None = None,
    data: Iterable[Any] | None = None,
    example: Any = None,
    seed: int = 0,
    samples: int = 256,
    low: float = -UNIT,
    high: float = UNIT,
    damp: float = 0.01,
    form: str = "joint",
    producers: bool = False,
    oversize: str = "diagonal",
) -> dict[str, Tensor]:
    """Return what the removal of each unit costs, summed over the layers that read it.

    The cost of a layer is the squared error of its outputs, summed over positions and averaged over examples, once its
    other inputs have made up for the unit: 1/2 tr(W_S (G_SS)^-1 W_S^T) with S all columns of the unit.

    Args:
        model, data, example, seed, samples, low, high, damp: see `compensate`.
        coupling: of this model.
        families: names of the families to score; default `coupling.primary()`.
        form: "joint", or "separate": the sum over columns of W_ij^2 / (2 G_jj), which is cheaper and ignores that
            columns of one unit go together.
        producers: add the output energy of the layers that make the unit. (Whether the paper counts them is not
            verified.) Families that no layer reads, such as query and key features, are always scored so.
        oversize: layers with more than 8192 columns count by the diagonal of H alone ("diagonal"), or are an "error".

    Returns:
        {family name: (size,) float64, higher = keep}; families without any layer that could be measured are left out.
    """
    _check_oversize(oversize)
    if form not in ("joint", "separate"):
        raise unknown("form of the score", form, ("joint", "separate"))
    work = copied(unwrap(model))
    batches = _batches(work, data, example, seed=seed, samples=samples, low=low, high=high)
    wanted = _families(coupling, families)
    chosen: dict[str, list[Slot]] = {}
    for family in wanted:
        readers = [s for s in family.slots if s.role == "input"]
        makers = [s for s in family.slots if s.role == "output"] if producers or not readers else []
        chosen[family.name] = readers + makers
    shapes = {n: t.shape for n, t in work.named_parameters()}
    names = [s.tensor for slots in chosen.values() for s in slots if len(shapes.get(s.tensor, ())) >= 2]
    check_finite(parameters_of(work, dict.fromkeys(names)), "weight")
    totals = {f.name: torch.zeros(f.size, dtype=torch.float64) for f in wanted}
    measured: set[str] = set()
    for grams in _in_parts(work, dict.fromkeys(names), batches, oversize):
        weights = parameters_of(work, grams)
        for family in wanted:
            for slot in chosen[family.name]:
                if slot.tensor in grams:
                    weight, gram = weights[slot.tensor].detach(), grams[slot.tensor]
                    totals[family.name] += _slot_costs(weight, gram, slot, damp, form).cpu()
                    measured.add(family.name)
    found = {name: total for name, total in totals.items() if name in measured}
    check_finite(found, "score")
    return found


def _slot_costs(weight: Tensor, gram: Gram, slot: Slot, damp: float, form: str) -> Tensor:
    """Return the costs of the units of a slot in one layer, (units,) float64."""
    address = gram.address
    positions = torch.as_tensor(slot.index, device=weight.device)
    parts = address.rows(weight).unflatten(0, (address.groups, -1)).double()
    if slot.axis != _input_axis(address):
        return _energies(parts, gram, address, positions)
    costs = torch.zeros(len(positions), dtype=torch.float64, device=weight.device)
    per_unit = [columns_of(address, p) for p in positions]
    for group, (part, moments) in enumerate(zip(parts, gram.matrix, strict=True)):
        sets = [unit[group] for unit in per_unit]
        if gram.diagonal:
            single = part.square().sum(0) * moments
        else:
            h, dead = obs.hessian(moments, damp)
            g = obs.inverse(h)
            part = part.masked_fill(dead, 0.0)
            if form == "joint" and len({len(s) for s in sets}) == 1:
                costs += obs.removal_costs(part, g, torch.stack(sets))
                continue
            if form == "joint":
                costs += torch.stack([obs.removal_costs(part, g, s[None])[0] for s in sets])
                continue
            single = obs.column_costs(part, g)
        costs += torch.stack([single[s].sum() for s in sets])
    return costs


def _energies(parts: Tensor, gram: Gram, address: Address, positions: Tensor) -> Tensor:
    """Return the output energy 1/2 w H w^T of the rows of each unit (without damping)."""
    if gram.diagonal:
        rows = (parts.square() * gram.matrix[:, None]).sum(-1)
    else:
        rows = ((parts @ gram.matrix) * parts).sum(-1)
    # Offsets on the output axis of a transposed convolution stand for one channel of every group.
    rows = rows.sum(0) if address.kind == "conv-transpose" else rows.flatten()
    return rows[positions].sum(1)


def _in_parts(
    model: nn.Module, names: Mapping[str, None], batches: Sequence[Batch], oversize: str
) -> Iterable[dict[str, Gram]]:
    """Yield Gram matrices of the weights, as many at a time as memory allows; one pass over the data each."""
    uses = order(model, names, batches[0]) if names else {}
    large = {n: u for n, u in uses.items() if columns(u[0]) > LIMIT and oversize == "diagonal"}
    if large:
        yield gather(model, large, batches, diagonal=True)
    part: dict[str, tuple[Address, int]] = {}
    held = 0
    for name, use in uses.items():
        if name in large:
            continue
        size = use[0].groups * columns(use[0]) ** 2
        if part and held + size > _MEMORY:
            yield gather(model, part, batches)
            part, held = {}, 0
        part[name] = use
        held += size
    if part:
        yield gather(model, part, batches)


def _batches(model: nn.Module, data: Any, example: Any, **options: Any) -> list[Batch]:
    """Return the data, or noise in the shape of the example."""
    device = device_of(model)
    if data is not None:
        return read_data(data, None, None, device)
    if example is None:
        raise InvalidValue(
            "compensation reads the inputs of layers; pass data=, or example= to use noise of its shape."
        )
    return noise(example, device=device, **options)


def _input_axis(address: Address) -> int:
    """Return the axis of a weight that its inputs lie on."""
    return 1 - address.output_axis


def _cut_consumers(coupling: Coupling, plan: Plan) -> tuple[dict[str, set[int]], Plan | None]:
    """Return the weights that lose inputs with their cut axes, and the part of the plan that no weight reads."""
    targets: dict[str, set[int]] = {}
    inward: dict[str, Any] = {}
    for family in coupling.families:
        kept = kept_units(plan, family)
        if kept.all():
            continue
        readers = [s for s in family.slots if s.role == "input"]
        for slot in readers:
            targets.setdefault(slot.tensor, set()).add(slot.axis)
        if not readers:
            inward[family.name] = kept
    return targets, Plan.from_keep(coupling, inward) if inward else None


def _families(coupling: Coupling, names: Iterable[str] | None) -> list[Family]:
    if names is None:
        return list(coupling.primary())
    known = {f.name: f for f in coupling.families}
    for name in (names := list(names)):
        if name not in known:
            raise unknown("family", name, known)
    return [known[n] for n in names]


def _check_oversize(oversize: str) -> None:
    if oversize not in ("error", "diagonal"):
        raise unknown("oversize", oversize, ("error", "diagonal"))
