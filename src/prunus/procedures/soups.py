"""Sparse model soups: retrain several copies of one pruned network, average them, prune the average, repeat.

Copies that start from the same pruned weights share one mask, so their average is as sparse as each of them.
Source: Zimmer, Spiegel and Pokutta, ICLR 2024 (arXiv 2306.16788).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.budget.allocate import check_fraction
from prunus.errors import InvalidValue, MaskMismatch, unknown
from prunus.masks import Masks
from prunus.measure.recalibrate import recalibrate
from prunus.measure.similarity import effective_state
from prunus.procedures.common import (
    Outcome,
    check_sparsity,
    cut,
    dense,
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


def average(
    states: Sequence[Mapping[str, Tensor]], masks: Sequence[Mapping[str, Tensor] | None] | None = None
) -> dict[str, Tensor]:
    """Return the mean of several states of one network: of effective weights, in float64, rounded back at the end.

    Floating-point entries (weights, biases, running statistics) are averaged. Whole numbers (counters) cannot be and
    come from the first state; bool entries must agree. The mean of equal states is that state, bit for bit.

    Args:
        states: state dicts with the same names, shapes and dtypes.
        masks: name -> bool tensor (True = kept) of each state, or None for a dense one; they must be the same for
            all, since the mean of different masks is denser than each. Pruned entries count as zero.

    Raises:
        InvalidValue: nothing to average, or states of different architectures.
        MaskMismatch: masks that differ, or do not fit.
    """
    if not states:
        raise InvalidValue("there is no network to average.")
    given = [None] * len(states) if masks is None else list(masks)
    if len(given) != len(states):
        raise InvalidValue(f"{len(states)} states came with {len(given)} masks; give one for each, or None.")
    for other in given[1:]:
        _check_same_masks(given[0], other)
    effective = [effective_state(state, mask) for state, mask in zip(states, given, strict=True)]
    first = effective[0]
    for state in effective[1:]:
        odd = [n for n in {*first, *state} if n not in first or n not in state or _kind(first[n]) != _kind(state[n])]
        if odd:
            raise InvalidValue(f"the networks differ in {sorted(odd)[0]!r}; only networks of one shape can be averaged.")
    mean: dict[str, Tensor] = {}
    for name, value in first.items():
        values = [state[name].detach() for state in effective]
        if value.is_floating_point():
            total = torch.zeros_like(value, dtype=torch.float64)
            for one in values:
                total += one
            mean[name] = (total / len(values)).to(value.dtype)
            continue
        if value.dtype == torch.bool and not all(torch.equal(value, one) for one in values):
            raise MaskMismatch(f"the bool entries of {name!r} differ between the networks, so they have no average.")
        mean[name] = value.detach().clone()
    return mean


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _check_same_masks(first: Mapping[str, Tensor] | None, second: Mapping[str, Tensor] | None) -> None:
    if (first is None) != (second is None):
        raise MaskMismatch("one network has masks and another has none; their average would not be sparse.")
    if first is None or second is None:
        return
    for name in {*first, *second}:
        if name not in first or name not in second or not torch.equal(first[name].cpu(), second[name].cpu()):
            raise MaskMismatch(f"the masks of {name!r} differ; only networks retrained under one mask make a soup.")


def distances(states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, float]:
    """Return how far apart networks lie: L2 distances and angles over the tensors `names`, as one long vector.

    Returns:
        "pairwise_min", "pairwise_mean", "pairwise_max", "to_mean" (mean distance to the average) and
        "angle_max_degrees"; all 0 for a single network.
    """
    vectors = [torch.cat([s[n].detach().double().reshape(-1).cpu() for n in names]) for s in states]
    centre = torch.stack(vectors).mean(dim=0)
    pairs = list(itertools.combinations(vectors, 2))
    apart = [float((a - b).norm()) for a, b in pairs] or [0.0]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs if a.any() and b.any()] or [1.0]
    return {
        "pairwise_min": min(apart),
        "pairwise_mean": sum(apart) / len(apart),
        "pairwise_max": max(apart),
        "to_mean": sum(float((v - centre).norm()) for v in vectors) / len(vectors),
        "angle_max_degrees": math.degrees(math.acos(max(-1.0, min(1.0, min(cosines))))),
    }


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


class Ensemble(nn.Module):
    """Several classifiers as one: log of the mean of their softmax outputs, (N, classes)."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to log-probabilities."""
        logs = torch.stack([model(x).log_softmax(dim=1) for model in self.models])
        return logs.logsumexp(dim=0) - math.log(len(self.models))


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
        weights = run.compute(f"phase-{phase}/soup", inputs, lambda: mix(states, chosen))
        current = State.of(weights, masks)
        history.append(_report(run, states, chosen, [v for _, v in choices], current) | {"phase": phase})
    metrics = history[-1]["soup"] | {"kept": current.masks.kept, "total": current.masks.total} if current.masks else {}
    final = State.of(current.weights, masks, metrics=metrics)
    return Outcome(final, steps, {"phases": history, "vary": vary, "kind": soup, "measured_on": held_out(run)})


def _chosen(
    run: Run, name: str, states: list[State], soup: str, mix: Callable[[Sequence[State], Sequence[int]], dict[str, Tensor]]
) -> list[int]:
    """Return which members make the soup of a phase."""
    if soup == "uniform" or len(states) == 1:
        return list(range(len(states)))

    def accuracy(members: list[int]) -> float:
        return run.evaluate(State.of(mix(states, members)), "validation")["accuracy"]

    def work() -> list[int]:
        return greedy([accuracy([i]) for i in range(len(states))], accuracy)

    result = run.compute(name, {"members": states, "validation": run.splits.validation}, work)
    assert isinstance(result, list)
    return result


def _report(run: Run, states: list[State], chosen: list[int], values: list[Any], soup: State) -> dict[str, Any]:
    """Return what a phase is worth: each member, their prediction ensemble, the soup, and how far apart they lie."""
    split = held_out(run)
    examples = run.splits.validation if split == "validation" else run.splits.train
    ensemble = Ensemble([s.model(run) for s in states])
    names = [n for n, _ in run.model.named_parameters()]
    assert isinstance(soup.masks, Masks)
    return {
        "sparsity": soup.masks.sparsity,
        "members": [{"value": v} | run.evaluate(s, split) for s, v in zip(states, values, strict=True)],
        "chosen": chosen,
        "soup": run.evaluate(soup, split),
        "ensemble": measured(ensemble, in_order(run, examples)),
        "distances": distances([s.weights for s in states], names),
    }
