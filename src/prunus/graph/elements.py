"""Positions of axes and what ties them together: equal, product of two factors, or never to be removed.

Every position of every axis that might be cut is an *element*, a whole number. Operators state three kinds of fact:
two elements stay or go together (`same`); an element stays exactly if both of two others stay (`product`, what a view
says when it factors an axis); an element never goes (`fix`). `solve` closes these facts: equal elements become one
class, classes known as a product in two ways have their factors matched, and what remains without factors are the
leaves: the units that can be removed one by one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Elements:
    """Collects facts about elements."""

    def __init__(self) -> None:
        self.count = 0
        self._equal: list[tuple[Ids, Ids]] = []
        self._products: list[tuple[Ids, Ids, Ids]] = []
        self._known_products: dict[tuple[bytes, bytes], Ids] = {}
        self._fixed: list[tuple[Ids, int]] = []
        self._heads: list[Ids] = []
        self._reasons: dict[str, int] = {}

    def fresh(self, count: int) -> Ids:
        """Return `count` new elements."""
        start, self.count = self.count, self.count + count
        return np.arange(start, self.count, dtype=np.int64)

    def same(self, left: Ids, right: Ids) -> None:
        """State that left[i] and right[i] stay or go together."""
        if left is not right:
            self._equal.append((left, right))

    def product(self, left: Ids, right: Ids) -> Ids:
        """Return elements e[i * len(right) + j] that stay exactly if left[i] and right[j] stay."""
        key = (left.tobytes(), right.tobytes())
        found = self._known_products.get(key)
        if found is None:
            found = self.fresh(len(left) * len(right))
            self._known_products[key] = found
            self._products.append((found, np.repeat(left, len(right)), np.tile(right, len(left))))
        return found

    def factor(self, ids: Ids, outer: int) -> tuple[Ids | None, Ids | None]:
        """Return (left, right) with `ids` as their product; None for a factor that cannot go or has one position."""
        inner = len(ids) // outer
        table = ids.reshape(outer, inner)
        if inner == 1:
            return ids, None
        if outer == 1:
            return None, ids
        if (table == table[:, :1]).all():
            return table[:, 0].copy(), None
        if (table == table[:1]).all():
            return None, table[0].copy()
        period = _period(ids)
        if period < len(ids) and period % inner == 0:  # several times over (a batch, say): factor it once
            left_once, right = self.factor(ids[:period].copy(), period // inner)
            return None if left_once is None else np.tile(left_once, len(ids) // period), right
        left, right = self.fresh(outer), self.fresh(inner)
        self._products.append((ids, np.repeat(left, inner), np.tile(right, outer)))
        self._known_products.setdefault((left.tobytes(), right.tobytes()), ids)
        return left, right

    def fix(self, ids: Ids | None, reason: str) -> None:
        """State that these elements never go, and why."""
        if ids is not None and len(ids):
            self._fixed.append((ids, self._reasons.setdefault(reason, len(self._reasons))))

    def head(self, ids: Ids | None) -> None:
        """Mark elements as positions of an axis over which activations are multiplied separately (heads)."""
        if ids is not None:
            self._heads.append(ids)

    def solve(self) -> Solution:
        """Close all facts."""
        left = np.concatenate([a for a, _ in self._equal]) if self._equal else np.empty(0, np.int64)
        right = np.concatenate([b for _, b in self._equal]) if self._equal else np.empty(0, np.int64)
        label = _components(self.count, left, right)
        whole, outer, inner = (
            (np.concatenate([p[i] for p in self._products]) for i in range(3))
            if self._products
            else (np.empty(0, np.int64),) * 3
        )
        while len(whole):
            order = np.argsort(label[whole], kind="stable")
            w, o, i = label[whole[order]], label[outer[order]], label[inner[order]]
            twice = w[1:] == w[:-1]
            edges_left = [o[1:][twice], i[1:][twice]]
            edges_right = [o[:-1][twice], i[:-1][twice]]
            # A product that contains itself says that the other factor goes whenever it goes: tie them.
            for factor, other in ((o, i), (i, o)):
                loop = (factor == w) & (other != w)
                edges_left.append(w[loop])
                edges_right.append(other[loop])
            a, b = np.concatenate(edges_left), np.concatenate(edges_right)
            changed = a != b
            if not changed.any():
                knot = _knots(w, o, i)
                if knot is None:
                    break
                a, b = knot
                changed = np.ones(len(a), dtype=bool)
            merged = _components(int(label.max()) + 1, a[changed], b[changed])
            label = merged[label]
        classes = int(label.max()) + 1 if self.count else 0
        left_of = np.full(classes, -1, np.int64)
        right_of = np.full(classes, -1, np.int64)
        if len(whole):
            w, o, i = label[whole], label[outer], label[inner]
            proper = (o != w) & (i != w)
            left_of[w[proper]], right_of[w[proper]] = o[proper], i[proper]
        reason_of = np.full(classes, -1, np.int64)
        for ids, reason in reversed(self._fixed):
            reason_of[label[ids]] = reason
        # What a fixed product is made of is fixed too; parents come before their factors.
        frontier = np.flatnonzero((reason_of >= 0) & (left_of >= 0))
        while len(frontier):
            touched = []
            for factor in (left_of[frontier], right_of[frontier]):
                new = reason_of[factor] < 0
                reason_of[factor[new]] = reason_of[frontier[new]]
                touched.append(factor[new])
            frontier = np.unique(np.concatenate(touched))
            frontier = frontier[left_of[frontier] >= 0]
        heads = np.zeros(classes, dtype=bool)
        for ids in self._heads:
            heads[label[ids]] = True
        frontier = np.flatnonzero(heads & (left_of >= 0))
        while len(frontier):
            factors = np.unique(np.concatenate([left_of[frontier], right_of[frontier]]))
            heads[factors] = True
            frontier = factors[left_of[factors] >= 0]
        return Solution(label, left_of, right_of, reason_of, heads, tuple(self._reasons))


@dataclass(frozen=True)
class Solution:
    """Closed facts.

    Attributes:
        label: class of every element.
        left, right: factors of every class; -1 where a class is a leaf.
        reason: number of the reason why a class is never removed; -1 where it may be.
        heads: whether a class is a position of a head axis.
        reasons: texts of the reasons.
    """

    label: Ids
    left: Ids
    right: Ids
    reason: Ids
    heads: NDArray[np.bool_]
    reasons: tuple[str, ...]

    def leaves(self, ids: Ids) -> tuple[Ids, Ids]:
        """Return (position, leaf) pairs: position p of the axis stays exactly if all its leaves stay."""
        position = np.arange(len(ids), dtype=np.int64)
        classes = self.label[ids]
        done: list[tuple[Ids, Ids]] = [(position[:0], classes[:0])]
        while len(classes):
            leaf = self.left[classes] < 0
            done.append((position[leaf], classes[leaf]))
            position, classes = position[~leaf], classes[~leaf]
            position, classes = (
                np.concatenate([position, position]),
                np.concatenate([self.left[classes], self.right[classes]]),
            )
        return np.concatenate([p for p, _ in done]), np.concatenate([c for _, c in done])


def _period(ids: Ids) -> int:
    """Return the length of the shortest beginning of which all is a whole number of copies."""
    again = np.flatnonzero(ids == ids[0])
    for length in again[1:]:
        if len(ids) % length == 0 and (ids.reshape(-1, length) == ids[:length]).all():
            return int(length)
    return len(ids)


def _components(count: int, left: Ids, right: Ids) -> Ids:
    """Return the number of the connected component of every node, numbered by first member."""
    if not len(left):
        return np.arange(count, dtype=np.int64)
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = coo_matrix((np.ones(len(left)), (left, right)), shape=(count, count))
    return connected_components(edges, directed=False)[1].astype(np.int64)


def _knots(whole: Ids, outer: Ids, inner: Ids) -> tuple[Ids, Ids] | None:
    """Return edges that merge classes which contain each other in a circle, or None."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    proper = (outer != whole) & (inner != whole)
    source = np.concatenate([whole[proper], whole[proper]])
    target = np.concatenate([outer[proper], inner[proper]])
    if not len(source):
        return None
    size = int(max(source.max(), target.max())) + 1
    edges = coo_matrix((np.ones(len(source)), (source, target)), shape=(size, size))
    found = connected_components(edges, directed=True, connection="strong")[1]
    together = found[source] == found[target]
    members: dict[int, list[int]] = defaultdict(list)
    for node in np.unique(np.concatenate([source[together], target[together]])):
        members[int(found[node])].append(int(node))
    pairs = [(group[0], other) for group in members.values() for other in group[1:]]
    if not pairs:
        return None
    return np.array([a for a, _ in pairs], np.int64), np.array([b for _, b in pairs], np.int64)
