"""What a network costs: parameters, multiply-accumulates and bytes; time comes from `prunus.measure.latency`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

from prunus.errors import InvalidValue, MaskMismatch
from prunus.measure.forwarding import call, device_of, evaluating, first_example, to_device
from prunus.measure.latency import Latency, latency
from prunus.parameters import unwrap

__all__ = [
    "Count",
    "Latency",
    "LayerCost",
    "count",
    "dense_bytes",
    "effective_macs",
    "latency",
    "layer_costs",
    "own_macs",
    "packed_bytes",
    "total_macs",
]


@dataclass(frozen=True)
class LayerCost:
    """Cost of one weight tensor.

    Attributes:
        parameters: number of weights in the tensor (biases are not part of it).
        macs: multiply-accumulates that one example spends on it, all uses together.
    """

    parameters: int
    macs: int

    @property
    def positions(self) -> int:
        """How often each weight is used for one example."""
        return self.macs // self.parameters if self.parameters else 0


@dataclass(frozen=True)
class Count:
    """Numbers of parameters, tied ones counted once.

    Attributes:
        parameters: all parameters of the model.
        nonzeros: all parameters less those a mask removes. A weight that merely happens to be zero is counted.
        masked: parameters of the tensors that have a mask.
        masked_kept: how many of those the masks keep.
    """

    parameters: int
    nonzeros: int
    masked: int
    masked_kept: int


def layer_costs(model: nn.Module, example: Any) -> dict[str, LayerCost]:
    """Return the cost of every weight tensor that multiplies activations, keyed by parameter name.

    One forward pass of a single example is observed through hooks. A weight tensor costs positions x numel: a linear
    layer is applied at every leading position, a convolution at every output position, a transposed convolution at
    every input position, a recurrent layer at every time step, an attention projection at every token; an embedding is
    looked up and costs nothing. Modules that are called several times and tensors shared by several modules
    accumulate under the first name of the tensor. Products between activations (attention scores) have no weight and
    are not counted here; `total_macs` counts them. Layers that the example does not reach are listed with 0 MACs.

    Args:
        model: observed in eval mode; modes are restored.
        example: a tensor with a batch axis in front, a tuple of arguments or a mapping of keyword arguments; only its
            first row is used.

    Returns:
        Parameter name (as in `named_parameters`) -> LayerCost, in the order of the model.

    Raises:
        InvalidValue: the example has no rows.
    """
    model = unwrap(model)
    names = {id(p): name for name, p in model.named_parameters()}
    used: dict[str, int] = {}
    sizes: dict[str, int] = {}

    def observer(prefix: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            for attribute, macs in _macs(module, args, kwargs, output).items():
                used[_name(names, module, prefix, attribute)] += macs

        return hook

    with ExitStack() as stack:
        for prefix, module in model.named_modules():
            for attribute, weight in _weights(module):
                name = _name(names, module, prefix, attribute)
                used.setdefault(name, 0)
                sizes[name] = weight.numel()
            if any(True for _ in _weights(module)):
                handle = module.register_forward_hook(observer(prefix), with_kwargs=True)
                stack.callback(handle.remove)
        _observe(model, example)
    return {name: LayerCost(sizes[name], macs) for name, macs in used.items()}


def total_macs(model: nn.Module, example: Any) -> int:
    """Return the multiply-accumulates of one example, measured operator by operator.

    Half of what `torch.utils.flop_counter` counts: matrix products, convolutions and attention, including products
    between activations. Element-wise work is not counted. Fused recurrent and attention kernels are switched off
    while counting, because the counter does not look inside them.

    Args:
        model: observed in eval mode; modes are restored.
        example: as in `layer_costs`.

    Raises:
        InvalidValue: the example has no rows.
    """
    with FlopCounterMode(display=False) as counter:
        _observe(unwrap(model), example)
    return counter.get_total_flops() // 2


def own_macs(model: nn.Module, example: Any) -> dict[str, int]:
    """Return what `total_macs` counts by path of the module that spends it, without what its submodules spend.

    Args and errors as for `total_macs`.

    Returns:
        Path (as in `named_modules`) -> multiply-accumulates, where there are any; they add up to `total_macs`.
    """
    model = unwrap(model)
    with FlopCounterMode(display=False) as counter:
        _observe(model, example)
    root = type(model).__name__
    found = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    total = counter.get_total_flops() // 2
    paths = [path for path, _ in model.named_modules() if path]
    inside = {path: found[f"{root}.{path}"] for path in paths if f"{root}.{path}" in found}
    own = {"": total} | inside
    for path, macs in inside.items():
        above = path.rpartition(".")[0]
        while above and above not in inside:
            above = above.rpartition(".")[0]
        own[above] -= macs
    if min(own.values()) < 0:  # a module that is called by another than the one it belongs to
        return {"": total} if total else {}
    return {path: macs for path, macs in own.items() if macs}


def effective_macs(costs: Mapping[str, LayerCost], densities: Mapping[str, float]) -> int:
    """Return the multiply-accumulates left when each tensor keeps a share of its weights.

    Exact for masks on single weights: every kept weight is used as often as before. Whether hardware turns it into
    time is another question, see `prunus.measure.latency`.

    Args:
        costs: result of `layer_costs`.
        densities: parameter name -> share of weights kept, between 0 and 1; tensors that are not named are dense.

    Raises:
        InvalidValue: a density outside [0, 1], or a name without a cost.
    """
    for name, density in densities.items():
        if not 0.0 <= density <= 1.0:
            raise InvalidValue(f"the density of {name!r} must lie in [0, 1], got {density!r}.")
        if name not in costs:
            raise InvalidValue(f"there is no cost for {name!r}; known: {', '.join(costs) or 'none'}.")
    return sum(round(cost.macs * densities.get(name, 1.0)) for name, cost in costs.items())


def count(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Count:
    """Count parameters, before and after explicit masks (weights that are zero by chance are not pruned).

    Args:
        model: any module; tied parameters count once.
        masks: parameter name -> bool tensor, True = kept.

    Raises:
        MaskMismatch: a mask has no parameter of its name and shape.
    """
    checked = _checked(model, masks)
    total = sum(p.numel() for p in model.parameters())
    masked = sum(mask.numel() for mask in checked.values())
    kept = sum(int(mask.sum()) for mask in checked.values())
    return Count(total, total - masked + kept, masked, kept)


def dense_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers of `model`, shared ones counted once."""
    return sum(t.numel() * t.element_size() for t in _stored(model).values())


