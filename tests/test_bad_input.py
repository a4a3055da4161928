"""Bad input: every refusal has its type, names the value, says what to do, and leaves everything as it was."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import prunus
import suites
from awkward import MLP, NOTHING_PRUNABLE, case, mlp
from prunus import errors
from prunus.budget.budgets import Problem, Uniform, decide
from prunus.budget.registry import BUDGETS
from prunus.catalog import Catalog, Entry, fold
from prunus.errors import (
    DamagedFile,
    Infeasible,
    InvalidValue,
    MaskMismatch,
    NonFinite,
    NothingPrunable,
    PrunusError,
    UnknownName,
    Unsupported,
    did_you_mean,
    unknown,
)
from prunus.masks import Masks
from prunus.methods.registry import METHODS
from prunus.parameters import Address, prunable
from prunus.scores.registry import SCORES


def refused(kind, match, *args, model=None, **options):
    """Assert that `prunus.prune` refuses, with this type and message, and that nothing changed; in place, too."""
    model = MLP.build() if model is None else model
    for inplace in (False, True):
        with suites.untouched(model, f"a refused pruning with {args} {options}"), pytest.raises(kind, match=match) as e:
            prunus.prune(model, *args, measure=False, inplace=inplace, **options)
        assert isinstance(e.value, PrunusError)
        assert len(str(e.value)) > 25


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ("90%", r"sparsity must be a number between 0 and 1, not the text '90%'\. Write 0\.9 instead"),
        ("0.9", r"not the text '0\.9'"),
        (1.0, r"sparsity 1\.0 is outside \[0, 1\)"),
        (1, r"sparsity 1 is outside"),
        (-0.1, r"sparsity -0\.1 is outside"),
        (math.nan, "sparsity nan is outside"),
        (math.inf, "sparsity inf is outside"),
        (90, r"sparsity 90 is outside \[0, 1\)\. If you mean 90 %, write 0\.9"),
        (True, "not True"),
        ([0.9], r"not \[0\.9\]"),
        (torch.tensor(0.9), "not tensor"),
        (0.9999, r"keeps none of 390 prunable weights; 0\.997436 keeps the last one"),
    ],
)
def test_sparsities(sparsity, message):
    refused(InvalidValue, message, sparsity)


@pytest.mark.parametrize("keep", [0, -1, 391, True, 2.5, "10", math.nan])
def test_counts(keep):
    refused(InvalidValue, f"keep {keep!r} must be a whole number from 1 to 390", keep=keep)


def test_neither_or_both():
    refused(InvalidValue, "exactly one of sparsity .* and keep")
    refused(InvalidValue, "exactly one of sparsity .* and keep", 0.5, keep=10)


def test_patterns_that_contradict_the_sparsity():
    refused(InvalidValue, r"pattern 2:4 fixes the sparsity at 0\.5; leave sparsity and", 0.9, unit="2:4")
    refused(InvalidValue, r"pattern 1:4 fixes the sparsity at 0\.75", 0.5, unit="1:4")
    refused(InvalidValue, "pattern 2:4 fixes", unit="2:4", keep=195)
    refused(InvalidValue, r"Write 0\.5", "50%", unit="2:4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "magnitud"}, "unknown score 'magnitud'.*'magnitude'"),
        ({"score": "wandaa"}, "'wanda'"),
        ({"score": None}, "unknown score None"),
        ({"budget": "erkk"}, "unknown budget 'erkk'.*'erk'"),
        ({"budget": {"name": "global", "minimun": 3}}, "'minimun'.*'minimum'"),
        ({"budget": {"name": "like", "score": "snipp"}, "score": "random"}, "'snip'"),
        ({"unit": "wieght"}, "unknown unit 'wieght'.*'weight'"),
        ({"unit": "2/4"}, "unknown unit '2/4'"),
    ],
)
def test_unknown_names_come_with_suggestions(options, message):
    refused(UnknownName, message, 0.5, **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"unit": "5:4"}, InvalidValue, "pattern 5:4 is not possible"),
        ({"unit": "0x4"}, InvalidValue, "block 0x4 has no elements"),
        ({"rounds": 0}, InvalidValue, "rounds 0 must be a whole number from 1 up"),
        ({"rounds": "3"}, InvalidValue, "rounds '3'"),
        ({"rounds": 2.5}, InvalidValue, r"rounds 2\.5"),
        ({"include": "9.*"}, InvalidValue, r"pattern '9\.\*' matches no parameter name"),
        ({"exclude": ["0.*", "9.*"]}, InvalidValue, r"pattern '9\.\*' matches no parameter name"),
        ({"exclude": "*"}, NothingPrunable, "excluded by name"),
        ({"budget": {"minimum": 3}}, InvalidValue, "has no name"),
        ({"budget": {"name": "global", "minimum": 200}}, Infeasible, "a minimum of 200 entries in each of 3 tensors"),
        ({"unit": "row", "budget": "row-wise"}, InvalidValue, "row-wise competition is between single weights"),
        (
            {"unit": "row", "budget": {"name": "global", "minimum": 2}},
            InvalidValue,
            "per-tensor minimum counts weights",
        ),
        ({"budget": "uniform-plus"}, Infeasible, "uniform-plus at density"),
        ({"budget": "lamp", "score": "movement", "data": MLP.batches()}, InvalidValue, "LAMP needs non-negative"),
    ],
)
def test_contradictory_choices(options, kind, message):
    refused(kind, message, 0.9, **options)


@pytest.mark.parametrize("info", [pytest.param(s, id=s.name) for s in SCORES if s.data != "none"])
def test_missing_and_empty_data(info):
    refused(InvalidValue, "pass (data|example)=", 0.5, score=info.name)
    refused(InvalidValue, "data is empty; give at least one batch", 0.5, score=info.name, data=[])
    x, y = MLP.batch()
    refused(InvalidValue, "no examples", 0.5, score=info.name, data=[(x[:0], y[:0])])


@pytest.mark.parametrize("name", ["snip", "fisher", "grasp", "movement"])
def test_data_without_labels(name):
    refused(InvalidValue, r"needs labels; give data as \(inputs, labels\)", 0.5, score=name, data=[MLP.batch()[0]])


def test_data_of_the_wrong_kind():
    refused(InvalidValue, "a batch must be", 0.5, score="snip", data=["text"])
    refused(InvalidValue, "a batch must be", 0.5, score="snip", data=[MLP.batch() * 2])
    refused(
        Unsupported, "token ids", 0.5, score="synflow", data=case("tied embedding").batches(),
        model=case("tied embedding").build(),
    )  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_weights(value):
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = value
    refused(NonFinite, r"weight '2\.weight' has 1 NaN or infinite of 200 .*load sound weights", 0.5, model=model)
    x, y = MLP.batch()
    refused(NonFinite, r"weight '2\.weight'", 0.5, model=model, score="snip", data=[(x, y)])
    biased = mlp()
    with torch.no_grad():
        biased[2].bias[0] = value
    assert prunus.prune(biased, 0.5, measure=False).masks.kept == 195  # biases are not ranked


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_data(value):
    x, y = MLP.batch()
    x[0, 0] = value
    for name in ("snip", "grasp", "fisher", "wanda"):
        refused(NonFinite, "NaN or infinite", 0.5, score=name, data=[(x, y)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_scores(value):
    scores = {"w": torch.tensor([[1.0, value], [2.0, 3.0]])}
    problem = Problem(addresses={"w": Address(name="w", shape=(2, 2))}, scores=scores, keep=2)
    with pytest.raises(NonFinite, match="the score of 'w' has 1 NaN or infinite values"):
        decide(problem, Uniform())


def test_nothing_prunable():
    refused(NothingPrunable, "nothing prunable in Sequential.*vector", 0.5, model=NOTHING_PRUNABLE.build())
    with pytest.raises(NothingPrunable, match="no parameters"):
        prunus.prune(torch.nn.ReLU(), 0.5)


def test_masks_of_another_model():
    hole = torch.zeros(20, 8, dtype=torch.bool)
    refused(MaskMismatch, "'9.weight' is missing in the second", 0.5, masks=Masks({"9.weight": hole}))
    masks = dict(Masks.full(mlp()).items())
    refused(MaskMismatch, "'4.weight' is missing in the first", 0.5, masks=Masks(dict(list(masks.items())[:2])))
    masks["0.weight"] = torch.ones(8, 20, dtype=torch.bool)
    refused(MaskMismatch, r"'0\.weight' has shape \(8, 20\) in one set and \(20, 8\)", 0.5, masks=Masks(masks))
    model = MLP.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with suites.untouched(model, "refused masks"):
        with pytest.raises(MaskMismatch, match="Masks fit only the architecture they were made for"):
            prunus.sparsify(model, optimizer, masks=Masks({"9.weight": hole}), steps=3)
        with pytest.raises(MaskMismatch, match="has shape"):
            prunus.sparsify(model, optimizer, masks=Masks({"2.weight": hole}), steps=3)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("tied linear", "second.weight", r"another name of 'first\.weight'; call it so"),
        ("torch.nn.utils.prune", "0.weight_orig", r"already under torch\.nn\.utils\.prune"),
        ("weight norm", "0.parametrizations.weight.original1", "parametrised by _WeightNorm"),
    ],
)
def test_masks_of_tensors_that_cannot_be_held(name, mask, message):
    model = case(name).build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = Masks({mask: torch.ones_like(model.get_parameter(mask), dtype=torch.bool)})
    with pytest.raises(MaskMismatch, match=f"'{mask}' cannot be held: .*{message}"):
        prunus.sparsify(model, optimizer, masks=masks, steps=3)


def test_masks_that_are_too_sparse():
    model = MLP.build()
    sparse = prunus.prune(model, 0.9, measure=False).masks
    for rounds in (1, 4):
        refused(Infeasible, "keep 39 of 390 weights, fewer than the 195", 0.5, masks=sparse, rounds=rounds)
    refused(Infeasible, "keep 0 of 390", 0.5, masks=sparse & ~sparse, rounds=3)


def test_mask_files(tmp_path):
    path = tmp_path / "m.safetensors"
    masks = prunus.prune(mlp(), 0.5, measure=False).masks
    masks.save(path)
    data = path.read_bytes()
    for damaged in (b"", data[:10], data[:-1], data + b"x", data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match=str(path)):
            Masks.load(path)
    path.unlink()
    with pytest.raises(DamagedFile, match="cannot be read"):
        Masks.load(path)


@pytest.mark.parametrize("info", [pytest.param(m, id=m.name) for m in METHODS if m.kind == "step"])
def test_methods_refuse_unknown_options_with_a_suggestion(info):
    with pytest.raises(UnknownName, match=r"'sparsety'.*'sparsity'"):
        METHODS.build(info.name, sparsety=0.5)


def test_optimizers():
    model = MLP.build()
    for wrong in (None, object(), model, [1]):
        with pytest.raises(InvalidValue, match="is not a torch optimizer"):
            prunus.sparsify(model, wrong, prunus.Static(0.5), steps=3)
    assert all(bool((p != 0).all()) for p in model.parameters())


# -- the errors themselves ----------------------------------------------------------------------------------------

KINDS = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, PrunusError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_errors_have_exit_codes_and_say_what_they_are(kind):
    assert kind.exit_code in (2, 3, 4, 5, 75)
    assert kind.__doc__
    assert str(kind("message")) == "message"  # also where a builtin base (LookupError...) would print it otherwise


def test_errors_are_also_what_python_calls_them():
    assert issubclass(InvalidValue, ValueError)
    assert issubclass(UnknownName, LookupError)
    assert issubclass(NonFinite, ArithmeticError)
    assert issubclass(errors.DataMissing, FileNotFoundError)
    assert issubclass(errors.MissingExtra, ImportError)


def test_suggestions():
    assert did_you_mean("manitude", ["magnitude", "random"]) == " Did you mean 'magnitude'?"
    assert did_you_mean("RIGL", ["rigl"]) == " Did you mean 'rigl'?"
    assert did_you_mean("zzzz", ["magnitude"]) == ""
    assert str(unknown("score", "x", ["b", "a", "a"])) == "unknown score 'x'. Known: a, b."


# -- catalogues ---------------------------------------------------------------------------------------------------


def test_names_are_forgiving():
    for name in ("RigL", "rigl", "RIGL", "rig-l", "Rig_L"):
        assert METHODS.entry(name).name == "rigl"
    assert METHODS.entry("gmp").name == "gmp-cubic"
    assert "SR_STE" in METHODS
    assert "nothing" not in METHODS
    assert 3 not in METHODS
    assert fold("A-b_c D") == "abcd"
    assert METHODS.names("r*") == [m.name for m in METHODS if m.name.startswith("r")]


@pytest.mark.parametrize("catalog", [METHODS, SCORES, BUDGETS], ids=lambda c: c.kind)
def test_no_two_rows_answer_to_one_name(catalog):
    spellings = [n for e in catalog for n in {fold(n) for n in (e.name, *e.aliases)}]
    assert len(spellings) == len(set(spellings))
    assert len(list(catalog)) == len(catalog)
    for entry in catalog:
        assert catalog.entry(entry.name) is entry
        assert all(catalog.entry(a) is entry for a in entry.aliases)
    with pytest.raises(UnknownName, match=f"unknown {catalog.kind}"):
        catalog.load("no such thing at all")


def anything(**options):
    return options


def test_catalogues_build_and_refuse():
    row = Entry(name="one", target="test_bad_input:anything", summary="takes anything", aliases=("eins",))
    table = Catalog("thing", [row])
    assert table.build("eins", a=1) == {"a": 1}
    assert table.entry("ONE").describe()["aliases"] == ["eins"]
    with pytest.raises(UnknownName, match=r"unknown thing 'on'.*'one'"):
        table.build("on")


def test_the_tables_cost_no_torch():
    code = (
        "import sys, prunus, prunus.methods.registry, prunus.scores.registry, prunus.budget.registry, prunus.errors;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(len(dir(prunus)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 20


def test_public_names_exist_and_others_do_not():
    for name in prunus.__all__:
        assert getattr(prunus, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prunee'"):
        prunus.prunee  # noqa: B018


def test_numbers_of_numpy_are_numbers():
    expected = prunus.prune(mlp_seeded(), 0.5, measure=False).masks
    for value in (np.float32(0.5), np.float64(0.5)):
        assert prunus.prune(mlp_seeded(), value, measure=False).masks == expected


def mlp_seeded():
    return MLP.build()


def test_prunable_of_the_plain_model():
    assert prunable(mlp()).total == 390
