"""The neutral form of a network: values with shapes, and ATen operators between them, whatever they were read from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of the network.

    Attributes:
        index: number in the graph, in order of appearance.
        shape: its shape for the example the graph was read with.
        kind: "input", "parameter", "buffer", "constant" (made outside the graph, not registered) or "activation".
        name: name in `named_parameters` / `named_buffers` (of an initialiser in ONNX); "" otherwise.
        floating: whether its dtype is floating point or complex.
        memory: number of the memory it lies in; values with the same one are views of each other. 0: not known.
    """

    index: int
    shape: tuple[int, ...]
    kind: str = "activation"
    name: str = ""
    floating: bool = True
    memory: int = 0

    @property
    def stored(self) -> bool:
        """Whether the model stores it, so that a plan can slice it."""
        return self.kind in ("parameter", "buffer")


@dataclass(eq=False, slots=True)
class Node:
    """One operator call.

    Attributes:
        op: ATen name without overload, e.g. "convolution"; operators of other libraries keep "library.name".
        args: arguments by the names of the ATen schema; tensors are `Value`s, lists may hold them.
        outputs: the tensors it returned, in order (None for missing ones).
        module: path of the innermost module that was running.
        inplace: whether it wrote into its first argument.
        spelled: name of the Python call it came from, if that takes sizes or counts (see `prunus.graph.sizes`).
        training: whether it ran in the additional pass in train mode.
    """

    op: str
    args: dict[str, Any]
    outputs: tuple[Value | None, ...]
    module: str = ""
    inplace: bool = False
    spelled: str = ""
    training: bool = False

    def inputs(self) -> Iterator[Value]:
        """Yield every tensor argument, lists flattened."""
        for argument in self.args.values():
            if isinstance(argument, Value):
                yield argument
            elif isinstance(argument, list | tuple):
                yield from values_in(argument)

    def __str__(self) -> str:
        return f"{self.op} in {self.module or 'the model itself'}"


@dataclass(eq=False, slots=True)
class Call:
    """A Python call that spells sizes out (`x.view(2, 3)`), by which a size fixed in code can be found again.

    Attributes:
        module: path of the innermost module that was running.
        number: name of the function, and how many calls of it the module had made in this forward, itself included,
            such as "view.2".
        place: which of the tensors it returned.
        value: that tensor.
        adapts: axes whose size was left open (-1) and follows the others.
        source: the tensor that was sliced or averaged.
        ranges: (axis, start, stop) of the slices of `source` that were spelled as numbers.
        averaged: axes of `source` over which a mean or the statistics of a norm were taken.
    """

    module: str
    number: str
    place: int
    value: Value
    adapts: frozenset[int] = frozenset()
    source: Value | None = None
    ranges: tuple[tuple[int, int, int], ...] = ()
    averaged: tuple[int, ...] = ()


@dataclass(eq=False)
class Graph:
    """Values and operators in the order of execution.

    Attributes:
        values: every tensor.
        nodes: every operator call.
        outputs: tensors the model returned; their shapes must not change.
        source: "meta", "real" or "onnx": how it was read.
        notes: what the reader of a report should know, such as control flow that depends on data.
        calls: Python calls that spell sizes out.
        train_too: whether the operators of a pass in train mode follow those in eval mode.
        model, example: what it was read from, where that was a module.
    """

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    source: str = "meta"
    notes: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    train_too: bool = False
    model: Any = None
    example: Any = None

    def value(self, shape: tuple[int, ...], kind: str = "activation", name: str = "", floating: bool = True) -> Value:
        """Add a tensor."""
        made = Value(len(self.values), tuple(int(s) for s in shape), kind, name, floating)
        self.values.append(made)
        return made

    @property
    def stored(self) -> Mapping[str, Value]:
        """Parameters and buffers the network used, by name."""
        return {v.name: v for v in self.values if v.stored}


def values_in(argument: Any) -> Iterator[Value]:
    """Yield the values inside an argument: itself, or the members of a list or tuple."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from values_in(item)
