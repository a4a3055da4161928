"""Reading a network: which widths and depths can be searched, and what each layer costs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prunus.errors import NothingPrunable
from prunus.graph.couple import Family, couple
from prunus.graph.plan import Plan
from prunus.graph.record import record
from prunus.measure.cost import layer_costs
from prunus.measure.forwarding import call, device_of, evaluating, first_example, to_device
from prunus.structured.tas.sampling import FRACTIONS, depth_choices, width_choices
from prunus.structured.tas.space import Pair, Part, SearchSpace, Stage, Term, Width, first_channels


def search_space(
    model: nn.Module,
    example: Any,
    *,
    fractions: Sequence[float] = FRACTIONS,
    depth: bool = True,
    prunable: Collection[str] | None = None,
    seed: int = 0,
) -> SearchSpace:
    """Find what can be searched in a network.

    A width is searched for every channel family whose channels all come out of convolutions followed by a batch norm:
    the search network writes zeros into channels beyond a width, and zeros must stay zeros until the next convolution
    or linear layer (as they do through ReLU, pooling, residual sums and gates). A depth is searched for every
    `nn.Sequential` of at least two blocks of one class, with convolutions, that from the second block on keep the shape
    and read and write the same families as the first (residual stages).

    Args:
        model: any network; one forward pass is observed.
        example: a batch of inputs.
        fractions: width choices, see `width_choices`.
        depth: whether depths are searched.
        prunable: names of weights that may be cut; None for all.
        seed: of the initial logits.

    Raises:
        NothingPrunable: neither a width nor a depth can be searched.
    """
    coupling = couple(record(model, example))
    pairs = _pairs(model, example)
    able = {f: width_choices(f.size, fractions)[0] for f in coupling.primary() if _searchable(f, pairs, prunable)}
    blocked = Plan.from_keep(coupling, first_channels(able)).blocked
    chosen = [f for f in able if f.size > 1 and f.name not in blocked]
    widths = tuple(Width(f, width_choices(f.size, fractions)) for f in chosen)
    stages = tuple(_stages(model, example, coupling.families, prunable)) if depth else ()
    if not widths and not stages:
        raise NothingPrunable(
            f"{type(model).__name__} has no width or depth to search: widths need convolutions followed by a batch "
            "norm, depths chains of residual blocks."
        )
    parts = {conv: _parts(model, conv, widths) for conv in pairs}
    found = tuple(
        Pair(conv, norm, parts[conv]) for conv, norm in pairs.items() if any(p.width is not None for p in parts[conv])
    )
    return SearchSpace(widths, stages, found, tuple(_terms(model, example, widths, stages)), coupling, seed)


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _pairs(model: nn.Module, example: Any) -> dict[str, str]:
    """Return convolution -> batch norm for those where the one's output is the other's input, each called once."""
    made: list[tuple[Tensor, str]] = []
    found: list[tuple[str, str]] = []
    calls: list[str] = []
    handles = []

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # Keeping the tensor keeps its identity from being given to a later one.
            made.append((output, path))
            calls.append(path)

        return hook

    def match(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.extend((conv, path) for output, conv in made if output is args[0])
            calls.append(path)

        return hook

    for path, module in model.named_modules():
        if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
            handles.append(module.register_forward_hook(note(path)))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(match(path)))
    _run(model, example, handles)
    return {conv: norm for conv, norm in found if calls.count(conv) == calls.count(norm) == 1}


def _run(model: nn.Module, example: Any, handles: list[Any]) -> None:
    """Run the first row of `example` in eval mode, then take the hooks off."""
    try:
        with evaluating(model), torch.no_grad():
            call(model, to_device(first_example(example), device_of(model)))
    finally:
        for handle in handles:
            handle.remove()


def _searchable(family: Family, pairs: Mapping[str, str], prunable: Collection[str] | None) -> bool:
    """Tell whether all channels of a family come out of convolutions followed by a batch norm."""
    norms = set(pairs.values())
    for slot in family.slots:
        owner, role = _owner(slot.tensor), slot.role
        if role == "input":
            fine = True
        elif role == "affine":
            fine = owner in norms
        else:
            fine = role in ("output", "bias") and owner in pairs
        if prunable is not None and slot.tensor.endswith("weight") and role in ("input", "output"):
            fine = fine and slot.tensor in prunable
        if not fine:
            return False
    return True


def _parts(model: nn.Module, conv: str, widths: Sequence[Width]) -> tuple[Part, ...]:
    """Cut the output channels of a convolution by family; what belongs to none comes last."""
    weight = f"{conv}.weight"
    parts = [
        Part(number, np.asarray(slot.index))
        for number, width in enumerate(widths)
        for slot in width.family.slots
        if slot.tensor == weight and slot.axis == 0 and slot.role == "output"
    ]
    taken = np.concatenate([p.positions.reshape(-1) for p in parts]) if parts else np.empty(0, dtype=np.int64)
    rest = np.setdiff1d(np.arange(model.get_parameter(weight).shape[0]), taken)
    return (*parts, Part(None, rest.reshape(-1, 1))) if rest.size else tuple(parts)


def _stages(
    model: nn.Module, example: Any, families: Sequence[Family], prunable: Collection[str] | None
) -> Iterator[Stage]:
    shapes: dict[str, tuple[Any, Any]] = {}
    handles = []

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            ends = (args[0] if len(args) == 1 else None, output)
            shapes[path] = tuple(tuple(t.shape) if isinstance(t, Tensor) else None for t in ends)  # type: ignore[assignment]

        return hook

    chains = {p: m for p, m in model.named_modules() if isinstance(m, nn.Sequential) and len(m) > 1}
    for path, chain in chains.items():
        handles += [b.register_forward_hook(note(f"{path}.{name}")) for name, b in chain.named_children()]
    _run(model, example, handles)
    taken: list[str] = []
    for path, chain in chains.items():
        blocks = [f"{path}.{name}" for name, _ in chain.named_children()]
        weights = [f"{path}.{name}" for name, p in chain.named_parameters() if p.ndim > 1]
        alike = len({type(b) for b in chain}) == 1 and all(
            any(isinstance(m, _ConvNd) for m in b.modules()) for b in chain
        )
        level = all(b in shapes and shapes[b][0] is not None and shapes[b][0] == shapes[b][1] for b in blocks[1:])
        allowed = prunable is None or all(w in prunable for w in weights)
        if not alike or not level or not allowed or any(path.startswith(f"{t}.") for t in taken):
            continue
        outward = [_outward(block, families) for block in blocks]
        if all(later <= outward[0] for later in outward[1:]):
            taken.append(path)
            yield Stage(path, tuple(name for name, _ in chain.named_children()), depth_choices(len(blocks)))


def _outward(block: str, families: Sequence[Family]) -> set[str]:
    """Return the families that a block shares with the rest of the network."""
    found = set()
    for family in families:
        inside = [slot.tensor.startswith(f"{block}.") for slot in family.slots]
        if any(inside) and not all(inside):
            found.add(family.name)
    return found


def _terms(model: nn.Module, example: Any, widths: Sequence[Width], stages: Sequence[Stage]) -> Iterator[Term]:
    parameters = dict(model.named_parameters())
    for name, cost in layer_costs(model, example).items():
        if not cost.macs:
            continue
        axes = []
        for axis, length in enumerate(parameters[name].shape):
            parts = tuple(
                (number, slot.index.shape[1])
                for number, width in enumerate(widths)
                for slot in width.family.slots
                if slot.tensor == name and slot.axis == axis
            )
            axes.append((length - sum(entries * widths[n].family.size for n, entries in parts), parts))
        stage, block = None, 0
        for number, chain in enumerate(stages):
            if name.startswith(f"{chain.path}."):
                stage, block = number, chain.blocks.index(name[len(chain.path) + 1 :].split(".")[0])
        yield Term(cost.positions, tuple(axes), stage, block)
