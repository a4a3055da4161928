"""Rounds of pruning (iterative, activating) and what every procedure of the table owes."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from prunus.errors import InvalidValue, RecipeChanged, UnknownName
from prunus.keep import choose
from prunus.masks import Masks
from prunus.measure.activity import dead_neuron_rate
from prunus.measure.cost import layer_costs
from prunus.methods.registry import METHODS
from prunus.models.create import create
from prunus.oneshot import prune
from prunus.procedures.activating import activate, ap
from prunus.procedures.at_init import at_init, snip
from prunus.procedures.common import calibration_inputs, cut, scoring_data, spread_over, whole_epochs
from prunus.procedures.imp import even, imp, rounds_for, shuffle_all, shuffle_layers
from prunus.procedures.oneshot import oneshot
from prunus.run.plan import Planner
from prunus.run.stages import Run
from prunus.run.store import Store
from prunus.train.training import Training
from small_runs import Watched, digits_run, masked, normed_run, same_weights

PROCEDURES = [m for m in METHODS if m.kind == "procedure"]
# Those that end in a network which is really smaller, and so fast everywhere, have a shape instead of masks.
NARROWING = [m for m in PROCEDURES if m.speedup == "universal"]
MASKING = [m for m in PROCEDURES if m not in NARROWING]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- rounds -------------------------------------------------------------------------------------------------------


def test_rounds_take_equal_shares_of_what_is_left_and_end_on_the_target():
    levels = [0.0, *rounds_for(0.98, 0.3)]
    shares = [1 - (1 - b) / (1 - a) for a, b in itertools.pairwise(levels)]
    assert levels[-1] == pytest.approx(0.98)
    assert len(levels) == 12
    assert max(shares) <= 0.3 + 1e-12
    assert max(shares) - min(shares) < 1e-12
    assert rounds_for(1 - 0.8**5, 0.2) == pytest.approx([0.2, 0.36, 0.488, 0.5904, 0.67232])
    assert rounds_for(0, 0.2) == []


def test_hand_case_and_no_return_of_what_was_pruned():
    line = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[5.0, -1.0, 3.0, -2.0, 4.0, 1000.0]]))
    masks = Masks({"weight": torch.tensor([[True, True, True, True, True, False]])})
    left = choose(line, keep=3, masks=masks)
    assert left["weight"].tolist() == [[True, False, True, False, True, False]]


def test_without_rounds_it_is_plain_training():
    run = digits_run()
    plain = run.train("plain")
    assert same_weights(imp(run.within("imp"), sparsity=0.0).state, plain)
    assert same_weights(ap(run.within("ap"), sparsity=0.0).state, plain)


@pytest.mark.parametrize("rewind_to", [0, "1ep"])
def test_weights_are_rewound_bit_for_bit(rewind_to):
    run = digits_run(kind=Watched)
    found = imp(run.within("imp"), sparsity=0.7, rate=0.4, rewind_to=rewind_to)
    early = run.root.initial if rewind_to == 0 else run.train("early-30-15", training=run.training, until=15)
    for number in range(1, 4):
        start, choices = run.seen[f"round-{number}"]
        assert choices["start_step"] == (0 if rewind_to == 0 else 15)
        assert choices.get("rates") is None
        for name, value in early.weights.items():
            held = choices["masks"].get(name)
            expected = value if held is None else torch.where(held, value, torch.zeros_like(value))
            assert torch.equal(start.weights[name], expected), name
    assert found.state.masks is not None
    assert found.steps == (30 * 4 if rewind_to == 0 else 30 + 15 * 3)


@pytest.mark.parametrize("rewind", ["learning-rate", "finetune"])
def test_trained_weights_stay_when_only_the_rate_is_reset(rewind):
    run = digits_run(kind=Watched)
    imp(run.within("imp"), sparsity=0.6, rate=0.4, rewind=rewind)
    before = run.train("dense-30", training=run.training, start=run.initial, start_step=0, continue_optimizer=False)
    start, choices = run.seen["round-1"]
    for name, value in masked(before, choices["masks"]).items():
        assert torch.equal(start.weights[name], value)
    schedule = run.training.learning_rates(15)
    assert choices.get("rates") == (None if rewind == "learning-rate" else [schedule[-1]] * 30)


def test_counts_and_nesting_of_rounds():
    run = digits_run(kind=Watched, epochs=1)
    found = imp(run.within("imp"), sparsity=0.9, rate=0.5)
    total = 64 * 32 + 32 * 16 + 16 * 10
    kept = [row["kept"] for row in found.details["rounds"]]
    assert kept == [total - round(s * total) for s in rounds_for(0.9, 0.5)]
    masks = [run.seen[f"round-{n}"][1]["masks"] for n in range(1, len(kept) + 1)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(masks))
    assert found.state.masks == masks[-1]
    for name, mask in masks[-1].items():
        assert not bool(found.state.weights[name][~mask].any())


def test_controls_keep_what_they_say():
    masks = Masks({"a": torch.rand(20, 10) < 0.1, "b": torch.rand(10, 5) < 0.6})
    layers, everywhere, level = shuffle_layers(masks, 0), shuffle_all(masks, 0), even(masks, 0)
    assert [layers.count(n) for n in masks] == [masks.count(n) for n in masks]
    assert layers != masks
    assert everywhere.kept == masks.kept
    assert everywhere.count("a") != masks.count("a")
    assert abs(level.kept - masks.kept) <= 1
    assert abs(level.count("a") / 200 - masks.density) < 0.01
    assert shuffle_layers(masks, 0) == layers
    assert shuffle_layers(masks, 1) != layers


def test_branches_differ_in_one_factor():
    run = digits_run(kind=Watched, epochs=1)
    ticket = imp(run.within("ticket"), sparsity=0.5, rate=0.5)
    assert ticket.state.masks is not None
    for branch in ("reinit", "shuffle-layers", "shuffle-all", "even"):
        imp(run.within(branch), sparsity=0.5, rate=0.5, branch=branch)
        start, choices = run.seen[f"branch-{branch}"]
        assert (choices["masks"] == ticket.state.masks) == (branch == "reinit")
        kept = choices["masks"]["layers.0.weight"]
        same = torch.equal(start.weights["layers.0.weight"][kept], run.initial.weights["layers.0.weight"][kept])
        assert same == (branch != "reinit")


def test_iterative_lamp():
    """The iterative protocol of LAMP is rounds with its budget and fine-tuning: the first mask is that of `prune`."""
    run = digits_run(kind=Watched, hidden=(64, 8))
    found = imp(run.within("lamp"), sparsity=0.95, rate=0.6, budget="lamp", rewind="finetune")
    masks = found.state.masks
    assert masks is not None
    assert masks.kept == masks.total - round(0.95 * masks.total)
    assert min(row.kept for row in masks.table()) >= 1
    dense = run.train("dense-30", training=run.training, start=run.initial, start_step=0, continue_optimizer=False)
    first = prune(dense.model(run), rounds_for(0.95, 0.6)[0], budget="lamp", measure=False).masks
    assert run.seen["round-1"][1]["masks"] == first


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sparsity": 1.0}, InvalidValue),
        ({"rate": 0.0}, InvalidValue),
        ({"rewind": "weigth"}, UnknownName),
        ({"branch": "reinitialise"}, UnknownName),
        ({"rewind_to": "half"}, InvalidValue),
    ],
)
def test_imp_refuses(options, error):
    with pytest.raises(error):
        imp(digits_run(limit=64, epochs=1), **options)


# -- activating ---------------------------------------------------------------------------------------------------


WEIGHTS = {"w": torch.tensor([-1.0, -2.0, 3.0, -0.5, 7.0])}
PREVIOUS = {"w": torch.tensor([-1.25, -1.0, 3.0, -0.4, 7.0])}
ALIVE = Masks({"w": torch.tensor([True, True, True, True, False])})


@pytest.mark.parametrize(
    ("count", "gone"), [(0, []), (1, [3]), (2, [3, 0]), (3, [3, 0, 1]), (4, [3, 0, 1]), (99, [3, 0, 1])]
)
def test_activation_by_hand(count, gone):
    left = activate(WEIGHTS, PREVIOUS, ALIVE, count)["w"]
    assert [i for i in range(4) if not bool(left[i])] == sorted(gone)
    assert not bool(left[4])


def test_activation_takes_only_alive_negatives_and_spares_what_is_excluded():
    g = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=g) for n, s in {"a": (7, 9), "b": (15, 7)}.items()}
    previous = {n: w + 0.1 * torch.randn(w.shape, generator=g) for n, w in weights.items()}
    masks = Masks({n: torch.rand(w.shape, generator=g) < 0.6 for n, w in weights.items()})
    left = activate(weights, previous, masks, 10)
    assert left <= masks
    assert masks.kept - left.kept == 10
    for name in masks:
        assert bool((weights[name][masks[name] & ~left[name]] < 0).all())
    spared = activate(weights, previous, masks, 10, exclude=("a",))
    assert torch.equal(spared["a"], masks["a"])
    assert masks.kept - spared.kept == 10
    # Brute force: the ten smallest movements of the candidates, over both tensors.
    moved = sorted(
        (float((weights[n] - previous[n]).abs().reshape(-1)[i]), n, i)
        for n in masks
        for i in range(masks[n].numel())
        if bool(masks[n].reshape(-1)[i]) and float(weights[n].reshape(-1)[i]) < 0
    )
    assert {(n, i) for _, n, i in moved[:10]} == {
        (n, int(i)) for n in masks for i in (masks[n] & ~left[n]).reshape(-1).nonzero().reshape(-1)
    }
    with pytest.raises(InvalidValue, match="negative"):
        activate(weights, previous, masks, -1)


def test_activation_never_turns_a_unit_of_one_layer_off():
    g = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU())
    x = torch.rand(64, 12, generator=g)
    before = net(x) > 0
    rate = dead_neuron_rate(net, [x])
    masks = Masks({"0.weight": torch.ones(20, 12, dtype=torch.bool)})
    weights = {"0.weight": net[0].weight.detach()}
    activate(weights, {"0.weight": torch.zeros(20, 12)}, masks, 40).apply(net)
    assert bool((net(x) > 0)[before].all())
    assert dead_neuron_rate(net, [x]) < rate


def test_without_a_share_activating_is_imp():
    run = digits_run()
    base = imp(run.within("imp"), sparsity=0.8, rate=0.5)
    same = ap(run.within("ap"), sparsity=0.8, rate=0.5, share=0.0)
    assert same.state.masks == base.state.masks
    assert same_weights(same.state, base.state)
    assert same.steps == base.steps


def test_activating_meets_the_target_and_wakes_units():
    run = digits_run(epochs=4, hidden=(64, 32), kind=Watched)
    base = ap(run.within("imp"), sparsity=0.8, rate=0.5, share=0.0)
    awake = ap(run.within("ap"), sparsity=0.8, rate=0.5, share=0.15)
    most = ap(run.within("most"), sparsity=0.8, rate=0.5, share=0.5)
    rates = [o.details["rounds"][-1]["dead_rate"] for o in (base, awake)]
    assert rates[1] < rates[0] - 0.02
    for outcome in (base, awake, most):
        masks = outcome.state.masks
        assert masks is not None
        assert masks.kept == masks.total - round(0.8 * masks.total)
    # A round that spends everything on activation removes negative weights as long as there are any outside the
    # output layer, and the base pruner takes the rest.
    _, choices = run.seen["round-1"]
    dense = run.train("dense-60", training=run.training, start=run.initial, start_step=0, continue_optimizer=False)
    gone = {n: ~m for n, m in choices["masks"].items()}
    hidden = [n for n in gone if n != "layers.4.weight"]
    assert all(bool((dense.weights[n][gone[n]] < 0).all()) for n in hidden)
    assert not bool(gone["layers.4.weight"].any())
    json.dumps(awake.details)


def test_activating_refuses():
    run = digits_run(limit=64, epochs=1)
    with pytest.raises(InvalidValue, match="share"):
        ap(run, rate=0.1, share=0.2)
    with pytest.raises(UnknownName):
        ap(run, rewind="none")


# -- data for scores and budgets ----------------------------------------------------------------------------------


def test_budgets_bring_the_data_they_need():
    run = digits_run(epochs=1)
    assert scoring_data(run, "magnitude", "global") is None
    assert len(scoring_data(run, "random", {"name": "like", "score": "snip"})[0]) == 2
    (inputs,) = scoring_data(run, "magnitude", "rate-distortion")
    assert inputs.shape == (256, 1, 8, 8)
    like = at_init(run.within("like"), score="random", budget={"name": "like", "score": "snip"})
    own = snip(run.within("snip"))
    assert [r.kept for r in like.state.masks.table()] == [r.kept for r in own.state.masks.table()]
    assert like.state.masks != own.state.masks
    rd = oneshot(run.within("rd"), budget={"name": "rate-distortion", "points": 10}, epochs=1)
    assert rd.state.masks.kept == rd.state.masks.total - round(0.9 * rd.state.masks.total)


def test_calibration_inputs_and_even_spreading():
    run = digits_run()
    x = calibration_inputs(run, 50)
    assert torch.equal(x, calibration_inputs(run, 50))
    assert len(calibration_inputs(run, 10_000)) == len(run.splits.train)
    rows = {tuple(r.reshape(-1).tolist()) for r in run.splits.train.normalise(run.splits.train.x)}
    assert all(tuple(r.reshape(-1).tolist()) in rows for r in x)
    part = spread_over(run.splits.train, 90)
    assert torch.equal(part.ids, run.splits.train.ids[::10])
    assert len(spread_over(run.splits.train, 10**6)) == len(run.splits.train)


def test_patterns_of_the_run_hold_in_cuts():
    run = digits_run(exclude=("layers.4.*",))
    masks = cut(run, "prune", run.initial, 0.5)
    assert set(masks) == {"layers.0.weight", "layers.2.weight"}
    found = ap(run.within("ap"), sparsity=0.5, rate=0.6, share=0.1, epochs=1)
    assert set(found.state.masks) == set(masks)


def test_a_length_in_steps_becomes_epochs():
    assert whole_epochs(digits_run(training=Training(steps=40))) == 3
    assert whole_epochs(digits_run(training=Training(steps=1))) == 1
    assert whole_epochs(digits_run(training=Training())) == 20


# -- every procedure of the table ---------------------------------------------------------------------------------


def small(info, store=None, kind=Run, **options) -> Run:
    if info.name == "rnn-sparsity":
        return digits_run(
            store=store,
            kind=kind,
            limit=100,
            make=lambda seed: create("gru", input_shape=(1, 8, 8), hidden=8, seed=seed),
            training=Training(epochs=2, batch_size=16, optimizer="adam", lr=0.01),
            **options,
        )
    if info.name == "structure-lth":  # the first and the last layer stay dense, so there must be a middle
        options["make"] = lambda seed: create("mlp", input_shape=(1, 8, 8), hidden=(16, 12), seed=seed)
        return digits_run(store=store, kind=kind, limit=100, **options)
    if info.name == "layer-lottery":  # plain networks have no block that can go
        options["make"] = lambda seed: create("resnet20", num_classes=4, input_shape=(1, 6, 6), width=4, seed=seed)
    return normed_run(store=store, kind=kind, **options)


def test_the_table_lists_them_all():
    assert {m.name for m in PROCEDURES} == {
        *("one-shot", "lth-imp", "snip", "grasp", "synflow", "pai-baselines", "sparse-model-soups"),
        *("rethinking-pruning", "three-regime", "activating-while-pruning", "rnn-sparsity", "rd-layer-adaptive"),
        *("precrop", "layer-lottery"),
        *("structure-lth", "transformable-architecture-search"),
        *("chase", "mask-sparsity", "group-norm"),
    }
    for alias, name in {"imp": "lth-imp", "sms": "sparse-model-soups", "ap": "activating-while-pruning"}.items():
        assert METHODS.entry(alias).name == name
    for info in PROCEDURES:
        first, *rest = inspect.signature(info.load()).parameters.values()
        assert first.name == "run"
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest), info.name
        assert "sparsity" in [p.name for p in rest], info.name


@pytest.mark.parametrize("info", NARROWING, ids=lambda m: m.name)
def test_procedures_end_in_a_small_network(info):
    method, run = info.load(), small(info)
    found = method(run.within(info.name), sparsity=0.7)
    assert found.state.shape is not None
    assert json.loads(json.dumps(found.state.shape.describe())) == found.state.shape.describe()
    model = found.state.model(run)
    x = run.splits.train.normalise(run.splits.train.x[:4])
    assert model(x).shape == run.model(x).shape
    costs = [sum(c.macs for c in layer_costs(m, x).values()) for m in (run.model, model)]
    assert 0 < costs[1] <= 0.3 * costs[0]
    assert all(bool(torch.isfinite(w).all()) for w in found.state.weights.values())
    assert json.loads(json.dumps(found.details)) == json.loads(json.dumps(found.details, allow_nan=False))
    again = method(small(info).within(info.name), sparsity=0.7)
    assert again.state.digest == found.state.digest
    assert again.details == found.details
    other = method(small(info, seed=1).within(info.name), sparsity=0.7)
    assert other.state.digest != found.state.digest


@pytest.mark.parametrize("info", MASKING, ids=lambda m: m.name)
def test_procedures_end_in_a_sparse_network(info):
    method = info.load()
    run = small(info)
    found = method(run.within(info.name), sparsity=0.7)
    masks = found.state.masks
    assert masks is not None
    if info.name == "structure-lth":  # whole channels are counted up, and both densities told
        assert found.details["ticket_sparsity"] == pytest.approx(0.7, abs=1 / masks.total)
        assert found.details["sparsity"] == masks.sparsity
    elif info.name == "chase":  # channels go, the number of weights belongs to the dense network
        dense = found.details["dense_weights"]
        assert masks.total < dense
        assert masks.kept == dense - round(0.7 * dense)
    else:
        assert masks.kept == masks.total - round(0.7 * masks.total)
    for name, mask in masks.items():
        assert not bool(found.state.weights[name][~mask].any()), name
        assert bool(torch.isfinite(found.state.weights[name]).all())
    assert json.loads(json.dumps(found.details)) == json.loads(json.dumps(found.details, allow_nan=False))
    assert found.steps > 0
    again = method(small(info).within(info.name), sparsity=0.7)
    assert again.state.digest == found.state.digest
    assert again.details == found.details
    other = method(small(info, seed=1).within(info.name), sparsity=0.7)
    assert other.state.digest != found.state.digest


# The length of scratch-B in rethinking-pruning follows from the masks, which a plan does not know.
@pytest.mark.parametrize("info", [m for m in PROCEDURES if m.name != "rethinking-pruning"], ids=lambda m: m.name)
def test_planning_names_the_stages_that_are_trained(info):
    trained = small(info, kind=Watched)
    steps = info.load()(trained.within("m"), sparsity=0.7).steps
    planned: dict[str, int] = {}
    planner = Planner.of(small(info), planned)
    outcome = info.load()(planner.within("m"), sparsity=0.7)
    assert {n.removeprefix("m/") for n in planned} == set(trained.seen)
    assert sum(planned.values()) == steps == outcome.steps


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("timing.jsonl", "lock")
    }


class Interrupted(Exception):
    """Stands for anything that ends the process between two steps."""


CUT = ("sparse-model-soups", "activating-while-pruning", "three-regime", "rnn-sparsity", "tas")


@pytest.mark.parametrize("name", CUT)
def test_a_cut_procedure_goes_on(name, tmp_path):
    info = METHODS.entry(name)

    def work(folder, limit=None):
        steps = iter(range(limit or 0))

        def crash():
            if limit is not None and next(steps, None) is None:
                raise Interrupted
            return False

        with Store.create(folder, {}, {"versions": "same"}) as store:
            run = small(info, store=store, should_stop=crash, checkpoint_seconds=None, checkpoint_steps=2)
            return info.load()(run.within(name), sparsity=0.7)

    whole = work(tmp_path / "whole")
    # The search has four steps: the first cut falls into it.
    for limit in (2, 8) if name == "tas" else (5, 13):
        with pytest.raises(Interrupted):
            work(tmp_path / "cut", limit)
    resumed = work(tmp_path / "cut")
    assert resumed.state.digest == whole.state.digest
    assert resumed.details == whole.details
    ours, theirs = tree(tmp_path / "cut"), tree(tmp_path / "whole")
    assert set(ours) == set(theirs)
    if name != "rnn-sparsity":
        assert ours == theirs
    assert info.load()(small(info).within(name), sparsity=0.7).state.digest == whole.state.digest
    with Store.create(tmp_path / "whole", {}, {"versions": "same"}) as store, pytest.raises(RecipeChanged):
        info.load()(small(info, store=store).within(name), sparsity=0.8)
