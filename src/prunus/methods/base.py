"""What a step method is: a set of choices and three moments at which it may change the masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from prunus.budget.allocate import check_fraction
from prunus.budget.budgets import Problem, budget, decide
from prunus.budget.select import some_kept
from prunus.errors import Infeasible, InvalidValue
from prunus.masks import Masks
from prunus.units import NM, unit

if TYPE_CHECKING:
    from prunus.sparsifier import Sparsifier

BudgetChoice = str | Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """Base of all step methods. Fields hold choices as given; state lives in the `Sparsifier` they are attached to.

    Attributes:
        sparsity: final share of zeros among prunable weights, in [0, 1).
    """

    sparsity: float = 0.9

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Raise a typed error when the choices do not make sense for a training of this length."""
        check_fraction("sparsity", self.sparsity, one_allowed=False)

    def start(self, s: Sparsifier) -> Masks:
        """Return the masks in force before the first step."""
        raise NotImplementedError

    def wants_dense_gradients(self, s: Sparsifier) -> bool:
        """Whether the coming step's gradients must stay unmasked because this method reads them."""
        return False

    def trains_dense(self, s: Sparsifier) -> bool:
        """Whether the coming step updates dense weights behind the masked ones, whose state must not be masked."""
        return False

    def before(self, s: Sparsifier) -> None:
        """Act when gradients are ready and the optimizer has not moved yet."""

    def after(self, s: Sparsifier) -> None:
        """Act after the optimizer moved and pruned entries were zeroed; `s.step` steps are done."""

    def describe(self) -> dict[str, Any]:
        """Return name and choices as JSON-ready values."""
        return {"method": type(self).__name__} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def select(
    s: Sparsifier,
    sparsity: float,
    *,
    score: str = "magnitude",
    budget_choice: BudgetChoice = "global",
    unit_choice: str = "weight",
    among: Masks | None = None,
) -> Masks:
    """Score, spend the budget, keep: the masks at `sparsity` for the weights as they are now.

    Args:
        s: the running sparsifier, which has weights, gradients and step.
        sparsity: share of zeros over all prunable entries.
        score: name of a score whose needs a training loop can meet.
        budget_choice: see `prunus.budget.budgets.budget`.
        unit_choice: see `prunus.units.unit`.
        among: only entries kept here may stay (nested pruning).
    """
    scores = s.scores(score)
    if among is not None:
        scores = {n: v.masked_fill(~among[n].to(v.device), -torch.inf) for n, v in scores.items()}
    what = unit(unit_choice)
    total = sum(a.size for a in s.addresses.values())
    keep = some_kept(total, sparsity)
    if among is not None:
        keep = min(keep, among.kept)  # whole rows and blocks may have left less than was asked for
    if isinstance(what, NM) and sparsity == 0:
        return Masks({n: torch.ones_like(v, dtype=torch.bool) for n, v in scores.items()})
    chosen = budget(budget_choice)
    if chosen.needs_scores or chosen.needs_distortion:
        raise InvalidValue(
            f"budget {budget_choice!r} runs the model on data, which a training hook cannot; prune first with "
            "prunus.prune(..., data=...) and pass its masks to sparsify."
        )
    return decide(Problem(addresses=s.addresses, scores=scores, keep=keep, unit=what), chosen)


def check_pattern(unit_choice: str, sparsity: float) -> None:
    """Raise `InvalidValue` when an N:M pattern contradicts the sparsity asked for."""
    what = unit(unit_choice)
    if isinstance(what, NM) and abs(sparsity - (1 - what.density)) > 1e-6:
        raise InvalidValue(
            f"pattern {what} has sparsity {1 - what.density:g}, not {sparsity:g}; give sparsity={1 - what.density:g}."
        )


MASK_TOLERANCE = 0.005


def starting_masks(s: Sparsifier, sparsity: float) -> Masks | None:
    """Return the given masks, or None; for methods that keep the number of weights they start with.

    Raises:
        InvalidValue: the masks have another sparsity than the method was made with (beyond what rounding explains).
    """
    if s.given is not None and abs(s.given.sparsity - sparsity) > MASK_TOLERANCE:
        raise InvalidValue(
            f"the given masks have sparsity {s.given.sparsity:.4g}, but the method was made with {sparsity:g} and "
            "keeps the number of weights it starts with; make it with the sparsity of the masks."
        )
    return s.given


def given_masks(s: Sparsifier, sparsity: float) -> Masks | None:
    """Return the masks handed to `sparsify`, if any, checked to leave enough for `sparsity`.

    Raises:
        Infeasible: they keep fewer weights than `sparsity` would.
    """
    if s.given is None:
        return None
    keep = some_kept(s.given.total, sparsity)
    if s.given.kept < keep:
        raise Infeasible(
            f"the given masks keep {s.given.kept} of {s.given.total} weights, fewer than the {keep} of sparsity "
            f"{sparsity:g}; ask for more sparsity, or leave masks out."
        )
    return s.given


def check_no_holes(s: Sparsifier) -> None:
    """Raise `InvalidValue` when masks that prune were handed to a method that chooses among all weights."""
    if s.given is not None and s.given.kept < s.given.total:
        raise InvalidValue(
            f"{type(s.method).__name__} chooses among all weights, so it cannot start from masks of sparsity "
            f"{s.given.sparsity:g}; leave masks out, or hold them with method=None."
        )


def random_masks(s: Sparsifier, sparsity: float, budget_choice: BudgetChoice) -> Masks:
    """Return masks at random positions with exact counts divided by `budget_choice`."""
    return select(s, sparsity, score="random", budget_choice=budget_choice)
