"""Make a cut that the user's own forward can run: adjust remembered numbers, try, and roll back what fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.graph.couple import Coupling, Keep
from prunus.graph.edit import matching, put, stored_tensors
from prunus.graph.ir import Graph, Node, Value
from prunus.graph.plan import Plan
from prunus.graph.record import Failed, run_once
from prunus.graph.sizes import whole_sizes

EXACT = 1e-4  # relative difference up to which removing counts as equal to masking in float32


def tolerance(model: nn.Module) -> float:
    """Return the relative difference up to which removing counts as equal to masking, for the model's precision."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds & {torch.float16, torch.bfloat16}:
        return 5e-2
    return EXACT if torch.float32 in kinds else 1e-9


# How a size fixed in code is changed: not at all, if the code follows by itself; by the number that the module
# remembers; where there is none or it serves something else too, in the call that spells it out; or in every call, for
# sizes that should stay and were computed from one that changes.
_TACTICS = ("nothing", "remembered", "spelled", "spelled everywhere")


@dataclass(frozen=True)
class _Trouble:
    node: int  # number of the first operator that did not come out as predicted
    path: str  # the module that was running
    reason: str


def fit(coupling: Coupling, keep: Keep) -> Plan:
    """Return the plan for `keep`, without the families whose removal the module's own code does not survive.

    The module is run with tensors of the cut shapes that hold no numbers: if it runs the same operators with the
    predicted shapes, the plan stands. Otherwise the numbers that the failing module remembers, then the sizes that its
    code spells, are adjusted; where that does not help, the families that meet at the failing operator are left whole,
    and named in `Plan.blocked`.
    """
    graph = coupling.graph
    model = graph.model
    if model is None:
        return _draft(coupling, keep, {}, {})
    keep = {name: _as_bool(mask) for name, mask in keep.items()}
    coupling.removed(keep)
    keep = {n: k for n, k in keep.items() if not k.all()}
    modules = dict(model.named_modules())
    blocked: dict[str, str] = {}
    attempts: list[Plan] = []
    tactics: dict[type, int] = {}  # per class of module, how sizes are changed; all alike share one
    while True:
        wanted = _constants(coupling, keep, modules, tactics)
        spelled = _spelled_sizes(coupling, keep, modules, tactics)
        plan = replace(_draft(coupling, keep, wanted, blocked), sizes=spelled)
        trouble = _try(coupling, plan, keep)
        if trouble is None:
            return plan
        attempts.append(plan)
        if not keep:
            raise InvalidValue(f"the model does not repeat its own forward: {trouble.reason}")
        node = graph.nodes[min(trouble.node, len(graph.nodes) - 1)]
        # First doubt the numbers that were set in the failing module, those around it and those inside it (which it may
        # read), then the cut itself.
        for kind in _near(trouble.path, modules):
            while tactics.get(kind, 0) + 1 < len(_TACTICS):
                tactics[kind] = tactics.get(kind, 0) + 1
                if (
                    _constants(coupling, keep, modules, tactics) != wanted
                    or _spelled_sizes(coupling, keep, modules, tactics) != spelled
                ):
                    break
            else:
                continue
            break
        else:
            for attempt in attempts:
                if _runs_for_real(graph, attempt):
                    return attempt
            attempts.clear()
            tactics.clear()
            for name in _blamed(coupling, keep, node):
                blocked[name] = trouble.reason
                keep = {n: k for n, k in keep.items() if n != name}


def _near(path: str, modules: Mapping[str, nn.Module]) -> list[type]:
    """Return the classes of the module at `path`, of those around it, innermost first, and of those inside it."""
    inside = modules[path].modules()
    kinds = [type(modules[path])]
    while path:
        path = path.rpartition(".")[0]
        kinds.append(type(modules[path]))
    return list(dict.fromkeys([*kinds, *map(type, inside)]))


