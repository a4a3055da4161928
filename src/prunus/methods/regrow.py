"""Dynamic sparse training: at constant density, drop the weakest weights and grow others, every so often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.budget.select import keep_best
from prunus.errors import InvalidValue, ScheduleTooShort
from prunus.masks import Masks
from prunus.methods.base import BudgetChoice, Method, random_masks, starting_masks
from prunus.schedule import CURVES, Duration, interval_of, progress, steps_of
from prunus.sparsifier import Sparsifier

GROWTH = ("gradient", "random", "momentum")
GROWTH_MOMENTUM = 0.9


def rewire(mask: Tensor, drop_score: Tensor, grow_score: Tensor, count: int) -> Tensor:
    """Drop the `count` lowest kept entries and grow the `count` highest of all entries that are then not kept.

    Just-dropped entries may be grown again at once (Evci et al., ICML 2020, exclude only kept ones); such an entry
    keeps its value. The number of kept entries does not change.

    Args:
        mask: bool; drop_score, grow_score: same shape, higher = keep / grow.
        count: how many to exchange, limited to what is kept and what is free.
    """
    alive = int(torch.count_nonzero(mask))
    count = min(count, alive)
    kept = keep_best(drop_score.masked_fill(~mask, -torch.inf), alive - count) & mask
    return kept | keep_best(grow_score.masked_fill(kept, -torch.inf), count)


@dataclass(frozen=True)
class Regrow(Method):
    """Base of SET, RigL and ITOP: random sparse start, then drop and grow at fixed layer densities.

    The exchange happens after the optimizer step, in addition to it (RigL's TensorFlow code skips the gradient
    step of that iteration; PyTorch ports do both). Grown weights start at 0 with clean optimizer state.

    Attributes:
        budget: layer densities at the start.
        fraction: share of each layer's kept weights exchanged, at the start.
        fraction_end: the same at `end`.
        anneal: curve between the two: "cosine", "linear"...; "constant" stays at `fraction`.
        every, end: interval and last moment of exchanges.
        growth: "gradient" (largest |dense gradient|), "random", or "momentum" (largest |running sum of dense
            gradients|, factor 0.9: sparse momentum of Dettmers & Zettlemoyer, 2019; costs one tensor per weight).
    """

    budget: BudgetChoice = "erk"
    fraction: float = 0.3
    fraction_end: float = 0.0
    anneal: str = "cosine"
    every: Duration = "100ba"
    end: Duration = "0.75dur"
    growth: str = "gradient"

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check fractions, growth rule, and that at least one exchange fits."""
        super().check(steps, steps_per_epoch)
        check_fraction("fraction", self.fraction)
        check_fraction("fraction_end", self.fraction_end)
        if self.growth not in GROWTH:
            raise InvalidValue(f"growth {self.growth!r} is not known; choose from {', '.join(GROWTH)}.")
        if self.anneal not in CURVES:
            raise InvalidValue(f"anneal {self.anneal!r} is not known; choose from {', '.join(CURVES)}.")
        every, end = self.window(steps, steps_per_epoch)
        if end > steps:
            raise ScheduleTooShort(
                f"{type(self).__name__} exchanges weights until step {end} ({self.end!r}) but the training has {steps} "
                "steps; train longer, or set an earlier `end`."
            )
        if self.fraction > 0 and (every > end or every >= steps):
            raise ScheduleTooShort(
                f"{type(self).__name__} exchanges weights every {every} steps ({self.every!r}) until step {end} "
                f"({self.end!r}) of {steps}, so it never would; train longer, or set a shorter `every`."
            )

    def window(self, steps: int, steps_per_epoch: int | None) -> tuple[int, int]:
        """Return (interval, last step) of exchanges in optimizer steps."""
        every = interval_of(self.every, total_steps=steps, steps_per_epoch=steps_per_epoch)
        return every, steps_of(self.end, total_steps=steps, steps_per_epoch=steps_per_epoch)

    def start(self, s: Sparsifier) -> Masks:
        """Return the given masks, or random ones at the layer densities of `budget`."""
        given = starting_masks(s, self.sparsity)
        return given if given is not None else random_masks(s, self.sparsity, self.budget)

    def exchange_due(self, s: Sparsifier, step: int) -> bool:
        """Tell whether weights are exchanged after `step` steps; never after the last, when none could be trained."""
        every, end = self.window(s.steps, s.steps_per_epoch)
        return 0 < step <= end and step < s.steps and step % every == 0

    def fraction_at(self, s: Sparsifier, step: int) -> float:
        """Return the exchanged share at `step`."""
        if self.anneal == "constant":
            return self.fraction
        _, end = self.window(s.steps, s.steps_per_epoch)
        return CURVES[self.anneal](self.fraction, self.fraction_end, progress(step, 0, end))

    def update_due(self, s: Sparsifier, step: int) -> bool:
        """Tell whether the masks change after `step` steps."""
        return self.exchange_due(s, step)

    def wants_dense_gradients(self, s: Sparsifier) -> bool:
        """Growth reads gradients of pruned weights: at steps with an exchange, or always to average them."""
        return self.growth == "momentum" or (self.growth == "gradient" and self.update_due(s, s.step + 1))

    def before(self, s: Sparsifier) -> None:
        """Average dense gradients for growth by momentum (the optimizer's own momentum is zero where pruned)."""
        if self.growth == "momentum":
            for name, gradient in s.gradients().items():
                old = s.memory.get(f"momentum/{name}")
                s.memory[f"momentum/{name}"] = gradient.clone() if old is None else GROWTH_MOMENTUM * old + gradient

    def after(self, s: Sparsifier) -> None:
        """Exchange weights when due."""
        if self.exchange_due(s, s.step):
            s.update(self.exchange(s, s.masks))

    def exchange(self, s: Sparsifier, masks: Masks) -> Masks:
        """Return the masks after one exchange in every layer."""
        fraction = self.fraction_at(s, s.step)
        drop, grow, weights = s.scores("magnitude"), self.growth_scores(s), s.weights()
        new = {}
        for name, mask in masks.items():
            mask = mask.to(drop[name].device)
            alive = int(torch.count_nonzero(mask))
            new[name] = self.rewire_layer(mask, drop[name], grow[name], fraction, alive, weights[name])
        return Masks(new)

    def rewire_layer(
        self, mask: Tensor, drop: Tensor, grow: Tensor, fraction: float, alive: int, weight: Tensor
    ) -> Tensor:
        """Return the new mask of one layer: truncate(fraction * kept) entries are exchanged."""
        return rewire(mask, drop, grow, int(fraction * alive + 1e-9))

    def growth_scores(self, s: Sparsifier) -> Mapping[str, Tensor]:
        """Return what ranks the candidates for growth."""
        if self.growth == "random":
            return s.noise("growth")
        if self.growth == "gradient":
            return s.scores("gradient")
        return {n: s.memory[f"momentum/{n}"].abs() for n in s.parameters}
