"""How much each unit of an ONNX model matters: element scores without gradients, pooled like those of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prunus.errors import InvalidValue, Unsupported
from prunus.graph.couple import Family
from prunus.graph.onnx_file import Arrays, Session, inputs_of
from prunus.graph.onnx_graph import OnnxGraph
from prunus.parameters import check_finite
from prunus.randomness import generator
from prunus.structured.importance import ranked

if TYPE_CHECKING:
    from onnx import ModelProto

EVIDENCE = ("weight", "noise", "input_norm")


@dataclass(frozen=True)
class _Use:
    """One product of a stored weight with data: which value it reads, and how its features lie on the weight."""

    data: str
    axis: int  # of the features in the data
    weight_axis: int
    groups: int = 1


def unit_scores_onnx(
    source: OnnxGraph,
    families: Sequence[Family],
    score: str = "magnitude",
    *,
    pool: str = "sum",
    normalise: str = "mean",
    batches: Sequence[Arrays] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the scores of the units of every family, shape (family.size,), higher = keep.

    Args:
        source: the model.
        families: whose units are scored.
        score: an element score whose evidence is among weights, noise and input norms (`prunus ls scores`).
        pool, normalise: see `prunus.structured.importance.pooled`.
        batches: inputs of single calls, for scores that look at activations: the root mean square of every input
            feature over examples and positions, measured in onnxruntime; a convolution's feature is a channel.
        seed: of random scores.

    Raises:
        UnknownName: no such score.
        Unsupported: the score needs gradients, which an ONNX model does not give.
        InvalidValue: the score needs inputs and there are none, or pool or normalise is unknown.
        NonFinite: a weight holds NaN or infinity.
    """
    from prunus.scores.registry import SCORES

    info = SCORES.entry(score)
    lacking = [need for need in info.needs if need not in EVIDENCE]
    if lacking:
        possible = [n for n in SCORES.names("*") if set(SCORES.entry(n).needs) <= set(EVIDENCE)]
        raise Unsupported(
            f"score {score!r} needs {lacking[0].replace('_', ' ')}, which an ONNX model does not give; possible are "
            f"{', '.join(possible)}. Prune the PyTorch model for others."
        )
    if "input_norm" in info.needs and not batches:
        raise InvalidValue(f"score {score!r} looks at activations; give inputs (--calibration at the command line).")
    tensors = _tensors(source.model, {s.tensor for f in families for s in f.slots})
    weights = {
        s.tensor: tensors[s.tensor]
        for f in families
        for s in f.slots
        if s.role in ("output", "input") and len(s.shape) >= 2
    }
    check_finite(weights, "weight")
    norms = input_norms(source, weights, batches) if "input_norm" in info.needs else {}
    function = info.load()

    def elements() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            evidence: dict[str, Tensor] = {"weight": weight}
            if "noise" in info.needs:
                evidence["noise"] = torch.rand(weight.shape, generator=generator(seed, "score noise", name))
            if "input_norm" in info.needs:
                if name not in norms:
                    continue  # a table, say, that multiplies no activations
                evidence["input_norm"] = norms[name]
            yield name, function(**{need: evidence[need] for need in info.needs})

    return ranked(families, elements(), tensors, pool, normalise)


def _tensors(model: ModelProto, names: set[str]) -> dict[str, Tensor]:
    import onnx

    found = {}
    for tensor in model.graph.initializer:
        if tensor.name in names:
            array = onnx.numpy_helper.to_array(tensor)
            exact = array if array.dtype == np.float64 else array.astype(np.float32)
            found[tensor.name] = torch.from_numpy(np.ascontiguousarray(exact))
    return found


def input_norms(source: OnnxGraph, weights: Mapping[str, Tensor], batches: Sequence[Arrays]) -> dict[str, Tensor]:
    """Return the root mean square of the input features of every weight that multiplies activations, in its shape.

    A weight with several readers sees the inputs of all of them.
    """
    uses = {name: list(_uses(source.model, name)) for name in weights}
    uses = {name: found for name, found in uses.items() if found}
    given = set(inputs_of(source.model))
    wanted = sorted({u.data for found in uses.values() for u in found} - given)
    session = Session(source.model, wanted)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for feeds in batches:
        values: dict[str, Any] = {**session(feeds), **feeds}
        for name, found in uses.items():
            for use in found:
                x = torch.from_numpy(np.ascontiguousarray(values[use.data].astype(np.float64)))
                x = x.movedim(use.axis, -1).flatten(0, -2) if x.ndim > 1 else x[None]
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + x.square().sum(0)
                counts[name] = counts.get(name, 0) + x.shape[0]
    result = {}
    for name, total in sums.items():
        weight, use = weights[name], uses[name][0]
        norm = (total / counts[name]).sqrt().float()
        if use.groups > 1 and use.weight_axis == 1:  # outputs of a group see the channels of that group
            norm = norm.reshape(use.groups, 1, -1).expand(-1, weight.shape[0] // use.groups, -1)
            norm = norm.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        else:
            shape = [1] * weight.ndim
            shape[use.weight_axis] = -1
            norm = norm.reshape(shape)
        result[name] = norm.expand(weight.shape)
    return result


def _uses(model: ModelProto, name: str) -> Iterator[_Use]:
    for node in model.graph.node:
        attributes = {a.name: a.i for a in node.attribute if a.name in ("group", "transA", "transB")}
        if len(node.input) < 2 or name not in node.input[:2]:
            continue
        second = node.input[1] == name
        if node.op_type == "Conv" and second:
            yield _Use(node.input[0], 1, 1, attributes.get("group", 1))
        elif node.op_type == "ConvTranspose" and second:
            yield _Use(node.input[0], 1, 0)
        elif node.op_type == "Gemm" and second:
            yield _Use(node.input[0], 0 if attributes.get("transA") else 1, 1 if attributes.get("transB") else 0)
        elif node.op_type == "MatMul" and second:
            yield _Use(node.input[0], -1, -2)
        elif node.op_type == "MatMul" and node.input[0] == name:
            yield _Use(node.input[1], -2, -1)
