"""Activating while pruning: spend a small share of each round on negative weights that hardly moved.

A unit behind a rectifier is off more often the more negative weights feed it; taking those that training used least
wakes units up. Source: Liu, Ghosh, Tan and Motani, TMLR 2023 (arXiv 2212.06145).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.budget.select import keep_count, keep_top
from prunus.errors import InvalidValue, unknown
from prunus.masks import Masks
from prunus.measure.activity import activity
from prunus.procedures.common import Outcome, check_sparsity, cut, diagnose, held_out, in_order, shorter
from prunus.procedures.imp import RESETS, prune_in_rounds, rounds_for
from prunus.run.stages import Run, State
from prunus.schedule import Duration


def activate(
    weights: Mapping[str, Tensor],
    previous: Mapping[str, Tensor],
    masks: Masks,
    count: int,
    *,
    exclude: Collection[str] = (),
) -> Masks:
    """Prune the `count` kept negative weights with the smallest movement |w - w_previous| over all tensors together.

    Args:
        weights: at the end of a training, by name; more tensors than `masks` names do not matter.
        previous: at its start.
        masks: what is kept so far.
        count: how many to prune; when fewer negative weights are kept, all of those go.
        exclude: tensors left as they are, such as the output layer, which has no rectifier behind it.

    Returns:
        The new masks, nested in the old ones. Of equal movements the later position goes first.

    Raises:
        InvalidValue: a negative count.
    """
    if count < 0:
        raise InvalidValue(f"count={count} is negative; give how many weights to prune, from 0 up.")
    movement: dict[str, Tensor] = {}
    candidates = 0
    for name, mask in masks.items():
        weight = weights[name].detach().cpu()
        chosen = mask.cpu() & (weight < 0)
        if name in exclude:
            chosen = torch.zeros_like(chosen)
        candidates += int(chosen.sum())
        moved = (weight - previous[name].detach().cpu()).abs().to(torch.float64)
        # What is no candidate ranks above every movement and so stays as it is.
        movement[name] = moved.masked_fill(~chosen, torch.inf)
    left = keep_top(movement, masks.total - min(count, candidates))
    return Masks({name: mask & left[name].to(mask.device) for name, mask in masks.items()})


def ap(
    run: Run,
    *,
    sparsity: float = 0.9,
    rate: float = 0.2,
    share: float = 0.02,
    score: str = "magnitude",
    budget: str | Mapping[str, Any] = "global",
    rewind: str = "weight",
    rewind_to: Duration = 0,
    spare_output: bool = True,
    epochs: int | None = None,
) -> Outcome:
    """Find a sparse ticket by rounds of a base pruner followed by selective activation, and train it.

    Each round prunes at most `rate` of the remaining weights: first the base pruner, then `share` of the remaining
    weights (of the count before the round) by `activate`. With share = 0 it is `imp`, mask for mask.

    Args:
        run: stages, data, model and training choices; the model needs rectifiers or smooth relatives of them.
        sparsity: final share of zeros, met exactly: where too few negative weights are left, the base pruner takes
            the rest.
        rate: largest share of the remaining weights removed per round.
        share: share of the remaining weights removed by activation; at most `rate`.
        score, budget: of the base pruner, as in `prunus.prune`.
        rewind, rewind_to: as in `imp`; movement is measured from the start of the training that was just done, which
            with "weight" are the rewound weights.
        spare_output: leave the last prunable tensor out of the activation step; it feeds no rectifier. (The authors'
            code does not exclude it.)
        epochs: length of each training; default the run's.

    The details hold, per round, the dynamic dead-neuron rate of the trained network on validation inputs (training
    inputs without a validation split).
    """
    check_sparsity(sparsity)
    check_fraction("share", share)
    if check_fraction("rate", rate, one_allowed=False) == 0 or share > rate:
        raise InvalidValue(f"rate={rate} must be above 0 and at least share={share}, which is a part of it.")
    if rewind not in RESETS:
        raise unknown("rewinding mode", rewind, RESETS)
    training = run.training if epochs is None else shorter(run.training, epochs)
    full = Masks.full(run.model, include=run.include, exclude=run.exclude)
    examples = run.splits.validation if held_out(run) == "validation" else run.splits.train

    def choose(name: str, start: State, trained: State, target: float, masks: Masks | None) -> Masks:
        before = full if masks is None else masks
        goal = keep_count(before.total, target)
        # The tolerance keeps 0.02 * 50 = 1.0000000000000002 and 0.29 * 100 = 28.999999999999996 what they mean.
        wanted = min(int(share * before.kept + 1e-9), before.kept - goal)
        between = 1 - (goal + wanted) / before.total
        base = cut(run, f"{name}-base", trained, between, score=score, budget=budget, masks=masks)
        spared = (list(full)[-1],) if spare_output else ()
        inputs = {
            "start": start,
            "trained": trained,
            "masks": base,
            "count": wanted,
            "exclude": list(spared),
        }

        def work() -> Masks:
            return activate(trained.weights, start.weights, base, wanted, exclude=spared)

        result = run.compute(name, inputs, work)
        assert isinstance(result, Masks)
        if result.kept > goal:
            result = cut(run, f"{name}-rest", trained, target, score=score, budget=budget, masks=result)
        return result

    def observe(name: str, trained: State) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            found = activity(trained.model(run), in_order(run, examples))
            return {"dead_rate": found.dead_rate, "always_off": found.always_off}

        planned = {"dead_rate": 0.0, "always_off": 0.0}
        result = diagnose(run, name, {"state": trained, "data": examples}, work, planned)
        assert isinstance(result, dict)
        return result

    found = prune_in_rounds(
        run,
        rounds_for(sparsity, rate),
        choose,
        training=training,
        again=training,
        rewind=rewind,
        rewind_to=rewind_to,
        observe=observe,
    )
    details = {"rounds": found.history, "rewind": rewind, "dead_rate_measured_on": held_out(run)}
    return Outcome(found.trained, found.steps, details)
