"""Which channels go: thresholds on their scales, votes of coupled layers, and quotas with a floor per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunus.budget.select import keep_best, keep_top
from prunus.errors import Infeasible, InvalidValue, NonFinite


def check_scales(scale: Tensor) -> Tensor:
    """Return |scale| in float64 if it is a finite vector with at least one entry.

    Raises:
        InvalidValue: not a vector, or empty.
        NonFinite: an entry is NaN or infinite.
    """
    if not isinstance(scale, Tensor) or scale.ndim != 1 or not scale.numel():
        what = f"shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
        raise InvalidValue(f"scales must be a vector with one entry per channel, not {what}.")
    if not bool(torch.isfinite(scale).all()):
        raise NonFinite("scales hold NaN or infinity, so channels cannot be ranked by them; look for a diverged loss.")
    return scale.detach().abs().to(torch.float64)


def above_threshold(scale: Tensor, threshold: float = 0.01, minimum: int = 1) -> Tensor:
    """Keep the channels with |scale| > threshold, and at least the `minimum` largest.

    A subgradient of strength s at learning rate lr leaves dead scales oscillating within lr * s of zero, so the
    threshold must be above that. Source: Jiang et al., 2022 (arXiv 2201.06776), the authors' code.

    Args:
        scale: (C,) scales of a norm layer.
        threshold: from 0 up.
        minimum: channels that always stay, limited to C.

    Returns:
        bool (C,), True = stays.
    """
    size = check_scales(scale)
    if not threshold >= 0:
        raise InvalidValue(f"threshold {threshold} must be a number from 0 up.")
    return (size > threshold) | keep_best(size, _least(minimum, size.numel()))


def above_energy(scale: Tensor, share: float = 1e-4, negligible: float = 1e-3, minimum: int = 1) -> Tensor:
    """Cut the longest run of smallest scales whose squares add up to at most `share` of all squares.

    A layer whose largest scale is below `negligible` is cut down to the minimum. Source: Jiang et al., 2022 (arXiv
    2201.06776), the rule called "OT" in the authors' code.

    Args:
        scale: (C,) scales of a norm layer.
        share: of the sum of squares, in [0, 1).
        negligible: from 0 up.
        minimum: channels that always stay, limited to C.

    Returns:
        bool (C,), True = stays.
    """
    size = check_scales(scale)
    if not 0 <= share < 1:
        raise InvalidValue(f"share {share} must be in [0, 1).")
    if not negligible >= 0:
        raise InvalidValue(f"negligible {negligible} must be a number from 0 up.")
    always = keep_best(size, _least(minimum, size.numel()))
    if float(size.max()) < negligible or not float(size.max()):
        return always
    ordered = (size / size.max()).sort().values  # squares of tiny scales would vanish
    energy = ordered.square().cumsum(0)
    cut = int((energy <= share * energy[-1]).sum())
    # The same as a threshold midway between the last scale of the run and the next, except that a scale equal to the
    # next one stays: all equal ones together would not fit under the share.
    return (size / size.max() >= ordered[cut]) | always


def _least(minimum: int, channels: int) -> int:
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 1:
        raise InvalidValue(f"minimum {minimum!r} must be a whole number of channels, at least 1.")
    return min(minimum, channels)


def vote(keeps: Sequence[Tensor]) -> Tensor:
    """Agree on what layers whose channels are added together give up: a conservative consensus.

    Every layer votes against its victims. With m the fewest victims of any layer, the largest number of votes v is
    found that at least m channels have; the channels with v votes or more go from all layers. When a layer has no
    victim, nothing goes. Source: Jiang et al., 2022 (arXiv 2201.06776), the authors' code for residual stages.

    Args:
        keeps: one bool (C,) per layer, True = the layer wants it to stay.

    Returns:
        bool (C,), True = stays.

    Raises:
        InvalidValue: no layers, or masks that are not bool vectors of one length.
    """
    if not keeps or any(k.dtype != torch.bool or k.ndim != 1 or k.shape != keeps[0].shape for k in keeps):
        raise InvalidValue("a vote needs one bool vector per layer, all of one length.")
    votes = torch.stack([~k for k in keeps]).sum(0)
    fewest = min(int((~k).sum()) for k in keeps)
    if fewest == 0:
        return torch.ones_like(keeps[0])
    needed = int(votes.sort(descending=True).values[fewest - 1])
    return votes < needed


def channel_floor(channels: int, sparsity: float, ratio: float) -> int:
    """Return the fewest channels a layer may be left with: truncate(channels * (1 - sparsity) * ratio).

    Source: Yin et al., NeurIPS 2023 (Chase), the authors' code; `ratio` is their minimum ratio beta.
    """
    return int(channels * (1 - sparsity) * ratio + 1e-9)


def keep_channels(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], remove: int, floors: Mapping[str, int]
) -> dict[str, Tensor]:
    """Remove the lowest-scoring channels of all layers together, no layer below its floor.

    What a layer at its floor cannot give is taken from the others, lowest scores first: cutting layers to their floor
    and sharing out the rest again until nothing is left over comes to the same, because the channels that a floor
    protects are the best of their layer. The count is exact; of equal scores the later position goes. Source: Yin et
    al., NeurIPS 2023 (Chase).

    Args:
        scores: layer -> one score per channel, higher = keep.
        alive: layer -> bool, what is there still.
        remove: how many channels go, from 0 up.
        floors: layer -> fewest channels that stay.

    Returns:
        layer -> bool, a subset of `alive`.

    Raises:
        Infeasible: the floors leave fewer channels to remove.
        NonFinite: a score of a living channel is NaN.
    """
    spare = sum(max(0, int(alive[n].sum()) - floors[n]) for n in scores)
    if not 0 <= remove <= spare:
        raise Infeasible(
            f"cannot remove {remove} channels: the floors leave {spare}; lower the floor ratio or the channel sparsity."
        )
    ranked = {}
    for name, score in scores.items():
        there = alive[name].to(score.device)
        if bool(torch.isnan(score[there]).any()):
            raise NonFinite(f"channel scores of {name!r} hold NaN; look for a diverged loss.")
        # float64 keeps the order of equal scores; infinity protects, minus infinity marks what is gone.
        ranked[name] = score.to(torch.float64).masked_fill(~there, -math.inf)
        best = keep_best(ranked[name], min(floors[name], int(there.sum())))
        ranked[name] = ranked[name].masked_fill(best, math.inf)
    total = sum(int(a.sum()) for a in alive.values())
    return keep_top(ranked, total - remove)