def _as_bool(mask: Any) -> NDArray[np.bool_]:
    return np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask).astype(bool)


def _draft(
    coupling: Coupling, keep: Keep, attributes: Mapping[str, Mapping[str, int]], blocked: Mapping[str, str]
) -> Plan:
    indices = coupling.indices(keep)
    names = {key.rpartition(":")[0] for key in indices}
    return Plan(
        {k: v.tolist() for k, v in indices.items()},
        {v.name: list(v.shape) for v in coupling.graph.values if v.stored and v.name in names},
        {p: dict(a) for p, a in attributes.items()},
        [],
        {name: np.flatnonzero(_as_bool(mask)).tolist() for name, mask in keep.items()},
        dict(blocked),
    )


def _constants(
    coupling: Coupling, keep: Keep, modules: Mapping[str, nn.Module], tactics: Mapping[type, int]
) -> dict[str, dict[str, int]]:
    """Return the numbers to set: per module path, where it remembers a size that changes -> the new size."""
    shapes = coupling.shapes(keep)
    result: dict[str, dict[str, int]] = {}

    def note(path: str, spelling: str, number: int) -> None:
        result.setdefault(path, {})[spelling] = number

    def sized(module: str, value: Value, adapts: frozenset[int]) -> None:
        for axis, (old, new) in enumerate(zip(value.shape, shapes[value.index], strict=True)):
            if old == new or axis in adapts:
                continue
            if _TACTICS[tactics.get(type(modules[module]), 0)] == "remembered":
                for spelling in matching(modules[module], old):
                    note(module, spelling, new)

    for node in coupling.graph.nodes:
        if node.op in ("convolution", "_convolution"):
            for path, spelling, number in _convolution_numbers(node, shapes, modules):
                note(path, spelling, number)
            continue
        if node.op == "native_group_norm":
            x, groups = node.args["input"], int(node.args["group"])
            new = groups * shapes[x.index][1] // x.shape[1]
            if new != groups and hasattr(modules[node.module], "num_groups"):
                note(node.module, "num_groups", new)
                note(node.module, "num_channels", shapes[x.index][1])
            continue
        if node.op == "slice":
            for output in node.outputs:
                if output is not None:
                    sized(node.module, output, frozenset())
    for call in coupling.graph.calls:
        if not call.averaged and not call.ranges:
            sized(call.module, call.value, call.adapts)
    return result


def _convolution_numbers(
    node: Node, shapes: list[tuple[int, ...]], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str, int]]:
    """Yield (module path, attribute, number) of a grouped convolution that loses groups."""
    groups, weight, x, y = int(node.args.get("groups", 1)), node.args["weight"], node.args["input"], node.outputs[0]
    assert y is not None
    if groups == 1:
        return
    axis = len(x.shape) - len(weight.shape) + 1
    inputs, outputs = shapes[x.index][axis], shapes[y.index][axis]
    per_group = shapes[weight.index][1]
    new = outputs // per_group if node.args.get("transposed") else inputs // per_group
    if new != groups:
        # A weight that is computed (standardised, say) is made in the module that uses it.
        path = weight.name.rpartition(".")[0] if weight.stored else node.module
        if getattr(modules.get(path), "groups", None) == groups:
            yield path, "groups", new
            for spelling, number in (("in_channels", inputs), ("out_channels", outputs)):
                if hasattr(modules[path], spelling):
                    yield path, spelling, number


