"""Selection against a stable sort, counts against their limits, and every budget against cases worked out by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.budget import allocate
from prunus.budget.allocate import check_fraction, fit_counts, proportional_densities
from prunus.budget.budgets import Family, Global, Like, Problem, RowWise, Uniform, budget, decide
from prunus.budget.lamp import lamp
from prunus.budget.select import (
    keep_best,
    keep_best_rows,
    keep_count,
    keep_top,
    keep_whole_units,
    round_half_up,
    some_kept,
    threshold,
)
from prunus.errors import Infeasible, InvalidValue, NonFinite, UnknownName
from prunus.parameters import Address
from prunus.units import Row
from suites import LAYERS, problem_of

FEW = settings(max_examples=100, deadline=None, derandomize=True, database=None)
NUMBERS = st.sampled_from([-torch.inf, -2.0, -0.0, 0.0, 0.1, 1.0, 1.0000001, 3.0, 1e30])


def oracle(scores, k):
    """Mark the k best by a stable sort in double precision: what keep_top must equal."""
    flat = torch.cat([s.reshape(-1).double() for s in scores.values()])
    keep = torch.zeros(flat.numel(), dtype=torch.bool)
    keep[flat.sort(descending=True, stable=True).indices[:k]] = True
    parts = keep.split([s.numel() for s in scores.values()])
    return {n: part.reshape(scores[n].shape) for n, part in zip(scores, parts, strict=True)}


def problem(scores, keep, **options):
    """Return a problem on matrices written out by hand."""
    tensors = {n: torch.tensor(s, dtype=torch.float32) for n, s in scores.items()}
    tensors = {n: t if t.ndim > 1 else t[None] for n, t in tensors.items()}
    addresses = {n: Address(name=n, shape=tuple(t.shape), family=n.rpartition(".")[2]) for n, t in tensors.items()}
    return Problem(addresses=addresses, scores=tensors, keep=keep, **options)


def kept(masks):
    return {n: m.reshape(-1).int().tolist() for n, m in masks.items()}


# -- selection ----------------------------------------------------------------------------------------------------


@FEW
@given(
    values=st.lists(st.lists(NUMBERS, min_size=1, max_size=9), min_size=1, max_size=4),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), min_size=4, max_size=4
    ),
    data=st.data(),
)
def test_keep_top_equals_a_stable_sort(values, dtypes, data):
    scores = {str(i): torch.tensor(v, dtype=d) for i, (v, d) in enumerate(zip(values, dtypes, strict=False))}
    k = data.draw(st.integers(0, sum(map(len, values))))
    widest = torch.float64 if any(s.dtype == torch.float64 for s in scores.values()) else torch.float32
    expected = oracle({n: s.to(widest) for n, s in scores.items()}, k)
    got = keep_top(scores, k)
    assert all(torch.equal(got[n], expected[n]) for n in scores)
    v, ties = threshold(list(scores.values()), k)
    flat = torch.cat([s.to(widest) for s in scores.values()])
    assert int((flat > v).sum()) + ties == k
    assert ties <= int((flat == v).sum())


@pytest.mark.parametrize("kind", ["continuous", "few values", "level", "mostly dead", "sorted", "outliers"])
def test_the_threshold_does_not_depend_on_the_sample(kind, monkeypatch):
    monkeypatch.setattr("prunus.budget.select._SAMPLE", 256)  # one entry of 50: nets of some million weights, in small
    generator = torch.Generator().manual_seed(0)
    sizes = (10_000, 7, 3001)
    scores = {str(n): torch.rand(n, generator=generator) for n in sizes}
    if kind == "few values":
        scores = {n: (s * 5).floor() for n, s in scores.items()}
    if kind == "level":
        scores = {n: torch.ones_like(s) for n, s in scores.items()}
    if kind == "mostly dead":
        scores = {n: s.masked_fill(s < 0.99, -torch.inf) for n, s in scores.items()}
    if kind == "sorted":
        scores = {n: s.sort().values for n, s in scores.items()}
    if kind == "outliers":  # everything of worth lies where the sample never looks
        scores = {n: s * 1e-9 for n, s in scores.items()}
        scores["10000"][1::50] += 1.0
    total = sum(sizes)
    for k in (0, 1, 2, 100, 200, 1000, total // 3, total - 1, total):
        got, expected = keep_top(scores, k), oracle(scores, k)
        assert all(torch.equal(got[n], expected[n]) for n in scores), (kind, k)


def test_memory_layout_does_not_move_ties():
    score = torch.ones(2, 3, 2, 2)
    last = score.to(memory_format=torch.channels_last)
    assert torch.equal(keep_best(last, 5), keep_best(score, 5))
    assert torch.equal(keep_top({"w": last}, 5)["w"], keep_best(score, 5))


def test_selection_refuses_the_impossible():
    with pytest.raises(Infeasible, match="cannot keep 3 of 2"):
        keep_best(torch.ones(2), 3)
    with pytest.raises(NonFinite, match="NaN"):
        keep_best(torch.tensor([torch.nan, torch.nan, 1.0]), 2)
    assert threshold([torch.tensor([])], 0) == (math.inf, 0)
    assert not keep_best(torch.ones(3), 0).any()


@FEW
@given(st.lists(st.lists(NUMBERS, min_size=5, max_size=5), min_size=1, max_size=5), st.integers(0, 5))
def test_keep_best_rows_equals_keep_best_of_each_row(rows, k):
    score = torch.tensor(rows)
    assert torch.equal(keep_best_rows(score, k), torch.stack([keep_best(row, k) for row in score]))


def test_whole_units_stop_at_the_first_that_does_not_fit():
    scores = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 3.0, -torch.inf])}
    sizes = {"a": torch.tensor([4, 1]), "b": torch.tensor([3, 3, 1])}
    for elements, expected in ((3, ([0, 0], [0, 0, 0])), (6, ([1, 0], [0, 0, 0])), (9, ([1, 0], [1, 0, 0]))):
        got = keep_whole_units(scores, sizes, elements)
        assert (got["a"].int().tolist(), got["b"].int().tolist()) == expected
    assert keep_whole_units(scores, sizes, 99)["b"].tolist() == [True, True, False]  # the dead one stays out


@pytest.mark.parametrize(
    ("x", "expected"), [(0.5, 1), (1.5, 2), (2.5, 3), (0.49, 0), (899.9999999999999, 900), (2.4999999999, 3)]
)
def test_rounding(x, expected):
    assert round_half_up(x) == expected


def test_counts_from_sparsities():
    assert keep_count(1000, 0.9) == 100
    assert keep_count(3, 0.5) == 1
    assert keep_count(390, 0.6) == 156
    assert some_kept(10, 0.9) == 1
    with pytest.raises(InvalidValue, match=r"sparsity 0\.99 keeps none of 10 .*; 0\.9 keeps the last one"):
        some_kept(10, 0.99)


# -- dividing counts ----------------------------------------------------------------------------------------------


@FEW
@given(
    layers=st.lists(st.tuples(st.floats(0, 60), st.integers(0, 40), st.integers(0, 50)), min_size=1, max_size=7),
    share=st.floats(0, 1),
)
def test_fitted_counts_are_exact_and_within_limits(layers, share):
    wanted, minimum, capacity = (list(column) for column in zip(*layers, strict=True))
    low = [min(m, c) for m, c in zip(minimum, capacity)]
    total = sum(low) + round(share * (sum(capacity) - sum(low)))
    counts = fit_counts(wanted, capacity, total, minimum)
    assert sum(counts) == total
    assert all(lo <= n <= c for lo, n, c in zip(low, counts, capacity, strict=True))


@FEW
@given(wishes=st.lists(st.integers(0, 50), min_size=1, max_size=6), room=st.integers(0, 10))
def test_wishes_that_fit_are_granted(wishes, room):
    assert fit_counts([float(w) for w in wishes], [w + room for w in wishes], sum(wishes)) == wishes


def test_counts_round_by_largest_remainder_to_the_earlier_layer():
    assert fit_counts([1.5, 1.5, 1.0], [9, 9, 9], 4) == [2, 1, 1]
    assert fit_counts([0.2, 0.9, 0.9], [9, 9, 9], 2) == [0, 1, 1]
    assert fit_counts([5, 5], [3, 9], 10) == [3, 7]
    assert fit_counts([0, 0], [5, 5], 3) == [2, 1]
    assert fit_counts([10, 10], [10, 10], 10, [8, 0]) == [8, 2]


def test_counts_that_cannot_be():
    with pytest.raises(Infeasible, match="only 6 are left"):
        fit_counts([1, 1], [3, 3], 7)
    with pytest.raises(Infeasible, match="below the 4 that the per-layer minimum asks for"):
        fit_counts([1, 1], [3, 3], 3, [2, 2])


# -- densities from shapes ----------------------------------------------------------------------------------------

HAND = [(16, 3, 3, 3), (32, 16, 3, 3), (10, 32)]


def numbers(shapes, densities):
    return sum(d * math.prod(s) for d, s in zip(densities, shapes, strict=True))


def test_erk_by_hand():
    densities = allocate.erdos_renyi(HAND, 0.2)
    assert densities == pytest.approx([0.55087, 0.11155, 1.0], abs=1e-5)
    assert numbers(HAND, densities) == pytest.approx(1072)
    addresses = [Address(name=str(i), shape=s) for i, s in enumerate(HAND)]
    masks = decide(problem_of(Uniform(), 0.2, addresses=addresses), budget("erk"))
    assert [r.kept for r in masks.table()] == [238, 514, 320]


def test_er_and_erk_agree_on_linear_layers_only():
    linear = [(20, 30), (10, 20)]
    assert allocate.erdos_renyi(linear, 0.3, kernel=False) == allocate.erdos_renyi(linear, 0.3)
    assert allocate.erdos_renyi(HAND, 0.2, kernel=False) != allocate.erdos_renyi(HAND, 0.2)
    assert allocate.erdos_renyi(HAND, 0.2, power=0.0) == pytest.approx([0.2] * 3)


SHAPES = st.lists(st.lists(st.integers(1, 24), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6)
ALLOCATORS = {
    "uniform": allocate.uniform,
    "uniform-plus": allocate.uniform_plus,
    "er": lambda s, d: allocate.erdos_renyi(s, d, kernel=False),
    "erk": allocate.erdos_renyi,
    "erk-half": lambda s, d: allocate.erdos_renyi(s, d, power=0.5),
    "erk-plus": allocate.erdos_renyi_plus,
    "smart-ratio": allocate.smart_ratio,
}


@FEW
@pytest.mark.parametrize("name", ALLOCATORS)
@given(shapes=SHAPES, density=st.floats(0.01, 1.0))
def test_allocators_meet_the_total_within_bounds(name, shapes, density):
    try:
        densities = ALLOCATORS[name](shapes, density)
    except Infeasible:
        assert name in ("uniform-plus", "erk-plus")
        return
    assert all(0 <= d <= 1 + 1e-9 for d in densities)
    total = density * sum(map(math.prod, shapes))
    if name == "smart-ratio":  # may fall short where the other layers are full already; counts are fitted afterwards
        assert numbers(shapes, densities) <= total + 1e-6
    else:
        assert numbers(shapes, densities) == pytest.approx(total)


@pytest.mark.parametrize("name", ["uniform", "uniform-plus", "er", "erk", "erk-plus"])
def test_full_density_is_dense_everywhere(name):
    assert ALLOCATORS[name](HAND, 1.0) == pytest.approx([1.0] * 3)


@FEW
@given(shapes=st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=2, max_size=5), d=st.floats(0.02, 1))
def test_uniform_plus_keeps_its_promises(shapes, d):
    try:
        densities = allocate.uniform_plus(shapes, d)
    except Infeasible:
        sizes = [math.prod(s) for s in shapes]
        assert d * sum(sizes) < sizes[0] + 0.2 * sizes[-1] + 1e-9
        return
    assert densities[0] == 1.0
    assert densities[-1] >= 0.2 - 1e-12
    assert len(set(densities[1:-1])) <= 1


def test_uniform_plus_by_hand():
    assert allocate.uniform_plus([(10,), (100,), (10,)], 0.5) == pytest.approx([1, 50 / 110, 50 / 110])
    assert allocate.uniform_plus([(10,), (100,), (10,)], 0.15) == pytest.approx([1, 0.06, 0.2])
    # Density above the floor, and yet the dense first layer would push the last one below it.
    assert allocate.uniform_plus([(20,), (100,), (100,)], 0.25) == pytest.approx([1, 0.15, 0.2])
    with pytest.raises(Infeasible, match="needs 12 of 6 entries"):
        allocate.uniform_plus([(10,), (100,), (10,)], 0.05)


def test_erk_plus_takes_the_classifier_out_first():
    densities = allocate.erdos_renyi_plus(HAND, 0.2, last=0.5)
    assert densities[-1] == 0.5
    rest = (0.2 * 5360 - 160) / (5360 - 320)
    assert densities[:-1] == allocate.erdos_renyi(HAND[:-1], rest)
    with pytest.raises(Infeasible, match="erk-plus keeps 1 of the last layer"):
        allocate.erdos_renyi_plus(HAND, 0.01)


def test_smart_ratio_by_hand():
    shapes = [(10, 10)] * 4
    raw = [4 * 5, 3 * 4, 2 * 3]
    densities = allocate.smart_ratio(shapes, 0.2)
    scale = (80 - 30) / (100 * sum(raw))
    assert densities == pytest.approx([*(scale * r for r in raw), 0.3])
    assert allocate.smart_ratio(shapes, 0.05)[-1] == pytest.approx(0.2)  # the last layer cannot exceed the budget


def test_layers_that_overflow_become_dense():
    assert proportional_densities([10, 1, 1], [10, 10, 10], 0.5) == pytest.approx([1, 0.25, 0.25])
    assert proportional_densities([1, 1], [10, 10], 0.5, dense=[True, False]) == pytest.approx([1, 0])
    with pytest.raises(Infeasible, match="layers kept dense"):
        proportional_densities([1, 1], [10, 10], 0.4, dense=[True, False])


# -- budgets by hand ----------------------------------------------------------------------------------------------

CARDS = {"a": [5, 4, 3, 2], "b": [0.4, 0.3, 0.2, 0.1]}


@pytest.mark.parametrize(
    ("minimum", "a", "b"),
    [(0, [1, 1, 1, 1], [0, 0, 0, 0]), (1, [1, 1, 1, 0], [1, 0, 0, 0]), (2, [1, 1, 0, 0], [1, 1, 0, 0])],
)
def test_global_with_a_minimum_by_hand(minimum, a, b):
    assert kept(decide(problem(CARDS, 4), Global(minimum=minimum))) == {"a": a, "b": b}
    assert kept(decide(problem(CARDS, 4), Global(minimum_share=minimum / 8))) == {"a": a, "b": b}


def test_a_minimum_that_costs_more_than_the_budget():
    with pytest.raises(Infeasible, match="a minimum of 3 entries in each of 2 tensors needs 6, but the budget is 4"):
        decide(problem(CARDS, 4), Global(minimum=3))


def test_a_large_minimum_is_uniform_and_small_tensors_stay_dense():
    scores = {"a": [3, 9, 1, 4], "b": [8, 7, 6, 5], "c": [0.1]}
    assert [r.kept for r in decide(problem(scores, 5), Global(minimum=2)).table()] == [2, 2, 1]
    assert decide(problem(CARDS, 4), Global(minimum=2)) == decide(problem(CARDS, 4), Uniform())


@pytest.mark.parametrize("seed", range(25))
def test_global_with_a_minimum_is_optimal_by_brute_force(seed):
    draw = random.Random(seed)
    scores = {n: [round(draw.random() * s, 3) for _ in range(draw.randint(1, 4))] for n, s in zip("abc", (1, 3, 9))}
    flat = [(n, i) for n in scores for i in range(len(scores[n]))]
    minimum = draw.randint(0, 2)
    least = sum(min(minimum, len(s)) for s in scores.values())
    keep = draw.randint(max(least, 1), len(flat))
    best = max(
        sum(scores[n][i] for n, i in chosen)
        for chosen in itertools.combinations(flat, keep)
        if all(sum(m == n for m, _ in chosen) >= min(minimum, len(s)) for n, s in scores.items())
    )
    masks = decide(problem(scores, keep), Global(minimum=minimum))
    total = sum(scores[n][i] for n, i in flat if masks[n].reshape(-1)[i])
    assert masks.kept == keep
    assert total == pytest.approx(best)


def test_global_follows_permutations_and_signs_but_not_scales():
    small = {"a": [5, 4, 3, 2], "b": [6, 1, 3.5, 0.1]}
    first = decide(problem(small, 4), Global())
    swapped = decide(problem({"b": small["b"], "a": small["a"]}, 4), Global())
    assert first == swapped
    scaled = decide(problem({"a": small["a"], "b": [10 * x for x in small["b"]]}, 4), Global())
    assert first != scaled


def test_lamp_scores_by_hand():
    assert lamp(torch.tensor([3.0, 1.0, 2.0])).tolist() == pytest.approx([1, 1 / 14, 4 / 13])
    assert lamp(torch.tensor([10.0, 20.0])).tolist() == pytest.approx([0.2, 1])
    cards = {"a": [3, 1, 2], "b": [10, 20]}
    assert kept(decide(problem(cards, 3), budget("lamp"))) == {"a": [1, 0, 1], "b": [0, 1]}
    assert kept(decide(problem(cards, 3), budget("global"))) == {"a": [1, 0, 0], "b": [1, 1]}


@FEW
@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=12), st.floats(0.0625, 100, width=32))
def test_lamp_equals_the_double_loop(values, scale):
    score = torch.tensor(values)
    expected = []
    order = sorted(range(len(values)), key=lambda i: (-score[i].item(), i))
    for i in range(len(values)):
        above = order[: order.index(i) + 1]
        tail = sum(score[j].item() ** 2 for j in above)
        expected.append(score[i].item() ** 2 / tail if score[i].item() ** 2 > 0 else 0.0)
    got = lamp(score)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(expected, rel=1e-9)
    assert got.tolist() == pytest.approx(lamp(score.double() * scale).tolist(), rel=1e-6)
    if max(values) > 1e-18:
        assert float(got.max()) == 1.0
    by_score, by_lamp = score.argsort(stable=True, descending=True), got.argsort(stable=True, descending=True)
    assert torch.equal(score[by_score], score[by_lamp])


def test_lamp_is_accurate_in_large_layers():
    score = torch.full((200_000,), 1e-3)
    score[0] = 1e3
    got = lamp(score)
    assert float(got[0]) == 1.0
    assert float(got[-1]) == pytest.approx(1e-6 / (1e6 + 199_999 * 1e-6), rel=1e-6)


def test_lamp_leaves_no_layer_empty_and_the_dead_dead():
    for seed in range(5):
        task = problem_of(budget("lamp"), 0.05, seed=seed, dead=0.3)
        masks = decide(task, budget("lamp"))
        assert all(r.kept >= 1 for r in masks.table())
        assert all(not bool(masks[n][s == -torch.inf].any()) for n, s in task.scores.items())
    assert lamp(torch.tensor([-torch.inf, 2.0])).tolist() == [-math.inf, 1.0]
    assert lamp(torch.zeros(3)).tolist() == [0, 0, 0]


def test_lamp_ignores_the_scale_of_a_layer():
    task = problem_of(budget("lamp"), 0.3)
    scaled = problem_of(budget("lamp"), 0.3)
    for factor, score in zip((0.01, 3, 100, 7, 0.5), scaled.scores.values(), strict=True):
        score.mul_(factor)
    assert decide(task, budget("lamp")) == decide(scaled, budget("lamp"))
    assert decide(task, budget("global")) != decide(scaled, budget("global"))


def test_lamp_refuses_negative_scores():
    with pytest.raises(InvalidValue, match=r"LAMP needs non-negative scores.*'a'"):
        decide(problem({"a": [1, -1]}, 1), budget("lamp"))


def test_rounds_of_lamp_follow_the_living():
    alive = problem_of(budget("lamp"), 1.0)
    scores, count = dict(alive.scores), sum(alive.sizes)
    for _ in range(4):
        count = round_half_up(count * 0.8)
        masks = decide(Problem(addresses=alive.addresses, scores=scores, keep=count), budget("lamp"))
        assert masks.kept == count
        scores = {n: s.masked_fill(~masks[n], -torch.inf) for n, s in scores.items()}


def test_ratios_like_another_score():
    task = problem_of(Like(score="snip"), 0.4)
    masks = decide(task, Like(score="snip"))
    own = keep_top(task.ratio_scores["snip"], task.keep)
    assert [r.kept for r in masks.table()] == [int(own[n].sum()) for n in task.addresses]
    overlap = sum(int((masks[n] & own[n]).sum()) for n in task.addresses) / masks.kept
    assert overlap == pytest.approx(0.4, abs=0.08)  # positions are independent of the other score's
    with pytest.raises(InvalidValue, match=r"ratios like 'snip' need that score; use prunus\.prune"):
        decide(problem(CARDS, 4), Like(score="snip"))


def test_rows_drop_the_same_number_each():
    scores = {"a": [[1, 2, 3, 4], [9, 9, 9, 9]]}
    assert decide(problem(scores, 4), RowWise())["a"].int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert decide(problem(scores, 5), RowWise()).kept == 6  # each row drops floor(0.375 * 4) = 1
    with pytest.raises(InvalidValue, match="row-wise competition is between single weights"):
        decide(problem(scores, 4, unit=Row()), RowWise())


def test_uniform_floor_by_hand():
    addresses = [Address(name="body", shape=(10, 90)), Address(name="head", shape=(10, 10))]
    chosen = budget("uniform-floor")
    at = {d: [r.kept for r in decide(problem_of(chosen, d, addresses=addresses), chosen).table()] for d in (0.3, 0.1)}
    assert at == {0.3: [270, 30], 0.1: [80, 20]}
    with pytest.raises(Infeasible, match="lower `last`"):
        decide(problem_of(chosen, 0.01, addresses=addresses), chosen)


# -- families -----------------------------------------------------------------------------------------------------


def test_families_have_budgets_of_their_own_and_one_exact_total():
    odd = {"x.q": [1, 2, 3], "y.q": [9, 8, 7], "x.k": [1, 2, 3], "x.v": [4]}
    masks = decide(problem(odd, 5), Family())
    assert masks.kept == 5
    rows = {r.name: r.kept for r in masks.table()}
    assert (rows["x.q"], rows["y.q"]) == (0, 3)  # they compete with each other
    assert rows["x.k"] in (1, 2)
    assert decide(problem(odd, 5), Family(within=Uniform())) != masks
    assert Family(within="uniform") == Family(within=Uniform())


def test_named_families_follow_their_own_sparsities():
    chosen = budget({"name": "family", "sparsities": {"x.q": 1 / 3, "*.q": 2 / 3}})
    masks = decide(problem({"x.q": [1, 2, 3], "y.q": [9, 8, 7], "x.k": [1, 2, 3]}, 6), chosen)
    assert kept(masks) == {"x.q": [0, 1, 1], "y.q": [1, 0, 0], "x.k": [1, 1, 1]}


def test_families_do_not_revive_the_dead():
    for chosen in (Family(), Family(sparsities={"a": 0.25})):
        masks = decide(problem({"a": [1, -math.inf, -math.inf, 2], "b": [1, 2, 3, 4]}, 4), chosen)
        assert not masks["a"].reshape(-1)[1:3].any()


def test_families_take_ratios_of_their_own_members():
    chosen = Family(within=Like(score="snip"))
    assert chosen.needs_scores == ("snip",)
    assert decide(problem_of(chosen, 0.5), chosen).kept == problem_of(chosen, 0.5).keep
    assert Family(within="rate-distortion").needs_distortion


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"name": "family", "sparsities": {"nothing.*": 0.5}}, InvalidValue, r"pattern 'nothing\.\*' matches no"),
        ({"name": "family", "sparsities": {"*": "50%"}}, InvalidValue, r"sparsity of '\*' .*Write 0\.5"),
        ({"name": "family", "within": "erkk"}, UnknownName, "'erk'"),
        ({"name": "global", "minimum": -1}, InvalidValue, "minimum -1 must be a whole number"),
        ({"name": "global", "minimum": 2.5}, InvalidValue, r"minimum 2\.5 must be a whole number"),
        ({"name": "global", "minimum_share": 2}, InvalidValue, "minimum_share 2 is outside"),
        ({"name": "erk-plus", "last": "90%"}, InvalidValue, r"last .*Write 0\.9"),
        ({"name": "uniform-plus", "last": -0.1}, InvalidValue, r"last -0\.1 is outside"),
        ({"name": "uniform-floor", "last": 3}, InvalidValue, r"If you mean 3 %, write 0\.03"),
        ({"name": "smart-ratio", "last": math.nan}, InvalidValue, "last nan is outside"),
        ({"name": "rate-distortion", "points": 0}, InvalidValue, "points 0 must be at least 1"),
        ({"name": "erkk"}, UnknownName, "unknown budget 'erkk'.*'erk'"),
        ({"name": "erk", "powr": 2}, UnknownName, "unknown option.*'powr'.*'power'"),
        ({"minimum": 3}, InvalidValue, "has no name"),
    ],
)
def test_bad_choices_are_refused_with_the_remedy(options, kind, message):
    with pytest.raises(kind, match=message):
        decide(problem(CARDS, 4), budget(options))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("90%", r"not the text '90%'. Write 0\.9 instead"),
        ("many", "not the text 'many'"),
        ("x%", "not the text 'x%'"),
        (True, "not True"),
        (None, "not None"),
        ([0.9], r"not \[0\.9\]"),
        (90, r"90 is outside \[0, 1\)\. If you mean 90 %, write 0\.9"),
        (1.0, r"1\.0 is outside \[0, 1\)"),
        (-0.1, r"-0\.1 is outside"),
        (math.nan, "nan is outside"),
        (math.inf, "inf is outside"),
    ],
)
def test_fractions(value, message):
    with pytest.raises(InvalidValue, match=f"sparsity .*{message}"):
        check_fraction("sparsity", value, one_allowed=False)


def test_fractions_that_are_fine():
    numpy = pytest.importorskip("numpy")
    for value in (0, 0.0, 0.5, numpy.float32(0.5), numpy.float64(0.5)):
        assert check_fraction("sparsity", value, one_allowed=False) == float(value)
    assert check_fraction("share", 1) == 1.0


def test_layers_of_the_shared_problem_are_of_every_kind():
    assert {a.kind for a in LAYERS} == {"conv", "linear"}
