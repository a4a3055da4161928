"""Exact selection of the k best of many tensors at once; equal scores keep the earlier position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunus.errors import Infeasible, InvalidValue, NonFinite

_SAMPLE = 1 << 16


def round_half_up(x: float) -> int:
    """Round to the nearest whole number, halves up, forgiving float dust such as 0.9 * 1000 = 900.0000000000001."""
    return math.floor(x + 0.5 + 1e-9)


def keep_count(total: int, sparsity: float) -> int:
    """Return how many of `total` entries stay at `sparsity`: total - round(sparsity * total)."""
    return total - round_half_up(sparsity * total)


def some_kept(total: int, sparsity: float) -> int:
    """Return `keep_count`, which must not be zero: a net without any weight is never what was meant.

    Raises:
        InvalidValue: `sparsity` rounds to nothing kept.
    """
    keep = keep_count(total, sparsity)
    if keep == 0:
        raise InvalidValue(
            f"sparsity {sparsity:g} keeps none of {total} prunable weights; "
            f"{1 - 1 / max(total, 1):g} keeps the last one."
        )
    return keep


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flatten, and bring all tensors to one dtype of at least 32 bits, so that comparisons are exact."""
    widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.detach().reshape(-1).to(widest) for t in tensors]


def threshold(tensors: Sequence[Tensor], k: int) -> tuple[float, int]:
    """Find the score v at which exactly k entries stay: all above v, and the first `ties` of those equal to v.

    A sorted sample of every s-th entry brackets v; one pass counts what lies above the bracket and collects the
    little that lies inside, which is then searched exactly. The bracket is widened when it missed, so the result
    never depends on the sample. Memory beside the input: about one hundredth of it.

    Args:
        tensors: scores, any shapes, no NaN; -inf marks entries that may only stay when nothing else is left.
        k: how many to keep, 0 <= k <= number of entries.

    Returns:
        (v, ties); v = inf keeps nothing, v = -inf with ties = everything at -inf keeps all.
    """
    flat = _alike(tensors)
    n = sum(t.numel() for t in flat)
    if k <= 0:
        return math.inf, 0
    if k > n:
        raise Infeasible(f"cannot keep {k} of {n} entries.")
    stride = max(1, n // _SAMPLE)
    sample = torch.cat([t[::stride].cpu() for t in flat]).sort(descending=True).values
    m = sample.numel()
    centre = k / n * m
    margin = 8.0 + 4.0 * math.sqrt(max(centre * (1 - k / n), 1.0)) if stride > 1 else 1.0
    while True:
        low, high = math.floor(centre + margin), math.floor(centre - margin)
        lower = float(sample[low]) if low < m else -math.inf
        upper = float(sample[high]) if high >= 0 else math.inf
        above = sum(int(torch.count_nonzero(t > upper)) for t in flat)
        if above < k:
            if lower == upper:
                equal = sum(int(torch.count_nonzero(t == upper)) for t in flat)
                if above + equal >= k:
                    return upper, k - above
            else:
                middle = torch.cat([t[(t >= lower) & (t <= upper)].cpu() for t in flat])
                if above + middle.numel() >= k:
                    v = float(middle.kthvalue(middle.numel() - (k - above) + 1).values)
                    return v, k - above - int(torch.count_nonzero(middle > v))
        if low >= m and high < 0:
            raise NonFinite(f"scores hold NaN, so the {k} best of {n} are not defined; look for a diverged loss.")
        margin *= 4.0


def keep_top(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Mark the k highest scores over all tensors together (bool tensors of the same shapes).

    Ties at the threshold go to the earlier tensor, then the earlier position.

    Raises:
        Infeasible: k is larger than the number of entries.
        NonFinite: so many scores are NaN that no k are left.
    """
    v, ties = threshold(list(scores.values()), k)
    keep: dict[str, Tensor] = {}
    widest = torch.float64 if any(t.dtype == torch.float64 for t in scores.values()) else torch.float32
    for name, score in scores.items():
        score = score.detach().to(widest).contiguous()  # channels-last scores: positions count in logical order
        mask = score > v
        if ties:
            equal = (score == v).reshape(-1).nonzero().reshape(-1)[:ties]
            mask.view(-1)[equal] = True
            ties -= equal.numel()
        keep[name] = mask
    return keep


def keep_best(score: Tensor, k: int) -> Tensor:
    """Mark the k highest entries of one tensor (see `keep_top`)."""
    return keep_top({"": score.contiguous()}, k)[""]


def keep_whole_units(scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor], elements: int) -> dict[str, Tensor]:
    """Mark the highest-scoring units, over all tensors together, whose sizes add up to at most `elements`.

    Units are taken in order of score until the next one would exceed the budget; -inf units are never taken.
    """
    flat = torch.cat(_alike(list(scores.values())))
    size = torch.cat([sizes[n].to(flat.device) for n in scores])
    order = flat.argsort(descending=True, stable=True)
    fits = (size[order].cumsum(0) <= elements) & (flat[order] > -math.inf)
    keep = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    keep[order[fits]] = True
    parts = keep.split([s.numel() for s in scores.values()])
    return {n: part.reshape(scores[n].shape) for n, part in zip(scores, parts, strict=True)}


def keep_best_rows(score: Tensor, k: int) -> Tensor:
    """Mark the k highest entries of every row of a matrix; ties go to the earlier column."""
    order = score.argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    return keep.scatter_(1, order[:, :k], True)
