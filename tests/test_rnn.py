"""Recurrent sparsity: gate matrices, masked layers, random wiring."""

from __future__ import annotations

import sys

import networkx as nx
import pytest
import torch
from torch import nn

from prunus.errors import InvalidValue, MaskMismatch, MissingExtra, NothingPrunable, UnknownName
from prunus.models.create import create
from prunus.models.random_graph import FAMILIES, graph_statistics, random_wiring, wiring
from prunus.models.random_graph_rnn import MODES, MaskedRecurrent, RandomGraphRNN, edge_mask, last_step, tile_gates
from prunus.parameters import prunable
from prunus.procedures.common import dense, retrain_rates, shorter
from prunus.procedures.rnn import epochs_to_regain, gate_matrices, rnn_sparsity
from prunus.train.training import Training
from small_runs import digits_run, same_weights


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def twin(mode: str, inputs: int, hidden: int) -> nn.RNNBase:
    if mode.startswith("rnn"):
        return nn.RNN(inputs, hidden, nonlinearity=mode.removeprefix("rnn_"), batch_first=True)
    return {"gru": nn.GRU, "lstm": nn.LSTM}[mode](inputs, hidden, batch_first=True)


def by_hand(mode, x, weights, biases):
    """The written recurrences, step by step: (N, T, inputs) to (N, T, hidden)."""
    (w_ih, w_hh), (b_ih, b_hh) = weights, biases
    h = c = x.new_zeros(len(x), w_hh.shape[1])
    states = []
    for t in range(x.shape[1]):
        i, g = x[:, t] @ w_ih.T + b_ih, h @ w_hh.T + b_hh
        if mode == "gru":
            (ir, iz, i_n), (hr, hz, h_n) = i.chunk(3, 1), g.chunk(3, 1)
            r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
            n = (i_n + r * h_n).tanh()
            h = n + z * (h - n)
        elif mode == "lstm":
            i_, f, cell, o = (i + g).chunk(4, 1)
            c = f.sigmoid() * c + i_.sigmoid() * cell.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            h = (i + g).tanh() if mode == "rnn_tanh" else (i + g).relu()
        states.append(h)
    return torch.stack(states, dim=1)


# -- masked layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_full_patterns_give_torchs_layers(mode):
    ours, theirs = MaskedRecurrent(mode, 5, 7), twin(mode, 5, 7)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(3, 9, 5)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=0, atol=1e-6)
    theirs.load_state_dict({n: t for n, t in ours.state_dict().items() if "pattern" not in n})
    ours.eval()
    torch.testing.assert_close(ours(x), theirs.eval()(x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_patterns_mask_weights_against_the_written_recurrence(mode):
    inputs, states = torch.rand(7, 5) < 0.4, torch.rand(7, 7) < 0.4
    layer = MaskedRecurrent(mode, 5, 7, inputs=inputs, states=states)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1)
    gates = MODES[mode][1]
    weights = (layer.weight_ih_l0 * inputs.repeat(gates, 1), layer.weight_hh_l0 * states.repeat(gates, 1))
    x = torch.randn(4, 6, 5)
    expected = by_hand(mode, x, weights, (layer.bias_ih_l0, layer.bias_hh_l0))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-6)
    layer(x).sum().backward()
    assert not bool(layer.weight_ih_l0.grad[~layer.pattern_ih].any())
    assert not bool(layer.weight_hh_l0.grad[~layer.pattern_hh].any())
    assert bool(layer.weight_ih_l0.grad[layer.pattern_ih].any())


@pytest.mark.parametrize("mode", ["rnn_tanh", "rnn_relu"])
def test_without_feedback_a_step_sees_only_its_own_input(mode):
    layer = MaskedRecurrent(mode, 5, 7, states=torch.zeros(7, 7, dtype=torch.bool))
    x = torch.randn(2, 6, 5)
    changed = x.clone()
    changed[:, :4] = torch.randn(2, 4, 5)
    assert torch.equal(layer(x)[:, 4:], layer(changed)[:, 4:])
    dense_layer = MaskedRecurrent(mode, 5, 7)
    assert not torch.equal(dense_layer(x)[:, 4:], dense_layer(changed)[:, 4:])


