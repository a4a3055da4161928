"""Dividing the rows of a mask into balanced clusters that use the same columns: a hypergraph cut, or Jaccard linkage.

Rows are vertices; every column is a hyperedge that joins the rows with a non-zero in it. Regroup asks for clusters of
about equal size that cut few hyperedges, so that rows of high Jaccard similarity |A & B| / |A | B| end together.
Everything here is deterministic: sums of whole numbers, ties to the earlier row. Where masks are so dense that nearly
every column is cut by any clusters, the cut says little and `jaccard_clusters` puts similar rows together better.

Sources: Fiduccia and Mattheyses, "A linear-time heuristic for improving network partitions", DAC 1982; recursive
bisection with that tolerance as in hMETIS (Karypis et al., DAC 1997), for which this stands in; the use for masks
follows Rumi, Ma, Wang and Jiang, PACT 2020. One level, no coarsening.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prunus.budget.allocate import check_fraction
from prunus.budget.select import round_half_up
from prunus.errors import InvalidValue, unknown

Partitioner = Callable[[Tensor, int], Sequence[Tensor]]

# Similarities are whole numbers of this size: sums in any order are exact, so no platform breaks ties differently.
_SCALE = 1 << 16


def jaccard(mask: Tensor) -> Tensor:
    """Return the Jaccard similarity |A_i & A_j| / |A_i | A_j| of all pairs of rows.

    Args:
        mask: bool (rows, columns).

    Returns:
        float64 (rows, rows); two empty rows have similarity 1.
    """
    ones = mask.double()
    overlap, sizes = ones @ ones.T, ones.sum(1)
    union = sizes[:, None] + sizes[None, :] - overlap
    return torch.where(union > 0, overlap / union.clamp(min=1), torch.ones_like(union))


def hyperedge_cut(mask: Tensor, clusters: Sequence[Tensor]) -> int:
    """Return how many columns have non-zeros in more than one cluster of rows."""
    used = torch.stack([mask[rows].any(0) for rows in clusters])
    return int((used.sum(0) > 1).sum())


def hypergraph_clusters(mask: Tensor, clusters: int, *, imbalance: float = 0.1) -> list[Tensor]:
    """Divide rows by recursive bisection: greedy growth from one row, then Fiduccia-Mattheyses passes.

    Moves are ranked by the drop in cut hyperedges; of equal drops, by the gain in Jaccard similarity (less its mean)
    that stays inside the two sides, which is what decides where nearly every column is cut anyway. Passes go on until
    one brings nothing.

    Args:
        mask: bool (rows, columns).
        clusters: how many; at most as many as there are rows.
        imbalance: each bisection may miss its share by so much of the rows it divides (0.1: 40 to 60% of a half).

    Returns:
        `clusters` int64 tensors of ascending row numbers, none empty, in order of their first rows.

    Raises:
        InvalidValue: more clusters than rows, or less than one; imbalance outside [0, 1].
    """
    rows = _check(mask, clusters)
    slack = check_fraction("imbalance", imbalance)
    incidence = mask.cpu().numpy()
    similarity = _centred(mask)
    parts = [
        torch.from_numpy(np.sort(part)) for part in _divide(np.arange(rows), clusters, incidence, similarity, slack)
    ]
    return sorted(parts, key=lambda part: int(part[0]))


def jaccard_clusters(mask: Tensor, clusters: int, *, imbalance: float = 0.1) -> list[Tensor]:
    """Merge rows, then clusters, of the highest average Jaccard similarity, up to a size cap.

    Merging ends when `clusters` are left or every further pair would exceed the cap of
    ceil(rows / clusters x (1 + imbalance)) rows; because of the cap there may be more clusters than asked for.

    Args, returns, raises: as `hypergraph_clusters`.
    """
    rows = _check(mask, clusters)
    cap = math.ceil(rows / clusters * (1 + check_fraction("imbalance", imbalance)) - 1e-9)
    total = np.floor(jaccard(mask.cpu()).numpy() * _SCALE).astype(np.int64)
    sizes = np.ones(rows, dtype=np.int64)
    members = [[row] for row in range(rows)]
    alive = np.ones(rows, dtype=bool)
    below = np.tri(rows, k=0, dtype=bool)
    while alive.sum() > clusters:
        pairs = sizes[:, None] * sizes[None, :]
        allowed = (sizes[:, None] + sizes[None, :] <= cap) & alive[:, None] & alive[None, :] & ~below
        if not allowed.any():
            break
        average = np.where(allowed, total / pairs, -1.0)
        first, second = divmod(int(average.argmax()), rows)
        members[first] += members[second]
        total[first] += total[second]
        total[:, first] += total[:, second]
        sizes[first] += sizes[second]
        alive[second] = False
    parts = [torch.tensor(sorted(members[i])) for i in np.flatnonzero(alive)]
    return sorted(parts, key=lambda part: int(part[0]))


PARTITIONERS: dict[str, Callable[..., list[Tensor]]] = {
    "hypergraph": hypergraph_clusters,
    "jaccard": jaccard_clusters,
}


def partitioner(spec: str | Partitioner, imbalance: float = 0.1) -> Partitioner:
    """Return the partitioner called `spec` ("hypergraph" or "jaccard") with this tolerance; a function as it is.

    A partitioner maps (bool mask (rows, columns), clusters) to index tensors that hold every row once.

    Raises:
        UnknownName: no partitioner is called that.
    """
    if callable(spec):
        return spec
    if spec not in PARTITIONERS:
        raise unknown("partitioner", spec, PARTITIONERS)
    return partial(PARTITIONERS[spec], imbalance=check_fraction("imbalance", imbalance))


def check_partition(parts: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Return `parts` if together they hold each of 0..rows-1 once, else raise `InvalidValue`."""
    held = torch.cat([p.reshape(-1).long() for p in parts]) if len(parts) else torch.empty(0, dtype=torch.int64)
    if not torch.equal(held.sort().values, torch.arange(rows)):
        raise InvalidValue(
            f"the partitioner did not return every one of {rows} rows exactly once (it returned {held.numel()} row "
            "numbers); a partitioner maps (mask, clusters) to disjoint index tensors that cover all rows."
        )
    return [p.reshape(-1).long().sort().values for p in parts if p.numel()]


