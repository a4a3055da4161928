"""Iterative magnitude pruning: train, prune a share of what is left, rewind, repeat - and its control branches.

Sources: The Lottery Ticket Hypothesis (Frankle & Carbin, ICLR 2019); late rewinding: Frankle et al., arXiv 1903.01611;
learning-rate rewinding and fine-tuning: Renda, Frankle & Carbin, ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prunus.budget.allocate import check_fraction
from prunus.budget.select import keep_best, round_half_up
from prunus.errors import InvalidValue, unknown
from prunus.masks import Masks
from prunus.procedures.common import Outcome, check_sparsity, cut, fresh, length, shorter, steps_per_epoch
from prunus.randomness import generator
from prunus.run.stages import Run, State
from prunus.schedule import Duration, steps_of
from prunus.train.training import Training

RESETS = ("weight", "learning-rate", "finetune")
BRANCHES = ("ticket", "reinit", "shuffle-layers", "shuffle-all", "even", "oneshot")


def rounds_for(sparsity: float, rate: float) -> list[float]:
    """Return the sparsity after each round: equal shares of what is left go, at most `rate`, ending on `sparsity`.

    1 - (1 - p)^r with p = 1 - (1 - sparsity)^(1/R) and R the fewest rounds for which p <= rate.
    """
    if sparsity == 0:
        return []
    rounds = math.ceil(math.log(1 - sparsity) / math.log(1 - rate) - 1e-9)
    return [1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds + 1)]


def shuffle_layers(masks: Masks, seed: int) -> Masks:
    """Permute every layer's mask on its own: each layer keeps its count, positions are random."""
    shuffled = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator(seed, "shuffle layer", name))
        shuffled[name] = mask.cpu().reshape(-1)[order].reshape(mask.shape)
    return Masks(shuffled)


def shuffle_all(masks: Masks, seed: int) -> Masks:
    """Permute the mask over all layers together: only the total count stays."""
    flat = torch.cat([m.cpu().reshape(-1) for m in masks.values()])
    flat = flat[torch.randperm(flat.numel(), generator=generator(seed, "shuffle all"))]
    parts = flat.split([m.numel() for m in masks.values()])
    return Masks({n: p.reshape(masks[n].shape) for n, p in zip(masks, parts, strict=True)})


def even(masks: Masks, seed: int) -> Masks:
    """Give every layer the same density at random positions; the total stays to within rounding per layer."""
    density = masks.density
    spread = {}
    for name, mask in masks.items():
        noise = torch.rand(mask.shape, generator=generator(seed, "even", name))
        spread[name] = keep_best(noise, round_half_up(density * mask.numel()))
    return Masks(spread)


def rewound(state: State, masks: Masks, run: Run) -> State:
    """Return `state` with pruned weights at zero: m * theta, bit for bit elsewhere."""
    model = state.model(run)
    masks.apply(model)
    return State.of(model.state_dict(), masks, state.step, optimizer=state.optimizer)


Choose = Callable[[str, State, State, float, Masks | None], Masks]


@dataclass(frozen=True)
class Rounds:
    """What `prune_in_rounds` leaves behind.

    Attributes:
        trained: the network at the end of the last round (the dense one, when there were no rounds).
        masks: the masks found, or None without a round.
        early: the network that weights are rewound to.
        moment: the step of the schedule at which `early` was taken.
        steps: optimizer steps taken.
        history: one JSON-ready row per round.
    """

    trained: State
    masks: Masks | None
    early: State
    moment: int
    steps: int
    history: list[dict[str, Any]]


def dense_by_way_of(run: Run, training: Training, rewind_to: Duration) -> tuple[State, State, int]:
    """Train dense with a stop on the way, as stages shared by all methods of a seed.

    Returns:
        the network at `rewind_to` (the initial one at 0), the trained one, and that moment in steps.
    """
    total = length(run, training)
    moment = steps_of(rewind_to, total_steps=total, steps_per_epoch=steps_per_epoch(run, training))
    early = run.initial
    if moment:
        early = run.root.train(f"early-{total}-{moment}", training=training, until=moment)
    trained = run.root.train(
        f"dense-{total}-from-{moment}" if moment else f"dense-{total}",
        start=early,
        start_step=moment,
        training=training,
        continue_optimizer=moment > 0,
    )
    return early, trained, moment


