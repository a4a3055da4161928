"""PreCrop and PreConfig: narrow an untrained network to a budget, then train it like any other.

Source: "Structured Pruning is All You Need for Pruning CNNs at Initialization", Cai et al., 2022 (arXiv 2203.02549).
"""

from __future__ import annotations

from collections.abc import Mapping

from prunus.budget.registry import BUDGETS
from prunus.errors import unknown
from prunus.masks import Masks
from prunus.procedures.common import Outcome, check_sparsity, cut, length, shorter
from prunus.procedures.cutting import Cut, coupling_of, inputs
from prunus.run.stages import Run, State
from prunus.scores.registry import SCORES
from prunus.structured.precrop import choose_widths, crop_of, crop_plan, reinitialise, width_space


def layer_densities(run: Run, name: str, sparsity: float, source: str) -> dict[str, float]:
    """Return the density of every weight under masks of the untrained network, of which nothing else is used.

    Args:
        run: data and model.
        name: of the stage.
        sparsity: of the masks.
        source: a score ("synflow", "grasp", "snip"...; one ranking over the whole net) or a budget ("erk"...).

    Raises:
        UnknownName: neither.
    """
    if source in SCORES:
        masks: Masks = cut(run, name, run.initial, sparsity, score=source)
    elif source in BUDGETS:
        masks = cut(run, name, run.initial, sparsity, score="random", budget=source)
    else:
        raise unknown("source of densities", source, ["flow", *(e.name for e in (*SCORES, *BUDGETS))])
    return {row.name: row.density for row in masks.table()}


def precrop(
    run: Run,
    *,
    sparsity: float = 0.5,
    params: float | None = None,
    macs: float | None = None,
    densities: str = "flow",
    realise: str = "root",
    preconfig: bool = False,
    epochs: int | None = None,
) -> Outcome:
    """Choose widths under a budget, cut the untrained network to them, give it new weights, and train it.

    Args:
        run: stages, data, model and training choices.
        sparsity: share of all parameters to be removed, when neither `params` nor `macs` is given; never less is.
            Also the sparsity of the masks that `densities` are read from.
        params, macs: limits, as shares or counts, see `prunus.structured.precrop.choose_widths`.
        densities: where layer densities come from: "flow" (the largest expected synaptic flow, no data), a score
            ("synflow", "grasp", "snip"...) or a budget ("erk"...) of masks at initialisation.
        realise: "root", "fit", "flow" or "uniform", see `prunus.structured.precrop.choose_widths`.
        preconfig: let layers grow beyond their width; refused where one does, because a cut cannot widen: start from a
            wider network and give `params` or `macs` as a count.
        epochs: length of the training; default the run's.

    The details hold widths, densities and costs.
    """
    check_sparsity(sparsity)
    training = run.training if epochs is None else shorter(run.training, epochs)
    if params is None and macs is None:
        params = 1 - sparsity
    coupling = coupling_of(run, run.initial)
    space = width_space(run.model, inputs(run), coupling)
    followed = None
    if densities != "flow":
        found = layer_densities(run, "densities", sparsity, densities)
        followed = {name: density for name, density in found.items() if name in space.positions}

    def work() -> Mapping[str, int]:
        return choose_widths(
            space, params=params, macs=macs, densities=followed, realise=realise, preconfig=preconfig
        ).widths

    described = {
        "sizes": dict(zip(space.families, space.sizes, strict=True)),
        "params": params,
        "macs": macs,
        "densities": followed,
        "realise": realise,
        "preconfig": preconfig,
    }
    widths = run.compute("widths", described, work)
    crop = crop_of(space, [int(widths[name]) for name in space.families])
    shape = Cut(crop_plan(coupling, crop))
    start = State.of(reinitialise(shape.apply(run.model), run.seed).state_dict(), shape=shape)
    state = run.train("train", start=start, training=training)
    whole = crop_of(space, space.sizes)
    details = {
        "widths": crop.widths,
        "full_widths": crop.sizes,
        "densities": crop.densities,
        "params": crop.params,
        "params_share": crop.params / whole.params,
        "macs": crop.macs,
        "macs_share": crop.macs / whole.macs,
    }
    return Outcome(state, length(run, training), details)
