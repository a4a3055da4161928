"""ONNX models: read like modules, cut for real, proved in onnxruntime; damage and misuse are named."""

from __future__ import annotations

import builtins
import copy
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx_nets import NETS, Build, attended, plain, unknown  # noqa: E402
from prunus.cli import main  # noqa: E402
from prunus.errors import (  # noqa: E402
    DamagedFile,
    Infeasible,
    InvalidValue,
    MaskMismatch,
    MissingExtra,
    NonFinite,
    NothingPrunable,
    StorageFailed,
    UnknownName,
    Unsupported,
)
from prunus.graph.couple import Coupling, Family, couple  # noqa: E402
from prunus.graph.onnx_edit import cut_onnx, fit_onnx, mask_onnx, random_inputs, verify_onnx  # noqa: E402
from prunus.graph.onnx_file import Session  # noqa: E402
from prunus.graph.onnx_graph import OnnxGraph, read_onnx  # noqa: E402
from prunus.graph.plan import Plan  # noqa: E402
from prunus.graph.record import record  # noqa: E402
from prunus.structured.onnx import apply_onnx, prune_onnx  # noqa: E402
from prunus.structured.onnx_scores import unit_scores_onnx  # noqa: E402

EXACT = 1e-5


def some_kept(coupling: Coupling, seed: int) -> dict[str, Any]:
    """Keep about 60 % of the units of every family that is offered, at least one."""
    random = np.random.default_rng(seed)
    keep = {}
    for family in coupling.primary():
        mask = random.random(family.size) < 0.6
        mask[random.integers(family.size)] = True
        keep[family.name] = mask
    return keep


def arrays_of(model: Any) -> dict[str, Any]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def run(model: Any, feeds: dict[str, Any]) -> list[Any]:
    return list(Session(model)(feeds).values())


# -- reading and cutting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["whole", "counted"])
@pytest.mark.parametrize("name", NETS)
def test_removing_equals_masking_and_the_small_model_has_the_predicted_size(name: str, norms: str) -> None:
    model = NETS[name]()
    before = model.SerializeToString(deterministic=True)
    source = read_onnx(model)
    coupling = couple(source.graph, norms=norms)
    assert coupling.primary()
    for seed in range(2):
        keep = some_kept(coupling, seed)
        plan = fit_onnx(source, coupling, keep)
        assert not plan.blocked
        assert set(plan.families) == set(keep)
        small = cut_onnx(source, coupling, plan)
        onnx.checker.check_model(small, full_check=name != "unknown")
        inputs = random_inputs(source.model, source.shapes, seed)
        assert verify_onnx(source, coupling, plan, inputs) <= EXACT
        dense, masked = run(source.model, inputs), run(mask_onnx(source, plan), inputs)
        assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(dense, masked, strict=True))  # something was removed
        if norms == "whole":
            again = couple(read_onnx(small).graph)
            assert again.macs() == coupling.macs(keep)
            assert again.parameters() == coupling.parameters(keep)
    assert model.SerializeToString(deterministic=True) == before


def sizes_of(coupling: Coupling) -> list[tuple[str, int]]:
    return sorted((f.kind, f.size) for f in coupling.primary())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", [("channel", 8), ("channel", 12)]),
        # Grouped convolutions: whole groups, or the same offset of every group, whichever is offered first.
        ("joined", [("channel", 2), ("channel", 4), ("channel", 4), ("channel", 5), ("channel", 10)]),
        ("shuffled", [("channel", 3), ("channel", 4), ("channel", 4), ("channel", 5)]),
        ("normed", [("channel", 4), ("channel", 6), ("channel", 6)]),  # four groups of a group norm
        ("attended", [("channel", 12), ("head", 2)]),
        ("attended-operator", [("channel", 12), ("head", 2), ("head", 2)]),
        ("recurrent", [("channel", 9)]),
    ],
)
def test_families_of_small_networks(name: str, expected: list[tuple[str, int]]) -> None:
    assert sizes_of(couple(read_onnx(NETS[name]()).graph)) == expected


