"""Which tensors of a model may be pruned, and how each is laid out: the one place that knows the output axis."""

from __future__ import annotations

import copy
import fnmatch
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from prunus.errors import InvalidValue, NonFinite, NothingPrunable, Unsupported, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where one prunable tensor lives and which of its axes is which.

    Attributes:
        name: the parameter's name in `model.named_parameters()`.
        shape: shape of the tensor.
        kind: "linear", "conv", "conv-transpose", "embedding", "recurrent", "attention", "bilinear" or "other".
        family: the last word of the module path ("q_proj", "conv1"...), or "input-hidden" / "hidden-hidden" /
            "projection" for recurrent tensors; module-family budgets group by it.
        output_axis: axis whose entries each produce one output.
        groups: groups of a convolution (1 otherwise).
        gates: blocks of rows stacked along the output axis (3 for GRU, 4 for LSTM, 3 for packed attention).
        aliases: other names of the same tensor (tied weights).
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "linear"
    family: str = ""
    output_axis: int = 0
    groups: int = 1
    gates: int = 1
    aliases: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of entries of the tensor."""
        return int(torch.Size(self.shape).numel())

    @property
    def outputs(self) -> int:
        """Number of outputs, over all groups."""
        return self.shape[self.output_axis] * (self.groups if self.kind == "conv-transpose" else 1)

    @property
    def inputs(self) -> int:
        """Entries along the input (reduction) axis of one output: input channels per group, not kernel taps."""
        if len(self.shape) < 2:
            return 1
        return self.shape[0] // self.groups if self.output_axis == 1 else self.shape[1]

    def rows(self, tensor: Tensor) -> Tensor:
        """Lay `tensor` (of this shape) out as a matrix (outputs, everything that feeds one output).

        The input axis runs fastest, so N consecutive columns are N consecutive inputs at one kernel tap: the
        layout that N:M hardware reads (channels last). Returns a view where strides allow, else a copy.
        """
        if len(self.shape) == 1:
            return tensor.reshape(-1, 1)
        if self.output_axis == 0:
            return tensor.movedim(1, -1).reshape(self.shape[0], -1)
        grouped = tensor.unflatten(0, (self.groups, -1))  # (groups, inputs, outputs per group, *kernel)
        return grouped.movedim(1, -1).reshape(self.outputs, -1)

    def unrows(self, matrix: Tensor) -> Tensor:
        """Undo `rows`: return a contiguous tensor of this shape from a matrix (outputs, ...)."""
        if len(self.shape) == 1:
            return matrix.reshape(self.shape).contiguous()
        if self.output_axis == 0:
            return matrix.reshape(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1).contiguous()
        kernel = self.shape[2:]
        grouped = matrix.reshape(self.groups, self.shape[1], *kernel, self.inputs).movedim(-1, 1)
        return grouped.reshape(self.shape).contiguous()

    def broadcast_inputs(self, per_input: Tensor) -> Tensor:
        """Spread one number per input feature (shape (all inputs,)) over the tensor, so that shapes match.

        For grouped convolutions entry g * inputs + i of `per_input` belongs to input i of group g.
        """
        per_group = per_input.reshape(self.groups, self.inputs)
        taps = self.size // (self.outputs * self.inputs)
        rows = per_group.repeat_interleave(self.outputs // self.groups, 0)
        return self.unrows(rows.unsqueeze(1).expand(-1, taps, -1).reshape(self.outputs, -1))


@dataclass(frozen=True)
class Prunable(Mapping[str, Address]):
    """The prunable tensors of a model by name, in module order, and why every other tensor was left out."""

    addresses: dict[str, Address]
    skipped: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Address:
        return self.addresses[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.addresses)

    def __len__(self) -> int:
        return len(self.addresses)

    @property
    def total(self) -> int:
        """Number of prunable entries."""
        return sum(a.size for a in self.values())


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module inside DistributedDataParallel, DataParallel or torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def copied(model: nn.Module, replaced: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Return a deep copy of `model`, also where modules carry computed tensors that `copy.deepcopy` refuses.

    Layers under torch.nn.utils.prune, weight_norm or spectral_norm hold their weight as the result of a computation,
    which they repeat before every call; the copy starts from its value.

    Args:
        model: the module to copy.
        replaced: id of a tensor -> the tensor that the copy holds in its place, not copied.
    """
    computed = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and v.grad_fn is not None)
    memo: dict[int, object] = {id(v): v.detach().clone() for v in computed}
    return copy.deepcopy(model, memo | dict(replaced or {}))


