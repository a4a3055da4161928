"""Layer lottery: tickets that lose whole residual blocks, at initialisation or after training with rewinding.

Source: "When Layers Play the Lottery, all Tickets Win at Initialization", Jordao, de Araujo, Maia and Pedrini, 2023
(arXiv 2301.10835).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.data.balanced import balanced_batch
from prunus.errors import unknown
from prunus.graph.plan import Plan
from prunus.measure.cost import count
from prunus.measure.forwarding import evaluating
from prunus.measure.similarity import linear_cka
from prunus.procedures.common import (
    Outcome,
    calibration_inputs,
    check_sparsity,
    diagnose,
    fresh,
    length,
    measure,
    shorter,
)
from prunus.procedures.cutting import Cut, inputs
from prunus.procedures.imp import dense_by_way_of
from prunus.run.stages import Run, State
from prunus.schedule import Duration
from prunus.structured.layers import (
    Blocks,
    number_for,
    reset_statistics,
    residual_blocks,
    score_blocks,
    worst_blocks,
)

WHEN = ("init", "trained")
STARTS = ("rewind", "reinit")


def find_blocks(run: Run, *, spare_neighbours: bool = False) -> Blocks:
    """Return the residual blocks of the run's network, seen on two training examples."""
    return residual_blocks(run.model, inputs(run), spare_neighbours=spare_neighbours)


def without(run: Run, state: State, names: list[str], step: int = 0) -> State:
    """Return `state` without these blocks: the other weights, norm layers with fresh statistics, no optimizer state."""
    shape = Cut(Plan(removed_modules=names))
    model = reset_statistics(shape.apply(state.model(run)))
    return State.of(model.state_dict(), step=step, shape=shape)


def scores_of(
    run: Run,
    name: str,
    state: State,
    blocks: Blocks,
    *,
    score: str,
    aggregate: str = "sum",
    per_class: int = 10,
) -> dict[str, float]:
    """Return the scores of all removable blocks, as a stage of the run."""
    names = list(blocks.removable)
    data = None
    if score != "random":
        x, y, _ = balanced_batch(run.splits.train, per_class, seed=run.seed)
        data = [(x.to(run.device), y.to(run.device))]
    described = {
        "state": state,
        "blocks": names,
        "criterion": score,
        "aggregate": aggregate,
        "data": data,
        "seed": run.seed,
    }

    def work() -> dict[str, float]:
        return score_blocks(state.model(run), names, score, data=data, aggregate=aggregate, seed=run.seed)

    # A file holds names in alphabetical order; ties are broken by the order of the network.
    found = run.compute(name, described, work)
    return {n: float(found[n]) for n in names}


def penultimate(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the last linear layer of `model` reads, in eval mode: shape (n, features)."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    read: list[Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    finally:
        hook.remove()
    return read[-1].flatten(1)


def layer_lottery(
    run: Run,
    *,
    sparsity: float = 0.3,
    blocks: int | None = None,
    score: str = "grasp",
    aggregate: str = "sum",
    when: str = "init",
    start: str = "rewind",
    rewind_to: Duration = 0,
    spare_neighbours: bool = False,
    epochs: int | None = None,
) -> Outcome:
    """Remove whole residual blocks once and train the shallower network.

    "init": score the untrained network, remove, train for the whole length. "trained": train the whole network, score
    it, remove, put the weights of `rewind_to` back into the blocks that stay and train on from that moment of the
    schedule. Blocks go once; norm layers start with fresh statistics and the optimizer without state.

    Args:
        run: stages, data, model and training choices.
        sparsity: share of the multiply-accumulates to be removed, classifier included; the fewest blocks that do, so
            never less is removed.
        blocks: how many blocks go, instead of `sparsity`.
        score, aggregate: see `prunus.structured.layers.score_blocks`; ten training examples per class are looked at.
        when: "init" or "trained".
        start: for "trained": "rewind", or "reinit" (new initial weights and the whole schedule).
        rewind_to: for "trained": moment of the dense training, such as 0 or "25ep".
        spare_neighbours: see `prunus.structured.layers.residual_blocks`.
        epochs: length of each training; default the run's.

    Raises:
        NothingPrunable: the network has no block that can go.
        Infeasible: more blocks than can go.

    The details hold scores, removed blocks, stages left without any removable block, costs, and after "trained" the
    CKA of the penultimate features with those of the dense network on training inputs.
    """
    check_sparsity(sparsity)
    if when not in WHEN:
        raise unknown("moment of removal", when, WHEN)
    if start not in STARTS:
        raise unknown("start", start, STARTS)
    training = run.training if epochs is None else shorter(run.training, epochs)
    every = find_blocks(run, spare_neighbours=spare_neighbours)
    # What is impossible is refused before any training.
    alike = dict.fromkeys(every.removable, 0.0)
    if blocks is None:
        number_for(every, alike, sparsity)
    else:
        worst_blocks(alike, blocks)

    choices: dict[str, Any] = {"score": score, "aggregate": aggregate}
    moment, dense, steps = 0, None, length(run, training)
    if when == "init":
        scores = scores_of(run, "blocks", run.initial, every, **choices)
        gone = worst_blocks(scores, number_for(every, scores, sparsity) if blocks is None else blocks)
        ticket = without(run, run.initial, gone)
    else:
        early, dense, moment = dense_by_way_of(run, training, rewind_to)
        if start == "reinit":
            early, moment = fresh(run), 0
        scores = scores_of(run, "blocks", dense, every, **choices)
        gone = worst_blocks(scores, number_for(every, scores, sparsity) if blocks is None else blocks)
        ticket = without(run, early, gone, moment)
        steps += length(run, training) - moment
    state = run.train("ticket", start=ticket, training=training, start_step=moment)

    original, left = count(run.model).parameters, count(ticket.model(run)).parameters
    removed_macs = sum(every.removable[name].macs for name in gone)
    details: dict[str, Any] = {
        "removed": gone,
        "removable": len(every.removable),
        "fixed": {b.name: b.reason for b in every.every if b.reason},
        "emptied_stages": every.emptied(gone),
        "scores": scores,
        "macs_share": 1 - removed_macs / every.macs,
        "params_share": left / original,
    }
    if dense is not None:
        details["dense"] = measure(run, dense)
        x = calibration_inputs(run)

        def cka() -> dict[str, float]:
            return {"cka": linear_cka(penultimate(dense.model(run), x), penultimate(state.model(run), x))}

        details |= diagnose(run, "similarity", {"dense": dense, "ticket": state, "inputs": x}, cka, {"cka": 0.0})
    return Outcome(state, steps, details)