def test_macs_by_hand() -> None:
    # (6 -> 8 -> 3) of two rows: 2 * (6 * 8 + 8 * 3)
    b = Build()
    y = b.add("Relu", b.linear(b.input(2, 6), 6, 8))
    coupling = couple(read_onnx(b.model(b.linear(y, 8, 3))).graph)
    (family,) = coupling.families
    assert coupling.macs() == 144
    assert coupling.macs({family.name: np.arange(8) < 5}) == 2 * (6 * 5 + 5 * 3)
    assert coupling.parameters() == 6 * 8 + 8 + 8 * 3 + 3


def test_a_dynamic_model_stays_dynamic() -> None:
    source = read_onnx(attended(dynamic=True))
    for norms in ("whole", "counted"):
        coupling = couple(source.graph, norms=norms)
        plan = fit_onnx(source, coupling, some_kept(coupling, 1))
        assert not plan.blocked
        inputs = {"ids": np.random.default_rng(0).integers(0, 11, (3, 7))}  # read with (1, 16)
        assert verify_onnx(source, coupling, plan, inputs) <= EXACT
    assert read_onnx(attended(dynamic=True), sizes={"length": 9, "batch": 2}).shapes == {"ids": (2, 9)}


def test_an_attention_that_divides_by_a_size_keeps_that_size() -> None:
    fixed = couple(read_onnx(attended(dynamic=True)).graph)
    free = couple(read_onnx(attended()).graph)
    width = next(f for f in free.families if f.kind == "head")
    assert {f.size for f in free.families if {s.tensor for s in f.slots} & {s.tensor for s in width.slots}} == {2, 4}
    assert sorted(f.size for f in fixed.families) == [2, 12]
    assert any("used as a number" in reason for reason in fixed._solution.reasons)


def test_the_proof_can_fail() -> None:
    source = read_onnx(attended())
    coupling = couple(source.graph, norms="anew")
    plan = fit_onnx(source, coupling, some_kept(coupling, 1))
    assert verify_onnx(source, coupling, plan, random_inputs(source.model, source.shapes)) > 1e-2


def test_a_family_that_changes_the_outputs_is_rolled_back_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # A wrong translation: a sigmoid taken for a relu, behind which zeros are not zero.
    from prunus.graph import onnx_ops

    b = Build()
    x = b.input(4, 6)
    y = b.add("Sigmoid", b.linear(x, 6, 8))
    z = b.add("Relu", b.linear(x, 6, 8))
    y, z = (b.add("ReduceSum", t, b.ints(1)) for t in (y, z))
    model = b.model(b.add("Concat", y, z, axis=1))
    assert len(couple(read_onnx(model).graph).families) == 1
    monkeypatch.setitem(onnx_ops._ELEMENTWISE, "Sigmoid", "relu")
    out = prune_onnx(model, 0.5, measure=False)
    assert out.report.difference is not None
    assert out.report.difference <= EXACT
    assert list(out.report.blocked) == ["w1:1"]
    assert [f["kept"] for f in out.report.families] == [8, 4]
    assert "differs from masking" in str(out.report)


def test_an_unknown_operator_keeps_its_axes_and_is_named() -> None:
    out = prune_onnx(unknown(), 0.5, measure=False)
    assert [(f["name"], f["kept"]) for f in out.report.families] == [("free:1", 5)]
    assert list(out.report.without_rule) == ["onnx.com.microsoft.QuickGelu"]
    assert "no rule for operator" in out.report.unprunable["before:1"]
    assert "QuickGelu" in str(out.report)
    # Nothing can run an operator of nobody: shapes behind it are unknown, and there is no proof.
    strange = unknown("nobody")
    with pytest.raises(Unsupported, match="verify=False"):
        prune_onnx(strange, 0.5)
    out = prune_onnx(strange, 0.5, verify=False, measure=False)
    assert out.report.difference is None
    assert "onnx.Add (of unknown shape)" in out.report.without_rule
    shapes = {n: a.shape for n, a in arrays_of(out.model).items()}
    assert (shapes["free"], shapes["before"], shapes["after"]) == ((6, 5), (6, 8), (8, 6))