@pytest.mark.parametrize("gates", [1, 3, 4])
def test_all_gates_of_a_unit_share_its_pattern(gates):
    mask = torch.rand(6, 4) < 0.5
    tiled = tile_gates(mask, gates)
    for unit in range(6):
        for gate in range(gates):
            assert torch.equal(tiled[gate * 6 + unit], mask[unit])
    # The negative control: repeating each row instead gives gates of different units to one another.
    if gates > 1:
        assert not torch.equal(tiled, mask.repeat_interleave(gates, dim=0))


def test_absent_weights_are_zero_and_addressed_as_gates():
    layer = MaskedRecurrent("lstm", 3, 4, inputs=torch.eye(4, 3, dtype=torch.bool))
    assert not bool(layer.weight_ih_l0[~layer.pattern_ih].any())
    addresses = prunable(layer)
    assert {n: (a.family, a.gates) for n, a in addresses.items()} == {
        "weight_ih_l0": ("input-hidden", 4),
        "weight_hh_l0": ("hidden-hidden", 4),
    }
    with pytest.raises(UnknownName, match="gru"):
        MaskedRecurrent("gnu", 3, 4)
    with pytest.raises(MaskMismatch, match=r"\(4, 3\)"):
        MaskedRecurrent("gru", 3, 4, inputs=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(MaskMismatch, match="float32"):
        MaskedRecurrent("gru", 3, 4, inputs=torch.ones(4, 3))


# -- graphs -------------------------------------------------------------------------------------------------------


def test_layers_are_longest_paths():
    plan = wiring(6, [(0, 1), (1, 2), (0, 2), (3, 2), (2, 5), (4, 3), (5, 2)])
    # Edges run from lower to higher; (4, 3) becomes 3 -> 4 and (3, 2) becomes 2 -> 3.
    assert plan.edges == ((0, 1), (0, 2), (1, 2), (2, 3), (2, 5), (3, 4))
    assert plan.layers == ((0,), (1,), (2,), (3, 5), (4,))
    assert plan.between(2, 3) == [(0, 0), (0, 1)]
    assert plan.between(0, 2) == [(0, 0)]
    for edges in ([(0, 0)], [(0, 6)], [(-1, 2)]):
        with pytest.raises(InvalidValue, match="edges"):
            wiring(6, edges)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nodes", [10, 25])
def test_random_wiring_against_networkx(family, nodes):
    plan = random_wiring(family, nodes, seed=3)
    assert plan == random_wiring(family, nodes, seed=3)
    assert plan != random_wiring(family, nodes, seed=4)
    graph = nx.DiGraph(plan.edges)
    assert nx.is_directed_acyclic_graph(graph)
    for depth, layer in enumerate(plan.layers):
        for vertex in layer:
            ancestors = nx.ancestors(graph, vertex) | {vertex}
            assert nx.dag_longest_path_length(graph.subgraph(ancestors)) == depth
    if family == "barabasi-albert":
        m = max(1, nodes // 10)
        assert len(plan.edges) == m * (nodes - m)


def test_statistics_of_a_path():
    found = graph_statistics(wiring(4, [(0, 1), (1, 2), (2, 3)]))
    assert (found["layers"], found["nodes"], found["edges"]) == (4, 4, 3)
    assert (found["sources"], found["sinks"], found["diameter"]) == (1, 1, 3)
    assert found["density"] == pytest.approx(0.5)
    assert found["average_shortest_path"] == pytest.approx(10 / 6)
    assert found["degree_mean"] == pytest.approx(1.5)
    assert found["degree_variance"] == pytest.approx(0.25)
    assert found["degree_std"] == pytest.approx(0.5)
    assert found["closeness_mean"] == pytest.approx((2 * 3 / 6 + 2 * 3 / 4) / 4)
    # Two of the three pairs of other vertices meet through an inner vertex; the edges carry 3, 4 and 3 of 6 pairs.
    assert found["node_betweenness_mean"] == pytest.approx((0 + 2 / 3 + 2 / 3 + 0) / 4)
    assert found["edge_betweenness_mean"] == pytest.approx((3 + 4 + 3) / 6 / 3)
    assert found["eccentricity_mean"] == pytest.approx(2.5)
    with pytest.raises(InvalidValue, match="connected"):
        graph_statistics(wiring(4, [(0, 1), (2, 3)]))


def test_graphs_need_networkx_and_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(MissingExtra, match="pip install networkx"):
        random_wiring("barabasi-albert", 10)
    assert RandomGraphRNN(2, (4, 3), nodes=3, edges=[(0, 1), (1, 2)]).wiring.nodes == 3


def test_random_wiring_refuses():
    with pytest.raises(UnknownName, match="watts-strogatz"):
        random_wiring("watts", 10)
    with pytest.raises(InvalidValue, match="3 vertices"):
        random_wiring("barabasi-albert", 2)


# -- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_connections_between_layers_are_the_edges(cell, family):
    model = RandomGraphRNN(3, (5, 4), cell=cell, family=family, nodes=14)
    gates = MODES[cell][1]
    joined = [*list(model.layers)[1:], *model.skips.values()]
    assert sum(int(layer.pattern_ih.sum()) for layer in joined) == gates * len(model.wiring.edges)
    assert bool(model.layers[0].pattern_ih.all())
    assert all(bool(layer.pattern_hh.all()) for layer in joined)
    assert model(torch.randn(2, 5, 4)).shape == (2, 3)
    assert model.linear.in_features == len(model.wiring.layers[-1])


def test_forward_by_hand_with_a_skip():
    model = RandomGraphRNN(2, (4, 3), cell="rnn_tanh", nodes=4, edges=[(0, 2), (1, 2), (2, 3), (0, 3)])
    assert model.wiring.layers == ((0, 1), (2,), (3,))
    assert list(model.skips) == ["0-2"]
    assert torch.equal(edge_mask(model.wiring, 0, 2), torch.tensor([[True, False]]))
    x = torch.randn(5, 4, 3)
    zero = model.layers[0](model.embedding(x))
    last = model.layers[2](model.layers[1](zero)) + model.skips["0-2"](zero)
    torch.testing.assert_close(model(x), model.linear(last[:, -1]))


def test_the_graph_has_its_own_seed():
    first, second = (create("random-graph-rnn", input_shape=(1, 4, 4), nodes=12, seed=s) for s in (0, 1))
    assert first.wiring == second.wiring
    assert not torch.equal(first.embedding.weight, second.embedding.weight)
    assert create("random-graph-rnn", input_shape=(1, 4, 4), nodes=12, graph_seed=1).wiring != first.wiring


def test_padding_is_not_read_when_it_is_known():
    x = torch.zeros(3, 6, 2)
    x[0, :4], x[1, :6], x[2, 0, 1] = 1.0, 1.0, 1.0
    assert last_step(x).tolist() == [3, 5, 0]
    assert last_step(torch.zeros(1, 6, 2)).tolist() == [0]
    model = RandomGraphRNN(2, (6, 2), nodes=4, edges=[(0, 1), (1, 2), (2, 3)], padded=True)
    longer = torch.cat([x, torch.zeros(3, 5, 2)], dim=1)
    torch.testing.assert_close(model(longer), model(x))
    torch.testing.assert_close(model(x[:1]), model(x[:1, :4]))
    model.padded = False
    assert not torch.allclose(model(longer), model(x))


# -- pruning gate matrices ----------------------------------------------------------------------------------------


def recurrent_run(cell: str = "gru", epochs: int = 2, **options):
    return digits_run(
        make=lambda seed: create(cell, input_shape=(1, 8, 8), hidden=12, layers=2, seed=seed),
        training=Training(epochs=epochs, optimizer="adam", lr=0.01, weight_decay=0.0),
        **options,
    )


def test_targets_are_gate_matrices_of_all_layers():
    run = recurrent_run("lstm")
    assert gate_matrices(run, "input-hidden") == ("recurrent.weight_ih_l0", "recurrent.weight_ih_l1")
    assert gate_matrices(run, "hidden-hidden") == ("recurrent.weight_hh_l0", "recurrent.weight_hh_l1")
    assert len(gate_matrices(run, "both")) == 4
    with pytest.raises(UnknownName, match="hidden-hidden"):
        gate_matrices(run, "hidden")
    with pytest.raises(NothingPrunable, match="recurrent"):
        gate_matrices(digits_run(), "both")


@pytest.mark.parametrize("target", ["both", "input-hidden", "hidden-hidden"])
def test_one_threshold_over_the_targeted_matrices(target):
    run = recurrent_run()
    found = rnn_sparsity(run.within(target), sparsity=0.5, target=target, epochs=0)
    names = gate_matrices(run, target)
    masks = found.state.masks
    assert tuple(masks) == names
    assert masks.kept == masks.total - round(masks.total / 2)
    trained = dense(run)
    kept = torch.cat([trained.weights[n][masks[n]].abs() for n in names])
    gone = torch.cat([trained.weights[n][~masks[n]].abs() for n in names])
    assert float(kept.min()) >= float(gone.max())
    for name, value in trained.weights.items():
        expected = value * masks[name] if name in masks else value
        assert torch.equal(found.state.weights[name], expected), name
    assert found.details["targeted_weights"] == masks.total


def test_epochs_measured_one_by_one_are_one_training():
    run = recurrent_run(epochs=3)
    found = rnn_sparsity(run.within("m"), sparsity=0.8, epochs=3)
    trained, second = dense(run), shorter(run.training, 3)
    masks = found.state.masks
    rates = retrain_rates(run, "LLR", run.training, second, trained, masks)
    model = trained.model(run)
    masks.apply(model)
    whole = run.train("whole", start=type(trained).of(model.state_dict()), masks=masks, training=second, rates=rates)
    assert same_weights(found.state, whole)
    assert len(found.details["retraining_accuracy"]) == 3
    assert found.details["retraining_accuracy"][-1] == run.evaluate(whole, "validation")["accuracy"]
    assert found.steps == 6 * 15


def test_cutting_all_inputs_blinds_the_network():
    run = recurrent_run(epochs=8)
    blind = rnn_sparsity(run.within("i"), sparsity=1.0, target="input-hidden", epochs=1)
    assert blind.state.masks.kept == 0
    assert blind.details["retraining_accuracy"][-1] < 0.2
    assert blind.details["epochs_to_regain"] is None
    x = run.splits.test.normalise(run.splits.test.x[:5])
    answers = blind.state.model(run).eval()(x)
    torch.testing.assert_close(answers, answers[:1].expand_as(answers))
    half = rnn_sparsity(run.within("h"), sparsity=0.5, target="hidden-hidden", epochs=3)
    assert half.details["retraining_accuracy"][-1] > half.details["dense_accuracy"] - 0.1


def test_epochs_to_regain_by_hand():
    assert epochs_to_regain([0.5, 0.8, 0.95], 0.95) == 2
    assert epochs_to_regain([0.95, 0.9], 0.95) == 0
    assert epochs_to_regain([0.5, 0.94], 0.95) is None
    assert epochs_to_regain([0.5, 0.94], 0.95, tolerance=0.01) == 1


def test_random_graph_networks_can_be_pruned():
    run = digits_run(
        make=lambda seed: create("random-graph-rnn", input_shape=(1, 8, 8), nodes=8, cell="rnn_tanh", seed=seed),
        training=Training(epochs=1, optimizer="adam", lr=0.01, clip_norm=5.0),
        limit=100,
    )
    found = rnn_sparsity(run.within("m"), sparsity=0.5, epochs=1)
    masks = found.state.masks
    assert masks.kept == masks.total - round(masks.total / 2)
    assert all(n.startswith(("layers.", "skips.")) for n in masks)
