"""What a run will do, found by going through its methods without training anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prunus.data.examples import Splits
from prunus.keep import choose
from prunus.masks import Masks
from prunus.run.cells import Cell, carry_out
from prunus.run.stages import Run, State
from prunus.schedule import steps_of


class Planner(Run):
    """A run whose trainings return at once with untrained weights; `planned` lists their stages and steps."""

    planned: dict[str, int]

    @classmethod
    def of(cls, run: Run, planned: dict[str, int]) -> Planner:
        """Return a planner with the data, model and choices of `run`, that notes stages in `planned`."""
        made = cls(
            splits=run.splits,
            make_model=run.make_model,
            training=run.training,
            seed=run.seed,
            name_prefix=run.name_prefix,
        )
        made.planned = planned
        return made

    def train(self, name: str, **choices: Any) -> State:
        """Note the stage and its steps."""
        training = choices.get("training") or self.training
        data = choices.get("data")
        per_epoch = self.steps_per_epoch(training, data.train if isinstance(data, Splits) else data)
        total = len(training.learning_rates(per_epoch))  # also notices a warm-up that does not fit
        until = choices.get("until")
        end = total if until is None else steps_of(until, total_steps=total, steps_per_epoch=per_epoch)
        method = choices.get("method")
        if method is not None:
            method.check(total, per_epoch)
        self.planned[f"{self.name_prefix}{name}"] = end - int(choices.get("start_step", 0))
        masks = choices.get("masks")
        if masks is None and method is not None:
            masks = Masks.full(self.model)
        start = choices.get("start")
        begin = self.initial if start is None or start.shape is None else start
        metrics = {"validation_accuracy": 0.0, "accuracy": 0.0, "loss": 0.0}
        return State.of(begin.weights, masks, end, metrics, shape=begin.shape)

    def compute(self, name: str, inputs: Mapping[str, Any], function: Callable[[], Any]) -> Any:
        """Return magnitude masks in place of masks of any score, and what `function` returns otherwise."""
        if "sparsity" in inputs and "score" in inputs:
            pattern = inputs.get("unit", "weight")
            sparsity = None if ":" in pattern else inputs["sparsity"]
            earlier = inputs.get("masks")
            patterns = {name: inputs.get(name, ()) for name in ("include", "exclude")}
            return choose(self.model, sparsity, unit=pattern, masks=earlier, **patterns)
        return function()

    def evaluate(self, state: State, split: str = "test") -> dict[str, float]:
        """Return zeros."""
        return {"accuracy": 0.0, "loss": 0.0, "ece": 0.0, "worst_class_accuracy": 0.0}


def plan(cells: list[Cell], root_of: Callable[[int], Run]) -> dict[str, int]:
    """Return the optimizer steps of every training stage of `cells`, by full stage name, without training.

    Raises:
        ScheduleTooShort: a method does not fit its training; nothing has been trained yet.
    """
    planned: dict[str, int] = {}
    first = min(c.seed for c in cells)
    planner = Planner.of(root_of(first), planned)
    for cell in cells:
        if cell.seed == first:
            carry_out(cell, planner)
    prefix = planner.name_prefix
    for seed in dict.fromkeys(c.seed for c in cells):
        other = root_of(seed).name_prefix
        planned |= {other + n.removeprefix(prefix): steps for n, steps in list(planned.items()) if n.startswith(prefix)}
    return planned
