"""Dynamic sparse training under a soft memory bound: explore beyond the budget, come back to it, then exchange.

Source: the training of Chase (Yin et al., NeurIPS 2023, Dynamic Sparsity Is Channel-Level Sparsity Learner) without its
removal of channels. From the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.budget.select import keep_top, round_half_up, some_kept
from prunus.errors import Infeasible, InvalidValue, ScheduleTooShort
from prunus.masks import Masks
from prunus.methods.regrow import Regrow
from prunus.schedule import CURVES, Duration, cosine, progress, steps_of
from prunus.sparsifier import Sparsifier


def explore(
    masks: Mapping[str, Tensor],
    drop_score: Mapping[str, Tensor],
    grow_score: Mapping[str, Tensor],
    down_to: int,
    up_to: int,
    allowed: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Drop the lowest kept entries of all layers until `down_to` are left, then grow the highest free ones to `up_to`.

    Just-dropped entries are free and may be grown again at once, keeping their value.

    Args:
        masks: layer -> bool, what is kept.
        drop_score, grow_score: layer -> scores of the same shape, higher = keep / grow.
        down_to: kept entries after dropping; when fewer are kept, none is dropped.
        up_to: kept entries after growing; limited to what is allowed.
        allowed: layer -> bool, where entries may grow (None: everywhere).
    """
    kept_now = sum(int(torch.count_nonzero(m)) for m in masks.values())
    stay = min(down_to, kept_now)
    kept = keep_top(
        {n: drop_score[n].masked_fill(~m.to(drop_score[n].device), -torch.inf) for n, m in masks.items()}, stay
    )
    closed = {n: k if allowed is None else k | ~allowed[n].to(k.device) for n, k in kept.items()}
    room = sum(int(torch.count_nonzero(~c)) for c in closed.values())
    grown = keep_top(
        {n: grow_score[n].masked_fill(closed[n].to(grow_score[n].device), -torch.inf) for n in kept},
        min(max(0, up_to - stay), room),
    )
    return {n: kept[n] | grown[n].to(kept[n].device) for n in kept}


@dataclass(frozen=True)
class SoftBound(Regrow):
    """Global exploration above the budget until `explore_end`, then global drop and grow at the budget.

    With N prunable weights, B = N - round(sparsity * N) and d = 1 - sparsity, every `every` steps until `explore_end`:
    drop by magnitude to B, grow by `growth` to N (d + bound(t)), where bound falls to 0 along a cosine. At
    `explore_end` the excess is dropped, so from there on exactly B are kept. After it, at the same interval: drop the
    share `fraction`(t) of the kept weights and grow as many. All layers compete together.

    With `bound=0, explore_end=0` this is RigL with one ranking for the whole net. The authors' code keeps one weight
    more and grows one fewer per event; counts are exact here. That bound(t) reaches 0 at `explore_end` is our reading.

    Attributes:
        bound: how far, as a share of N, exploration goes beyond the budget at the start.
        explore_end: end of exploration (paper, CIFAR: 130 of 160 epochs).
        fraction, fraction_end: exchanged share, along a cosine over the whole training.
        every: interval of events (paper: 1,000 steps of 72,000).
        since: steps of the same training done before attaching, when it goes on with a smaller network.
        dense: N when the network was cut since then; B stays what it was.
    """

    fraction: float = 0.5
    fraction_end: float = 0.005
    every: Duration = "0.014dur"
    end: Duration = "1dur"
    bound: float = 0.05
    explore_end: Duration = "0.81dur"
    since: int = 0
    dense: int | None = None

    def check(self, steps: int, steps_per_epoch: int | None) -> None:
        """Check the shares, and that an event fits."""
        if isinstance(self.since, bool) or not isinstance(self.since, int) or self.since < 0:
            raise InvalidValue(f"since {self.since!r} must be a number of steps from 0 up.")
        whole = self.since + steps
        super().check(whole, steps_per_epoch)
        check_fraction("bound", self.bound)
        self.explored_until(whole, steps_per_epoch)

    def explored_until(self, whole: int, steps_per_epoch: int | None) -> int:
        """Return the end of exploration in steps of the whole training.

        Raises:
            ScheduleTooShort: it lies beyond the training.
        """
        end = steps_of(self.explore_end, total_steps=whole, steps_per_epoch=steps_per_epoch)
        if end > whole:
            raise ScheduleTooShort(
                f"exploration ends at step {end} ({self.explore_end!r}) but the training has {whole} steps; train "
                "longer, or end it earlier."
            )
        return end

    def counts(self, s: Sparsifier, step: int) -> tuple[int, int]:
        """Return (B, how many weights exploration may hold at `step` of the whole training)."""
        total = self.dense if self.dense is not None else sum(a.size for a in s.addresses.values())
        kept = some_kept(total, self.sparsity)
        end = self.explored_until(self.since + s.steps, s.steps_per_epoch)
        return kept, min(total, kept + round_half_up(total * cosine(self.bound, 0.0, progress(step, 0, end))))

    def start(self, s: Sparsifier) -> Masks:
        """Return the given masks, or random ones at the layer densities of `budget`."""
        if not self.since:
            return super().start(s)
        if s.given is None:
            raise InvalidValue(f"since={self.since} goes on with a training, so give the masks it had as masks=...")
        return s.given

    def exchange_due(self, s: Sparsifier, step: int) -> bool:
        """Tell whether an event falls on `step` steps since attaching, the end of exploration included."""
        now, whole = self.since + step, self.since + s.steps
        every, end = self.window(whole, s.steps_per_epoch)
        regular = 0 < now <= end and now < whole and now % every == 0
        return step > 0 and (regular or now == self.explored_until(whole, s.steps_per_epoch))

    def fraction_at(self, s: Sparsifier, step: int) -> float:
        """Return the exchanged share at `step`, along its curve over the whole training."""
        if self.anneal == "constant":
            return self.fraction
        _, end = self.window(self.since + s.steps, s.steps_per_epoch)
        return CURVES[self.anneal](self.fraction, self.fraction_end, progress(self.since + step, 0, end))

    def allowed(self, s: Sparsifier) -> Mapping[str, Tensor] | None:
        """Return where weights may grow; None: everywhere."""
        return None

    def after(self, s: Sparsifier) -> None:
        """Explore, or exchange, when due; layers compete, so that their counts move."""
        if self.exchange_due(s, s.step):
            s.update(self.exchange(s, s.masks))

    def exchange(self, s: Sparsifier, masks: Masks) -> Masks:
        """Return the masks after one event."""
        now, allowed = self.since + s.step, self.allowed(s)
        kept, most = self.counts(s, now)
        capacity = masks.total if allowed is None else sum(int(torch.count_nonzero(a)) for a in allowed.values())
        if capacity < kept:
            raise Infeasible(
                f"{capacity} weights are left in living channels, fewer than the {kept} of sparsity {self.sparsity:g}; "
                "remove fewer channels, raise their floor, or ask for more sparsity."
            )
        end = self.explored_until(self.since + s.steps, s.steps_per_epoch)
        if now < end:
            down_to, up_to = kept, most
        elif now == end:
            down_to, up_to = kept, kept
        else:
            down_to, up_to = kept - int(self.fraction_at(s, s.step) * kept + 1e-9), kept
        return Masks(explore(masks, s.scores("magnitude"), self.growth_scores(s), down_to, up_to, allowed))
