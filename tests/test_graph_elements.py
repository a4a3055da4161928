"""The solver of coupled positions against brute force over every set of removed elements."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from itertools import product as pairs

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.graph.elements import Elements, Solution


@dataclass
class System:
    """Facts, kept twice: in the solver, and as plain tuples for brute force."""

    solver: Elements = field(default_factory=Elements)
    equal: list[tuple[int, int]] = field(default_factory=list)
    products: list[tuple[int, int, int]] = field(default_factory=list)
    fixed: set[int] = field(default_factory=set)

    def fresh(self, count: int) -> np.ndarray:
        return self.solver.fresh(count)

    def same(self, left: np.ndarray, right: np.ndarray) -> None:
        self.solver.same(left, right)
        self.equal += list(zip(left.tolist(), right.tolist(), strict=True))

    def product(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        whole = self.solver.product(left, right)
        self.products += [(int(w), int(a), int(b)) for w, (a, b) in zip(whole, pairs(left, right), strict=True)]
        return whole

    def factor(self, ids: np.ndarray, outer: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        left, right = self.solver.factor(ids, outer)
        if left is not None and right is not None:
            self.products += [(int(w), int(a), int(b)) for w, (a, b) in zip(ids, pairs(left, right), strict=True)]
        return left, right

    def fix(self, ids: np.ndarray, reason: str = "because") -> None:
        self.solver.fix(ids, reason)
        self.fixed |= set(ids.tolist())

    @property
    def count(self) -> int:
        return self.solver.count

    def holds(self, gone: np.ndarray) -> np.ndarray:
        """Return which rows of a bool table (sets, elements) satisfy every fact."""
        fine = np.ones(len(gone), dtype=bool)
        for a, b in self.equal:
            fine &= gone[:, a] == gone[:, b]
        for w, a, b in self.products:
            fine &= gone[:, w] == (gone[:, a] | gone[:, b])
        for e in self.fixed:
            fine &= ~gone[:, e]
        return fine

    def every_set(self) -> np.ndarray:
        sets = np.arange(1 << self.count)
        return (sets[:, None] >> np.arange(self.count) & 1).astype(bool)

    def plain(self) -> bool:
        """Return whether every class is a product in at most one way, and none contains itself."""
        parent = list(range(self.count))

        def root(e: int) -> int:
            while parent[e] != e:
                e = parent[e]
            return e

        for a, b in self.equal:
            parent[root(a)] = root(b)
        parts: dict[int, tuple[int, int]] = {}
        for w, a, b in self.products:
            made = (root(a), root(b))
            if parts.setdefault(root(w), made) != made:
                return False

        def acyclic(e: int, above: frozenset[int]) -> bool:
            return e not in above and all(acyclic(p, above | {e}) for p in parts.get(e, ()))

        return all(acyclic(w, frozenset()) for w in parts)


def gone_with(system: System, solution: Solution) -> dict[int, np.ndarray]:
    """Return for every leaf that may go which elements go with it."""
    position, leaf = solution.leaves(np.arange(system.count))
    return {
        int(unit): np.isin(np.arange(system.count), position[leaf == unit])
        for unit in np.unique(leaf)
        if solution.reason[unit] < 0
    }


def unions(units: dict[int, np.ndarray], count: int) -> set[bytes]:
    sets = {np.zeros(count, dtype=bool).tobytes()}
    for unit in units.values():
        sets |= {(np.frombuffer(s, dtype=bool) | unit).tobytes() for s in sets}
    return sets


def check(system: System) -> dict[int, np.ndarray]:
    """Assert soundness always, and for plain systems that the units are all there is to remove."""
    solution = system.solver.solve()
    units = gone_with(system, solution)
    if units:
        assert system.holds(np.stack(list(units.values()))).all()
    reachable = unions(units, system.count)
    assert system.holds(np.array([np.frombuffer(s, dtype=bool) for s in reachable])).all()
    if system.plain() and system.count <= 14:
        table = system.every_set()
        assert {row.tobytes() for row in table[system.holds(table)]} == reachable
        # Minimal: no part of a unit can go alone.
        for unit in units.values():
            part = table & unit
            alone = part[system.holds(part)]
            assert {row.tobytes() for row in alone} == {unit.tobytes(), np.zeros(system.count, dtype=bool).tobytes()}
    return units


# -- by hand ------------------------------------------------------------------------------------------------------


def test_nothing_stated_means_every_element_alone():
    system = System()
    system.fresh(5)
    assert [u.tolist() for u in check(system).values()] == np.eye(5, dtype=bool).tolist()


def test_no_elements():
    solution = Elements().solve()
    position, leaf = solution.leaves(np.arange(0))
    assert len(position) == len(leaf) == len(solution.label) == 0


def test_equal_elements_go_together_through_chains():
    system = System()
    a, b, c = system.fresh(3), system.fresh(3), system.fresh(3)
    system.same(a, b)
    system.same(b, c[::-1].copy())
    assert len(check(system)) == 3
    solution = system.solver.solve()
    assert solution.label[a].tolist() == solution.label[c[::-1]].tolist()


def test_a_view_into_heads_and_features_removes_rows_or_columns():
    system = System()
    flat = system.fresh(6)
    system.factor(flat, 2)
    units = check(system)
    assert sorted(int(u[flat].sum()) for u in units.values()) == [2, 2, 2, 3, 3]
    assert {tuple(flat[u[flat]].tolist()) for u in units.values()} == {(0, 1, 2), (3, 4, 5), (0, 3), (1, 4), (2, 5)}


def test_flattening_and_factoring_again_gives_the_same_factors():
    system = System()
    head, feature = system.fresh(2), system.fresh(3)
    flat = system.product(head, feature)
    again_head, again_feature = system.factor(flat, 2)
    assert len(check(system)) == 5
    label = system.solver.solve().label
    assert label[head].tolist() == label[again_head].tolist()
    assert label[feature].tolist() == label[again_feature].tolist()


def test_the_same_product_asked_twice_is_one():
    system = Elements()
    a, b = system.fresh(2), system.fresh(3)
    assert system.product(a, b) is system.product(a, b)


def test_three_factors_nest():
    system = System()
    flat = system.fresh(8)
    _, rest = system.factor(flat, 2)
    system.factor(rest, 2)
    units = check(system)
    assert len(units) == 6
    assert {int(u[flat].sum()) for u in units.values()} == {4}


def test_unlike_factorings_of_one_axis_leave_only_what_fits_both():
    # 12 = 3 x 4 = 6 x 2: thirds are pairs of sixths.
    system = System()
    flat = system.fresh(12)
    system.factor(flat, 3)
    system.factor(flat, 6)
    for unit in check(system).values():
        table = unit[flat]
        assert table.any()


def test_factor_recognises_tiled_and_repeated_axes():
    system = Elements()
    ids = system.fresh(3)
    left, right = system.factor(np.tile(ids, 4), 4)
    assert left is None
    assert right.tolist() == ids.tolist()
    left, right = system.factor(np.repeat(ids, 4), 3)
    assert right is None
    assert left.tolist() == ids.tolist()
    assert system.factor(ids, 3)[1] is None
    assert system.factor(ids, 1)[0] is None
    whole = system.fresh(6)
    once, other = system.factor(whole, 3)
    left, right = system.factor(np.tile(whole, 2), 6)  # twice the same: its factors come twice, not from new ones
    assert len(left) == 6
    assert left[:3].tolist() == left[3:].tolist()
    solution = system.solve()
    assert (solution.label[left[:3]] == solution.label[once]).all()
    assert (solution.label[right] == solution.label[other]).all()


def test_fixing_a_product_fixes_its_factors_down_to_the_leaves():
    system = System()
    flat = system.fresh(8)
    first, rest = system.factor(flat, 2)
    second, third = system.factor(rest, 2)
    system.fix(flat[:1], "held")
    solution = system.solver.solve()
    assert {solution.reasons[solution.reason[solution.label[e]]] for e in (first[0], second[0], third[0])} == {"held"}
    assert len(check(system)) == 3


def test_fixing_all_factors_fixes_the_product_and_one_factor_leaves_the_other():
    system = System()
    a, b = system.fresh(2), system.fresh(2)
    flat = system.product(a, b)
    system.fix(a)
    units = check(system)
    assert {tuple(np.flatnonzero(u)) for u in units.values()} == {(b[0], flat[0], flat[2]), (b[1], flat[1], flat[3])}
    system.fix(b)
    assert check(system) == {}


def test_the_first_reason_is_the_one_reported():
    system = Elements()
    ids = system.fresh(2)
    system.fix(ids, "first")
    system.fix(ids, "second")
    system.fix(None, "nothing")
    solution = system.solve()
    assert [solution.reasons[r] for r in solution.reason] == ["first", "first"]


def test_a_product_that_contains_itself_ties_the_other_factor():
    system = System()
    a, b = system.fresh(1), system.fresh(1)
    whole = system.product(a, b)
    system.same(whole, a)
    units = check(system)
    assert [u.tolist() for u in units.values()] == [[True, True, True]]


def test_products_in_a_circle_become_one_unit():
    system = System()
    a, b, c = system.fresh(1), system.fresh(1), system.fresh(1)
    first = system.product(a, b)
    second = system.product(first, c)
    system.same(second, a)
    units = check(system)
    assert len(units) == 1
    assert next(iter(units.values())).all()


def test_heads_are_handed_down_to_factors_and_to_equals():
    system = Elements()
    flat, other, apart = system.fresh(6), system.fresh(2), system.fresh(2)
    head, feature = system.factor(flat, 2)
    system.same(head, other)
    system.head(other)
    system.head(None)
    solution = system.solve()
    assert solution.heads[solution.label[head]].all()
    assert not solution.heads[solution.label[feature]].any()
    assert not solution.heads[solution.label[apart]].any()


def test_large_systems_are_closed_quickly():
    system = Elements()
    axes = [system.fresh(4096) for _ in range(60)]
    for a, b in pairwise(axes):
        system.same(a, b)
    head, _ = system.factor(axes[0], 64)
    system.factor(axes[-1], 64)
    solution = system.solve()
    assert len(np.unique(solution.leaves(axes[30])[1])) == 128
    assert (solution.reason < 0).all()
    assert len(head) == 64


# -- at random ----------------------------------------------------------------------------------------------------


@st.composite
def systems(draw: st.DrawFn, largest: int = 12) -> System:
    """Draw axes, flatten and factor them, tie them, fix some."""
    system = System()
    axes = [system.fresh(draw(st.integers(1, 4))) for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["fresh", "product", "factor", "same", "same", "tile", "fix"]))
        axis = axes[draw(st.integers(0, len(axes) - 1))]
        if kind == "fresh" and system.count < largest:
            axes.append(system.fresh(draw(st.integers(1, 4))))
        elif kind == "product":
            other = axes[draw(st.integers(0, len(axes) - 1))]
            if system.count + len(axis) * len(other) <= largest + 4:
                axes.append(system.product(axis, other))
        elif kind == "factor":
            outers = [d for d in range(1, len(axis) + 1) if len(axis) % d == 0]
            if system.count + 2 * len(axis) <= largest + 4:
                parts = system.factor(axis, draw(st.sampled_from(outers)))
                axes += [p for p in parts if p is not None]
        elif kind == "same":
            others = [a for a in axes if len(a) == len(axis) and a is not axis]
            if others:
                system.same(axis, draw(st.sampled_from(others)))
        elif kind == "tile":
            axes.append(np.tile(axis, 2)[: draw(st.integers(1, 2 * len(axis)))])
        else:
            system.fix(axis[: draw(st.integers(1, len(axis)))])
    return system


@settings(max_examples=300, deadline=None)
@given(systems())
def test_units_satisfy_every_fact_and_are_all_there_is(system: System):
    check(system)


@settings(max_examples=100, deadline=None)
@given(systems(), st.randoms(use_true_random=False))
def test_the_order_of_facts_does_not_matter(system: System, random):
    units = gone_with(system, system.solver.solve())
    again = Elements()
    again.fresh(system.count)
    facts = [(again._equal, (np.array([a]), np.array([b]))) for a, b in system.equal]
    facts += [(again._products, (np.array([w]), np.array([a]), np.array([b]))) for w, a, b in system.products]
    facts += [(again._fixed, (np.array([e]), 0)) for e in system.fixed]
    random.shuffle(facts)
    for store, fact in facts:
        store.append(fact)
    again._reasons["because"] = 0
    shuffled = gone_with(system, again.solve())
    assert {u.tobytes() for u in units.values()} == {u.tobytes() for u in shuffled.values()}


@settings(max_examples=100, deadline=None)
@given(systems())
def test_a_fixed_element_never_goes(system: System):
    for unit in gone_with(system, system.solver.solve()).values():
        assert not unit[list(system.fixed)].any()


def test_brute_force_would_notice_a_wrong_unit():
    system = System()
    flat = system.fresh(4)
    system.factor(flat, 2)
    wrong = np.zeros((1, system.count), dtype=bool)
    wrong[0, flat[0]] = True
    assert not system.holds(wrong).any()
    broken = System()
    left = broken.fresh(2)
    broken.equal.append((int(left[0]), int(left[1])))  # a fact the solver was not told
    with pytest.raises(AssertionError):
        check(broken)
