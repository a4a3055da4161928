"""Gradual pruning: the mask shrinks along a schedule while training goes on. GMP, global MP, LAMP are settings."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.budget.allocate import check_fraction
from prunus.errors import InvalidValue, ScheduleTooShort
from prunus.masks import Masks
from prunus.methods.base import BudgetChoice, Method, check_pattern, given_masks, select
from prunus.schedule import Duration, ResolvedSchedule, Schedule
from prunus.scores.registry import SCORES
from prunus.sparsifier import Sparsifier


@dataclass(frozen=True)
class Gradual(Method):
    """Prune a little at a time from `initial` to `sparsity`; masks are nested, what is pruned stays pruned.

    Attributes:
        score: what ranks the weights; gradient scores use the gradient of the step itself.
        budget: who competes.
        unit: what goes as one piece.
        curve: how sparsity rises: "cubic", "linear", "cosine", "exponential", "oneshot".
        initial: sparsity before `begin`.
        begin, end, every: window and interval, in optimizer steps or as "2ep", "500ba", "0.3dur"; the last event
            falls exactly on `end`, so the target is met exactly.
    """

    score: str = "magnitude"
    budget: BudgetChoice = "uniform"
    unit: str = "weight"
    curve: str = "cubic"
    initial: float = 0.0
    begin: Duration = 0
    end: Duration = "0.67dur"
    every: Duration = "0.01dur"

    def schedule(self, steps: int, steps_per_epoch: int | None) -> ResolvedSchedule:
        """Return the sparsity schedule in optimizer steps."""
        wanted = Schedule(
            final=self.sparsity,
            initial=self.initial,
            curve=self.curve,
            begin=self.begin,
            end=self.end,
            every=self.every,
        )
        return wanted.resolve(steps, steps_per_epoch)

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check the sparsity, and that the ramp has room for its interval."""
        super().check(steps, steps_per_epoch)
        check_pattern(self.unit, self.sparsity)
        if check_fraction("initial", self.initial) > self.sparsity:
            raise InvalidValue(
                f"initial sparsity {self.initial:g} is above the final {self.sparsity:g}; pruned weights do not return."
            )
        plan = self.schedule(steps, steps_per_epoch)
        if self.curve != "oneshot" and plan.end - plan.begin < plan.every:
            raise ScheduleTooShort(
                f"the ramp runs over {plan.end - plan.begin} steps ({self.begin!r} to {self.end!r}) but prunes every "
                f"{plan.every} ({self.every!r}), so it would be one cut; train longer, or set a shorter `every`."
            )

    def start(self, s: Sparsifier) -> Masks:
        """Return everything kept, or the first cut when the schedule begins at step 0."""
        plan = self.schedule(s.steps, s.steps_per_epoch)
        first = given_masks(s, self.sparsity) or select(s, 0.0)
        self._at(s, self.sparsity, first)  # refuses impossible choices now instead of at the first event
        sparsity = plan.value(0)
        return self._at(s, sparsity, first) if sparsity > first.sparsity else first

    def wants_dense_gradients(self, s: Sparsifier) -> bool:
        """A gradient score must see the gradient itself; after the step some optimizers have overwritten it."""
        plan = self.schedule(s.steps, s.steps_per_epoch)
        return "gradient" in SCORES.entry(self.score).needs and plan.due(s.step + 1)

    def after(self, s: Sparsifier) -> None:
        """Cut further when an event is due."""
        plan = self.schedule(s.steps, s.steps_per_epoch)
        if plan.due(s.step):
            s.update(self._at(s, plan.value(s.step), s.masks))

    def _at(self, s: Sparsifier, sparsity: float, among: Masks) -> Masks:
        return select(s, sparsity, score=self.score, budget_choice=self.budget, unit_choice=self.unit, among=among)
