"""Coupled axes as objects: families of units that compete, and what removing one unit takes with it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.errors import InvalidValue, MaskMismatch, unknown
from prunus.graph.coupler import Coupler
from prunus.graph.elements import Ids, Solution
from prunus.graph.ir import Graph, Value

Keep = Mapping[str, Any]
_RULE_FILES = ("rules_shape", "rules_math", "rules_product")


@dataclass(frozen=True, eq=False)
class Slot:
    """The part of one axis of one tensor that belongs to a family.

    Attributes:
        tensor: name of the parameter or buffer.
        axis: which of its axes.
        index: positions on that axis, int64 (units of the family, positions per unit).
        role: what the axis is to its operator: "output", "input", "bias", "affine" (norms) or "other".
        shape: shape of the tensor.
    """

    tensor: str
    axis: int
    index: NDArray[np.int64]
    role: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Family:
    """Units of one shape that compete: the channels of a layer, of a residual stream, the heads of an attention.

    Attributes:
        name: its first slot as "tensor:axis".
        kind: "channel" or "head" (positions over which activations are multiplied separately).
        size: number of units.
        slots: what each unit occupies.
    """

    name: str
    kind: str
    size: int
    slots: tuple[Slot, ...]
    leaves: NDArray[np.int64] = field(repr=False)

    def describe(self, unit: int = 0) -> str:
        """Say what removing one unit takes with it."""
        first, *rest = self.slots
        parts = [f"removing {self.kind} {unit} of {self.name} takes with it"]
        for slot in (first, *rest):
            places = slot.index[unit]
            spelled = ", ".join(map(str, places[:4])) + (f", ... ({len(places)} positions)" if len(places) > 4 else "")
            parts.append(f"  {slot.tensor} axis {slot.axis} ({slot.role}): {spelled}")
        return "\n".join(parts)

    def __str__(self) -> str:
        return f"{self.name}: {self.size} {self.kind}s over {len(self.slots)} slots"


class Coupling:
    """Everything `couple` found out about a graph.

    Attributes:
        graph: the graph.
        families: every set of units that may be removed, in order of first appearance.
        unprunable: "tensor:axis" -> why it is not cut, for axes of weights.
        counted: whether norms go on counting what was removed.
    """

    def __init__(self, coupler: Coupler, solution: Solution) -> None:
        self.graph: Graph = coupler.graph
        self.counted = coupler.norms == "counted"
        self._axes = coupler.axes
        self._costs = coupler.costs
        self._solution = solution
        self.without_rule = dict(coupler.without_rule)
        self._leaf_cache: dict[int, tuple[Ids, Ids]] = {}
        self._family_of_leaf: dict[int, str] | None = None
        self._last: NDArray[np.bool_] | None = None
        self._stays: dict[int, NDArray[np.bool_]] = {}
        self._shaped: tuple[NDArray[np.bool_], list[tuple[int, ...]]] | None = None
        self.families, self.unprunable = self._gather(coupler)
        self._by_name = {f.name: f for f in self.families}

    def __getitem__(self, name: str) -> Family:
        if name not in self._by_name:
            raise unknown("family", name, self._by_name)
        return self._by_name[name]

    def __str__(self) -> str:
        lines = [f.describe() for f in self.families]
        lines += [f"{name} stays: {reason}" for name, reason in self.unprunable.items()]
        return "\n".join(lines)

    def _gather(self, coupler: Coupler) -> tuple[tuple[Family, ...], dict[str, str]]:
        self._of_weights = np.zeros(len(self._solution.left), dtype=bool)
        places: list[tuple[Value, int]] = []
        slot_of, position_of, leaf_of = [], [], []
        unprunable: dict[str, str] = {}
        for value in self.graph.values:
            if not value.stored or value.index not in coupler.axes:
                continue
            for axis, ids in enumerate(coupler.axes[value.index]):
                if ids is None:
                    continue
                position, leaf = self._leaves(ids)
                self._of_weights[leaf] = True
                free = self._solution.reason[leaf] < 0
                if not free.any():
                    role = coupler.role.get((value.name, axis))
                    if role in ("output", "input"):
                        number = int(self._solution.reason[leaf[0]])
                        unprunable[f"{value.name}:{axis}"] = self._solution.reasons[number]
                    continue
                slot_of.append(np.full(int(free.sum()), len(places), np.int64))
                position_of.append(position[free])
                leaf_of.append(leaf[free])
                places.append((value, axis))
        self._pairs: set[tuple[int, int]] = set()
        if not places:
            return (), unprunable
        slot, position, leaf = (np.concatenate(a) for a in (slot_of, position_of, leaf_of))
        longest = int(position.max()) + 1
        _, first = np.unique((leaf * len(places) + slot) * longest + position, return_index=True)
        slot, position, leaf = slot[first], position[first], leaf[first]  # sorted by leaf, slot, position
        # A unit that takes a whole axis with it can never go.
        sizes = np.array([value.shape[axis] for value, axis in places])
        pair = leaf * len(places) + slot
        pairs, counts = np.unique(pair, return_counts=True)
        emptying = np.unique(pairs[counts == sizes[pairs % len(places)]] // len(places))
        stays = ~np.isin(leaf, [*emptying, *self._unmade(coupler, places, leaf, slot, unprunable)])
        slot, position, leaf = slot[stays], position[stays], leaf[stays]
        if not len(leaf):
            return (), unprunable
        # Units with the same slots, each the same number of times, are siblings.
        weight = np.random.default_rng(0).integers(1, 1 << 62, len(places), dtype=np.uint64)
        leaves, start = np.unique(leaf, return_index=True)
        signature = np.add.reduceat(weight[slot], start)
        _, first_leaf, family_of = np.unique(signature, return_index=True, return_inverse=True)
        family_of = _siblings(
            family_of, np.repeat(np.arange(len(leaves)), np.diff(np.append(start, len(leaf)))), slot, position
        )
        _, first_leaf, family_of = np.unique(family_of, return_index=True, return_inverse=True)
        order = np.argsort(np.argsort(first_leaf))
        family_of = order[family_of]
        entries = np.repeat(family_of, np.diff(np.append(start, len(leaf))))
        self._pairs = _meeting(slot * longest + position, entries)
        by_family = np.argsort(entries * len(places) + slot, kind="stable")  # within: by leaf, then position
        entries, slot, position = entries[by_family], slot[by_family], position[by_family]
        cut = np.flatnonzero(np.diff(entries * len(places) + slot)) + 1
        pieces: list[list[tuple[int, Ids]]] = [[] for _ in first_leaf]
        for begin, piece in zip(np.append(0, cut), np.split(position, cut), strict=True):
            pieces[int(entries[begin])].append((int(slot[begin]), piece))
        members_of = np.split(leaves[np.argsort(family_of, kind="stable")], np.cumsum(np.bincount(family_of))[:-1])
        families: list[Family] = []
        used: dict[str, int] = {}
        for members, mine in zip(members_of, pieces, strict=True):
            slots = []
            for which, piece in mine:
                value, axis = places[which]
                role = coupler.role.get((value.name, axis), "other")
                slots.append(Slot(value.name, axis, piece.reshape(len(members), -1), role, value.shape))
            first_slot = next((s for s in slots if s.role == "output"), slots[0])
            name = f"{first_slot.tensor}:{first_slot.axis}"
            used[name] = used.get(name, 0) + 1
            name = name if used[name] == 1 else f"{name}#{used[name]}"
            kind = "head" if self._solution.heads[members].any() else "channel"
            families.append(Family(name, kind, len(members), tuple(slots), members))
        return tuple(families), unprunable

    def _unmade(
        self, coupler: Coupler, places: list[tuple[Value, int]], leaf: Ids, slot: Ids, unprunable: dict[str, str]
    ) -> Ids:
        """Return the leaves that no parameter makes: positions of a buffer that is not saved with the model.

        A forward may build such a buffer anew, so it has another shape in a fresh instance. Beside a parameter that
        makes the same positions it must be sliced; alone, it is an input of the model.
        """
        from prunus.graph.edit import unsaved

        unsaved_names = unsaved(self.graph.model) if self.graph.model is not None else set()
        passing = np.array([value.name in unsaved_names for value, _ in places])
        reading = np.array([coupler.role.get((value.name, axis)) == "input" for value, axis in places])
        found = np.setdiff1d(leaf[passing[slot]], leaf[~(passing | reading)[slot]])
        for which in np.unique(slot[np.isin(leaf, found)]):
            value, axis = places[which]
            if not passing[which]:
                unprunable[f"{value.name}:{axis}"] = "reads a buffer that is not saved with the model"
        return found

    def _leaves(self, ids: Ids) -> tuple[Ids, Ids]:
        found = self._leaf_cache.get(id(ids))
        if found is None:
            found = self._leaf_cache[id(ids)] = self._solution.leaves(ids)
        return found

    @cached_property
    def conflicts(self) -> dict[str, frozenset[str]]:
        """Families that cut the same axis as factors of one product (heads and features of a head)."""
        result: dict[str, set[str]] = {f.name: set() for f in self.families}
        for a, b in self._pairs:
            one, other = self.families[a].name, self.families[b].name
            result[one].add(other)
            result[other].add(one)
        return {name: frozenset(others) for name, others in result.items()}

    def primary(self) -> tuple[Family, ...]:
        """Return the families offered by default: of factors of one axis only one, heads before their features."""
        wanted = [f for f in self.families if f.size > 1]
        wanted.sort(key=lambda f: (f.kind != "head", f.size < 8, -len(f.slots), -f.size))
        taken: set[str] = set()
        for family in wanted:
            if not taken & self.conflicts[family.name]:
                taken.add(family.name)
        return tuple(f for f in self.families if f.name in taken)

    def removed(self, keep: Keep) -> NDArray[np.bool_]:
        """Return for every class whether it goes, from {family name: bool array (size,), True = stays}.

        Raises:
            UnknownName: no family is called so.
            MaskMismatch: an array has another length.
            InvalidValue: an array keeps nothing.
        """
        gone = np.zeros(len(self._solution.left), dtype=bool)
        for name, mask in keep.items():
            family = self[name]
            array = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask).astype(bool)
            if array.shape != (family.size,):
                raise MaskMismatch(f"family {name!r} has {family.size} units, the mask has shape {array.shape}.")
            if not array.any():
                raise InvalidValue(f"the mask of family {name!r} keeps nothing; at least one unit must stay.")
            gone[family.leaves[~array]] = True
        return gone

    def families_on(self, values: Sequence[Value]) -> set[str]:
        """Return the names of the families that cut some axis of these values."""
        if self._family_of_leaf is None:
            self._family_of_leaf = {int(leaf): f.name for f in self.families for leaf in f.leaves}
        found: set[str] = set()
        for value in values:
            for ids in self._axes.get(value.index, ()):
                if ids is not None:
                    found.update(self._family_of_leaf.get(int(leaf), "") for leaf in np.unique(self._leaves(ids)[1]))
        return found - {""}

    def kept(self, ids: Ids, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which positions of an axis stay."""
        # One cut is asked about many times in a row, so the answers about the last one are remembered.
        if self._last is not gone:
            if self._last is None or not np.array_equal(self._last, gone):
                self._stays.clear()
            self._last = gone
        stays = self._stays.get(id(ids))
        if stays is None:
            position, leaf = self._leaves(ids)
            stays = np.ones(len(ids), dtype=bool)
            stays[position[gone[leaf]]] = False
            self._stays[id(ids)] = stays
        return stays

    def from_weights(self, value: Value, axis: int) -> bool:
        """Return whether the size of an axis is that of (a factor of) an axis of some weight, not of the input."""
        axes = self._axes.get(value.index)
        ids = axes[axis] if axes is not None else None
        return ids is not None and bool(self._of_weights[self._leaves(ids)[1]].any())

    def repeats(self, value: Value, axis: int) -> bool:
        """Return whether an axis holds some positions several times over, as (batch, heads) in one axis does."""
        axes = self._axes.get(value.index)
        ids = axes[axis] if axes is not None else None
        return ids is not None and len(np.unique(ids)) < len(ids)

    def stays(self, value: Value, axis: int, gone: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """Return which positions of an axis of a value stay; None where the axis is never cut."""
        axes = self._axes.get(value.index)
        return None if axes is None or axes[axis] is None else self.kept(axes[axis], gone)  # type: ignore[arg-type]

    def indices(self, keep: Keep) -> dict[str, NDArray[np.int64]]:
        """Return "tensor:axis" -> kept positions, for every axis that loses some."""
        gone = self.removed(keep)
        result = {}
        for value in self.graph.values:
            if value.stored and value.index in self._axes:
                for axis, ids in enumerate(self._axes[value.index]):
                    if ids is not None:
                        stays = self.kept(ids, gone)
                        if not stays.all():
                            result[f"{value.name}:{axis}"] = np.flatnonzero(stays)
        return result

    def shapes(self, keep: Keep) -> list[tuple[int, ...]]:
        """Return the shape of every value of the graph after the cut, in graph order."""
        gone = self.removed(keep)
        if self._shaped is not None and np.array_equal(self._shaped[0], gone):
            return list(self._shaped[1])
        counts: dict[int, int] = {}
        result = []
        for value in self.graph.values:
            axes = self._axes.get(value.index)
            if axes is None:
                result.append(value.shape)
                continue
            shape = list(value.shape)
            for axis, ids in enumerate(axes):
                if ids is not None:
                    if id(ids) not in counts:
                        counts[id(ids)] = int(self.kept(ids, gone).sum())
                    shape[axis] = counts[id(ids)]
            result.append(tuple(shape))
        self._shaped = gone, result
        return list(result)

    def macs(self, keep: Keep | None = None) -> int:
        """Return the multiply-accumulates of the example after the cut (of the whole network without one)."""
        gone = self.removed(keep or {})
        counts: dict[int, int] = {}
        total = 0
        for constant, axes in self._costs:
            product = constant
            for ids in axes:
                if id(ids) not in counts:
                    counts[id(ids)] = int(self.kept(ids, gone).sum())
                product *= counts[id(ids)]
            total += product
        return total

    def parameters(self, keep: Keep | None = None) -> int:
        """Return the number of parameters after the cut, tied ones counted once."""
        shapes = self.shapes(keep or {})
        return sum(int(np.prod(shapes[v.index], dtype=np.int64)) for v in self.graph.values if v.kind == "parameter")


def _meeting(place: Ids, family: Ids) -> set[tuple[int, int]]:
    """Return the pairs of families that have an entry at the same place."""
    order = np.argsort(place, kind="stable")
    place, family = place[order], family[order]
    pairs: set[tuple[int, int]] = set()
    for distance in range(1, len(place)):
        same = place[distance:] == place[:-distance]
        if not same.any():
            break
        left, right = family[:-distance][same], family[distance:][same]
        for a, b in np.unique(np.stack([left, right], 1), axis=0):
            if a != b:
                pairs.add((int(a), int(b)))
    return pairs


NORMS = ("whole", "counted", "anew")


def _siblings(family_of: Ids, unit: Ids, slot: Ids, position: Ids) -> Ids:
    """Tell apart units of one form that cross each other, such as rows and columns of a square.

    Units that overlap wherever they are cross; ones that keep apart somewhere (as in an outer product) do not.
    """
    from scipy.sparse.csgraph import connected_components

    result = family_of * (len(family_of) + 1)
    family = family_of[unit]
    order = np.lexsort((position, slot, family))
    f, s, p = family[order], slot[order], position[order]
    twice = (f[1:] == f[:-1]) & (s[1:] == s[:-1]) & (p[1:] == p[:-1])
    for number in np.unique(f[1:][twice]):
        members = np.flatnonzero(family_of == number)
        apart = np.zeros((len(members), len(members)), dtype=bool)
        for which in np.unique(slot[family == number]):
            mine = (family == number) & (slot == which)
            place = np.unique(position[mine], return_inverse=True)[1]
            table = np.zeros((len(members), place.max() + 1), dtype=np.float32)
            table[np.searchsorted(members, unit[mine]), place] = 1
            apart |= table @ table.T == 0
        result[members] += connected_components(apart, directed=False)[1]
    return result


def couple(graph: Graph, *, norms: str = "whole") -> Coupling:
    """Find out which axes of a graph must be cut together.

    Args:
        graph: from `prunus.graph.record.record` or the ONNX reader.
        norms: what becomes of an axis over which a layer norm, an RMS norm or a mean takes its statistics.
            "whole": it is never cut. "counted": it may be cut where what goes is zero, and the statistics go on
            counting what went, so that removing still equals masking; the norm then runs as a few operators. "anew": it
            may be cut, and the statistics are those of what remains, which is another function.

    Raises:
        InvalidValue: `norms` is none of these.
    """
    if norms not in NORMS:
        raise InvalidValue(f"norms {norms!r} must be one of {', '.join(NORMS)}.")
    for name in _RULE_FILES:
        importlib.import_module(f"prunus.graph.{name}")
    coupler = Coupler(graph, norms=norms)
    coupler.run()
    return Coupling(coupler, coupler.elements.solve())
