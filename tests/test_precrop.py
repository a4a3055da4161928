"""Densities of the largest expected flow, and the widths that realise them: identities, brute force, simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.budget.budgets import Problem, budget, decide
from prunus.budget.synexp import expected_flow, synexp, water_fill
from prunus.errors import Infeasible, InvalidValue, MissingExtra, NothingPrunable, UnknownName, Unsupported
from prunus.keep import choose
from prunus.measure.cost import count, layer_costs, total_macs
from prunus.models.create import create
from prunus.parameters import Address
from prunus.procedures.precrop import precrop as procedure
from prunus.structured.precrop import choose_widths, flow_densities, precrop, width_space
from prunus.structured.widths import Limit, WidthSpace, best_widths, fit_widths, root_widths, scaled, whole_widths
from small_runs import Watched, normed_run


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- water-filling --------------------------------------------------------------------------------------------------

COSTS = st.lists(st.integers(1, 10_000), min_size=1, max_size=8)


@given(COSTS, st.floats(0.01, 0.99))
def test_unsaturated_layers_get_the_same_number(costs, share):
    found = water_fill(costs, share * sum(costs))
    p = found.densities
    assert p @ costs == pytest.approx(share * sum(costs))
    free = p < 1 - 1e-12
    assert free.any()
    amounts = (p * costs)[free]
    assert amounts == pytest.approx(np.full(len(amounts), 1 / found.multipliers[0]))
    # A layer is saturated only when it has no more than the others get.
    assert all(c <= 1 / found.multipliers[0] * (1 + 1e-9) for c in np.asarray(costs)[~free])


def test_by_hand():
    assert water_fill([100, 1000, 50, 4000], 1000).densities.tolist() == pytest.approx([1, 0.425, 1, 0.10625])
    assert water_fill([100, 1000], 1100).densities.tolist() == [1, 1]
    assert water_fill([100, 1000], 5000).multipliers == (0.0,)
    assert water_fill([0, 10], 5).densities.tolist() == [1, 0.5]
    assert water_fill([100, 1000], 500, upper=math.inf).densities.tolist() == pytest.approx([2.5, 0.25])


def test_the_multiplier_falls_as_the_budget_grows():
    costs = [300, 50, 7000, 900]
    found = [water_fill(costs, b).multipliers[0] for b in range(100, 8250, 150)]
    assert all(b < a for a, b in itertools.pairwise(found))
    assert water_fill(costs, 8250).multipliers == (0.0,)


@pytest.mark.parametrize("budgets", [(1000, 300), (2000, 300), (300, 1500), (4000, 1760), (900, 900)])
@pytest.mark.parametrize("upper", [1.0, 2.0])
def test_two_budgets_against_a_grid(budgets, upper):
    """No point of a fine grid over three layers is better, and the conditions of optimality hold."""
    costs = np.array([[100.0, 1000.0, 4000.0], [900.0, 800.0, 60.0]])
    found = water_fill(costs, budgets, upper=upper)
    p, multipliers = found.densities, found.multipliers
    assert (costs @ p <= np.array(budgets) * (1 + 1e-9)).all()
    grid = np.linspace(0.01, upper, 80)
    every = np.stack(np.meshgrid(grid, grid, grid), -1).reshape(-1, 3)
    feasible = every[(every @ costs.T <= budgets).all(1)]
    assert np.log(feasible).sum(1).max() <= synexp(p) + 1e-9
    assert np.log(feasible).sum(1).max() >= synexp(p) - 0.2
    assert p == pytest.approx(np.minimum(upper, 1 / np.maximum(np.array(multipliers) @ costs, 1e-12)))
    for multiplier, used, limit in zip(multipliers, costs @ p, budgets, strict=True):
        assert multiplier * (limit - used) == pytest.approx(0, abs=1e-6)


def test_one_slack_budget_changes_nothing():
    costs = [[100.0, 1000.0, 4000.0], [900.0, 800.0, 60.0]]
    assert water_fill(costs, [1000, 1e9]).densities.tolist() == water_fill(costs[0], 1000).densities.tolist()
    assert water_fill(costs, [1e9, 300]).densities.tolist() == water_fill(costs[1], 300).densities.tolist()


def test_refuses_costs_that_mean_nothing():
    for costs, limits in (([], 1), ([1, -1], 1), ([1, math.nan], 1), ([1, 2], 0), ([1, 2], [1, 2]), ([1, 2], math.inf)):
        with pytest.raises(InvalidValue):
            water_fill(costs, limits)
    with pytest.raises(InvalidValue):
        water_fill(np.ones((3, 2)), [1, 1, 1])
    with pytest.raises(InvalidValue, match="costs nothing"):
        water_fill([0, 1], 1, upper=math.inf)
    with pytest.raises(InvalidValue, match="upper"):
        water_fill([1, 1], 1, upper=0)


def test_budget_divides_like_water():
    addresses = {n: Address(name=n, shape=s) for n, s in (("a", (10, 10)), ("b", (100, 10)), ("c", (5, 10)))}
    scores = {n: torch.rand(a.shape) for n, a in addresses.items()}
    masks = decide(Problem(addresses=addresses, scores=scores, keep=450), budget("synexp"))
    assert {n: masks.count(n) for n in masks} == {"a": 100, "b": 300, "c": 50}
    model = create("mlp", input_shape=(1, 8, 8), hidden=(64, 32))
    kept = {r.name: r.kept for r in choose(model, 0.9, budget="synexp").table()}
    total = 64 * 64 + 64 * 32 + 320
    assert sum(kept.values()) == total - round(0.9 * total)
    assert max(kept.values()) - min(kept.values()) <= 1


# -- expected flow ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["entries", "rows", "columns"])
def test_expected_flow_by_simulation(kind):
    widths, densities = (6, 12, 16, 5), (0.5, 0.25, 0.75)
    g = torch.Generator().manual_seed(0)
    draws, total = 20_000, 0.0
    x = torch.ones(draws, widths[0], 1)
    for inputs, outputs, p in zip(widths, widths[1:], densities, strict=False):
        weight = torch.randn(draws, outputs, inputs, generator=g).abs()
        shape = {"entries": (outputs, inputs), "rows": (outputs, 1), "columns": (1, inputs)}[kind]
        # As many as the density says, exactly, at random places.
        noise = torch.rand(draws, shape[0] * shape[1], generator=g)
        count = round(p * noise.shape[1])
        mask = (noise.argsort(1).argsort(1) < count).reshape(draws, *shape)
        x = (weight * mask) @ x
    total = float(x.sum((1, 2)).mean())
    exact = [round(p * n) / n for p, n in zip(densities, _units(kind, widths), strict=True)]
    mean = math.sqrt(2 / math.pi)
    assert total == pytest.approx(expected_flow(widths, exact, [mean] * 3), rel=0.02)


def _units(kind, widths):
    pairs = list(itertools.pairwise(widths))
    return [{"entries": i * o, "rows": o, "columns": i}[kind] for i, o in pairs]


def test_flow_by_hand():
    assert expected_flow((2, 3, 4), (0.5, 0.25), (1.0, 2.0)) == 2 * 3 * 4 * 0.5 * 0.25 * 2
    assert synexp([0.5, 0.25]) == pytest.approx(math.log(0.125))
    assert synexp([0.5, 0.0]) == -math.inf
    with pytest.raises(InvalidValue, match="L \\+ 1"):
        expected_flow((2, 3), (0.5, 0.25), (1.0, 2.0))


# -- widths -----------------------------------------------------------------------------------------------------------


def chain(channels=(3, 16, 32, 64, 10), taps=9, positions=(1024, 256, 64, 1)) -> WidthSpace:
    """Convolutions one after the other with biases, and a linear layer at the end."""
    last = len(channels) - 2
    layouts = {}
    for l in range(last + 1):
        output = ((l if l < last else -1, channels[l + 1]),)
        layouts[f"w{l}"] = (output, ((l - 1 if l else -1, channels[l]),), ((-1, taps if l < last else 1),))
        layouts[f"b{l}"] = (output,)
    uses = {f"w{l}": positions[l] for l in range(last + 1)}
    return WidthSpace(tuple(f"f{l}" for l in range(last)), tuple(channels[1:-1]), layouts, uses)


def test_counts_by_hand():
    space = chain()
    widths = (5, 7, 11)
    params = 9 * (3 * 5 + 5 * 7 + 7 * 11) + 11 * 10 + 5 + 7 + 11 + 10
    macs = 9 * (3 * 5 * 1024 + 5 * 7 * 256 + 7 * 11 * 64) + 110
    assert space.count(space.params, widths) == params
    assert space.count(space.macs, widths) == macs
    assert space.densities(widths)["w1"] == pytest.approx(5 * 7 / (16 * 32))


def test_joined_tensors_and_residual_streams():
    """An axis of two families, and a tensor that reads and writes one family."""
    layouts = {"join": (((2, 6),), ((0, 4), (1, 8), (-1, 3))), "stream": (((0, 4),), ((0, 4),)), "depth": (((1, 8),),)}
    space = WidthSpace(("a", "b", "c"), (4, 4, 6), layouts, {"join": 1, "stream": 1, "depth": 1})
    # Each unit of b occupies two positions.
    assert space.count(space.params, (2, 3, 5)) == 5 * (2 + 6 + 3) + 4 + 6
    assert space.densities((2, 3, 5))["stream"] == pytest.approx(0.25)
    assert space.densities((2, 3, 5))["join"] == pytest.approx(5 * 11 / (6 * 15))
    x = best_widths(space, [Limit(space.params, 40)])
    assert space.params.cost(x) == pytest.approx(40, rel=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05])
def test_flow_against_brute_force(share):
    """No whole widths within the budget have a larger expected flow than the exact solution."""
    space = chain((3, 8, 12, 16, 4))
    for terms in (space.params, space.macs):
        limit = Limit(terms, max(share, 0.1 * (terms.cost(np.zeros(3)) > 1e5)) * space.count(terms, space.sizes))
        x = best_widths(space, [limit])
        value = synexp(list(_densities(space, x).values()))
        assert limit.terms.cost(x) == pytest.approx(limit.limit, rel=1e-6)
        best = max(
            synexp(list(space.densities(w).values()))
            for w in itertools.product(*(range(1, n + 1) for n in space.sizes))
            if space.count(terms, w) <= limit.limit
        )
        assert value >= best - 1e-7
        rounded = whole_widths(space, x, [limit])
        assert synexp(list(space.densities(rounded).values())) > best - 0.6


def _densities(space, x):
    return {n: math.exp(sum(x[f] for f in space.blocks(n)[0][1])) for n in space.positions}


def test_flow_under_two_budgets_against_a_grid():
    space = chain((3, 8, 12, 16, 4))
    limits = [Limit(t, 0.25 * space.count(t, space.sizes)) for t in (space.params, space.macs)]
    x = best_widths(space, limits)
    assert all(b.terms.cost(x) <= b.limit * (1 + 1e-9) for b in limits)
    steps = [np.linspace(-math.log(n), 0, 60) for n in space.sizes]
    every = np.stack(np.meshgrid(*steps), -1).reshape(-1, 3)
    fits = np.all([np.exp(every @ b.terms.exponents.T) @ b.terms.coefficients <= b.limit for b in limits], axis=0)
    slope = sum(np.bincount(space.blocks(n)[0][1], minlength=3) for n in space.positions)
    best = float((every[fits] @ slope).max())
    found = synexp(list(_densities(space, x).values()))
    assert found >= best - 1e-7
    assert found <= best + 0.15


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=5),
    st.floats(0.02, 1.0),
    st.sampled_from(["root", "fit", "flow", "uniform"]),
    st.sampled_from(["params", "macs", "both"]),
)
def test_budgets_are_met_within_one_channel(hidden, share, realise, which):
    space = chain((3, *hidden, 10), positions=tuple(4 ** (len(hidden) - i) for i in range(len(hidden) + 1)))
    given_budget = {n: share for n in ("params", "macs") if which in (n, "both")}
    try:
        crop = choose_widths(space, realise=realise, **given_budget)
    except Infeasible:
        floor = [1] * len(hidden)
        assert any(
            space.count(t, floor) > share * space.count(t, space.sizes)
            for t, n in ((space.params, "params"), (space.macs, "macs"))
            if n in given_budget
        )
        return
    widths = list(crop.widths.values())
    terms = {"params": space.params, "macs": space.macs}
    full = {n: space.count(t, space.sizes) for n, t in terms.items()}
    for name in given_budget:
        assert space.count(terms[name], widths) <= share * full[name] + 1e-6
    for i, width in enumerate(widths):
        if width < space.sizes[i]:
            wider = [*widths[:i], width + 1, *widths[i + 1 :]]
            assert any(space.count(terms[n], wider) > share * full[n] for n in given_budget), "room for one more"
    if share == 1.0:
        assert tuple(widths) == space.sizes


def test_a_full_budget_keeps_everything():
    space = chain()
    for realise in ("root", "fit", "flow", "uniform"):
        crop = choose_widths(space, params=1.0, macs=1.0, realise=realise)
        assert tuple(crop.widths.values()) == space.sizes
        assert set(crop.densities.values()) == {1.0}
        assert crop.saturated == space.families


def test_fit_follows_densities_that_widths_can_have():
    """Targets that come from widths give those widths back."""
    space = chain((3, 40, 60, 80, 10))
    widths = (10, 30, 44)
    targets = space.densities(widths)
    x = fit_widths(space, targets, [Limit(space.params, space.count(space.params, widths))])
    assert np.exp(x) * space.sizes == pytest.approx(widths, abs=0.05)
    crop = choose_widths(space, params=space.count(space.params, widths), densities=targets, realise="fit")
    assert tuple(crop.widths.values()) == widths


def test_a_width_is_the_square_root_of_the_density():
    """Not the density itself; the first layer, whose inputs stay, and a depthwise one ask for the whole density."""
    space = chain((16, *[64] * 6, 16), positions=(1,) * 7)
    limit = Limit(space.params, space.count(space.params, space.sizes))
    inner = {n: 0.25 for n in space.positions if n not in ("w0", "w6")}
    for realise in (root_widths, fit_widths):
        share = np.exp(realise(space, inner, [limit]))
        assert share / share[2] == pytest.approx(np.ones(6), abs=0.02)
    loose = Limit(space.params, 0.25 * limit.limit)
    assert np.exp(root_widths(space, inner, [loose]))[1:-1] == pytest.approx(np.full(4, 0.5), abs=0.02)
    uniform = np.exp(scaled(space, np.zeros(6), [loose]))
    assert uniform == pytest.approx(np.full(6, uniform[0]))
    # Targets that add up to the budget are met without scaling.
    layouts = {"w": (((0, 64),), ((-1, 3),)), "depthwise": (((0, 64),), ((-1, 9),)), "v": (((1, 32),), ((0, 64),))}
    small = WidthSpace(("f", "g"), (64, 32), layouts, dict.fromkeys(layouts, 1))
    x = np.log([0.25, 0.25])
    targets = {"w": 0.25, "depthwise": 0.25, "v": 0.0625}
    found = root_widths(small, targets, [Limit(small.params, small.params.cost(x))])
    assert np.exp(found) == pytest.approx([0.25, 0.25], abs=1e-6)


def test_neighbours_that_disagree_are_averaged():
    """By hand: log s is the mean of log(p) / 2 of the two layers, each with the parameters it keeps as weight."""
    layouts = {
        "a": (((0, 10),), ((1, 10),)),
        "b": (((2, 10),), ((0, 10),)),
        "ends": (((1, 10),), ((2, 10),)),
    }
    space = WidthSpace(("f", "g", "h"), (10, 10, 10), layouts, dict.fromkeys(layouts, 1))
    found = root_widths(space, {"a": 0.64, "b": 0.36}, [Limit(space.params, 300)])
    # Scaling up to the budget keeps the differences until a width is whole.
    tight = root_widths(space, {"a": 0.64, "b": 0.36}, [Limit(space.params, 60)])
    wished = np.array([(0.64 * math.log(0.8) + 0.36 * math.log(0.6)) / 1.0, math.log(0.8), math.log(0.6)])
    assert tight - tight[0] == pytest.approx(wished - wished[0], abs=1e-9)
    assert space.params.cost(tight) == pytest.approx(60)
    assert found == pytest.approx([0, 0, 0])


def test_wider_than_the_network():
    """Without the upper limit all layers have the same number of parameters, and a wide enough network agrees."""
    space = chain((3, 16, 64, 32, 10), positions=(16, 16, 16, 1))
    limit = Limit(space.params, 0.5 * space.count(space.params, space.sizes), "parameters")
    p = flow_densities(space, [limit], upper=math.inf)
    sizes = [sum(n for n, _ in space.blocks(name)) for name in p]
    amounts = [d * n for d, n in zip(p.values(), sizes, strict=True)]
    assert amounts == pytest.approx([amounts[0]] * len(amounts))
    crop = choose_widths(space, params=0.5, preconfig=True)
    assert crop.params <= limit.limit
    assert crop.wider
    wide = chain((3, 256, 1024, 512, 10), positions=(16, 16, 16, 1))
    same = choose_widths(wide, params=int(limit.limit))
    for ours, theirs in zip(crop.widths.values(), same.widths.values(), strict=True):
        assert abs(ours - theirs) <= 1


def test_refuses_what_cannot_be():
    space = chain()
    with pytest.raises(InvalidValue, match="give a budget"):
        choose_widths(space)
    for value in (0, -1, 1.5, math.nan, "half", True):
        with pytest.raises(InvalidValue, match="share in"):
            choose_widths(space, params=value)
    with pytest.raises(Infeasible, match="single unit"):
        choose_widths(space, params=20)
    with pytest.raises(UnknownName, match="uniform"):
        choose_widths(space, params=0.5, realise="uniformly")
    with pytest.raises(UnknownName, match="w0"):
        choose_widths(space, params=0.5, densities={"x0": 0.5})
    with pytest.raises(InvalidValue, match="density of 'w0'"):
        choose_widths(space, params=0.5, densities={"w0": 1.5})
    with pytest.raises(InvalidValue, match="takes no densities"):
        choose_widths(space, params=0.5, densities={"w0": 0.5}, realise="flow")


# -- networks ---------------------------------------------------------------------------------------------------------


def example(shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


NETS = {
    "resnet20": {"input_shape": (3, 8, 8), "shortcut": "B", "width": 8},
    "vgg-small": {"input_shape": (3, 16, 16), "width": 32},
    "wrn": {"input_shape": (3, 8, 8), "depth": 10, "width": 1},
    "vit": {"input_shape": (3, 16, 16), "width": 32, "depth": 2},
    "lenet5": {"input_shape": (1, 28, 28)},
    "torchvision/mobilenet_v2": {"input_shape": (3, 32, 32), "width_mult": 0.25},
}


def built(name):
    try:
        return create(name, **NETS[name]).eval()
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NETS)
def test_built_networks_cost_what_was_planned(name):
    model, x = built(name), example(NETS[name]["input_shape"])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    space = width_space(model, x)
    assert space.count(space.params, space.sizes) == count(model).parameters
    assert space.count(space.macs, space.sizes) == sum(c.macs for c in layer_costs(model, x).values())
    for budget_of, realise in (({"params": 0.3}, "root"), ({"macs": 0.4, "params": 0.4}, "flow")):
        made = precrop(model, x, realise=realise, **budget_of)
        costs = layer_costs(made.model, x)
        assert made.crop.params == count(made.model).parameters
        assert made.crop.macs == sum(c.macs for c in costs.values())
        assert made.crop.params <= budget_of["params"] * count(model).parameters
        if not name.startswith("vit"):  # products between activations have no weight
            assert made.crop.macs == total_macs(made.model, x)
        assert made.model(x).shape == model(x).shape
        assert made.plan.verify(model, x) < 1e-5
        for layer, density in made.crop.densities.items():
            was, now = model.get_parameter(layer).numel(), made.model.get_parameter(layer).numel()
            assert density == pytest.approx(now / was)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_neighbours_agree_and_ends_stay():
    model = built("vgg-small")
    small = precrop(model, example((3, 16, 16)), params=0.2).model
    layers = [m for m in small.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert layers[0].weight.shape[1] == 3
    assert layers[-1].weight.shape[0] == 10
    for first, second in itertools.pairwise(layers):
        assert first.weight.shape[0] == second.weight.shape[1]


def test_new_weights_are_drawn_for_the_new_fan():
    model, x = built("vgg-small"), example((3, 16, 16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    state = torch.random.get_rng_state()
    one, two, other = (precrop(model, x, params=0.3, seed=s).model for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    for name, weight in one.named_parameters():
        assert torch.equal(weight, two.get_parameter(name))
        if weight.ndim == 4 and weight.shape[1] > 3:
            assert not torch.equal(weight, other.get_parameter(name))
            fan = weight[0].numel()
            assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / fan), rel=0.1)
    for module in one.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.running_mean == 0).all())


def test_densities_of_masks_are_followed():
    model, x = built("vgg-small"), example((3, 16, 16))
    masks = choose(model, 0.7, score="random", budget="erk")
    made = precrop(model, x, params=0.3, densities=masks)
    targets = {row.name: row.density for row in masks.table()}
    wide = [n for n in targets if n.startswith("features") and n != "features.0.weight"]
    ours = np.log([made.crop.densities[n] for n in wide])
    uniform = np.log([precrop(model, x, params=0.3, realise="uniform").crop.densities[n] for n in wide])
    wished = np.log([targets[n] for n in wide])
    assert np.abs(ours - wished).mean() < 0.5 * np.abs(uniform - wished).mean()


def test_widening_is_refused_with_the_way_out():
    model, x = create("lenet5", input_shape=(3, 32, 32)), example((3, 32, 32))
    limit = count(model).parameters
    crop = choose_widths(width_space(model, x), params=limit, preconfig=True)
    assert crop.wider
    with pytest.raises(Unsupported, match="times as wide and give the budget as a count"):
        precrop(model, x, params=limit, preconfig=True)
    vgg = create("vgg-small", width=8)
    wanted = choose_widths(width_space(vgg, x), params=1.0, preconfig=True)
    made = precrop(create("vgg-small", width=128), x, params=count(vgg).parameters)
    assert made.crop.params <= count(vgg).parameters
    assert not made.crop.saturated
    assert made.crop.widths == wanted.widths


def test_networks_without_widths():
    with pytest.raises(NothingPrunable, match="no width"):
        precrop(torch.nn.Linear(4, 3), torch.randn(2, 4), params=0.5)


# -- as a procedure ---------------------------------------------------------------------------------------------------


def test_procedure_trains_the_narrow_network():
    run = normed_run(kind=Watched)
    found = procedure(run.within("m"), sparsity=0.5)
    start, _ = run.seen["train"]
    model = found.state.model(run)
    assert found.details["widths"] == {"conv.weight:0": model.conv.out_channels}
    assert found.details["params"] == count(model).parameters <= 0.5 * count(run.model).parameters
    assert {n: w.shape for n, w in start.weights.items()} == {n: w.shape for n, w in found.state.weights.items()}
    assert not any(torch.equal(w, run.initial.weights[n][: len(w)]) for n, w in start.weights.items() if w.ndim == 4)
    other = procedure(normed_run().within("m"), macs=0.5)
    assert other.details["macs_share"] <= 0.5
    for source in ("synflow", "erk"):
        followed = procedure(normed_run(kind=Watched).within(source), sparsity=0.4, densities=source)
        assert followed.details["params_share"] <= 0.6
    with pytest.raises(UnknownName, match="synflow"):
        procedure(normed_run(), densities="synflows")
    with pytest.raises(Unsupported, match="times as wide"):
        procedure(normed_run(), params=1000, preconfig=True)
