"""Read a module's graph by running its own forward and writing down every ATen operator it dispatches.

Parameters are swapped for tensors on the meta device while the forward runs, so nothing is computed and nothing is
allocated; frozen models, models on the meta device and models on an accelerator are read alike. A forward that needs
real numbers (it branches on values, or mixes in tensors the model does not register) is run once for real instead.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from prunus.errors import InvalidValue, Unsupported
from prunus.graph.attention import headwise
from prunus.graph.edit import parameters_and_buffers
from prunus.graph.ir import Call, Graph, Node, Value
from prunus.graph.sizes import averaged_axes, left_open, ranges_of, spells
from prunus.parameters import unwrap

_QUIET = {"device", "empty_strided", "sym_size", "sym_stride", "sym_numel", "is_contiguous"}
_SCHEMA_NAMES: dict[Any, tuple[str, ...]] = {}


def _argument_names(function: Any) -> tuple[str, ...]:
    names = _SCHEMA_NAMES.get(function)
    if names is None:
        names = _SCHEMA_NAMES[function] = tuple(a.name for a in function._schema.arguments)
    return names


_UNARY = {"relu", "relu6", "silu", "gelu", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu"}


def _shortcut(name: str, args: Any) -> Any:
    """Return the result of common operators on meta tensors, whose own shape functions are slow; None for others."""
    if not args or not isinstance(args[0], Tensor):
        return _joined(args[0], args[1] if len(args) == 2 else 0) if name == "cat" and len(args) <= 2 else None
    first = args[0]
    if name in _UNARY:
        return first.new_empty(first.shape)
    if name.endswith("_") and name[:-1] in _UNARY:
        return first
    if name.removesuffix("_") in ("add", "sub", "mul", "div") and len(args) == 2:
        return _broadcast(first, args[1], inplace=name.endswith("_"))
    if name == "native_batch_norm":
        return first.new_empty(first.shape), first.new_empty(0), first.new_empty(0)
    if name == "native_layer_norm":
        over = tuple(args[1])
        leading = first.shape[: first.ndim - len(over)]
        if tuple(first.shape) == (*leading, *over) and all(t is None or tuple(t.shape) == over for t in args[2:4]):
            statistics = (*leading, *(1 for _ in over))
            return first.new_empty(first.shape), first.new_empty(statistics), first.new_empty(statistics)
    if name == "addmm":
        one, other = args[1], args[2]
        alike = first.dtype == one.dtype == other.dtype
        if alike and one.shape[1] == other.shape[0] and tuple(first.shape) == (other.shape[1],):
            return first.new_empty((one.shape[0], other.shape[1]))
    return None


def _joined(parts: list[Tensor], axis: int) -> Tensor | None:
    """Return the shape of a concatenation as an empty tensor, if it is a plain case."""
    first = parts[0]
    axis = axis % max(1, first.ndim)
    for part in parts:
        others = [a == b or i == axis for i, (a, b) in enumerate(zip(part.shape, first.shape, strict=False))]
        if part.dtype != first.dtype or part.ndim != first.ndim or not all(others):
            return None
    return first.new_empty([sum(p.shape[axis] for p in parts) if i == axis else n for i, n in enumerate(first.shape)])


def _broadcast(first: Tensor, second: Any, *, inplace: bool) -> Tensor | None:
    """Return the shape of elementwise arithmetic as an empty tensor, if it is a plain case."""
    if not first.is_floating_point():
        return None
    if isinstance(second, Tensor):
        if second.dtype != first.dtype or second.device != first.device:
            return None
        shape = first.shape if second.shape == first.shape else torch.broadcast_shapes(first.shape, second.shape)
    elif isinstance(second, float):
        shape = first.shape
    else:
        return None
    if inplace:
        return first if shape == first.shape else None
    return first.new_empty(shape)


def _attended(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any) -> Tensor | None:
    """Return the shape of plain attention as an empty tensor; None where batches or heads are broadcast."""
    if attn_mask is not None or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return None
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2] or query.dtype != value.dtype:
        return None
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


class _Recorder(TorchDispatchMode):
    """Writes each dispatched operator into a graph; tensors are known by identity and kept alive meanwhile."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.known: dict[int, Value] = {}
        self.alive: list[Tensor] = []
        self.path: list[str] = [""]
        self.counters: list[Counter[str]] = [Counter()]
        self.paused = 0
        self.spelled = ""
        self.training = False

    def register(self, tensor: Tensor, value: Value) -> Value:
        if tensor.layout == torch.strided:
            value.memory = tensor.untyped_storage()._cdata
        self.known[id(tensor)] = value
        self.alive.append(tensor)
        return value

    def look_up(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            value = self.known.get(id(item))
            if value is None:
                floating = item.is_floating_point() or item.is_complex()
                value = self.register(item, self.graph.value(tuple(item.shape), "constant", floating=floating))
            return value
        if isinstance(item, list | tuple):
            return [self.look_up(i) for i in item]
        return item

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return function(*args, **kwargs)
        # Arguments are read first: an operator in place makes its tensor a new value.
        named = {n: self.look_up(a) for n, a in zip(_argument_names(function), args, strict=False)}
        named.update((n, self.look_up(a)) for n, a in kwargs.items())
        name = function.__name__.partition(".")[0]
        result = _shortcut(name, args) if self.graph.source == "meta" and not kwargs else None
        if result is None:
            result = function(*args, **kwargs)
        if name in _QUIET:
            return result
        inplace = function._schema.is_mutable
        returned = result if isinstance(result, list | tuple) else (result,)
        outputs: list[Value | None] = []
        for item in returned:
            if isinstance(item, Tensor):
                floating = item.is_floating_point() or item.is_complex()
                outputs.append(self.register(item, self.graph.value(tuple(item.shape), floating=floating)))
            else:
                outputs.append(None)
        if function.namespace != "aten":
            name = f"{function.namespace}.{name}"
        if inplace and name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        self.graph.nodes.append(Node(name, named, tuple(outputs), self.path[-1], inplace, self.spelled, self.training))
        return result


class _Functions(TorchFunctionMode):
    """Sees Python's own calls: keeps attention one operator, and notes where sizes are spelled out.

    The decompositions of scaled-dot-product attention differ by device and bake the scale in.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if spells(function, args, kwargs):
            name, outer = function.__name__, recorder.spelled
            for frame in recorder.counters:
                frame[name] += 1
            number = f"{name}.{recorder.counters[-1][name]}"
            recorder.spelled = name
            try:
                result = function(*args, **kwargs)
            finally:
                recorder.spelled = outer
            source: Value | None = None
            ranges: tuple[tuple[int, int, int], ...] = ()
            averaged = averaged_axes(function, args, kwargs)
            if name == "__getitem__":
                ranges = tuple(ranges_of(*args))
            if ranges or averaged:
                source = recorder.known.get(id(args[0]))
            for place, item in enumerate(result if isinstance(result, list | tuple) else [result]):
                value = recorder.known.get(id(item))
                if value is not None:
                    adapts = left_open(function, args, kwargs)
                    call = Call(recorder.path[-1], number, place, value, adapts, source, ranges, averaged)
                    recorder.graph.calls.append(call)
            return result
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        named = {n: recorder.look_up(a) for n, a in zip(names, args, strict=False)}
        named.update((n, recorder.look_up(a)) for n, a in kwargs.items())
        recorder.paused += 1
        try:
            result = _attended(*args, **kwargs) if recorder.graph.source == "meta" else None
            result = function(*args, **kwargs) if result is None else result
        finally:
            recorder.paused -= 1
        value = recorder.register(result, recorder.graph.value(tuple(result.shape)))
        recorder.graph.nodes.append(Node("scaled_dot_product_attention", named, (value,), recorder.path[-1]))
        return result


@contextlib.contextmanager
def swapped(model: nn.Module, replacement: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in place of parameters and buffers, without hooks or checks, and put the old ones back after."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    recurrent: list[tuple[nn.RNNBase, list[Any]]] = []
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            for store in (module._parameters, module._buffers):
                for name, old in store.items():
                    full = f"{path}.{name}" if path else name
                    if old is not None and full in replacement:
                        undo.append((store, name, old))
                        store[name] = replacement[full]  # type: ignore[assignment]
            if isinstance(module, nn.RNNBase):
                recurrent.append((module, module._flat_weights))
                names = module._flat_weights_names
                module._flat_weights = [getattr(module, n) if hasattr(module, n) else None for n in names]
        yield
    finally:
        for store, name, old in reversed(undo):
            store[name] = old
        for module, flat in recurrent:
            module._flat_weights = flat


@contextlib.contextmanager
def _paths(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Keep `recorder.path` at the module that is running."""

    def enter(path: str, *_: Any) -> None:
        recorder.path.append(path)
        recorder.counters.append(Counter())

    def leave(*_: Any) -> None:
        recorder.path.pop()
        recorder.counters.pop()

    # Registering two hooks per module by handle takes as long as the forward itself, so they are put in directly,
    # under a key that nobody else can have.
    key: Any = object()
    modules = list(model.named_modules())
    try:
        for path, module in modules:
            module._forward_pre_hooks[key] = partial(enter, path)
            module._forward_hooks[key] = leave
        yield
    finally:
        for _, module in modules:
            module._forward_pre_hooks.pop(key, None)
            module._forward_hooks.pop(key, None)


@contextlib.contextmanager
def plain_forward(model: nn.Module, *, train: bool = False) -> Iterator[None]:
    """Eval (or train) mode without gradients and without the fused paths that hide a module's parts."""
    modes = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.train(train)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of a call: a tensor, a tuple or list of arguments, a mapping of keywords, or a Batch.

    Raises:
        InvalidValue: there is no example.
    """
    if example is None:
        raise InvalidValue("structured pruning reads the network with one example input; pass example=.")
    if hasattr(example, "args") and hasattr(example, "kwargs"):
        return tuple(example.args), dict(example.kwargs)
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return (example,), {}


class Failed(Unsupported):
    """The forward could not be run; `graph` holds what was recorded before, `path` the module that failed."""

    graph: Graph
    path: str


def run_once(model: nn.Module, example: Any, *, meta: bool, train_too: bool = False) -> tuple[Graph, Any]:
    """Record one forward pass in eval mode and return (graph, output); raises `Failed` from what the forward raised.

    Args:
        model: the module.
        example: its input.
        meta: compute shapes only.
        train_too: add the operators of a second pass in train mode, for modules that run only then (auxiliary heads).
    """
    args, kwargs = arguments(example)
    graph = Graph(source="meta" if meta else "real", train_too=train_too)
    recorder = _Recorder(graph)
    replacement = _stand_ins(model, graph, recorder, meta)

    def moved(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        item = item.to("meta") if meta else item.detach().clone()
        recorder.register(item, graph.value(tuple(item.shape), "input", floating=item.is_floating_point()))
        return item

    output: Any = None
    for train in (False, True) if train_too else (False,):
        recorder.training = train
        inputs = tree_map(moved, (args, kwargs))
        try:
            with (
                plain_forward(model, train=train),
                headwise(model),
                swapped(model, replacement),
                _paths(model, recorder),
                recorder,
                _Functions(recorder),
            ):
                output = model(*inputs[0], **inputs[1])
        except Exception as error:
            failed = Failed(f"{type(error).__name__} in {recorder.path[-1] or type(model).__name__}: {error}")
            failed.graph, failed.path = graph, recorder.path[-1]
            raise failed from error
        known = (recorder.known.get(id(item)) for item in tree_flatten(output)[0] if isinstance(item, Tensor))
        graph.outputs += [v for v in dict.fromkeys(known) if v is not None and v not in graph.outputs]
    return graph, output


def _stand_ins(model: nn.Module, graph: Graph, recorder: _Recorder, meta: bool) -> dict[str, Tensor]:
    """Make every stored tensor a value of the graph; return its stand-ins without numbers by all names if `meta`."""
    replacement: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    parameters, buffers = parameters_and_buffers(model, every_name=True)
    for kind, tensors in (("parameter", parameters), ("buffer", buffers)):
        for name, tensor in tensors.items():
            first = names.setdefault(id(tensor), name)
            if meta and first == name:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                replacement[name] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
            elif meta:
                replacement[name] = replacement[first]
            if first == name:
                floating = tensor.is_floating_point() or tensor.is_complex()
                value = graph.value(tuple(tensor.shape), kind, name, floating)
                recorder.register(replacement[name] if meta else tensor, value)
    return replacement


def record(model: nn.Module, example: Any) -> Graph:
    """Return the graph of `model` for one example input; the model is left as it was.

    Args:
        model: any module; DDP and torch.compile wrappers are looked through.
        example: a tensor, a tuple of arguments, a mapping of keywords or a `Batch`; values matter only to models whose
            forward looks at them.

    Raises:
        InvalidValue: the example is missing or the model cannot run it.
        Unsupported: the module is compiled by TorchScript or quantised, so its parts cannot be edited.
    """
    model = unwrap(model)
    if not isinstance(model, nn.Module):
        raise InvalidValue(f"a torch.nn.Module is pruned, not {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise Unsupported("TorchScript modules cannot be edited; prune the Python module and script the result.")
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise Unsupported(f"{path or 'the model'} is a quantised module; prune before quantising.")
    _check_example(model, example)
    try:
        graph, _ = run_once(model, example, meta=True)
        graph = _with_train_pass(graph, model, example)
        graph.model, graph.example = model, example
        return graph
    except Failed as error:
        if any(p.is_meta for p in (*model.parameters(), *model.buffers())):
            raise InvalidValue(f"the model could not run the example on the meta device: {error}") from error
        reason = str(error)
    try:
        graph, _ = run_once(model, example, meta=False)
    except Failed as error:
        raise InvalidValue(f"the model cannot run the example input: {error}") from error.__cause__
    graph.model, graph.example = model, example
    graph.notes.append(f"read from a real forward pass, because one without numbers failed ({reason.splitlines()[0]})")
    if any(n.op in ("_local_scalar_dense", "nonzero", "masked_select") for n in graph.nodes):
        graph.notes.append("the forward looks at values; the graph is that of this example")
    return graph


def _check_example(model: nn.Module, example: Any) -> None:
    named = list(model.named_parameters())
    for name, parameter in named:
        if isinstance(parameter, UninitializedParameter):
            raise InvalidValue(f"parameter {name!r} is lazy and has no shape yet; run one forward pass first.")
    inputs = [i for i in tree_flatten(arguments(example))[0] if isinstance(i, Tensor)]
    for given in inputs:
        if given.is_meta and named and not any(t.is_meta for _, t in named):
            raise InvalidValue("the example is on the meta device and the model is not; give an example with numbers.")


def _with_train_pass(graph: Graph, model: nn.Module, example: Any) -> Graph:
    """Return the graph with a train-mode pass if some parameters are reached by none in eval mode."""
    used = {v.index for n in graph.nodes for v in n.inputs()}
    unreached = [v.name for v in graph.values if v.kind == "parameter" and v.index not in used]
    if not unreached:
        return graph
    try:
        return run_once(model, example, meta=True, train_too=True)[0]
    except Failed as error:
        graph.notes.append(
            f"{len(unreached)} parameters are not used in eval mode (first {unreached[0]!r}), and a pass in train mode "
            f"failed ({str(error).splitlines()[0]}); what reads cut channels only in train mode was not seen"
        )
        return graph
