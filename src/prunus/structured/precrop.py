"""PreCrop and PreConfig: choose layer densities before training and realise them as narrower (or wider) layers.

Source: "Structured Pruning is All You Need for Pruning CNNs at Initialization", Cai, Hua, Chen, Suh, De Sa and Zhang,
2022 (arXiv 2203.02549, later "Structured Pruning of CNNs at Initialization"). No code of the authors is known: what
follows rests on the abstracts, on published reviews and on derivation. One width per family of coupled channels and
the rounding are choices of this library; the authors' treatment of residual streams (convolutions that read only the
first channels) is not.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from prunus.budget.synexp import water_fill
from prunus.errors import InvalidValue, NothingPrunable, Unsupported, unknown
from prunus.graph.couple import couple
from prunus.graph.plan import Plan
from prunus.graph.record import record
from prunus.masks import Masks
from prunus.measure.cost import layer_costs
from prunus.models.create import seeded
from prunus.models.initialise import kaiming
from prunus.parameters import unwrap
from prunus.structured.widths import Limit, Part, WidthSpace, best_widths, fit_widths, root_widths, scaled, whole_widths

REALISATIONS = ("root", "fit", "flow", "uniform")


@dataclass(frozen=True)
class Crop:
    """Widths chosen under budgets.

    Attributes:
        widths: family of coupled channels -> units left (more than `sizes` only where widening was allowed).
        sizes: family -> units of the given network.
        densities: weight tensor -> share left.
        params: all parameters at these widths.
        macs: multiply-accumulates of one example in weight tensors at these widths.
    """

    widths: dict[str, int]
    sizes: dict[str, int]
    densities: dict[str, float]
    params: int
    macs: int

    @property
    def wider(self) -> tuple[str, ...]:
        """Families that got more units than the network has."""
        return tuple(name for name, width in self.widths.items() if width > self.sizes[name])

    @property
    def saturated(self) -> tuple[str, ...]:
        """Families that keep their full width; a wider network might give them more."""
        return tuple(name for name, width in self.widths.items() if width == self.sizes[name])


@dataclass(frozen=True)
class Cropped:
    """What `precrop` returns.

    Attributes:
        model: the narrower network with new initial weights.
        plan: what was cut from the given network.
        crop: widths, densities and costs.
    """

    model: nn.Module
    plan: Plan
    crop: Crop


def width_space(model: nn.Module, example: Any, coupling: Any = None) -> WidthSpace:
    """Return the network as widths see it: families of coupled channels, tensors in parts, uses of every weight.

    Families of a single unit and axes that belong to no family stay as they are. Heads are units where the graph says
    so; the width of a head stays.

    Args:
        model: the network.
        example: one batch of inputs.
        coupling: result of `prunus.graph.couple.couple` for this model, when it is known already.

    Raises:
        NothingPrunable: no family has two units.
        Unsupported: two families claim one position.
    """
    model = unwrap(model)
    coupling = couple(record(model, example)) if coupling is None else coupling
    families = [f for f in coupling.primary() if f.size > 1]
    if not families:
        raise NothingPrunable(f"no width of {type(model).__name__} can change. {dict(coupling.unprunable)}")
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    owners = {name: [np.full(length, -1) for length in shape] for name, shape in parameters.items()}
    for number, family in enumerate(families):
        for slot in family.slots:
            if slot.tensor not in owners:
                continue  # statistics of norm layers are no parameters
            owner = owners[slot.tensor][slot.axis]
            places = np.asarray(slot.index).reshape(-1)
            if (owner[places] >= 0).any():
                other = families[int(owner[places].max())].name
                raise Unsupported(f"{family.name!r} and {other!r} both own entries of {slot.tensor}:{slot.axis}.")
            owner[places] = number
    layouts: dict[str, tuple[tuple[Part, ...], ...]] = {}
    for name, axes in owners.items():
        parts = [np.unique(owner, return_counts=True) for owner in axes]
        layouts[name] = tuple(tuple((int(f), int(n)) for f, n in zip(*p, strict=True)) for p in parts)
    positions = {name: cost.positions for name, cost in layer_costs(model, example).items() if cost.macs}
    return WidthSpace(tuple(f.name for f in families), tuple(int(f.size) for f in families), layouts, positions)


def choose_widths(
    space: WidthSpace,
    *,
    params: float | None = None,
    macs: float | None = None,
    densities: Mapping[str, float] | None = None,
    realise: str = "root",
    preconfig: bool = False,
) -> Crop:
    """Return the widths of a network under a budget of parameters, of multiply-accumulates, or of both.

    Args:
        space: the network, see `width_space`.
        params: limit of all parameters: a share in (0, 1] of the network's, or a count (a whole number above 1).
        macs: limit of multiply-accumulates of one example in weight tensors, likewise.
        densities: weight tensor -> density to follow; default those of the largest expected flow (`water_fill`).
        realise: "root": the square root of every density, averaged where layers share a width; "fit": products of
            widths near the densities by least squares in the logarithm; both are then scaled to the budget. "flow":
            the largest expected flow over the widths themselves; "uniform": one share of every width.
        preconfig: let families grow beyond their width.

    Raises:
        InvalidValue: no budget, a budget out of range, or densities for a realisation that takes none.
        UnknownName: an unknown realisation, or a density of an unknown tensor.
        Infeasible: one unit per family is too much for a budget.
    """
    if realise not in REALISATIONS:
        raise unknown("realisation", realise, REALISATIONS)
    if densities is not None and realise not in ("root", "fit"):
        raise InvalidValue(f"realise={realise!r} takes no densities; use 'root' or 'fit', or leave them out.")
    wanted = {"parameters": (params, space.params), "multiply-accumulates": (macs, space.macs)}
    limits = [
        Limit(terms, _limit(name, value, space.count(terms, space.sizes)), name)
        for name, (value, terms) in wanted.items()
        if value is not None
    ]
    if not limits:
        raise InvalidValue("give a budget: params, macs, or both.")
    upper = math.inf if preconfig else 1.0
    if realise == "flow":
        x = best_widths(space, limits, upper=upper)
    elif realise == "uniform":
        x = scaled(space, np.zeros(len(space.sizes)), limits, upper=upper)
    else:
        followed = flow_densities(space, limits, upper=upper) if densities is None else densities
        x = (root_widths if realise == "root" else fit_widths)(space, followed, limits, upper=upper)
    return crop_of(space, whole_widths(space, x, limits, upper=upper))


def crop_of(space: WidthSpace, widths: Sequence[int]) -> Crop:
    """Return what these widths, one per family, amount to."""
    return Crop(
        dict(zip(space.families, widths, strict=True)),
        dict(zip(space.families, space.sizes, strict=True)),
        space.densities(widths),
        space.count(space.params, widths),
        space.count(space.macs, widths),
    )


def flow_densities(space: WidthSpace, limits: Sequence[Limit], *, upper: float = 1.0) -> dict[str, float]:
    """Return the densities of weight tensors that maximise the expected flow, before anything is said about widths.

    Of a limit, weight tensors get the share that is theirs at full width; biases and norms have the rest.
    """
    names = list(space.positions)
    full = [sum(entries for entries, _ in space.blocks(name)) for name in names]
    costs, shares = [], []
    for limit in limits:
        uses = [space.positions[n] if limit.name == "multiply-accumulates" else 1 for n in names]
        costs.append([n * u for n, u in zip(full, uses, strict=True)])
        shares.append(limit.limit * sum(costs[-1]) / space.count(limit.terms, space.sizes))
    level = water_fill(costs, shares, upper=upper)
    return dict(zip(names, level.densities.tolist(), strict=True))


def _limit(name: str, value: float, total: int) -> float:
    """Return a limit as a count, from a share or a count."""
    fine = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if fine and 0 < value <= 1:
        return float(math.floor(value * total + 1e-6))
    if fine and value > 1 and float(value).is_integer():
        return float(value)
    raise InvalidValue(f"{name} {value!r} is neither a share in (0, 1] nor a whole number of {name}.")


def crop_plan(coupling: Any, crop: Crop) -> Plan:
    """Return the plan that keeps the first units of every family; which ones is of no matter before training.

    Raises:
        Unsupported: a family is to grow, which cutting cannot do.
    """
    if crop.wider:
        name = crop.wider[0]
        factor = max(crop.widths[n] / crop.sizes[n] for n in crop.wider)
        raise Unsupported(
            f"{len(crop.wider)} families are to grow ({name}: {crop.sizes[name]} to {crop.widths[name]} units), but a "
            f"plan only cuts. Start from the same network {math.ceil(factor)} times as wide and give the budget as a "
            "count, or read the widths from the crop and build the network yourself."
        )
    keep = {n: np.arange(size) < crop.widths[n] for n, size in crop.sizes.items() if crop.widths[n] < size}
    return Plan.from_keep(coupling, keep)


def reinitialise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw new initial weights in place and return the model: N(0, 2 / fan-in) for linear layers and convolutions.

    Other modules get their own defaults (`reset_parameters`), which makes norm layers the identity with fresh
    statistics. Parameters that a module holds by itself, such as position embeddings, keep their values.
    """
    with seeded(seed, "reinitialise"):
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        kaiming(model)
    return model


