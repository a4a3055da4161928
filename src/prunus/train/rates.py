"""Learning rates as pure functions of progress, and the schedules of retraining after pruning.

A schedule maps a step in 0..total-1 to a factor of the peak rate. `rates` records a whole training as a list
with one rate per optimizer step; the schedules of retraining start from such a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from prunus.errors import InvalidValue, unknown

if TYPE_CHECKING:
    from torch import Tensor  # recipes and `--help` read this module without paying for torch

Factor = Callable[[int, int], float]


def constant(step: int, total: int) -> float:
    """Return 1 at every step."""
    return 1.0


def cosine(step: int, total: int) -> float:
    """Return (1 + cos(pi step / total)) / 2: 1 at step 0, towards 0 (Loshchilov and Hutter, SGDR, ICLR 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * step / max(total, 1)))


def linear(step: int, total: int) -> float:
    """Return 1 - step / total: 1 at step 0, towards 0."""
    return 1.0 - step / max(total, 1)


def milestones(step: int, total: int, at: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> float:
    """Return `factor` to the power of how many of the shares `at` of the training are over.

    A share s is over from step round(s total) on; the default is the usual drop by ten at one half and three
    quarters (He et al., CVPR 2016).
    """
    return factor ** sum(step >= round(share * total) for share in at)


SCHEDULES: dict[str, Factor] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "step": milestones,
}


def warmup(schedule: Factor, warmup_steps: int) -> Factor:
    """Return `schedule` squeezed into what follows a linear rise of `warmup_steps` steps.

    Step i of the rise has the factor (i + 1) / (warmup_steps + 1) of the schedule's first value, so that the
    first step is not lost at rate 0 and the peak itself belongs to the schedule.
    """

    def factor(step: int, total: int) -> float:
        rest = max(total - warmup_steps, 1)
        if step < warmup_steps:
            return schedule(0, rest) * (step + 1) / (warmup_steps + 1)
        return schedule(step - warmup_steps, rest)

    return factor


def rates(schedule: str, total: int, lr: float, *, warmup_steps: int = 0) -> list[float]:
    """Record a schedule: the learning rate of each of `total` optimizer steps.

    Args:
        schedule: "constant", "cosine", "linear" or "step".
        total: number of optimizer steps, >= 0.
        lr: the peak rate.
        warmup_steps: length of a linear rise before the schedule, 0..total.

    Raises:
        UnknownName: no such schedule.
        InvalidValue: the warm-up is longer than the training.
    """
    if schedule not in SCHEDULES:
        raise unknown("learning-rate schedule", schedule, SCHEDULES)
    if not 0 <= warmup_steps <= total:
        raise InvalidValue(f"a warm-up of {warmup_steps} steps does not fit in a training of {total} steps.")
    factor = warmup(SCHEDULES[schedule], warmup_steps) if warmup_steps else SCHEDULES[schedule]
    return [lr * factor(step, total) for step in range(total)]


def _rise_then(curve: Factor, steps: int, share: float) -> list[float]:
    """Record `curve` over `steps` after a linear rise over `share` of them (rounded down)."""
    factor = warmup(curve, int(share * steps))
    return [factor(step, steps) for step in range(steps)]


def fine_tune(original: Sequence[float], steps: int) -> list[float]:
    """FT: the last rate of the original training, constant (Han et al., NeurIPS 2015)."""
    return [float(original[-1])] * steps


def rewind(original: Sequence[float], steps: int) -> list[float]:
    """LRW: the rates of the original training's last `steps` steps again (Renda, Frankle, Carbin, ICLR 2020).

    Raises:
        InvalidValue: the original training was shorter than `steps`.
    """
    if steps > len(original):
        raise InvalidValue(
            f"LRW replays the last {steps} steps of the original training, which had only {len(original)}; "
            "retrain for fewer steps or use 'slr', 'clr' or 'llr'."
        )
    return [float(r) for r in original[len(original) - steps :]]