def _check(mask: Tensor, clusters: int) -> int:
    rows = len(mask)
    if isinstance(clusters, bool) or not isinstance(clusters, int) or not 1 <= clusters <= rows:
        raise InvalidValue(f"clusters={clusters!r} must be a whole number from 1 to {rows}, the number of rows.")
    return rows


def _centred(mask: Tensor) -> np.ndarray:
    """Return Jaccard similarities as whole numbers (rows, rows) with mean 0 off the diagonal and 0 on it.

    Without the mean, any cut of a random mask would look better the more unequal its sides are.
    """
    similarity = np.floor(jaccard(mask.cpu()).numpy() * _SCALE).astype(np.int64)
    rows = len(similarity)
    np.fill_diagonal(similarity, 0)
    similarity -= similarity.sum() // max(rows * (rows - 1), 1)
    np.fill_diagonal(similarity, 0)
    return similarity


def _divide(
    rows: np.ndarray, clusters: int, incidence: np.ndarray, similarity: np.ndarray, imbalance: float
) -> list[np.ndarray]:
    if clusters == 1:
        return [rows]
    left = clusters - clusters // 2
    right = clusters - left
    size, slack = round_half_up(len(rows) * left / clusters), int(imbalance * len(rows) + 1e-9)
    low, high = max(left, size - slack), min(len(rows) - right, size + slack)
    inside, among = incidence[rows], similarity[np.ix_(rows, rows)]
    # Grown from the row least like all others, and from the row least like that one: the better of two starts.
    seed = int(among.sum(1).argmin())
    starts = dict.fromkeys([seed, int(among[seed].argmin())])
    sides = [_refine(inside, among, _grow(among, start, size), low, high) for start in starts]
    side = max(sides, key=lambda found: _quality(inside, among, found))
    return [
        *_divide(rows[~side], left, incidence, similarity, imbalance),
        *_divide(rows[side], right, incidence, similarity, imbalance),
    ]