_RECURRENT_GATES = {"RNN": 1, "RNNCell": 1, "GRU": 3, "GRUCell": 3, "LSTM": 4, "LSTMCell": 4}
_ZERO_KEEPING = {"_SpectralNorm"}  # parametrizations under which a zero entry stays zero


def _layout(module: nn.Module, tensor_name: str, path: str) -> dict[str, object] | None:
    """Return the layout fields of a module's own tensor, or None when the module is no known layer."""
    family = path.rpartition(".")[2]
    convolution = (nn.modules.conv._ConvNd,)
    transposed = (nn.modules.conv._ConvTransposeNd,)
    if isinstance(module, transposed) and tensor_name == "weight":
        return {"kind": "conv-transpose", "family": family, "output_axis": 1, "groups": module.groups}
    if isinstance(module, convolution) and tensor_name == "weight":
        return {"kind": "conv", "family": family, "groups": module.groups}
    if isinstance(module, nn.Linear) and tensor_name == "weight":
        return {"kind": "linear", "family": family}
    if isinstance(module, nn.Bilinear) and tensor_name == "weight":
        return {"kind": "bilinear", "family": family}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        gates = _RECURRENT_GATES.get(getattr(module, "mode", type(module).__name__).split("_")[0], 1)
        for start, role in (("weight_ih", "input-hidden"), ("weight_hh", "hidden-hidden")):
            if tensor_name.startswith(start):
                return {"kind": "recurrent", "family": role, "gates": gates}
        if tensor_name.startswith("weight_hr"):
            return {"kind": "recurrent", "family": "projection"}
    if isinstance(module, nn.MultiheadAttention):
        if tensor_name == "in_proj_weight":
            return {"kind": "attention", "family": "in_proj", "gates": 3}
        if tensor_name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return {"kind": "attention", "family": tensor_name.removesuffix("_weight")}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and tensor_name == "weight":
        # y = W^T e_token: tokens are the inputs, features the outputs.
        return {"kind": "embedding", "family": family, "output_axis": 1}
    if type(module).__name__ == "Conv1D" and tensor_name == "weight" and hasattr(module, "nf"):
        return {"kind": "linear", "family": family, "output_axis": 1}  # transformers' (in, out) linear
    return None


def _reason_to_skip(parameter: Tensor, layout: dict[str, object] | None, embedded: bool) -> str | None:
    if not parameter.is_floating_point():
        return f"dtype {parameter.dtype} is not floating point (quantised or complex weights cannot be pruned)"
    if parameter.ndim == 0:
        return "a scalar; there is nothing inside it to prune"
    if parameter.numel() == 0:
        return "an empty tensor"
    if parameter.ndim < 2:
        return "a vector (bias or normalisation scale); vectors are never pruned unless included by name"
    if layout is None:
        return "not the weight of a known layer; name it in `include` to prune it with axis 0 as the output"
    if layout["kind"] == "embedding":
        return "an embedding table; name it in `include` to prune it"
    if embedded:
        return "tied to an embedding table; name it in `include` to prune both through the tie"
    return None