def scaled(original: Sequence[float], steps: int, share: float = 0.1) -> list[float]:
    """SLR: the whole original schedule compressed to `steps`, after a rise (Le and Hua, ICLR 2021).

    Step i of the compressed part takes the original rate at floor(i length / steps).
    """

    def replay(step: int, total: int) -> float:
        return float(original[min(step * len(original) // total, len(original) - 1)])

    return _rise_then(replay, steps, share)


def cyclic(original: Sequence[float], steps: int, share: float = 0.1) -> list[float]:
    """CLR: half a cosine from the largest original rate down to the smallest, after a rise (Le and Hua, ICLR 2021)."""
    high, low = max(original), min(original)
    return _rise_then(lambda step, total: low + (high - low) * cosine(step, total), steps, share)


def linear_restart(original: Sequence[float], steps: int, share: float = 0.1) -> list[float]:
    """LLR: a straight line from the largest original rate to 0, after a rise (Zimmer, Spiegel, Pokutta, ICLR 2023)."""
    high = max(original)
    return _rise_then(lambda step, total: high * linear(step, total), steps, share)


def adaptive_restart(
    original: Sequence[float], steps: int, norm_drop: float, pruned_fraction: float, share: float = 0.1
) -> list[float]:
    """ALLR: LLR whose first rate follows the damage done by pruning (Zimmer, Spiegel, Pokutta, ICLR 2023).

    The first rate is max(original) times norm_drop / sqrt(pruned_fraction), but at least the share
    steps / len(original) of it (at most all of it) and never above it.

    Args:
        norm_drop: ||w - pruned w|| / ||w||, see `norm_drop`.
        pruned_fraction: share of the weights that this pruning removed, in (0, 1].

    Raises:
        InvalidValue: the fraction is not in (0, 1] or the drop not in [0, 1].
    """
    if not 0.0 < pruned_fraction <= 1.0:
        raise InvalidValue(f"pruned_fraction={pruned_fraction!r} must be above 0 and at most 1 for 'allr'.")
    if not 0.0 <= norm_drop <= 1.0:
        raise InvalidValue(f"norm_drop={norm_drop!r} must be in [0, 1] for 'allr'.")
    floor = min(steps / len(original), 1.0)
    first = max(original) * min(max(norm_drop / math.sqrt(pruned_fraction), floor), 1.0)
    return _rise_then(lambda step, total: first * linear(step, total), steps, share)


RETRAINING = ("ft", "lrw", "slr", "clr", "llr", "allr")


def retraining(
    name: str,
    *,
    original: Sequence[float] | Callable[[int], float],
    steps: int,
    original_steps: int | None = None,
    norm_drop: float | None = None,
    pruned_fraction: float | None = None,
    warmup: float = 0.1,
) -> list[float]:
    """Return the learning rate of each of `steps` retraining steps, relative to a recorded original training.

    Args:
        name: "ft" (last rate, constant), "lrw" (replay of the last steps), "slr" (whole schedule, compressed),
            "clr" (cosine from largest to smallest), "llr" (line from the largest to 0), "allr" (the same from a
            rate that follows the damage). Compared in Zimmer, Spiegel and Pokutta, How I Learned to Stop
            Worrying and Love Retraining, ICLR 2023.
        original: one rate per step of the original training, as `rates` records it, or a function of the step.
        steps: length of the retraining in optimizer steps.
        original_steps: the original training's length; needed when `original` is a function.
        norm_drop, pruned_fraction: needed by "allr" and only by it.
        warmup: share of the steps in which "slr", "clr", "llr" and "allr" rise linearly to their first rate.

    Raises:
        UnknownName: no such schedule.
        InvalidValue: an argument is missing, does not apply, or is out of range.
    """
    chosen = name.lower() if isinstance(name, str) else name
    if chosen not in RETRAINING:
        raise unknown("retraining schedule", name, RETRAINING)
    recorded = _recorded(original, original_steps)
    if steps < 0:
        raise InvalidValue(f"steps={steps} is negative; retrain for 0 steps or more.")
    if not 0.0 <= warmup < 1.0:
        raise InvalidValue(f"warmup={warmup!r} must be a share in [0, 1).")
    if chosen == "allr":
        if norm_drop is None or pruned_fraction is None:
            raise InvalidValue("'allr' needs norm_drop and pruned_fraction; see prunus.train.rates.norm_drop.")
        return adaptive_restart(recorded, steps, norm_drop, pruned_fraction, warmup)
    if norm_drop is not None or pruned_fraction is not None:
        raise InvalidValue(f"norm_drop and pruned_fraction belong to 'allr'; {chosen!r} has no use for them.")
    if chosen == "ft":
        return fine_tune(recorded, steps)
    if chosen == "lrw":
        return rewind(recorded, steps)
    return {"slr": scaled, "clr": cyclic, "llr": linear_restart}[chosen](recorded, steps, warmup)


def _recorded(original: Sequence[float] | Callable[[int], float], original_steps: int | None) -> list[float]:
    if callable(original):
        if original_steps is None:
            raise InvalidValue("original is a function of the step; give original_steps, its length, as well.")
        recorded = [float(original(step)) for step in range(original_steps)]
    else:
        if original_steps is not None and original_steps != len(original):
            raise InvalidValue(f"original has {len(original)} rates but original_steps={original_steps}.")
        recorded = [float(rate) for rate in original]
    if not recorded:
        raise InvalidValue("the original training has no steps, so there is no rate to start from.")
    return recorded


def norm_drop(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Return ||before - after|| / ||before||, the L2 norms taken over the tensors named in `after` (0 if all zero).

    Args:
        before: weights by name, before pruning.
        after: the pruned weights, or masks (bool tensors, True = kept).

    Returns:
        A number in [0, 1] when `after` is `before` with zeros.
    """
    import torch

    whole = lost = 0.0
    for name, value in after.items():
        weight = before[name].detach().double()
        kept = weight * value.to(weight.device) if value.dtype == torch.bool else value.to(weight)
        whole += float(weight.square().sum())
        lost += float((weight - kept).square().sum())
    return math.sqrt(lost / whole) if whole else 0.0