def test_graphs_inside_nodes_keep_what_they_take_from_outside() -> None:
    b = Build()
    x = b.input(2, 6)
    y = b.linear(x, 6, 8)
    z = b.add("Relu", b.linear(x, 6, 10))
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        made = onnx.helper.make_tensor_value_info(f"{name}_y", 1, [2, 8])
        inner = onnx.helper.make_node(op, [y], [f"{name}_y"])
        branches[name] = onnx.helper.make_graph([inner], name, [], [made])
    condition = b.add("Less", b.add("ReduceSum", x, keepdims=0), b.hold(np.float32(0)))
    y = b.add("If", condition, **branches)
    y = b.add("Add", b.linear(y, 8, 3), b.linear(z, 10, 3))
    out = prune_onnx(b.model(y), 0.5, measure=False)
    assert [(f["size"], f["kept"]) for f in out.report.families] == [(10, 5)]
    assert "onnx.If" in out.report.without_rule


# -- what is stored once for several uses -----------------------------------------------------------------------


def test_equal_vectors_stored_once_do_not_tie_layers_and_shared_matrices_do() -> None:
    b = Build()
    x = b.input(2, 6)
    zero = b.hold(np.zeros(6, np.float32), "zero")
    y = x
    for _ in range(2):
        y = b.add("Relu", b.add("Gemm", y, b.weight(6, 6), zero))
    shared = b.weight(6, 6, name="shared")
    y = b.add("Tanh", b.add("MatMul", y, shared))
    y = b.add("Tanh", b.add("MatMul", y, b.add("Identity", shared)))
    model = b.model(b.linear(y, 6, 3))
    source = read_onnx(model)
    coupling = couple(source.graph)
    assert [f.size for f in coupling.families] == [6, 6]  # first layer; second layer with all axes of the shared one
    assert {(s.tensor, s.axis) for s in coupling.families[1].slots} >= {("shared", 0), ("shared", 1)}
    plan = fit_onnx(source, coupling, some_kept(coupling, 3))
    assert verify_onnx(source, coupling, plan, random_inputs(source.model, source.shapes)) <= EXACT


def test_shape_constants_shared_by_nodes_that_are_cut_differently() -> None:
    b = Build()
    x = b.input(2, 6)
    spelled = b.ints(2, 8)
    left, right = b.linear(x, 6, 8), b.linear(x, 6, 8)
    left, right = (b.add("Relu", b.add("Reshape", t, spelled)) for t in (left, right))
    model = b.model(b.add("Add", b.linear(left, 8, 3), b.linear(right, 8, 3)))
    source = read_onnx(model)
    coupling = couple(source.graph)
    first, second = coupling.families
    plan = fit_onnx(source, coupling, {first.name: np.arange(8) < 3})
    small = cut_onnx(source, coupling, plan)
    assert verify_onnx(source, coupling, plan, random_inputs(source.model, source.shapes)) <= EXACT
    shapes = [arrays_of(small)[n.input[1]].tolist() for n in small.graph.node if n.op_type == "Reshape"]
    assert shapes == [[2, 3], [2, 8]]
    assert second.size == 8