def packed_bytes(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Return the bytes when each masked tensor is stored as one bit per weight and the kept values.

    Everything else is stored dense. With w bytes per weight this pays as soon as more than 1 / (8 w) of a tensor is
    pruned (3.1 % in float32). Names, shapes and file headers are not counted.

    Args:
        model: any module.
        masks: parameter name -> bool tensor, True = kept.

    Raises:
        MaskMismatch: a mask has no parameter of its name and shape.
    """
    checked = _checked(model, masks)
    total = 0
    for name, tensor in _stored(model).items():
        if name in checked:
            total += (tensor.numel() + 7) // 8 + int(checked[name].sum()) * tensor.element_size()
        else:
            total += tensor.numel() * tensor.element_size()
    return total


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Return what a state dict holds, every tensor once, under its first name."""
    seen: dict[int, str] = {}
    unique: dict[str, Tensor] = {}
    for name, tensor in unwrap(model).state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen[id(tensor)] = name
            unique[name] = tensor
    return unique


def _checked(model: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the masks under the first names of their parameters, each tied parameter once."""
    if not masks:
        return {}
    model = unwrap(model)
    first = {id(p): name for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    checked: dict[str, Tensor] = {}
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            found = "no such parameter" if parameter is None else f"a parameter of shape {tuple(parameter.shape)}"
            raise MaskMismatch(f"mask {name!r} of shape {tuple(mask.shape)} meets {found} in the model.")
        if mask.dtype != torch.bool:
            raise MaskMismatch(f"mask {name!r} must be bool (True = kept), it is {mask.dtype}.")
        known = checked.setdefault(first[id(parameter)], mask)
        if known is not mask and not torch.equal(known, mask):
            raise MaskMismatch(f"{name!r} is tied to {first[id(parameter)]!r}, but their masks differ.")
    return checked


@contextmanager
def _unfused() -> Iterator[None]:
    """Switch off kernels that hide products: fused attention, the transformer fast path, oneDNN recurrence."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.enabled = onednn


def _observe(model: nn.Module, example: Any) -> None:
    """Run the first row of `example` through the model, unfused, in eval mode and without gradients."""
    inputs = to_device(first_example(example), device_of(model))
    # no_grad, not inference_mode: under the latter some products reach the flop counter undecomposed.
    with evaluating(model), torch.no_grad(), _unfused():
        call(model, inputs)


def _name(names: Mapping[int, str], module: nn.Module, prefix: str, attribute: str) -> str:
    """Return the first name of a weight in the model, also when it is tied or parametrised."""
    owner: Any = module
    *path, last = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    parameter = owner._parameters.get(last)
    if parameter is None and hasattr(owner, "parametrizations") and last in owner.parametrizations:
        original = getattr(owner.parametrizations[last], "original", None)
        parameter = owner.parametrizations[last].original0 if original is None else original
    full = f"{prefix}.{attribute}" if prefix else attribute
    return names.get(id(parameter), full)


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (attribute, tensor) of the weights that a module of a known kind multiplies with."""
    if isinstance(module, nn.MultiheadAttention):
        for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(module, attribute, None) is not None:
                yield attribute, getattr(module, attribute)
        yield "out_proj.weight", module.out_proj.weight
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        for attribute, parameter in module.named_parameters(recurse=False):
            if attribute.startswith("weight"):
                yield attribute, parameter
    elif isinstance(module, nn.Bilinear):
        yield "weight", module.weight
    else:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2:
            yield "weight", weight


def _macs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> dict[str, int]:
    """Return attribute -> multiply-accumulates of one call of a module, for all rows it was given."""
    if isinstance(module, nn.MultiheadAttention):
        return _attention_macs(module, args, kwargs)
    first: Any = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(module, nn.RNNBase):
        steps = first.data.shape[0] if isinstance(first, PackedSequence) else first.numel() // module.input_size
        return {name: steps * weight.numel() for name, weight in _weights(module)}
    if isinstance(module, nn.RNNCellBase):
        rows = first.numel() // module.input_size
        return {name: rows * weight.numel() for name, weight in _weights(module)}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or not isinstance(output, Tensor):
        return {}
    weight = next(tensor for _, tensor in _weights(module))
    if isinstance(module, _ConvTransposeNd):
        return {"weight": first.numel() // module.in_channels * weight.numel()}
    if isinstance(module, _ConvNd):
        return {"weight": output.numel() // module.out_channels * weight.numel()}
    if isinstance(module, nn.Bilinear):
        return {"weight": output.numel() // module.out_features * weight.numel()}
    # Linear layers and look-alikes (a (in, out) weight behind another class): both ends must fit the weight.
    if weight.ndim == 2 and isinstance(first, Tensor) and first.ndim and output.ndim:
        ends = (first.shape[-1], output.shape[-1])
        if ends in ((weight.shape[1], weight.shape[0]), (weight.shape[0], weight.shape[1])):
            return {"weight": output.numel() // output.shape[-1] * weight.numel()}
    return {}


def _attention_macs(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Return the cost of the four projections; query, key and value may have different lengths."""
    query, key, value = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key", "value")))
    width = module.embed_dim
    queries, keys, values = (
        query.numel() // width,
        key.numel() // (module.kdim or width),
        value.numel() // (module.vdim or width),
    )
    macs = {"out_proj.weight": queries * width * width}
    if module.in_proj_weight is not None:
        macs["in_proj_weight"] = (queries + keys + values) * width * width
    else:
        macs["q_proj_weight"] = queries * width * width
        macs["k_proj_weight"] = keys * (module.kdim or width) * width
        macs["v_proj_weight"] = values * (module.vdim or width) * width
    return macs
