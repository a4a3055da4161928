"""Walks a graph in order, applies the rule of each operator, and collects what ties axes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prunus.graph.elements import Elements, Ids
from prunus.graph.ir import Graph, Node, Value, values_in

Axes = list[Ids | None]
Rule = Callable[["Coupler", Node], None]
RULES: dict[str, Rule] = {}
COUNTABLE = ("mean", "layer_norm", "rms_norm", "batch_norm")  # calls whose statistics may count what was removed
LARGEST_AXIS = 1 << 22  # positions of a flattened axis beyond which it is left alone


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


class Coupler:
    """What is known about every value of a graph while its operators are visited in order.

    Attributes:
        elements: facts collected so far.
        axes: per value, the elements of each axis, or None where an axis is never cut.
        zero: per value and axis, whether the value is zero at positions that a mask removes. Weights are zeroed by the
            mask, so operators that keep zero carry this on; sums over an axis are exact only where it holds.
        origin: per value, which axis of which stored tensor each axis is, for weights and their transposes.
        role: what the axis of a stored tensor is to its operator: "output", "input", "bias", "affine" or "other".
        constant: values computed from stored tensors alone.
        costs: multiply-accumulates as (constant, axes): constant times the number of kept positions of each axis.
        norms: what becomes of axes over which statistics are taken (see `prunus.graph.couple.couple`).
        without_rule: operators that have no rule, and where each was met first.
    """

    def __init__(self, graph: Graph, *, norms: str = "whole") -> None:
        self.graph = graph
        self.norms = norms
        self.elements = Elements()
        self.axes: dict[int, Axes] = {}
        self.zero: dict[int, list[bool]] = {}
        self.origin: dict[int, list[tuple[Value, int] | None]] = {}
        self.role: dict[tuple[str, int], str] = {}
        self.constant: set[int] = set()
        self.costs: list[tuple[int, list[Ids]]] = []
        self.without_rule: dict[str, str] = {}
        self.node: Node | None = None

    def run(self) -> None:
        """Visit every operator and fix the outputs."""
        for node in live(self.graph):
            self.node = node
            inputs = list(node.inputs())
            if inputs and all(v.stored or v.index in self.constant or v.kind == "constant" for v in inputs):
                self.constant.update(o.index for o in node.outputs if o is not None)
            handler = RULES.get(node.op, _without_rule)
            if any(a is not None for v in inputs for a in self.of(v)) or node.op in CREATES:
                handler(self, node)
            for output in node.outputs:
                if output is not None and output.index not in self.axes:
                    self.put(output, [None] * len(output.shape))
            if node.inplace:
                self._written(node)
        self.node = None
        for value in self.graph.outputs:
            for ids in self.of(value):
                self.fix(ids, "an output of the model")

    def _written(self, node: Node) -> None:
        """Forget that views of memory are zero where an operator wrote something else into it."""
        written = [o for o in node.outputs if o is not None and o.memory]
        for output in written:
            lost = any(a is not None and not z for a, z in zip(self.axes[output.index], self.zero[output.index]))
            if lost or all(a is None for a in self.axes[output.index]):
                for value in self.graph.values[: output.index]:
                    if value.memory == output.memory and value.index in self.zero:
                        self.zero[value.index] = [False] * len(value.shape)

    def of(self, value: Value) -> Axes:
        """Return the elements of each axis of a value; stored tensors get theirs on first use."""
        found = self.axes.get(value.index)
        if found is None:
            free = value.stored and value.floating
            found = [self.elements.fresh(n) if free and n > 1 else None for n in value.shape]
            self.axes[value.index] = found
            self.zero[value.index] = [free] * len(found)
            if value.stored:
                self.origin[value.index] = [(value, i) for i in range(len(found))]
        return found

    def is_zero(self, value: Value, axis: int) -> bool:
        """Return whether the value is zero at removed positions of this axis."""
        self.of(value)
        return self.zero[value.index][axis]

    def put(
        self,
        value: Value | None,
        axes: Sequence[Ids | None],
        zero: Sequence[bool] | bool = False,
        origin: Sequence[tuple[Value, int] | None] | None = None,
    ) -> None:
        """Set what is known about a result."""
        if value is None:
            return
        self.axes[value.index] = [None if n <= 1 else a for a, n in zip(axes, value.shape, strict=True)]
        self.zero[value.index] = [zero] * len(value.shape) if isinstance(zero, bool) else list(zero)
        if origin is not None:
            self.origin[value.index] = list(origin)

    def same(self, left: Ids | None, right: Ids | None, reason: str) -> Ids | None:
        """Tie two axes; one that meets an axis that cannot be cut is fixed. Return the axis of the result."""
        if left is None or right is None:
            self.fix(left, reason)
            self.fix(right, reason)
            return None
        self.elements.same(left, right)
        return left

    def fix(self, ids: Ids | None, reason: str) -> None:
        """State that an axis is not cut here, and why."""
        if ids is not None:
            where = f" ({self.node})" if self.node is not None else ""
            self.elements.fix(ids, reason + where)

    def fix_all(self, values: Sequence[Value], reason: str) -> None:
        """Fix every axis of several values."""
        for value in values:
            for ids in self.of(value):
                self.fix(ids, reason)

    def statistics(self, value: Value, axis: int, reason: str) -> None:
        """State that a mean or the statistics of a norm are taken over an axis."""
        ids = self.of(value)[axis]
        if ids is None or self.norms == "anew":
            return
        countable = self.node is not None and self.node.spelled in COUNTABLE
        if not (self.norms == "counted" and countable and self.is_zero(value, axis)):
            self.fix(ids, reason)

    def merge(self, parts: Sequence[tuple[Ids | None, int]]) -> Ids | None:
        """Return the elements of axes flattened into one, given (elements, size) of each."""
        if all(ids is None for ids, _ in parts):
            return None
        total = int(np.prod([n for _, n in parts]))
        if total > LARGEST_AXIS:
            for ids, _ in parts:
                self.fix(ids, f"flattened into an axis of {total} positions")
            return None
        flat: Ids | None = None
        size = 1
        for ids, count in parts:
            if flat is None:
                flat = None if ids is None else np.tile(ids, size)
            elif ids is None:
                flat = np.repeat(flat, count)
            else:
                flat = self.elements.product(flat, ids)
            size *= count
        return flat

    def split(self, ids: Ids | None, sizes: Sequence[int]) -> Axes:
        """Return the elements of the axes into which one axis is factored."""
        result: Axes = []
        rest = ids
        for position, size in enumerate(sizes):
            if rest is None:
                result.append(None)
            elif position == len(sizes) - 1:
                result.append(rest)
            else:
                left, rest = self.elements.factor(rest, size)
                result.append(left)
        return result

    def mark(self, value: Value, axis: int, role: str) -> None:
        """Note what the axis of a stored tensor (or of a transpose of one) is to its operator."""
        origin = self.origin.get(value.index)
        if origin is not None and origin[axis] is not None:
            stored, place = origin[axis]  # type: ignore[misc]
            self.role.setdefault((stored.name, place), role)

    def cost(self, constant: int, *axes: tuple[Ids | None, int]) -> None:
        """Count constant x (kept positions of each axis) multiply-accumulates."""
        if self.node is not None and self.node.training:
            return
        for ids, size in axes:
            if ids is None:
                constant *= size
        self.costs.append((constant, [ids for ids, _ in axes if ids is not None]))


def live(graph: Graph) -> list[Node]:
    """Return the operators on which the outputs depend, and those that write in place."""
    needed = {v.index for v in graph.outputs}
    result = []
    for node in reversed(graph.nodes):
        if node.inplace or any(o is not None and o.index in needed for o in node.outputs):
            result.append(node)
            needed.update(v.index for v in node.inputs())
    return result[::-1]


def _without_rule(coupler: Coupler, node: Node) -> None:
    coupler.without_rule.setdefault(node.op, node.module)
    coupler.fix_all(list(node.inputs()), f"no rule for operator {node.op}")


CREATES: set[str] = set()


def tensors(node: Node, *names: str) -> list[Value]:
    """Return the values among the named arguments, lists flattened."""
    return [v for n in names for v in values_in(node.args.get(n))]


def dims(node: Node, name: str, rank: int, default: Any = None) -> list[int]:
    """Return an argument that names axes as non-negative numbers; None or an empty list means all."""
    given = node.args.get(name, default)
    if given is None or given == []:
        return list(range(rank))
    listed = list(given) if isinstance(given, list | tuple) else [given]
    return [int(d) % rank for d in listed]