def test_weights_of_16_bits() -> None:
    b = Build()
    half = onnx.TensorProto.FLOAT16
    y = b.add("LayerNormalization", b.input(2, 6, kind=half), b.weight(6), b.weight(6))
    for inside, out in ((6, 12), (12, 8)):
        y = b.add("LayerNormalization", b.add("Relu", b.linear(y, inside, out)), b.weight(out), b.weight(out))
    model = b.model(b.linear(y, 8, 3))
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for item in model.graph.output:
        item.type.tensor_type.elem_type = half
    out = prune_onnx(model, 0.5, norms="counted", measure=False)
    assert not out.report.blocked
    assert [f["kept"] for f in out.report.families] == [6, 4]
    assert {a.dtype for n, a in arrays_of(out.model).items() if n.startswith("w")} == {np.dtype(np.float16)}


def test_initialisers_listed_as_inputs_of_old_files() -> None:
    model = NETS["old"]()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    out = prune_onnx(model, 0.5, measure=False)
    assert out.report.difference is not None
    assert out.report.difference <= EXACT
    listed = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in out.model.graph.input}
    assert all(listed[n] == list(a.shape) for n, a in arrays_of(out.model).items() if n in listed)


# -- the same families as the module ----------------------------------------------------------------------------


def form(family: Family) -> tuple[Any, ...]:
    """Describe a family without names: the weights of its operators up to transposition."""
    weights = [(s.role, *sorted(s.shape), s.index.shape[1]) for s in family.slots if s.role in ("output", "input")]
    return (family.size, family.kind, *sorted(weights))


def exported(model: nn.Module, example: Any, folder: Path, *, dynamo: bool, **more: Any) -> Path:
    path = folder / f"net-{dynamo}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (example,), str(path), dynamo=dynamo, verbose=False, **more)
    return path