def _quality(incidence: np.ndarray, similarity: np.ndarray, side: np.ndarray) -> tuple[int, int]:
    """Return what makes a bisection good: few cut columns first, then much similarity inside the sides."""
    cut = int((incidence[~side].any(0) & incidence[side].any(0)).sum())
    sign = np.where(side, -1, 1)
    return -cut, int(sign @ similarity @ sign)


def _grow(similarity: np.ndarray, start: int, size: int) -> np.ndarray:
    """Return sides (False = first) after growing the first to `size` rows from `start`, the most similar row first."""
    side = np.ones(len(similarity), dtype=bool)
    pull = np.zeros(len(similarity), dtype=np.int64)
    row = start
    for _ in range(size):
        side[row] = False
        pull += similarity[row]
        row = int(np.where(side, pull, np.iinfo(np.int64).min).argmax())
    return side


def _edge_gains(pins: np.ndarray) -> np.ndarray:
    """Return, per side and column, the drop in cut when a row with a non-zero there leaves that side.

    A column is no longer cut when its only row on this side leaves to others; it becomes cut when all its rows, at
    least two, are on this side.
    """
    own, other = pins, pins[::-1]
    return ((own == 1) & (other >= 1)).astype(np.float32) - ((other == 0) & (own >= 2))


def _refine(incidence: np.ndarray, similarity: np.ndarray, side: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return sides after Fiduccia-Mattheyses passes: move every row once, best first, keep the best prefix, again."""
    columns = np.ascontiguousarray(incidence.T, dtype=np.float32)
    rows = len(side)
    step = int(np.abs(similarity).sum(1).max()) * 2 + 1 if rows else 1
    while True:
        now = side.copy()
        pins = np.stack([incidence[~now].sum(0), incidence[now].sum(0)]).astype(np.int64)
        edges = _edge_gains(pins)
        drop = edges @ columns  # (2, rows): valid for the side a row is on
        sign = np.where(now, -1, 1)
        # Similarity to the other side less that to the own side.
        near = -(similarity @ sign) * sign
        free = np.ones(rows, dtype=bool)
        first = int((~now).sum())
        total, best, moves, kept = (0, 0), (0, 0), [], 0
        while True:
            # One row beyond the limits on the way, else sides of fixed sizes could exchange nothing.
            allowed = free & np.where(now, first <= high, first >= low)
            if not allowed.any():
                break
            cut = drop[now.astype(np.int64), np.arange(rows)].astype(np.int64)
            key = np.where(allowed, cut * step + near, np.iinfo(np.int64).min)
            row = int(key.argmax())
            total = (total[0] + int(cut[row]), total[1] + int(near[row]))
            source = int(now[row])
            used = np.flatnonzero(incidence[row])
            pins[source, used] -= 1
            pins[1 - source, used] += 1
            fresh = _edge_gains(pins[:, used])
            changed = (fresh != edges[:, used]).any(0)
            where = used[changed]
            drop += (fresh[:, changed] - edges[:, where]) @ columns[where]
            edges[:, used] = fresh
            near = near + np.where(now == now[row], 2, -2) * similarity[row]
            near[row] = -near[row]
            now[row] = not now[row]
            first += 1 if source else -1
            free[row] = False
            moves.append(row)
            if total > best and low <= first <= high:
                best, kept = total, len(moves)
        if not kept:
            return side
        side = side.copy()
        side[moves[:kept]] = ~side[moves[:kept]]