def _spelled_sizes(
    coupling: Coupling, keep: Keep, modules: Mapping[str, nn.Module], tactics: Mapping[type, int]
) -> dict[str, dict[str, int]]:
    """Return the sizes to change in calls: module path -> {"call number.place.axis": new size}."""
    shapes, gone = coupling.shapes(keep), coupling.removed(keep)
    result: dict[str, dict[str, int]] = {}
    for call in coupling.graph.calls:
        for axis in call.averaged if coupling.counted else ():
            stays = coupling.stays(call.source, axis, gone) if call.source is not None else None
            if stays is not None and not stays.all():
                counted = whole_sizes(modules[call.module], call.number).get(axis, len(stays))
                result.setdefault(call.module, {})[f"{call.number}.count.{axis}"] = counted
        tactic = _TACTICS[tactics.get(type(modules[call.module]), 0)]
        if not tactic.startswith("spelled"):
            continue
        if not call.averaged and not call.ranges:
            new = shapes[call.value.index]
            axes = [i for i in range(len(new)) if i not in call.adapts]
            if tactic == "spelled everywhere" or any(new[i] != call.value.shape[i] for i in axes):
                # Beside a size that changes may stand one that should stay, so all that weights decide are set.
                fixed = [i for i in axes if new[i] != call.value.shape[i] or coupling.from_weights(call.value, i)]
                open_ = [i for i in fixed if coupling.repeats(call.value, i)]
                # How often the positions are repeated is up to the input (its batch), so that size is left open.
                may = len(open_) == 1 and not call.adapts and call.number.startswith(("view.", "reshape."))
                for i in fixed:
                    size = -1 if may and i in open_ else new[i]
                    result.setdefault(call.module, {})[f"{call.number}.{call.place}.{i}"] = size
        for axis, start, stop in call.ranges:
            stays = coupling.stays(call.source, axis, gone) if call.source is not None else None
            if stays is not None and not stays.all():
                mine = result.setdefault(call.module, {})
                mine[f"{call.number}.start.{axis}"] = int(stays[:start].sum())
                mine[f"{call.number}.stop.{axis}"] = int(stays[:stop].sum())
    return result


def _try(coupling: Coupling, plan: Plan, keep: Keep) -> _Trouble | None:
    """Run the cut model on meta tensors (or for real, if only that works) and compare shapes operator by operator."""
    graph = coupling.graph
    meta = graph.source == "meta"
    predicted = coupling.shapes(keep)
    try:
        if meta:
            with tried_on(graph.model, plan):
                found, _ = run_once(graph.model, graph.example, meta=True, train_too=graph.train_too)
        else:
            found, _ = run_once(plan.apply(graph.model), graph.example, meta=False)
    except Failed as error:
        nodes = error.graph.nodes
        matched = _first_difference(graph, nodes, predicted, partial=True)
        assert matched is not None
        place = _failing(coupling, keep, graph, matched, error.path)
        return _Trouble(place, error.path, f"{graph.nodes[place]} cannot run with the cut size: {error}")
    matched = _first_difference(graph, found.nodes, predicted)
    if matched is None:
        return None
    module = graph.nodes[matched].module
    return _Trouble(
        matched,
        module,
        f"{graph.nodes[matched]} gives another size than the cut predicts (a number is fixed in its code)",
    )


def _runs_for_real(graph: Graph, plan: Plan) -> bool:
    """Return whether a cut that failed, or ran other operators, gives the outputs of the masked model all the same.

    Kernels differ with and without numbers, and products with an axis of one position are computed by other operators.
    """
    if any(t.is_meta for t in (*graph.model.parameters(), *graph.model.buffers())):
        return False
    try:
        return plan.verify(graph.model, graph.example) <= tolerance(graph.model)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, AttributeError, NotImplementedError):
        return False


# Whether these run depends on strides, which a cut may simplify.
_LAYOUT = {
    "clone",
    "permute",
    "transpose",
    "t",
    "view",
    "_unsafe_view",
    "reshape",
    "contiguous",
    "expand",
    "detach",
    "alias",
    "_reshape_alias",
    "unsqueeze",
    "squeeze",
    "_to_copy",
    "as_strided",
    "copy",
    "empty",
    "empty_like",
    "new_empty",
    "lift_fresh",
}


