"""Sparse model soups: retrain several copies of one pruned network, average them, prune the average, repeat.

Copies that start from the same pruned weights share one mask, so their average is as sparse as each of them.
Source: Zimmer, Spiegel and Pokutta, ICLR 2024 (arXiv 2306.16788).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.errors import InvalidValue, unknown
from prunus.masks import Masks
from prunus.measure.recalibrate import recalibrate
from prunus.procedures.averaging import Ensemble, average, distances
from prunus.procedures.common import (
    Outcome,
    check_sparsity,
    cut,
    dense,
    diagnose,
    held_out,
    in_order,
    length,
    retrain_rates,
    shorter,
    spread_over,
    whole_epochs,
)
from prunus.randomness import key
from prunus.run.stages import Run, State
from prunus.train.loop import measured
from prunus.train.training import Training

FACTORS = ("seed", "weight-decay", "length", "lr")
SOUPS = ("uniform", "greedy")


def phase_sparsities(sparsity: float, phases: int) -> list[float]:
    """Return the sparsity after each phase, 1 - (1 - p)^j with p = 1 - (1 - sparsity)^(1/phases).

    Raises:
        InvalidValue: a sparsity outside [0, 1), or fewer than one phase.
    """
    check_sparsity(sparsity)
    if phases < 1:
        raise InvalidValue(f"phases={phases} must be 1 or more.")
    return [1 - (1 - sparsity) ** (j / phases) for j in range(1, phases + 1)]


def greedy(scores: Sequence[float], of_soup: Callable[[list[int]], float]) -> list[int]:
    """Return which members make the soup: best first, each added only where the soup does not get worse.

    Args:
        scores: validation accuracy of each member; equal ones are tried in their order.
        of_soup: the validation accuracy of the average of these members.

    The result is at least as good as the best member on the validation examples, by construction.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    chosen, best = [order[0]], scores[order[0]]
    for i in order[1:]:
        value = of_soup([*chosen, i])
        if value >= best:
            chosen, best = [*chosen, i], value
    return chosen


def member_choices(
    training: Training, vary: str, members: int, values: Sequence[float] | None = None
) -> list[tuple[Training, Any]]:
    """Return the training of each member and the value in which it differs (its number when seeds differ).

    Args:
        training: the retraining with its length in epochs.
        vary: "seed", "weight-decay", "length" (epochs) or "lr" (peak rate that the retraining schedule starts from).
        members: how many.
        values: one per member; by default a geometric range from half to twice the value in `training`.

    Raises:
        UnknownName: no such factor.
        InvalidValue: values that do not fit, or that make two members the same.
    """
    if vary not in FACTORS:
        raise unknown("factor between members", vary, FACTORS)
    if members < 1:
        raise InvalidValue(f"members={members} must be 1 or more.")
    if vary == "seed":
        if values is not None:
            raise InvalidValue(f"values={list(values)} have no meaning when members differ by seed; leave them out.")
        return [(training, number) for number in range(members)]
    epochs = training.epochs
    assert epochs is not None
    own = {"weight-decay": training.weight_decay, "length": float(epochs), "lr": training.lr}[vary]
    if values is None:
        exponents = [0.0] if members == 1 else [2 * i / (members - 1) - 1 for i in range(members)]
        chosen = [own * 2**e for e in exponents]
    else:
        chosen = [float(v) for v in values]
    if len(chosen) != members:
        raise InvalidValue(f"{len(chosen)} values were given for members={members}; give one for each.")
    if vary == "length":
        chosen = [max(1, round(v)) for v in chosen]
    if len(set(chosen)) < members:
        raise InvalidValue(f"members that differ by {vary} would get {chosen}, which are not distinct; give values=...")
    make: dict[str, Callable[[Any], Training]] = {
        "weight-decay": lambda v: replace(training, weight_decay=v),
        "length": lambda v: shorter(training, v),
        "lr": lambda v: replace(training, lr=v),
    }
    return [(make[vary](v), v) for v in chosen]


