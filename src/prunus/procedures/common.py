"""What a procedure is: a plain function over the stages of a run, ending in a sparse network and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.budget.budgets import budget as budget_of
from prunus.data.balanced import balanced_batch
from prunus.data.batches import Batches
from prunus.data.examples import Examples
from prunus.keep import choose
from prunus.masks import Masks
from prunus.randomness import generator
from prunus.run.stages import Run, State
from prunus.scores.registry import SCORES
from prunus.train.rates import norm_drop, retraining
from prunus.train.training import Training


@dataclass(frozen=True)
class Outcome:
    """What a procedure returns.

    Attributes:
        state: the final network with its masks.
        steps: optimizer steps that the whole procedure took, shared dense training included.
        details: JSON-ready results of its own (rounds, branches, diagnoses), shown in the report.
    """

    state: State
    steps: int
    details: dict[str, Any] = field(default_factory=dict)


def check_sparsity(sparsity: float) -> float:
    """Return `sparsity` if it is a share in [0, 1), else raise `InvalidValue`."""
    return check_fraction("sparsity", sparsity, one_allowed=False)


def steps_per_epoch(run: Run, training: Training | None = None) -> int:
    """Return how many optimizer steps one pass over the run's training examples takes."""
    choices = training or run.training
    return -(-len(run.splits.train) // choices.batch_size)


def length(run: Run, training: Training | None = None) -> int:
    """Return the optimizer steps of one training with these choices."""
    return (training or run.training).total_steps(steps_per_epoch(run, training))


def shorter(training: Training, epochs: int, **changes: Any) -> Training:
    """Return the same choices with another length in epochs (and other changes)."""
    return replace(training, epochs=epochs, steps=None, **changes)


def whole_epochs(run: Run) -> int:
    """Return the length of the run's training in epochs; a length given in steps is rounded to at least one epoch."""
    return max(1, round(length(run) / steps_per_epoch(run)))


def scoring_data(
    run: Run, score: str, budget: str | Mapping[str, Any] | None = None, per_class: int = 10
) -> list[Any] | None:
    """Return the batches that a score and a budget need, or None.

    Scores (those a budget takes its ratios from included) see one class-balanced batch of training examples (inputs,
    labels). A budget that only compares outputs sees `calibration_inputs`.
    """
    chosen = budget_of("global" if budget is None else budget)
    if any(SCORES.entry(s).data != "none" for s in (score, *chosen.needs_scores)):
        x, y, _ = balanced_batch(run.splits.train, per_class, seed=run.seed)
        return [(x.to(run.device), y.to(run.device))]
    return list(calibration_inputs(run).split(256)) if chosen.needs_distortion else None


def calibration_inputs(run: Run, count: int = 256) -> Tensor:
    """Return `count` training inputs (all, when there are fewer), drawn without a look at labels.

    Shape (count, ...), float32, normalised, not augmented, on the run's device.
    """
    examples = run.splits.train
    index = torch.randperm(len(examples), generator=generator(run.seed, "calibration"))[:count]
    return examples.normalise(examples.x[index]).to(run.device)


def spread_over(examples: Examples, count: int) -> Examples:
    """Return `count` examples (at most all) at even distances, in order: neither shuffled nor all of one class."""
    count = min(count, len(examples))
    return examples.subset(torch.arange(count) * len(examples) // max(count, 1))


def in_order(run: Run, examples: Examples) -> Batches:
    """Return batches of `examples` as they lie: not shuffled, not augmented, on the run's device."""
    return Batches(examples, max(run.training.batch_size, 256), shuffle=False, device=run.device)


def held_out(run: Run) -> str:
    """Return the split on which decisions and diagnoses are measured: "validation", or "train" when that is empty."""
    return "validation" if len(run.splits.validation) else "train"


def diagnose(run: Run, name: str, inputs: Mapping[str, Any], function: Callable[[], Any], planned: Any) -> Any:
    """Return `run.compute(name, inputs, function)`; a run that only plans gets `planned` at once.

    For passes over data whose result changes no training's length.
    """
    return planned if hasattr(run, "planned") else run.compute(name, inputs, function)


def measure(run: Run, state: State) -> dict[str, dict[str, float]]:
    """Return `run.evaluate` of every held-out split that has examples, for reports; decide nothing by "test"."""
    sizes = {"validation": len(run.splits.validation), "test": len(run.splits.test)}
    return {split: run.evaluate(state, split) for split, size in sizes.items() if size}


def dense(run: Run, training: Training | None = None) -> State:
    """Return the network trained dense with these choices: one stage shared by all methods of a seed."""
    choices = training or run.training
    return run.root.train(f"dense-{length(run, choices)}", training=choices)


def fresh(run: Run) -> State:
    """Return initial weights that no other part of the run uses: those of another seed."""
    other = run.within("fresh")
    other.seed = run.seed + 1_000_003
    return State.of(other.model.state_dict())


def retrain_rates(run: Run, name: str, original: Training, again: Training, before: State, masks: Masks) -> list[float]:
    """Return the learning rate of every retraining step, relative to the original schedule.

    Args:
        name: FT, LRW, SLR, CLR, LLR or ALLR (see `prunus.train.rates.retraining`).
        original, again: choices of the original training and of the retraining.
        before: the network before this cut.
        masks: what the cut left.
    """
    adaptive = name.lower() == "allr"
    already = before.masks.sparsity if before.masks is not None else 0.0
    return retraining(
        name,
        original=original.learning_rates(steps_per_epoch(run, original)),
        steps=length(run, again),
        norm_drop=norm_drop(before.weights, masks) if adaptive else None,
        pruned_fraction=(masks.sparsity - already) / (1 - already) if adaptive else None,
    )


def cut(
    run: Run,
    name: str,
    state: State,
    sparsity: float,
    *,
    score: str = "magnitude",
    budget: str | Mapping[str, Any] | None = "global",
    unit: str = "weight",
    masks: Masks | None = None,
    exclude: tuple[str, ...] = (),
    include: tuple[str, ...] = (),
    data: Sequence[Any] | None = None,
) -> Masks:
    """Choose masks for the weights of `state`, once, as a stage of the run (see `prunus.prune` for the arguments).

    `data` holds batches, x or (x, y); by default what score and budget need, see `scoring_data`. Patterns of `include`
    and `exclude` join those of the run.
    """
    include, exclude = (*run.include, *include), (*run.exclude, *exclude)
    batches = scoring_data(run, score, budget) if data is None else list(data)
    choice = dict(budget) if isinstance(budget, Mapping) else budget
    inputs = {
        "state": state,
        "sparsity": sparsity,
        "score": score,
        "budget": choice,
        "unit": unit,
        "masks": masks,
        "include": list(include),
        "exclude": list(exclude),
        "data": batches,
        "seed": run.seed,
    }

    def work() -> Masks:
        return choose(
            state.model(run),
            None if ":" in unit else sparsity,
            unit=unit,
            score=score,
            budget=budget,
            masks=masks,
            include=include,
            exclude=exclude,
            data=batches,
            seed=run.seed,
        )

    result = run.compute(name, inputs, work)
    assert isinstance(result, Masks)
    return result