class Net(nn.Module):
    """Convolutions, a residual, an attention and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.GELU(), nn.Conv2d(8, 8, 1))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.deep(x)
        x = self.norm(x.flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(x.mean(1))


def test_families_of_a_module_and_of_its_script_style_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, example = Net(), torch.randn(2, 3, 8, 8)
    ours = couple(record(model, example)).primary()
    source = read_onnx(exported(model, example, tmp_path, dynamo=False))
    coupling = couple(source.graph)
    assert Counter(map(form, coupling.primary())) == Counter(map(form, ours))
    assert coupling.macs() == couple(record(model, example)).macs()
    plan = fit_onnx(source, coupling, some_kept(coupling, 0))
    assert not plan.blocked
    assert verify_onnx(source, coupling, plan, random_inputs(source.model, source.shapes)) <= EXACT


@pytest.mark.slow
def test_a_dynamo_export_with_an_open_batch_axis(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, example = Net(), torch.randn(2, 3, 8, 8)
    path = exported(model, example, tmp_path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("rows")},))
    ours = couple(record(model, example)).primary()
    out = prune_onnx(path, macs=0.5, norms="counted", measure=False)
    assert not out.report.blocked
    assert out.report.macs_kept <= 0.5 * out.report.macs
    assert Counter(map(form, couple(read_onnx(path).graph).primary())) == Counter(map(form, ours))
    x = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    (name,) = (i.name for i in out.model.graph.input)
    (y,) = run(out.model, {name: x})
    masked = mask_onnx(read_onnx(path), out.plan)
    np.testing.assert_allclose(y, run(masked, {name: x})[0], atol=1e-5)


def vision() -> dict[str, Any]:
    from prunus.models.vision_repair import repair_torchvision

    repair_torchvision()
    zoo = pytest.importorskip("torchvision.models")
    convnext = [zoo.convnext.CNBlockConfig(16, 32, 2), zoo.convnext.CNBlockConfig(32, None, 2)]
    vit = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    swin = zoo.swin_transformer.SwinTransformer
    return {
        "resnet18": lambda: zoo.resnet18(num_classes=10),
        "mobilenet_v2": lambda: zoo.mobilenet_v2(num_classes=10),
        "densenet121": lambda: zoo.densenet121(num_classes=10),
        "shufflenet_v2": lambda: zoo.shufflenet_v2_x0_5(num_classes=10),
        "vit": lambda: zoo.VisionTransformer(**vit, num_classes=10),
        "swin": lambda: swin([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10),
        "convnext": lambda: zoo.convnext.ConvNeXt(convnext, num_classes=10),
    }


VISION = ("resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2", "vit", "swin", "convnext")


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", VISION)
def test_exports_of_torchvision_have_the_families_of_the_module(name: str, dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vision()[name]()
    for parameter in model.parameters():  # heads and layer scales start as zeros, which would prove nothing
        if float(parameter.detach().abs().max()) < 1e-3:
            nn.init.normal_(parameter, std=0.1)
    example = torch.randn(1, 3, 32 if name == "vit" else 64, 32 if name == "vit" else 64)
    theirs = couple(record(model, example))
    source = read_onnx(exported(model, example, tmp_path, dynamo=dynamo))
    coupling = couple(source.graph)
    assert coupling.macs() == theirs.macs()
    assert not coupling.without_rule
    if dynamo or name not in ("shufflenet_v2", "vit"):
        # The older exporter writes chunks as slices, whose halves need not stay equal, and scales as sizes.
        assert Counter(map(form, coupling.families)) == Counter(map(form, theirs.families))
        assert Counter(map(form, coupling.primary())) == Counter(map(form, theirs.primary()))
    for norms in ("whole", "counted"):
        coupling = couple(source.graph, norms=norms)
        plan = fit_onnx(source, coupling, some_kept(coupling, 0))
        assert not plan.blocked
        inputs = random_inputs(source.model, source.shapes)
        assert verify_onnx(source, coupling, plan, inputs) <= EXACT
        dense, masked = run(source.model, inputs)[0], run(mask_onnx(source, plan), inputs)[0]
        assert np.abs(dense - masked).max() > 1e-4 * np.abs(dense).max()


# -- the call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_targets_are_met(scope: str) -> None:
    out = prune_onnx(plain(), macs=0.5, scope=scope, measure=False)
    assert 0.4 * out.report.macs < out.report.macs_kept <= 0.5 * out.report.macs
    again = couple(read_onnx(out.model).graph)
    assert again.macs() == out.report.macs_kept
    assert again.parameters() == out.report.parameters_kept
    assert out.report.difference is not None
    assert out.report.difference <= EXACT
    out = prune_onnx(plain(), params=600, scope=scope, measure=False)
    assert couple(read_onnx(out.model).graph).parameters() <= 600


def test_options_of_the_selection() -> None:
    out = prune_onnx(plain(), 0.5, round_to=4, protect="w11", measure=False)
    assert [(f["size"], f["kept"]) for f in out.report.families] == [(8, 4), (12, 12)]
    out = prune_onnx(plain(), 0.9, minimum=0.5, measure=False)
    assert [f["kept"] for f in out.report.families] == [4, 6]
    out = prune_onnx(attended(), 0.5, unit="head", measure=False)
    assert [(f["kind"], f["kept"]) for f in out.report.families] == [("head", 1)]
    whole = prune_onnx(plain(), 0.0, measure=False)
    assert whole.report.macs_kept == whole.report.macs


def test_the_weakest_channels_go_first() -> None:
    b = Build()
    y = b.add("Relu", b.linear(b.input(2, 6), 6, 8))
    model = b.model(b.linear(y, 8, 3))
    weak = {1, 4, 6}
    for tensor in model.graph.initializer:
        if tensor.name == "w1":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[:, sorted(weak)] *= 1e-3
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w1"))
        if tensor.name == "w6":
            array = np.ones_like(onnx.numpy_helper.to_array(tensor))
            array[sorted(weak)] *= 1e-3
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w6"))
    for score in ("magnitude", "magnitude-squared"):
        out = prune_onnx(model, 3 / 8, score=score, measure=False)
        assert set(range(8)) - set(next(iter(out.plan.families.values()))) == weak


def test_wanda_scores_equal_the_formula() -> None:
    model = plain()
    source = read_onnx(model)
    coupling = couple(source.graph)
    images = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    batches = [{"x": images[:4]}, {"x": images[4:]}]
    elements = {}
    arrays = arrays_of(source.model)
    names = {n.input[1]: n.input[0] for n in source.model.graph.node if n.op_type in ("Conv", "Gemm")}
    data = {**Session(source.model, [n for n in names.values() if n != "x"])({"x": images}), "x": images}
    for weight, name in names.items():
        x = data[name].astype(np.float64)
        norm = np.sqrt((x**2).mean(tuple(i for i in range(x.ndim) if i != 1)))
        shape = (1, -1, 1, 1) if arrays[weight].ndim == 4 else (1, -1)
        elements[weight] = np.abs(arrays[weight]) * norm.reshape(shape)
    scores = unit_scores_onnx(source, coupling.families, "wanda", normalise="none", batches=batches)
    for family in coupling.families:
        expected = np.zeros(family.size)
        for slot in family.slots:
            if slot.tensor in elements:
                whole = np.moveaxis(elements[slot.tensor], slot.axis, 0).reshape(slot.shape[slot.axis], -1).sum(1)
                expected += whole[slot.index].sum(1)
        np.testing.assert_allclose(scores[family.name].numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["grouped", "vectors", "attended", "normed"])
def test_wanda_on_every_kind_of_product(name: str) -> None:
    model = NETS[name]()
    source = read_onnx(model)
    inputs = random_inputs(source.model, source.shapes)
    out = prune_onnx(model, 0.5, score="wanda", inputs=inputs, measure=False)
    assert out.report.difference is not None
    assert out.report.difference <= EXACT
    assert not out.report.blocked


def test_inputs_of_many_calls_and_random_scores() -> None:
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8))  # float64 is taken as float32
    out = prune_onnx(plain(), macs=0.6, score="wanda", inputs={"x": images}, measure=False)
    assert out.report.macs == prune_onnx(plain(), 0.1, measure=False).report.macs  # of one example
    a, b = (prune_onnx(plain(), 0.5, score="random", seed=s, measure=False).plan.families for s in (0, 0))
    c = prune_onnx(plain(), 0.5, score="random", seed=1, measure=False).plan.families
    assert a == b != c


def test_save_plan_and_replay(tmp_path: Path) -> None:
    model = attended()
    for norms in ("whole", "counted"):
        out = prune_onnx(model, 0.4, norms=norms, measure=False)
        out.save(tmp_path / "small.onnx")
        out.plan.save(tmp_path / "plan.json")
        again = apply_onnx(model, Plan.load(tmp_path / "plan.json"))
        assert again.SerializeToString(deterministic=True) == (tmp_path / "small.onnx").read_bytes()
        with pytest.raises(MaskMismatch):
            apply_onnx(out.model, out.plan)
        with pytest.raises(MaskMismatch):
            apply_onnx(plain(), out.plan)
    with pytest.raises(StorageFailed):
        out.save(tmp_path / "no" / "small.onnx")


def test_latency_is_measured_and_stages_are_told() -> None:
    told: list[str] = []
    out = prune_onnx(plain(), 0.5, on_stage=told.append)
    assert out.report.latency_ms is not None
    assert out.report.latency_ms > 0
    assert len(told) == 5
    json.dumps(out.report.to_dict())


# -- what cannot be done ----------------------------------------------------------------------------------------


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="no file"):
        prune_onnx(tmp_path / "missing.onnx", 0.5)
    with pytest.raises(InvalidValue, match="int"):
        prune_onnx(3, 0.5)  # type: ignore[arg-type]
    sound = plain().SerializeToString()
    contents = {"text": b"this is no model" * 20, "empty": b"", "short": sound[: len(sound) // 2]}
    for name, content in contents.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(DamagedFile):
            prune_onnx(path, 0.5)
        assert path.read_bytes() == content


def test_models_that_break_the_rules() -> None:
    broken = plain()
    broken.graph.node[0].input[0] = "nothing"
    with pytest.raises(DamagedFile, match="not a valid ONNX model"):
        prune_onnx(broken, 0.5)
    contradictory = plain()
    for tensor in contradictory.graph.initializer:
        if tensor.name == "w9":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((12, 5, 3, 3), np.float32), "w9"))
    with pytest.raises(DamagedFile, match="5 channels"):
        prune_onnx(contradictory, 0.5)
    ancient = plain()
    ancient.opset_import[0].version = 5
    with pytest.raises(Unsupported, match="operator set 5"):
        prune_onnx(ancient, 0.5)
    b = Build()
    y = b.add("Relu", b.linear(b.input(2, 6), 6, 8))
    several = b.model(b.linear(y, 8, 3))
    value = onnx.helper.make_sequence_type_proto(onnx.helper.make_tensor_type_proto(1, [2]))
    several.graph.input.append(onnx.helper.make_value_info("parts", value))
    with pytest.raises(Unsupported, match="no tensor"):
        prune_onnx(several, 0.5)
    sick = plain()
    for tensor in sick.graph.initializer:
        if tensor.name == "w9":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[0] = np.nan
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w9"))
    with pytest.raises(NonFinite, match="w9"):
        prune_onnx(sick, 0.5)


def test_weights_in_a_file_beside_the_model(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save_model(plain(), str(path), save_as_external_data=True, location="net.data", size_threshold=0)
    out = prune_onnx(path, 0.5, measure=False)
    assert out.report.difference is not None
    inside = prune_onnx(plain(), 0.5, measure=False)
    theirs = arrays_of(inside.model)
    assert all(np.array_equal(a, theirs[n]) for n, a in arrays_of(out.model).items())
    with pytest.raises(InvalidValue, match="file beside"):
        prune_onnx(onnx.load(str(path), load_external_data=False), 0.5)
    (tmp_path / "net.data").write_bytes(b"short")
    with pytest.raises(DamagedFile):
        prune_onnx(path, 0.5)
    (tmp_path / "net.data").unlink()
    with pytest.raises(DamagedFile, match="beside"):
        prune_onnx(path, 0.5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, InvalidValue, "exactly one"),
        ({"sparsity": 0.5, "macs": 0.5}, InvalidValue, "exactly one"),
        ({"sparsity": 1.0}, InvalidValue, "sparsity"),
        ({"macs": 0.0001}, Infeasible, "cannot be reached"),
        ({"macs": -1}, InvalidValue, "macs"),
        ({"sparsity": 0.5, "unit": "layer"}, InvalidValue, "unit"),
        ({"sparsity": 0.5, "unit": "head"}, NothingPrunable, "head"),
        ({"sparsity": 0.5, "score": "magnitud"}, UnknownName, "magnitude"),
        ({"sparsity": 0.5, "score": "taylor"}, Unsupported, "wanda"),
        ({"sparsity": 0.5, "score": "wanda"}, InvalidValue, "inputs"),
        ({"sparsity": 0.5, "scope": "none"}, InvalidValue, "scope"),
        ({"sparsity": 0.5, "pool": "none"}, InvalidValue, "pool"),
        ({"sparsity": 0.5, "protect": "nothing*"}, InvalidValue, "matches no tensor"),
        ({"sparsity": 0.5, "round_to": 0}, InvalidValue, "round_to"),
        ({"sparsity": 0.5, "sizes": {"bach": 2}}, InvalidValue, "batch"),
        ({"sparsity": 0.5, "sizes": {"batch": 0}}, InvalidValue, "batch"),
        ({"sparsity": 0.5, "inputs": {"y": np.zeros((1, 3, 8, 8))}}, InvalidValue, "no input 'y'"),
        ({"sparsity": 0.5, "inputs": {}}, InvalidValue, "no array for 'x'"),
        ({"sparsity": 0.5, "inputs": [1]}, InvalidValue, "list"),
        ({"sparsity": 0.5, "inputs": {"x": np.zeros((1, 3, 8))}}, InvalidValue, "4 axes"),
        ({"sparsity": 0.5, "inputs": {"x": np.zeros((1, 4, 8, 8))}}, InvalidValue, "axis 1"),
        ({"sparsity": 0.5, "inputs": {"x": np.zeros((0, 3, 8, 8))}}, InvalidValue, "empty"),
        ({"sparsity": 0.5, "inputs": {"x": np.full((1, 3, 8, 8), np.nan)}}, InvalidValue, "NaN"),
        ({"sparsity": 0.5, "inputs": {"x": np.full((1, 3, 8, 8), "a")}}, InvalidValue, "float32"),
    ],
)
def test_requests_that_cannot_be_met(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = plain()
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(error, match=words):
        prune_onnx(model, **options)
    assert model.SerializeToString(deterministic=True) == before


def test_without_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("onnxruntime"):
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, *args, **kwargs)

    model = plain()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match=r"prunus\[export\]"):
        prune_onnx(model, 0.5)


# -- command line -----------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, small = tmp_path / "net.onnx", tmp_path / "small.onnx"
    onnx.save(plain(), str(path))
    before = path.read_bytes()
    assert main(["prune", str(path), "--macs", "0.5", "-o", str(small), "--json"]) == 0
    seen = capsys.readouterr()
    found = json.loads(seen.out)
    assert found["report"]["macs_kept"] <= 0.5 * found["report"]["macs"]
    assert "proving" in seen.err
    assert couple(read_onnx(small).graph).macs() == found["report"]["macs_kept"]
    arrays = tmp_path / "x.npz"
    np.savez(arrays, x=np.random.default_rng(0).standard_normal((3, 3, 8, 8)))
    words = ["--sparsity", "0.5", "--score", "wanda", "--calibration", str(arrays), "--round-to", "4", "--quiet"]
    assert main(["prune", str(path), *words, "--minimum", "0.1", "--size", "batch=1", "-o", str(small)]) == 0
    seen = capsys.readouterr()
    assert "removed equals masked" in seen.out
    assert not seen.err
    assert path.read_bytes() == before


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, small = tmp_path / "net.onnx", str(tmp_path / "small.onnx")
    onnx.save(plain(), str(path))
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nothing of use")
    text = tmp_path / "x.npz"
    text.write_text("no arrays")
    ask = ["--sparsity", "0.5", "-o", small, "--quiet"]
    cases = [
        (["prune", "model.safetensors", *ask], 2, "ONNX models only"),
        (["prune", str(tmp_path / "no.onnx"), *ask], 2, "no file"),
        (["prune", str(bad), *ask], 5, "not"),
        (["prune", str(path), "--sparsity", "half", "-o", small], 2, "not a number"),
        (["prune", str(path), "--sparsity", "0.5", "-o", str(path)], 2, "model itself"),
        (["prune", str(path), *ask, "--calibration", str(text)], 5, "no arrays"),
        (["prune", str(path), *ask, "--calibration", str(tmp_path / "no.npz")], 2, "no file"),
        (["prune", str(path), *ask, "--size", "batch"], 2, "AXIS=N"),
        (["prune", str(path), "--macs", "0.000001", "-o", small, "--quiet"], 2, "cannot be reached"),
    ]
    for words, code, message in cases:
        assert main(words) == code
        assert message in capsys.readouterr().err
    assert not Path(small).exists()
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "--help"])
    assert stopped.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_the_graph_is_not_changed_by_reading_twice() -> None:
    model = plain()
    first, second = read_onnx(model), read_onnx(copy.deepcopy(model))
    assert isinstance(first, OnnxGraph)
    assert [str(n) for n in first.graph.nodes] == [str(n) for n in second.graph.nodes]