def soups(
    run: Run,
    *,
    sparsity: float = 0.9,
    phases: int = 3,
    members: int = 3,
    vary: str = "seed",
    values: Sequence[float] | None = None,
    soup: str = "uniform",
    retrain: str = "LLR",
    score: str = "magnitude",
    budget: str | Mapping[str, Any] = "global",
    dense_epochs: int | None = None,
    epochs: int | None = None,
    share: float = 0.2,
) -> Outcome:
    """Train dense; then per phase: prune, retrain several copies under the one mask, and go on with their average.

    Args:
        run: stages, data, model and training choices.
        sparsity: final share of zeros; each phase removes the same share of what is left.
        phases: how often to prune.
        members: copies per phase. They can be trained one after another or at the same time; with 1 this is iterative
            pruning with the retraining schedule `retrain`.
        vary, values: the one factor in which members differ, see `member_choices`. Seeds change data order,
            augmentation and dropout; the first member has the run's own.
        soup: "uniform" averages all members, "greedy" those that help on the validation examples.
        retrain: learning-rate schedule of retraining, see `prunus.train.rates`.
        score, budget: as in `prunus.prune`.
        dense_epochs: length of dense training; default the run's.
        epochs: length of each retraining; default a third of the run's.
        share: share of the training examples, at even distances and in order, over which BatchNorm statistics of an
            average are measured anew. Averaged variances are not the variances of the average.

    Raises:
        InvalidValue: greedy without validation examples, or options that do not fit.

    A soup of one member is that member, its BatchNorm statistics included.
    """
    targets = phase_sparsities(sparsity, phases)
    if soup not in SOUPS:
        raise unknown("soup", soup, SOUPS)
    if soup == "greedy" and not len(run.splits.validation):
        raise InvalidValue(
            "a greedy soup is chosen on validation examples, and there are none; set some aside (validation=0.1) or "
            "use soup='uniform'."
        )
    if check_fraction("share", share) == 0:
        raise InvalidValue("share=0 leaves no examples to measure BatchNorm statistics on; the usual share is 0.2.")
    whole = whole_epochs(run)
    first = shorter(run.training, whole if dense_epochs is None else dense_epochs)
    base = shorter(run.training, max(1, round(whole / 3)) if epochs is None else epochs)
    choices = member_choices(base, vary, members, values)
    calibration = spread_over(run.splits.train, max(2, math.ceil(share * len(run.splits.train))))

    def mix(states: Sequence[State], chosen: Sequence[int]) -> dict[str, Tensor]:
        picked = [states[i] for i in chosen]
        weights = average([s.weights for s in picked], [s.masks for s in picked])
        if len(picked) == 1:
            return weights
        model = State.of(weights).model(run)
        recalibrate(model, in_order(run, calibration))
        return {n: t.detach().cpu() for n, t in model.state_dict().items()}

    current = dense(run, first)
    steps, masks, history = length(run, first), None, []
    for phase, target in enumerate(targets, start=1):
        masks = cut(run, f"phase-{phase}/masks", current, target, score=score, budget=budget, masks=masks)
        states = []
        for number, (training, _) in enumerate(choices):
            original = replace(first, lr=training.lr)
            states.append(
                run.train(
                    f"phase-{phase}/member-{number}",
                    start=replace(current, step=0),
                    masks=masks,
                    training=training,
                    seed=key(run.seed, "soup member", phase, number) if vary == "seed" and number else None,
                    rates=retrain_rates(run, retrain, original, training, current, masks),
                )
            )
            steps += length(run, training)
        chosen = _chosen(run, f"phase-{phase}/chosen", states, soup, mix)
        inputs = {"members": states, "chosen": chosen, "calibration": calibration if len(chosen) > 1 else None}
        work = partial(mix, states, chosen)
        current = State.of(diagnose(run, f"phase-{phase}/soup", inputs, work, planned=states[0].weights), masks)
        row = _report(run, f"phase-{phase}/ensemble", states, chosen, [v for _, v in choices], current)
        history.append({"phase": phase} | row)
    metrics = history[-1]["soup"] | {"kept": current.masks.kept, "total": current.masks.total} if current.masks else {}
    final = State.of(current.weights, masks, metrics=metrics)
    return Outcome(final, steps, {"phases": history, "vary": vary, "kind": soup, "measured_on": held_out(run)})


def _chosen(
    run: Run,
    name: str,
    states: list[State],
    soup: str,
    mix: Callable[[Sequence[State], Sequence[int]], dict[str, Tensor]],
) -> list[int]:
    """Return which members make the soup of a phase."""
    if soup == "uniform" or len(states) == 1:
        return list(range(len(states)))

    def accuracy(members: list[int]) -> float:
        return run.evaluate(State.of(mix(states, members)), "validation")["accuracy"]

    def work() -> list[int]:
        return greedy([accuracy([i]) for i in range(len(states))], accuracy)

    result = diagnose(run, name, {"members": states, "validation": run.splits.validation}, work, planned=[0])
    assert isinstance(result, list)
    return result


def _report(
    run: Run, name: str, states: list[State], chosen: list[int], values: list[Any], soup: State
) -> dict[str, Any]:
    """Return what a phase is worth: each member, their prediction ensemble, the soup, and how far apart they lie."""
    split = held_out(run)
    examples = run.splits.validation if split == "validation" else run.splits.train

    def together() -> dict[str, float]:
        return measured(Ensemble([s.model(run) for s in states]), in_order(run, examples))

    names = [n for n, _ in run.model.named_parameters()]
    assert isinstance(soup.masks, Masks)
    return {
        "sparsity": soup.masks.sparsity,
        "members": [{"value": v} | run.evaluate(s, split) for s, v in zip(states, values, strict=True)],
        "chosen": chosen,
        "soup": run.evaluate(soup, split),
        "ensemble": diagnose(run, name, {"members": states, "data": examples}, together, planned={}),
        "distances": distances([s.weights for s in states], names),
    }