def precrop(
    model: nn.Module,
    example: Any,
    *,
    params: float | None = None,
    macs: float | None = None,
    densities: Mapping[str, float] | Masks | None = None,
    realise: str = "root",
    preconfig: bool = False,
    seed: int = 0,
) -> Cropped:
    """Crop an untrained network to a budget: choose widths, cut every family to its first channels, initialise anew.

    PreConfig (`preconfig`) drops the upper limit of the widths. Where a width is to grow beyond the given network,
    which a cut cannot do, start from a network several times as wide with the budget as a count: nothing but the upper
    limit refers to the network's own widths, so those chosen are nearly the same.

    Args:
        model: the network; left as it is.
        example: one batch of inputs.
        params, macs, realise, preconfig: as in `choose_widths`.
        densities: weight tensor -> density, or masks of any pruning at initialisation, whose densities count.
        seed: of the new initial weights.

    Raises:
        Unsupported: a width is to grow.
        InvalidValue, UnknownName, Infeasible, NothingPrunable: as `choose_widths` and `width_space`.
    """
    coupling = couple(record(unwrap(model), example))
    space = width_space(model, example, coupling)
    if isinstance(densities, Masks):
        densities = {row.name: row.density for row in densities.table() if row.name in space.positions}
    crop = choose_widths(space, params=params, macs=macs, densities=densities, realise=realise, preconfig=preconfig)
    plan = crop_plan(coupling, crop)
    return Cropped(reinitialise(plan.apply(unwrap(model)), seed), plan, crop)