class _Patterns:
    """Shell patterns of names; plain names among them are looked up, since there may be as many as tensors."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.plain = {p for p in patterns if not set(p) & set("*?[")}
        self.wild = [p for p in patterns if p not in self.plain]

    def match(self, name: str, aliases: Sequence[str] = ()) -> bool:
        """Return whether some pattern matches the name or an alias of it."""
        every = (name, *aliases)
        return not self.plain.isdisjoint(every) or any(fnmatch.fnmatchcase(n, p) for n in every for p in self.wild)

    def unmatched(self, names: Sequence[str]) -> Iterator[str]:
        """Yield the patterns that match none of the names."""
        yield from sorted(self.plain - set(names))
        for pattern in self.wild:
            if not any(fnmatch.fnmatchcase(n, pattern) for n in names):
                yield pattern


def prunable(
    model: nn.Module,
    *,
    include: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
    empty_ok: bool = False,
) -> Prunable:
    """List the tensors of `model` that may be pruned, with the layout of each.

    By default: weights of linear, convolution (grouped, depthwise, transposed too), bilinear, recurrent and
    attention layers. Biases, normalisation scales, embeddings, tensors tied to an embedding, and tensors of
    unknown modules are left out with a reason; a tied tensor appears once, under its first name.

    Args:
        model: any module; DDP and torch.compile wrappers are looked through.
        include: shell patterns of parameter names to add although they are left out by default.
        exclude: shell patterns of parameter names to leave out.
        empty_ok: return an empty result instead of raising when nothing is prunable.

    Raises:
        NothingPrunable: no tensor is left.
        InvalidValue: a pattern matches no parameter, or lazy parameters are not initialised yet.
        Unsupported: parameters are sharded (FSDP).
    """
    model = unwrap(model)
    include = (include,) if isinstance(include, str) else tuple(include)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            raise InvalidValue(f"parameter {name!r} is lazy and has no shape yet; run one forward pass first.")
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise Unsupported(f"parameter {name!r} is sharded (DTensor); prune before sharding the model.")
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    every_name = [n for group in names.values() for n in group]
    included, excluded = _Patterns(include), _Patterns(exclude)
    for patterns in (included, excluded):
        for pattern in patterns.unmatched(every_name):
            raise InvalidValue(f"pattern {pattern!r} matches no parameter name.{did_you_mean(pattern, every_name)}")

    layouts: dict[int, dict[str, object]] = {}
    embedded: set[int] = set()
    parametrised: dict[int, str] = {}
    for path, module in model.named_modules():
        for tensor_name, parameter in module.named_parameters(recurse=False):
            layout = _layout(module, tensor_name, path)
            if layout is None:
                continue
            if layout["kind"] == "embedding":
                embedded.add(id(parameter))
                layouts.setdefault(id(parameter), layout)
            elif layouts.get(id(parameter), layout)["kind"] == "embedding" or id(parameter) not in layouts:
                layouts[id(parameter)] = layout
        for tensor_name, chain in getattr(module, "parametrizations", {}).items():
            layout = _layout(module, tensor_name, path)
            kinds = [type(p).__name__ for p in chain]
            for part, parameter in chain.named_parameters(recurse=False):
                if part == "original" and layout is not None and set(kinds) <= _ZERO_KEEPING:
                    layouts[id(parameter)] = layout
                else:
                    parametrised[id(parameter)] = ", ".join(kinds)

    found: dict[str, Address] = {}
    skipped: dict[str, str] = {}
    for key, (name, *aliases) in names.items():
        tensor, layout = tensors[key], layouts.get(key)
        tied_to_embedding = key in embedded and layout is not None and layout["kind"] != "embedding"
        reason = _reason_to_skip(tensor, layout, tied_to_embedding)
        if name.endswith("_orig") and name.removesuffix("_orig") + "_mask" in dict(model.named_buffers()):
            reason = "already under torch.nn.utils.prune; call torch.nn.utils.prune.remove on it first"
        elif key in parametrised:
            reason = f"parametrised by {parametrised[key]}, under which a zero need not stay zero; fold it first"
        elif reason is not None and included.match(name, aliases) and tensor.is_floating_point():
            reason = None if tensor.ndim and tensor.numel() else reason
        if reason is None and excluded.match(name, aliases):
            reason = "excluded by name"
        if reason is not None:
            skipped[name] = reason
            continue
        fields = layout if layout is not None else {"kind": "other", "family": name.rpartition(".")[2]}
        found[name] = Address(name=name, shape=tuple(tensor.shape), aliases=tuple(aliases), **fields)  # type: ignore[arg-type]
    if not found and not empty_ok:
        listing = "; ".join(f"{n}: {r}" for n, r in list(skipped.items())[:6]) or "the model has no parameters"
        raise NothingPrunable(f"nothing prunable in {type(model).__name__}. {listing}.")
    return Prunable(found, skipped)


def parameters_of(model: nn.Module, names: Mapping[str, object]) -> dict[str, nn.Parameter]:
    """Return the parameters called `names`, in that order.

    Raises:
        InvalidValue: a name is not a parameter of the model.
    """
    every = dict(unwrap(model).named_parameters(remove_duplicate=False))
    missing = [n for n in names if n not in every]
    if missing:
        raise InvalidValue(f"{missing[0]!r} is not a parameter of the model.{did_you_mean(missing[0], every)}")
    return {n: every[n] for n in names}


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise `NonFinite` naming the first tensor that holds NaN or infinity (`what` is "weight", "score"...)."""
    for name, tensor in tensors.items():
        # A sum is one pass without a temporary of the tensor's size; only a bad or overflowing one is examined.
        if bool(torch.isfinite(tensor.detach().sum())):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NonFinite(
                f"{what} {name!r} has {bad} NaN or infinite of {tensor.numel()} values, so it cannot be ranked; "
                "load sound weights or lower the learning rate, and use float32 for scoring."
            )


def load_exact(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill `model` with a state that holds all of its entries, as one written by the same version of its class.

    Modules that convert older states look at the version beside the tensors, which a file does not carry.
    """
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(versioned)