def prune_in_rounds(
    run: Run,
    targets: Sequence[float],
    choose: Choose,
    *,
    training: Training,
    again: Training,
    rewind: str = "weight",
    rewind_to: Duration = 0,
    observe: Callable[[str, State], dict[str, Any]] | None = None,
) -> Rounds:
    """Train dense; then per target: choose masks, reset what is left, train again.

    Args:
        run: stages, data and model.
        targets: sparsity after each round, rising.
        choose: a function of (stage name, network at the start of the training just done, network at its end, target,
            masks so far or None) that returns the masks of the round, nested in those so far.
        training: choices of the dense training, and of the others with rewind "weight".
        again: choices of the training after a cut with "learning-rate" and "finetune".
        rewind, rewind_to: as in `imp`.
        observe: a function of (stage name, trained network) whose results join the row of the round.
    """
    total, per_epoch = length(run, training), steps_per_epoch(run, training)
    early, trained, moment = dense_by_way_of(run, training, rewind_to)
    begin, spent, masks = early, total, None
    last_rate = training.learning_rates(per_epoch)[-1] if total else training.lr
    history: list[dict[str, Any]] = []
    for number, target in enumerate(targets, start=1):
        masks = choose(f"masks-{number}", begin, trained, target, masks)
        name = f"round-{number}"
        if rewind == "weight":
            begin = rewound(early, masks, run)
            trained = run.train(
                name,
                start=begin,
                masks=masks,
                training=training,
                start_step=moment,
                continue_optimizer=moment > 0,
            )
            spent += total - moment
        else:
            begin = rewound(replace(trained, step=0), masks, run)
            rates = [last_rate] * length(run, again) if rewind == "finetune" else None
            trained = run.train(name, start=begin, masks=masks, training=again, rates=rates)
            spent += length(run, again)
        row = {"round": number, "sparsity": masks.sparsity, "kept": masks.kept} | trained.metrics
        history.append(row if observe is None else row | observe(f"observed-{number}", trained))
    return Rounds(trained, masks, early, moment, spent, history)


def imp(
    run: Run,
    *,
    sparsity: float = 0.9,
    rate: float = 0.2,
    rewind: str = "weight",
    rewind_to: Duration = 0,
    branch: str = "ticket",
    budget: str | Mapping[str, Any] = "global",
    score: str = "magnitude",
    epochs: int | None = None,
    retrain_epochs: int | None = None,
) -> Outcome:
    """Find a sparse ticket by iterative pruning and train it.

    Args:
        run: stages, data, model and training choices.
        sparsity: final share of zeros.
        rate: largest share of the remaining weights removed per round; equal rounds end exactly on `sparsity`.
        rewind: what the weights are reset to after each cut: "weight" (their values at `rewind_to`, schedule resumed
            there), "learning-rate" (they stay, the schedule starts again), "finetune" (they stay, last rate).
        rewind_to: moment of the dense training to rewind to: 0, or a late one such as "1ep".
        branch: the control to train with the mask found: "ticket", "reinit" (fresh initial weights), "shuffle-layers",
            "shuffle-all", "even", or "oneshot" (one cut of the dense net instead of rounds, same reset).
        budget, score: as in `prunus.prune`.
        epochs: length of each training; default the run's.
        retrain_epochs: length after a cut for "learning-rate" and "finetune"; default `epochs`.

    A pruned weight never comes back, and magnitudes are those at the end of training, never rewound ones.
    """
    check_sparsity(sparsity)
    if check_fraction("rate", rate, one_allowed=False) == 0:
        raise InvalidValue("rate 0 never prunes; the usual share per round is 0.2.")
    if rewind not in RESETS:
        raise unknown("rewinding mode", rewind, RESETS)
    if branch not in BRANCHES:
        raise unknown("branch", branch, BRANCHES)
    training = run.training if epochs is None else shorter(run.training, epochs)
    again = training if retrain_epochs is None else shorter(training, retrain_epochs)

    def choose(name: str, start: State, trained: State, target: float, masks: Masks | None) -> Masks:
        return cut(run, name, trained, target, score=score, budget=budget, masks=masks)

    targets = [sparsity] if branch == "oneshot" and sparsity else rounds_for(sparsity, rate)
    found = prune_in_rounds(run, targets, choose, training=training, again=again, rewind=rewind, rewind_to=rewind_to)
    trained, masks, steps = found.trained, found.masks, found.steps
    if masks is not None and branch not in ("ticket", "oneshot"):
        control = {"shuffle-layers": shuffle_layers, "shuffle-all": shuffle_all, "even": even}
        masks = control[branch](masks, run.seed) if branch in control else masks
        start = fresh(run) if branch == "reinit" else found.early
        state = rewound(start, masks, run)
        moment = found.moment
        trained = run.train(f"branch-{branch}", start=state, masks=masks, training=training, start_step=moment)
        steps += length(run, training) - moment
    return Outcome(trained, steps, {"rounds": found.history, "branch": branch, "rewind": rewind})
