"""Step methods against the algorithms they are named after; the shared suite checks what all of them promise."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from awkward import MLP
from prunus.budget.select import keep_count
from prunus.errors import DamagedFile, Infeasible, InvalidValue, NonFinite, ScheduleTooShort, Unsupported
from prunus.keep import choose
from prunus.masks import Masks
from prunus.methods.iss_p import important, shrink
from prunus.methods.regrow import GROWTH_MOMENTUM, rewire
from prunus.methods.sr_ste import refined_gradient
from prunus.parameters import Address, prunable
from prunus.units import NM
from suites import Loop, same_bits, same_state

FEW = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def one_thread():
    """These nets are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def counts(masks):
    return [row.kept for row in masks.table()]


def dense_gradients(loop):
    """Return the gradients of the coming step, taken on a copy that nothing is attached to."""
    twin = copy.deepcopy(loop.model)
    x, y = loop.case.batch(loop.done)
    parameters = {n: twin.get_parameter(n) for n in loop.handle.masks}
    grads = torch.autograd.grad(F.cross_entropy(twin(x), y), list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


# -- exchanging weights -------------------------------------------------------------------------------------------


@FEW
@given(
    layer=st.lists(
        st.tuples(st.booleans(), st.floats(0, 1, width=32), st.floats(0, 1, width=32)), min_size=1, max_size=12
    ),
    count=st.integers(0, 14),
)
def test_rewire_equals_brute_force(layer, count):
    mask, drop, grow = (torch.tensor(column) for column in zip(*layer, strict=True))
    kept = [i for i, m in enumerate(mask) if m]
    count_ = min(count, len(kept))
    stays = sorted(kept, key=lambda i: (-drop[i], i))[: len(kept) - count_]
    candidates = [i for i in range(len(layer)) if i not in stays]
    grown = sorted(candidates, key=lambda i: (-grow[i], i))[:count_]
    new = rewire(mask, drop, grow, count)
    assert new.nonzero().reshape(-1).tolist() == sorted(stays + grown)
    assert int(new.sum()) == len(kept)


def test_rewire_by_hand():
    mask = torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    drop = torch.tensor([0.1, 5, 3, 0, 0, 0])
    grow = torch.tensor([9.0, 9, 9, 1, 3, 2])
    assert rewire(mask, drop, grow, 1).int().tolist() == [1, 1, 1, 0, 0, 0]  # dropped, and grown again at once
    grow[0] = 0
    assert rewire(mask, drop, grow, 1).int().tolist() == [0, 1, 1, 0, 1, 0]
    grow[2] = 0
    assert rewire(mask, drop, grow, 2).int().tolist() == [0, 1, 0, 0, 1, 1]
    assert rewire(mask, drop, grow, 99).int().tolist() == [0, 1, 0, 0, 1, 1]  # all go, the best three come


def test_rewire_refuses_diverged_weights():
    with pytest.raises(NonFinite, match="NaN"):
        rewire(torch.ones(4).bool(), torch.full((4,), torch.nan), torch.zeros(4), 1)


@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_rigl_chooses_as_brute_force_does(fraction):
    choices = {"sparsity": 0.6, "every": 3, "end": "1dur", "anneal": "constant"}
    loop = Loop(prunus.RigL(fraction=fraction, **choices)).run(2)
    static = Loop(prunus.RigL(fraction=0.0, **choices)).run(3)  # the weights just before the exchange
    dense = dense_gradients(loop)
    loop.step()
    for name, mask in static.handle.masks.items():
        weight, gradient = static.weights()[name].reshape(-1).abs(), dense[name].reshape(-1).abs()
        alive = [i for i in range(mask.numel()) if mask.reshape(-1)[i]]
        moved = int(fraction * len(alive))
        stays = sorted(alive, key=lambda i: -weight[i])[: len(alive) - moved]
        grown = sorted(set(range(mask.numel())) - set(stays), key=lambda i: -gradient[i])[:moved]
        after = loop.handle.masks[name].reshape(-1)
        assert after.nonzero().reshape(-1).tolist() == sorted(stays + grown)


def test_no_exchange_is_static_bit_for_bit():
    static = Loop(prunus.Static(sparsity=0.6)).run()
    for method in (
        prunus.RigL(sparsity=0.6, every=2, fraction=0.0),
        prunus.SET(sparsity=0.6, every=2, fraction=0.0),
        prunus.RigL(sparsity=0.6, every=2, end=2, fraction=1e-6),
    ):
        loop = Loop(method).run()
        same_state(static, loop, f"{type(method).__name__} that exchanges nothing")


def test_exploration_rates():
    static = Loop(prunus.Static(sparsity=0.6)).run()
    assert static.handle.explored.density == pytest.approx(0.4, abs=1e-3)
    loop = Loop(prunus.SET(sparsity=0.6, every=1, fraction=0.9), steps=40)
    rates = []
    for _ in range(40):
        loop.step()
        rates.append(loop.handle.explored.density)
    assert all(b >= a for a, b in itertools.pairwise(rates))
    assert rates[-1] > 0.99


@pytest.mark.parametrize(
    ("method", "steps", "shares"),
    [
        (prunus.RigL(every=1, end="1dur"), (0, 50, 100), (0.3, 0.15, 0.0)),
        (prunus.RigL(every=1, end="0.5dur"), (0, 25, 50), (0.3, 0.15, 0.0)),
        (prunus.SET(every=1), (0, 50, 100), (0.3, 0.3, 0.3)),
        (prunus.ITOP(every=1), (0, 50, 100), (0.5, 0.2525, 0.005)),
        (prunus.GraNet(every=1), (0, 50, 100), (0.5, 0.2525, 0.005)),
        (prunus.RigL(every=1, end="1dur", anneal="linear"), (0, 50, 100), (0.3, 0.15, 0.0)),
    ],
)
def test_shares_are_annealed(method, steps, shares):
    handle = Loop(method, steps=100).handle
    assert [method.fraction_at(handle, s) for s in steps] == pytest.approx(shares)


def test_exchanges_fall_on_the_interval_and_never_on_the_last_step():
    method = prunus.ITOP(every=3)
    handle = Loop(method, steps=12).handle
    assert [s for s in range(14) if method.exchange_due(handle, s)] == [3, 6, 9]
    method = prunus.RigL(every=3, end=7)
    assert [s for s in range(14) if method.exchange_due(handle, s)] == [3, 6]


def test_set_drops_the_smallest_of_both_signs():
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, -0.1, -0.2, 0.0, 0.0])
    mask = weight != 0
    grow = torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 0.5])
    new = prunus.SET(fraction=0.5).rewire_layer(mask, weight.abs(), grow, 0.5, 6, weight)
    # Two of four positive ones and one of two negative ones go: 0.1, 0.2 and -0.1; three grow.
    assert new[[2, 3, 5, 6, 7]].all()
    assert int(new.sum()) == 6
    both = prunus.SET(sign_split=False).rewire_layer(mask, weight.abs(), grow, 0.5, 6, weight)
    assert both[[2, 3, 6, 7]].all()
    assert int(both.sum()) == 6
    # A kept zero counts as positive, once: of the two negative weights one goes.
    weight, grow = torch.tensor([0.0, -0.3, -0.4, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    mask = torch.tensor([True, True, True, False])
    new = prunus.SET(fraction=0.5).rewire_layer(mask, weight.abs(), grow, 0.5, 3, weight)
    assert new.int().tolist() == [1, 0, 1, 1]


def test_growth_by_momentum_follows_the_running_sum_of_dense_gradients():
    loop = Loop(prunus.RigL(sparsity=0.6, every=4, growth="momentum", end="1dur"))
    expected = {n: torch.zeros(m.shape) for n, m in loop.handle.masks.items()}
    for _ in range(4):
        for name, gradient in dense_gradients(loop).items():
            expected[name] = GROWTH_MOMENTUM * expected[name] + gradient
        before = loop.handle.masks
        loop.step()
    for name, mask in loop.handle.masks.items():
        torch.testing.assert_close(loop.handle.memory[f"momentum/{name}"], expected[name])
        size = expected[name].abs()
        grown, never = mask & ~before[name], ~mask & ~before[name]
        assert grown.any()
        assert size[grown].min() >= size.masked_fill(~never, 0.0).max()


def test_growth_by_momentum_resumes():
    method = prunus.RigL(sparsity=0.6, every=4, growth="momentum", end="1dur")
    whole, first = Loop(method).run(), Loop(method).run(6)
    second = Loop(method, model_seed=1)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.handle.load_state_dict(first.handle.state_dict())
    second.done = 6
    same_state(whole, second.run(6), "growth by momentum, resumed")


# -- ramps --------------------------------------------------------------------------------------------------------


def test_gmp_prunes_every_layer_to_the_ramp():
    method = prunus.GMP(sparsity=0.8, begin=2, end=10, every=2)
    loop = Loop(method)
    ramp = method.schedule(12, None)
    assert ramp.events() == [2, 4, 6, 8, 10]
    for step in range(1, 13):
        before = loop.handle.masks
        loop.step()
        masks = loop.handle.masks
        if step in ramp.events():
            target = ramp.value(step)
            assert masks.kept == keep_count(390, target)
            assert all(abs(row.kept - (1 - target) * row.total) <= 1 for row in masks.table())
            weights = loop.weights()
            for name, mask in masks.items():
                assert weights[name][mask].abs().min() > 0 or target == 0
        else:
            assert masks == before
    assert loop.handle.masks.kept == keep_count(390, 0.8)


def test_one_event_is_one_shot_magnitude_pruning_there():
    loop = Loop(prunus.GMP(sparsity=0.7, begin=4, end=4, every=1, curve="oneshot")).run(3)
    assert loop.handle.masks.sparsity == 0
    dense = Loop(prunus.Static(sparsity=0.0)).run(4)
    expected = choose(dense.model, 0.7, budget="uniform")
    loop.step()
    assert loop.handle.masks == expected


@pytest.mark.parametrize("budget", ["global", "lamp", "uniform-floor", "erk"])
def test_gmp_with_other_budgets_ends_exactly(budget):
    loop = Loop(prunus.GMP(sparsity=0.8, every="1ba", budget=budget)).run()
    assert loop.handle.masks.kept == keep_count(390, 0.8)


@pytest.mark.parametrize("unit", ["row", "block-2x2"])
def test_gmp_of_whole_units_never_asks_for_more_than_is_left(unit):
    loop = Loop(prunus.GMP(sparsity=0.5, every="1ba", unit=unit, budget="global")).run()
    assert keep_count(390, 0.5) - 20 < loop.handle.masks.kept <= keep_count(390, 0.5)


def test_ramps_start_from_given_masks():
    model = MLP.build()
    given_masks = choose(model, 0.5)
    loop = Loop(prunus.GMP(sparsity=0.8, every="1ba", budget="global"), masks=given_masks)
    assert loop.handle.masks == given_masks
    loop.run()
    assert loop.handle.masks <= given_masks
    assert loop.handle.masks.kept == keep_count(390, 0.8)
    for method in (prunus.GMP(sparsity=0.3, every="1ba"), prunus.GraNet(sparsity=0.3, initial=0.0, every="1ba")):
        with pytest.raises(Infeasible, match="the given masks keep 195 of 390 weights, fewer than the 273 of sparsity"):
            Loop(method, masks=given_masks)


@pytest.mark.parametrize("name", ["SET", "RigL", "ITOP", "Static"])
def test_given_masks_are_the_start(name):
    given_masks = choose(MLP.build(), 0.5)
    method = getattr(prunus, name)(sparsity=0.5, **({} if name == "Static" else {"every": 2}))
    loop = Loop(method, masks=given_masks)
    assert loop.handle.masks == given_masks
    assert counts(loop.run().handle.masks) == counts(given_masks)


@pytest.mark.parametrize("method", [prunus.ISSP(sparsity=0.5), prunus.SRSTE()])
def test_methods_that_choose_among_all_weights_refuse_masks(method):
    with pytest.raises(InvalidValue, match=r"cannot start from masks of sparsity 0\.5"):
        Loop(method, masks=choose(MLP.build(), 0.5))
    only = Masks({"2.weight": torch.ones(10, 20, dtype=torch.bool)})
    assert list(Loop(method, masks=only).run().handle.masks) == ["2.weight"]  # full masks only say where


def test_masks_alone_are_held():
    given_masks = choose(MLP.build(), 0.5)
    loop = Loop(None, masks=given_masks).run()
    assert loop.handle.masks == given_masks
    assert loop.handle.state_dict()["values"]["method"] is None


def test_global_mp_keeps_its_minimum():
    model = MLP.build()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plain = prunus.sparsify(model, optimizer, prunus.GlobalMP(sparsity=0.9, minimum_share=0.0), steps=3)
    assert plain.masks.count("2.weight") == 0
    plain.detach()
    model = MLP.build()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    held = prunus.sparsify(model, optimizer, prunus.GlobalMP(sparsity=0.9, minimum_share=0.02), steps=3)
    assert held.masks.count("2.weight") == int(0.02 * 390)
    assert held.masks.kept == 39


def test_lamp_pruning_is_one_lamp_cut_at_the_start():
    loop = Loop(prunus.LAMPPruning(sparsity=0.8))
    assert loop.handle.masks == choose(MLP.build(), 0.8, budget="lamp")
    masks = loop.handle.masks
    assert loop.run().handle.masks is masks


# -- GraNet -------------------------------------------------------------------------------------------------------


def test_granet_without_regrowth_is_global_gmp():
    granet = Loop(prunus.GraNet(sparsity=0.8, initial=0.0, every=2, ramp_end=8, fraction=0.0, fraction_end=0.0)).run()
    gmp = Loop(prunus.GMP(sparsity=0.8, every=2, end=8, budget="global")).run()
    same_state(granet, gmp, "GraNet without regrowth against GMP")


def test_granet_without_a_ramp_is_itop():
    granet = Loop(prunus.GraNet(sparsity=0.6, initial=0.6, every=2, ramp_end=0)).run()
    itop = Loop(prunus.ITOP(sparsity=0.6, every=2)).run()
    same_state(granet, itop, "GraNet at constant sparsity against ITOP")


def test_granet_follows_its_ramp_and_regrows_within_layers():
    method = prunus.GraNet(sparsity=0.9, initial=0.5, every=1, ramp_end=10)
    loop = Loop(method, steps=14)
    assert loop.handle.masks.kept == 195
    expected = [0.6084, 0.6952, 0.7628, 0.8136, 0.85, 0.8744, 0.8892, 0.8968, 0.8996, 0.9, 0.9, 0.9, 0.9, 0.9]
    for step, sparsity in enumerate(expected, 1):
        before = loop.handle.masks
        loop.step()
        assert loop.handle.masks.kept == keep_count(390, sparsity)
        grown = sum(int((m & ~before[n]).sum()) for n, m in loop.handle.masks.items())
        assert (grown > 0) == (step < 14)
        if step > 10:
            assert counts(loop.handle.masks) == counts(before)


def test_granet_meets_the_target_at_the_end_of_the_ramp_even_off_the_interval():
    loop = Loop(prunus.GraNet(sparsity=0.9, initial=0.5, every=4, ramp_end=7)).run(7)
    assert loop.handle.masks.kept == keep_count(390, 0.9)


@dataclass(frozen=True)
class RampOnly(prunus.GraNet):
    """GraNet without its exchange."""

    def exchange(self, s, masks):
        return masks


def test_granet_ranks_kept_weights_that_are_zero_above_pruned_ones():
    loop = Loop(RampOnly(sparsity=0.8, initial=0.5, every=2, ramp_end=6))
    before = loop.handle.masks
    with torch.no_grad():
        for parameter in loop.weights().values():
            parameter.zero_()  # as freshly grown ones are
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0
    loop.run(6)
    assert loop.handle.masks <= before
    assert loop.handle.masks.kept == keep_count(390, 0.8)


# -- soft shrinkage -----------------------------------------------------------------------------------------------


def test_shrinking_by_hand():
    weight, address = torch.tensor([[4.0, -3.0, 2.0, 1.0]]), Address(name="w", shape=(1, 4))
    for expected in ([4, -3, 1, 0.5], [4, -3, 0.5, 0.25]):
        weight = shrink(weight, important(weight, address, 0.5, None), 0.5)
        assert weight.tolist() == [expected]


@FEW
@given(n=st.integers(1, 300), ratio=st.floats(0, 0.9999))
def test_the_important_are_all_but_the_rounded_up_share(n, ratio):
    keep = important(torch.rand(1, n), Address(name="w", shape=(1, n)), ratio, None)
    assert int(keep.sum()) == n - min(math.ceil(ratio * n - 1e-9), int(0.995 * n))


def still(method, weights, steps=6):
    """Return weights after steps without any gradient."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = prunus.sparsify(model, optimizer, method, steps=20)
    for _ in range(steps):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    return model.weight.detach()[0], handle


def test_without_gradients_unimportant_weights_fall_geometrically():
    weights, handle = still(prunus.ISSP(sparsity=0.5, factor=0.9, search_end=10), [4.0, -3.0, 2.0, 1.0])
    torch.testing.assert_close(weights, torch.tensor([4.0, -3.0, 2 * 0.9**6, 0.9**6]))
    assert handle.masks.sparsity == 0
    weights, handle = still(prunus.ISSP(sparsity=0.5, factor=0.9, search_end=10), [4.0, -3.0, 2.0, 1.0], 10)
    assert weights.tolist() == [4, -3, 0, 0]
    assert handle.masks.kept == 2


def test_factor_one_is_dense_training_then_one_cut():
    loop = Loop(prunus.ISSP(sparsity=0.6, factor=1.0, search_end=6)).run(5)
    dense = Loop(prunus.Static(sparsity=0.0)).run(5)
    assert all(same_bits(p, q) for p, q in zip(loop.model.parameters(), dense.model.parameters(), strict=True))
    dense.step()
    loop.step()
    assert loop.handle.masks == choose(dense.model, 0.6, budget="uniform")


def test_factor_zero_is_iterative_hard_thresholding():
    loop = Loop(prunus.ISSP(sparsity=0.6, factor=0.0, search_end=8))
    for _ in range(7):
        loop.step()
        assert [int((w == 0).sum()) for w in loop.weights().values()] == [96, 120, 18]


def test_an_unimportant_weight_can_return_in_the_search_but_not_under_a_fixed_mask():
    for method, returns in (
        (prunus.ISSP(sparsity=0.5, search_end=15), True),
        (prunus.ISSP(sparsity=0.5, search_end=15, factor=0.0), True),
        (prunus.Static(sparsity=0.5, score="magnitude"), False),
    ):
        model = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        handle = prunus.sparsify(model, optimizer, method, steps=20)
        for _ in range(15):
            model.weight.grad = torch.tensor([[0.0, 0.0, 0.0, -3.5]])
            optimizer.step()
        assert bool(handle.masks["weight"][0, 3]) is returns


def test_patterns_replace_the_share():
    loop = Loop(prunus.ISSP(unit="2:4", search_end=6)).run()
    for name, mask in loop.handle.masks.items():
        address = prunable(loop.model)[name]
        assert int(mask.sum()) == NM(2, 4).kept(address)


# -- N:M ----------------------------------------------------------------------------------------------------------


def test_refined_gradients_by_hand():
    gradient, weight = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, torch.inf])
    mask = torch.tensor([True, False, True])
    assert refined_gradient(gradient, weight, mask, 0.1).tolist() == [1.0, 4.0, 3.0]
    assert torch.equal(refined_gradient(gradient, weight, mask, 0.0), gradient)


def test_sr_ste_equals_the_algorithm_written_out():
    decay, lr = 0.05, 0.1
    model, twin = MLP.build(), MLP.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    handle = prunus.sparsify(model, optimizer, prunus.SRSTE(decay=decay), steps=6)
    addresses = prunable(twin)
    dense = {n: twin.get_parameter(n).detach().clone() for n in addresses}
    for step in range(6):
        x, y = MLP.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

        masks = {n: NM(2, 4).choose(w.abs(), addresses[n]) for n, w in dense.items()}
        with torch.no_grad():
            for name, weight in dense.items():
                twin.get_parameter(name).copy_(weight * masks[name])
        names = [n for n, _ in twin.named_parameters()]
        grads = dict(zip(names, torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters())), strict=True))
        with torch.no_grad():
            for name, gradient in grads.items():
                if name in dense:
                    dense[name] -= lr * (gradient + decay * (~masks[name]).float() * dense[name])
                else:
                    twin.get_parameter(name).sub_(lr * gradient)
    for name, weight in dense.items():
        mask = NM(2, 4).choose(weight.abs(), addresses[name])
        assert torch.equal(handle.masks[name], mask)
        torch.testing.assert_close(model.get_parameter(name).detach(), weight * mask)


def test_decay_of_removed_weights_settles_the_masks():
    changes = {}
    for decay in (0.0, 1.0):
        loop = Loop(prunus.SRSTE(unit="1:4", decay=decay), steps=60)
        changes[decay] = 0.0
        for _ in range(60):
            before = loop.handle.masks
            loop.step()
            changes[decay] += loop.handle.masks.churn(before)
    assert changes[1.0] < changes[0.0]


def test_freezing_stops_the_masks_and_clears_the_state():
    loop = Loop(prunus.SRSTE(freeze=5)).run(5)
    masks = loop.handle.masks
    loop.run(7)
    assert loop.handle.masks is masks
    for name, mask in masks.items():
        assert not any(bool(state[~mask].any()) for state in loop.state(name))


def test_n_of_n_is_dense_training():
    sparse, dense = Loop(prunus.SRSTE(unit="4:4")).run(), Loop(prunus.Static(sparsity=0.0)).run()
    assert all(same_bits(p, q) for p, q in zip(sparse.model.parameters(), dense.model.parameters(), strict=True))


# -- random masks -------------------------------------------------------------------------------------------------


def test_random_masks_have_exact_erk_counts_whatever_the_seed():
    loops = [Loop(prunus.Static(sparsity=0.7), seed=s) for s in range(3)]
    assert len({tuple(counts(loop.handle.masks)) for loop in loops}) == 1
    assert len({loop.handle.masks.digest() for loop in loops}) == 3
    expected = choose(MLP.build(), 0.7, budget="erk")
    assert counts(loops[0].handle.masks) == counts(expected)


def test_static_units():
    loop = Loop(prunus.Static(sparsity=0.5, unit="2:4", score="magnitude"))
    assert loop.handle.masks == choose(MLP.build(), unit="2:4")
    rows = Loop(prunus.Static(sparsity=0.5, unit="row", budget="global")).handle.masks
    assert all(bool((m.all(1) | ~m.any(1)).all()) for m in rows.values())


# -- refusals at the start, not in the middle of a training -------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        (prunus.GMP(score="wanda", every=1), InvalidValue, "'wanda' needs input_norm, which a training hook cannot"),
        (prunus.GMP(score="movement", every=1), InvalidValue, "'movement' needs movement, which a training hook"),
        (prunus.Static(score="synflow"), InvalidValue, r"pass its masks to sparsify"),
        (prunus.GMP(score="magnitued", every=1), LookupError, "'magnitude'"),
        (prunus.GMP(budget="globl", every=1), LookupError, "'global'"),
        (prunus.GMP(budget="rate-distortion", every=1), InvalidValue, "runs the model on data"),
        (prunus.GMP(budget="like", every=1), InvalidValue, "runs the model on data"),
        (prunus.GMP(budget="uniform-plus", sparsity=0.9, every=1), Infeasible, "uniform-plus at density"),
        (prunus.GMP(unit="rows", every=1), LookupError, "'row'"),
        (prunus.GMP(unit="2:4", sparsity=0.9, every=1), InvalidValue, r"2:4 has sparsity 0\.5, not 0\.9"),
        (prunus.Static(unit="2:4"), InvalidValue, r"give sparsity=0\.5"),
        (prunus.SRSTE(sparsity=0.75), InvalidValue, r"2:4 has sparsity 0\.5, not 0\.75"),
        (prunus.SRSTE(sparsity="50%"), InvalidValue, r"Write 0\.5"),
        (prunus.SRSTE(unit="row"), InvalidValue, "patterns such as '2:4', not units of 'row'"),
        (prunus.SRSTE(decay=-1.0), InvalidValue, r"decay -1\.0"),
        (prunus.SRSTE(decay=math.nan), InvalidValue, "decay nan"),
        (prunus.GMP(initial=0.95, every=1), InvalidValue, r"initial sparsity 0\.95 is above the final 0\.9"),
        (prunus.GMP(initial="10%", every=1), InvalidValue, r"Write 0\.1"),
        (prunus.GMP(curve="cubical", every=1), InvalidValue, "'cubical' is not known"),
        (prunus.GMP(end="2dur", every=1), InvalidValue, "more than the whole training"),
        (prunus.GMP(end=13, every=1), ScheduleTooShort, "needs 13 steps"),
        (prunus.GraNet(sparsity=0.4, every=1), InvalidValue, r"initial sparsity 0\.5 is above the final 0\.4"),
        (prunus.GraNet(ramp_budget="globl", every=1), LookupError, "'global'"),
        (prunus.RigL(growth="gradients", every=1), InvalidValue, "'gradients' is not known; choose from gradient"),
        (prunus.RigL(anneal="cos", every=1), InvalidValue, "'cos' is not known; choose from"),
        (prunus.RigL(fraction=1.5, every=1), InvalidValue, r"fraction 1\.5 is outside"),
        (prunus.RigL(every=0), InvalidValue, "interval 0"),
        (prunus.RigL(end=20, every=1), ScheduleTooShort, r"until step 20 .* has 12"),
        (prunus.RigL(), ScheduleTooShort, "exchanges weights every 100 steps"),
        (prunus.SET(every="4ep"), ScheduleTooShort, "every 12 steps"),
        (prunus.GMP(begin=0, end=3, every=5), ScheduleTooShort, "would be one cut"),
        (prunus.ISSP(search_end=0), ScheduleTooShort, "search ends at step 0"),
        (prunus.ISSP(search_end=13), ScheduleTooShort, "search ends at step 13"),
        (prunus.ISSP(factor=1.5), InvalidValue, r"factor 1\.5"),
        (prunus.RigL(sparsity=0.999, every=1), InvalidValue, r"sparsity 0\.999 keeps none of 390"),
        (prunus.GMP(sparsity=0.999, every=1), InvalidValue, r"sparsity 0\.999 keeps none of 390"),
    ],
)
def test_choices_that_cannot_be_honoured_are_refused_before_the_first_step(method, kind, message):
    model = MLP.build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(kind, match=message):
        prunus.sparsify(model, optimizer, method, steps=12, steps_per_epoch=3)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_epochs_must_be_known():
    model = MLP.build()
    with pytest.raises(InvalidValue, match="steps_per_epoch is not known"):
        prunus.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), prunus.SET(), steps=12)


def test_methods_by_name():
    model = MLP.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert prunus.sparsify(model, optimizer, "rigl", steps=1000).method == prunus.RigL()
    with pytest.raises(LookupError, match="'rigl'"):
        prunus.sparsify(model, optimizer, "rigll", steps=1000)
    for wrong in (prunus.RigL, 3, object()):
        with pytest.raises((InvalidValue, Unsupported), match="not a step method"):
            prunus.sparsify(model, optimizer, wrong, steps=1000)
    with pytest.raises(InvalidValue, match="give a method, or masks"):
        prunus.sparsify(model, optimizer, steps=10)


def test_states_of_other_runs_are_refused_and_change_nothing():
    loop = Loop(prunus.RigL(sparsity=0.6, every=2)).run(5)
    state = loop.handle.state_dict()
    for other in (
        Loop(prunus.RigL(sparsity=0.7, every=2)),
        Loop(prunus.RigL(sparsity=0.6, every=2), seed=1),
        Loop(prunus.RigL(sparsity=0.6, every=2), steps=2 + 12),
        Loop(prunus.SET(sparsity=0.6, every=2)),
    ):
        before = other.handle.masks, other.handle.step
        with pytest.raises(InvalidValue, match=r"the saved state has .* this run"):
            other.handle.load_state_dict(state)
        assert before == (other.handle.masks, other.handle.step)
    damaged = {"values": state["values"], "tensors": dict(list(state["tensors"].items())[1:])}
    fresh = Loop(prunus.RigL(sparsity=0.6, every=2))
    with pytest.raises(DamagedFile, match="masks/"):
        fresh.handle.load_state_dict(damaged)
    assert fresh.handle.step == 0


def test_a_diverged_training_is_named_at_the_next_exchange():
    loop = Loop(prunus.RigL(sparsity=0.6, every=2))
    loop.step()
    with torch.no_grad():
        loop.model[0].weight.fill_(torch.nan)
    with pytest.raises(NonFinite, match="NaN"):
        loop.step()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_weights_are_named_before_anything_is_attached(value):
    model = MLP.build()
    with torch.no_grad():
        model[2].weight[0, 0] = value
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NonFinite, match=r"weight '2\.weight' has 1 NaN or infinite of 200"):
        prunus.sparsify(model, optimizer, prunus.Static(0.5), steps=3)
    assert not optimizer._optimizer_step_post_hooks


def test_gradient_scores_do_not_depend_on_how_the_optimizer_uses_its_buffers() -> None:
    """Nesterov momentum in its foreach form adds to `.grad` in place; the score must see the gradient before that."""

    def masks(foreach: bool) -> prunus.Masks:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
        held = prunus.sparsify(model, optimizer, prunus.GMP(0.7, score="taylor", every=2, end=8), steps=10)
        x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return held.masks

    assert masks(True) == masks(False)


@pytest.mark.parametrize("method", [prunus.RigL(0.9), prunus.SET(0.9, every=2), prunus.Static(0.9)])
def test_masks_of_another_sparsity_are_refused(method):
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 3))
    masks = choose(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidValue, match=r"0\.5"):
        prunus.sparsify(model, optimizer, method, steps=200, masks=masks)
