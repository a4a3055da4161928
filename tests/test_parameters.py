"""Which tensors may be pruned, why the others not, and how each is laid out."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import suites
from awkward import AWKWARD, Oddities, case, mlp
from prunus.errors import InvalidValue, NonFinite, NothingPrunable
from prunus.parameters import Address, check_finite, copied, parameters_of, prunable, unwrap

pytestmark = suites.projected_lstm_notice()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"0.weight": "linear", "2.weight": "linear", "4.weight": "linear"}),
        ("grouped", {"body.0.weight": "conv", "head.weight": "linear"}),
        ("grouped transposed", {"body.0.weight": "conv-transpose", "head.weight": "linear"}),
        ("bilinear", {"pair.weight": "bilinear", "head.weight": "linear"}),
        ("spectral norm", {"0.parametrizations.weight.original": "linear", "2.weight": "linear"}),
        ("weight norm", {"2.weight": "linear"}),
        ("torch.nn.utils.prune", {"2.weight": "linear", "4.weight": "linear"}),
        ("tied embedding", {"middle.weight": "linear", "head.weight": "linear"}),
        ("tied linear", {"first.weight": "linear", "head.weight": "linear"}),
        ("frozen", {"0.weight": "linear", "2.weight": "linear", "4.weight": "linear"}),
        ("compiled", {"0.weight": "linear", "2.weight": "linear", "4.weight": "linear"}),
        (
            "attention with other keys",
            {
                "keys.weight": "linear",
                "attention.q_proj_weight": "attention",
                "attention.k_proj_weight": "attention",
                "attention.v_proj_weight": "attention",
                "attention.out_proj.weight": "linear",
                "head.weight": "linear",
            },
        ),
    ],
)
def test_what_is_prunable(name, expected):
    assert {n: a.kind for n, a in prunable(case(name).build()).items()} == expected


@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3), ("rnn", 1)])
def test_recurrent_layers_know_gates_and_families(name, gates):
    found = prunable(case(name).build())
    assert {a.family for a in found.values()} == {"input-hidden", "hidden-hidden", "head"}
    assert all(a.gates == (gates if a.kind == "recurrent" else 1) for a in found.values())
    assert all(a.outputs == gates * 6 for a in found.values() if a.kind == "recurrent")
    projected = prunable(case("lstm with projection").build())
    assert projected["layer.weight_hr_l0"].family == "projection"


@pytest.mark.parametrize("awkward", AWKWARD, ids=str)
def test_every_parameter_is_either_prunable_or_left_out_with_a_reason(awkward):
    model = awkward.build()
    found = prunable(model)
    names = [n for n, _ in unwrap(model).named_parameters()]
    assert sorted([*found, *found.skipped]) == sorted(names)
    assert not set(found) & set(found.skipped)
    assert all(len(reason) > 10 for reason in found.skipped.values())
    assert found.total == sum(p.numel() for p in parameters_of(model, found).values())


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("mlp", "0.bias", "vector"),
        ("tied embedding", "embedding.weight", "tied to an embedding"),
        ("weight norm", "0.parametrizations.weight.original1", "_WeightNorm"),
        ("torch.nn.utils.prune", "0.weight_orig", r"prune\.remove"),
        ("oddities", "scale", "scalar"),
        ("oddities", "empty", "empty"),
        ("oddities", "whole", "int64"),
        ("oddities", "phase", "complex64"),
    ],
)
def test_reasons(name, tensor, reason):
    found = prunable(case(name).build())
    assert tensor not in found
    assert re.search(reason, found.skipped[tensor])


def test_include_and_exclude():
    model = case("tied embedding").build()
    found = prunable(model, include="embedding.*")
    assert found["embedding.weight"].aliases == ("output.weight",)
    assert list(prunable(model, include="output.weight")) == list(found)  # through either name
    assert "0.bias" in prunable(mlp(), include="*.bias")
    assert list(prunable(mlp(), exclude=("0.*", "2.*"))) == ["4.weight"]
    assert list(prunable(mlp(), include="0.bias", exclude="0.*")) == ["2.weight", "4.weight"]
    assert prunable(mlp(), exclude="0.*").skipped["0.weight"] == "excluded by name"
    assert not prunable(mlp(), exclude="*", empty_ok=True)
    tied = case("tied linear").build()
    assert list(prunable(tied, exclude="second.*")) == ["head.weight"]
    odd = prunable(Oddities(), include="*")
    assert {"scale", "empty", "whole", "phase"} <= set(odd.skipped)
    assert odd["layer.bias"].kind == "other"


def test_unknown_modules_are_pruned_only_by_name():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 4))

    with pytest.raises(NothingPrunable, match=r"nothing prunable in Own.*table: not the weight of a known layer"):
        prunable(Own())
    address = prunable(Own(), include="table")["table"]
    assert (address.kind, address.family, address.outputs, address.inputs) == ("other", "table", 3, 4)


def test_patterns_that_match_nothing_are_refused():
    for option in ("include", "exclude"):
        with pytest.raises(InvalidValue, match=r"pattern '0\.wieght' matches no parameter name.*'0\.weight'"):
            prunable(mlp(), **{option: "0.wieght"})
    with pytest.raises(InvalidValue, match="lazy"):
        prunable(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(NothingPrunable, match="no parameters"):
        prunable(nn.ReLU())


@pytest.mark.parametrize("order", ["embedding first", "linear first"])
def test_a_tie_to_an_embedding_is_seen_from_either_side(order):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            layers = {"embedding": nn.Embedding(7, 8), "output": nn.Linear(8, 7)}
            for name in layers if order == "embedding first" else reversed(layers):
                self.add_module(name, layers[name])
            self.output.weight = self.embedding.weight

    found = prunable(Tied(), empty_ok=True)
    assert not found
    assert any("tied to an embedding" in reason for reason in found.skipped.values())
    included = prunable(Tied(), include="*.weight")
    assert next(iter(included.values())).kind == "linear"


def test_an_embedding_reads_tokens_as_inputs():
    model = nn.Sequential(nn.Embedding(7, 4))
    assert "embedding table" in prunable(model, empty_ok=True).skipped["0.weight"]
    address = prunable(model, include="0.weight")["0.weight"]
    assert (address.output_axis, address.outputs, address.inputs) == (1, 4, 7)


def test_parametrizations_that_mix_entries_are_left_out():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2))
    found = prunable(model)
    assert list(found) == ["1.weight"]
    assert "_Orthogonal" in found.skipped["0.parametrizations.weight.original"]


def test_unwrap_looks_through_wrappers():
    model = mlp()
    assert unwrap(torch.compile(model, backend="eager")) is model
    assert unwrap(nn.DataParallel(torch.compile(model, backend="eager"))) is model
    assert unwrap(model) is model


def test_parameters_of_keeps_the_order_and_names_what_is_missing():
    model = mlp()
    assert list(parameters_of(model, ["4.weight", "0.weight"])) == ["4.weight", "0.weight"]
    with pytest.raises(InvalidValue, match=r"'0\.wait' is not a parameter of the model.*'0\.weight'"):
        parameters_of(model, ["0.wait"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_check_finite_names_tensor_and_count(value):
    bad = torch.zeros(3, 3)
    bad[1, 1] = value
    with pytest.raises(NonFinite, match="weight 'b' has 1 NaN or infinite of 9"):
        check_finite({"a": torch.ones(2), "b": bad}, "weight")
    check_finite({"huge": torch.full((8,), 3e38), "half": torch.full((9,), 6e4).half()}, "weight")


@pytest.mark.parametrize("name", ["torch.nn.utils.prune", "spectral norm", "compiled", "tied linear", "mlp"])
def test_copies_compute_the_same_and_share_nothing(name):
    awkward = case(name)
    model = awkward.build().eval()
    x, _ = awkward.batch()
    other = copied(model)
    assert torch.equal(model(x), other(x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(model(x), other(x))


def test_plain_deepcopy_fails_where_copied_does_not():
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(case("torch.nn.utils.prune").build())


# -- layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", suites.ADDRESSES, ids=lambda a: a.name)
def test_rows_hold_what_one_output_reads_with_inputs_running_fastest(address):
    tensor = torch.arange(address.size, dtype=torch.float32).reshape(address.shape)
    rows = address.rows(tensor)
    assert rows.shape == (address.outputs, address.size // address.outputs)
    assert torch.equal(address.unrows(rows), tensor)
    assert address.unrows(rows).is_contiguous()
    lines = suites.input_lines(address)
    expected = [[float(tensor[i]) for i in line] for line in lines]
    got = rows.reshape(-1, address.inputs)
    assert sorted(map(tuple, expected)) == sorted(map(tuple, got.tolist()))  # same groups, same order inside


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_transposed_convolution_are_its_output_channels(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    address = prunable(nn.Sequential(layer))["0.weight"]
    assert address.outputs == 6
    x = torch.randn(1, 4, 5, 5)
    for output in range(6):
        mask = torch.zeros(6, address.size // 6)
        mask[output] = 1.0
        alone = F.conv_transpose2d(x, layer.weight * address.unrows(mask), groups=groups)
        assert [bool(channel.any()) for channel in alone[0]] == [i == output for i in range(6)]
        torch.testing.assert_close(alone[0, output], layer(x)[0, output])


@pytest.mark.parametrize("address", [a for a in suites.ADDRESSES if len(a.shape) > 1], ids=lambda a: a.name)
def test_numbers_per_input_are_spread_to_the_weights_that_read_them(address):
    if address.kind == "bilinear":
        return  # two inputs: no single feature axis
    per_input = torch.arange(address.groups * address.inputs, dtype=torch.float32)
    spread = address.broadcast_inputs(per_input)
    assert spread.shape == address.shape
    for index in np.ndindex(*address.shape):
        if address.output_axis == 1:
            wanted = index[0]
        else:
            group = index[0] // (address.shape[0] // address.groups)
            wanted = group * address.inputs + index[1]
        assert spread[index] == wanted


def test_addresses_of_vectors():
    vector = Address(name="v", shape=(5,))
    assert (vector.size, vector.outputs, vector.inputs) == (5, 5, 1)
    assert vector.rows(torch.arange(5)).shape == (5, 1)