def _first_difference(
    graph: Graph, nodes: list[Node], predicted: list[tuple[int, ...]], *, partial: bool = False
) -> int | None:
    """Return the number of the first operator that ran otherwise or gave another shape; None when all agree.

    With `partial`, `nodes` is what ran before a failure, and the number of the operator after it is returned.
    """
    used = {v.index for n in graph.nodes for v in n.inputs()} | {v.index for v in graph.outputs}
    expected = [(i, n) for i, n in enumerate(graph.nodes) if n.op not in _LAYOUT]
    present = [n for n in nodes if n.op not in _LAYOUT]
    for (number, wanted), found in zip(expected, present, strict=False):
        if wanted.op != found.op or len(wanted.outputs) != len(found.outputs):
            return number
        if _numbers(wanted) != _numbers(found):
            return number
        for a, b in zip(wanted.outputs, found.outputs, strict=True):
            if a is not None and a.index in used and (b is None or predicted[a.index] != b.shape):
                return number
    if len(present) != len(expected) or partial:
        return expected[min(len(present), len(expected) - 1)][0]
    return None


def _numbers(node: Node) -> list[float]:
    """Return the numbers that an operator computes with; sizes and axes are not among them."""
    whole_too = node.op in ("add", "sub", "rsub", "mul", "div", "pow", "floor_divide", "remainder")
    given = node.args.values()
    return [float(a) for a in given if isinstance(a, float) or (whole_too and type(a) is int)]


def _failing(coupling: Coupling, keep: Keep, graph: Graph, place: int, path: str) -> int:
    """Return the operator that most likely failed: the first that loses positions since the last that ran well."""
    first = place
    while first > 0 and graph.nodes[first - 1].op in _LAYOUT:
        first -= 1
    for number in range(first, place + 1):
        if graph.nodes[number].module == path and _families_at(coupling, keep, graph.nodes[number]):
            return number
    return place


def _blamed(coupling: Coupling, keep: Keep, node: Node) -> list[str]:
    """Return the families that meet at the failing operator, there and at the same place of like modules."""
    graph = coupling.graph
    number = graph.nodes.index(node)
    places = [number, *range(number - 1, -1, -1)]
    for place in places:
        names = _families_at(coupling, keep, graph.nodes[place])
        if names:
            break
    else:
        return list(keep)
    model_class = type(graph.model.get_submodule(node.module))
    key = _relative(graph, place)
    for other, candidate in enumerate(graph.nodes):
        alike = candidate.op == graph.nodes[place].op and other != place and _relative(graph, other) == key
        if alike and type(graph.model.get_submodule(candidate.module)) is model_class:
            names |= _families_at(coupling, keep, candidate)
    return sorted(names)


def _relative(graph: Graph, place: int) -> int:
    """Return how many operators of the same module ran directly before this one."""
    module, count = graph.nodes[place].module, 0
    while place - count - 1 >= 0 and graph.nodes[place - count - 1].module == module:
        count += 1
    return count


def _families_at(coupling: Coupling, keep: Keep, node: Node) -> set[str]:
    values = [*node.inputs(), *(o for o in node.outputs if o is not None)]
    return coupling.families_on(values) & set(keep)


@contextlib.contextmanager
def tried_on(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Give the model the shape of a plan meanwhile, with tensors that hold no numbers; everything is put back after."""
    made: dict[int, Tensor] = {}
    for name, tensor in stored_tensors(model).items():
        if name in plan.shapes:
            empty = torch.empty(plan.cut_shape(name), dtype=tensor.dtype, device="meta")
            made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    named = {*plan.attributes, *plan.sizes}
    before = []
    for path, module in model.named_modules():
        stores = [*module._parameters.values(), *module._buffers.values()]
        if path in named or any(id(t) in made for t in stores):
            before.append((module, type(module), dict(vars(module)), dict(module._parameters), dict(module._buffers)))
    try:
        put(model, made)
        plan.set_numbers(model)
        yield
    finally:
        for module, kind, attributes, parameters, buffers in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
