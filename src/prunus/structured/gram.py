"""Second moments of what a layer reads: the Gram matrix of its inputs, gathered while the model runs.

Weights are recognised where ATen multiplies with them, so that layers, functional calls and the projections inside
attention modules are covered alike. A convolution reads patches: its inputs are unfolded, one column per input channel
of a group and kernel tap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.errors import InvalidValue, NonFinite, Unsupported
from prunus.evidence import Batch
from prunus.measure.forwarding import evaluating
from prunus.parameters import Address, parameters_of

LIMIT = 8192  # columns of one group: a float64 matrix of 0.5 GiB, and its inverse takes two more
_CHUNK = 1 << 23  # entries of an unfolded piece, 64 MiB in float64


@dataclass(frozen=True)
class Sliding:
    """How a convolution moves over its input, one number per spatial axis (see `torch.nn.ConvTranspose2d`).

    Attributes:
        stride, padding, dilation: as of the layer.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed convolution.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class Gram:
    """Second moments of the inputs of one weight.

    Attributes:
        address: layout of the weight as it is used.
        matrix: float64, per group the sum over positions of x x^T divided by the number of examples: shape
            (groups, d, d) with d = inputs x kernel taps and columns in the order of `Address.rows` (inputs run
            fastest); or (groups, d), the diagonal alone.
        examples: over how many examples.
    """

    address: Address
    matrix: Tensor
    examples: int

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonal was gathered."""
        return self.matrix.ndim == 2


def patches(x: Tensor, address: Address, sliding: Sliding | None = None) -> Tensor:
    """Unfold inputs into the rows that a weight is multiplied with.

    Args:
        x: (N, ..., features) of a linear layer, (N, channels, *space) of a convolution.
        address: layout of the weight.
        sliding: None for a linear layer.

    Returns:
        (groups, rows, d): row r times `address.rows(weight)` of the group, transposed, is one output position.
    """
    if sliding is None:
        return x.reshape(1, -1, x.shape[-1])
    kernel = address.shape[2:]
    if sliding.transposed:
        x = _spread(x, kernel, sliding)
    else:
        x = F.pad(x, [p for side in reversed(sliding.padding) for p in (side, side)])
    for axis, (size, dilation) in enumerate(zip(kernel, sliding.dilation, strict=True)):
        step = 1 if sliding.transposed else sliding.stride[axis]
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    if sliding.transposed:
        x = x.flip(tuple(range(x.ndim - len(kernel), x.ndim)))
    # (N, channels, *positions, *taps) -> (groups, N, *positions, *taps, inputs)
    x = x.unflatten(1, (address.groups, -1)).movedim(1, 0).movedim(2, -1)
    taps = int(torch.Size(kernel).numel())
    return x.reshape(address.groups, -1, taps * x.shape[-1])


def _spread(x: Tensor, kernel: Sequence[int], sliding: Sliding) -> Tensor:
    """Return the input whose ordinary windows, taps reversed, are what a transposed convolution reads."""
    for axis, size in enumerate(kernel):
        length, stride = x.shape[2 + axis], sliding.stride[axis]
        reach = sliding.dilation[axis] * (size - 1)
        spaced = (length - 1) * stride + 1
        if stride > 1:
            shape = list(x.shape)
            shape[2 + axis] = spaced
            wide = x.new_zeros(shape)
            wide.narrow(2 + axis, 0, spaced)[(slice(None),) * (2 + axis) + (slice(None, None, stride),)] = x
            x = wide
        before = reach - sliding.padding[axis]
        outputs = spaced - 2 * sliding.padding[axis] + reach + sliding.output_padding[axis]
        after = outputs + reach - before - spaced
        x = F.pad(x, [0, 0] * (x.ndim - 3 - axis) + [before, after])
    return x


class _Sum:
    """A running Gram matrix."""

    def __init__(self, name: str, diagonal: bool):
        self.name = name
        self.diagonal = diagonal
        self.address: Address | None = None
        self.total: Tensor | None = None

    def add(self, address: Address, x: Tensor, sliding: Sliding | None) -> None:
        if self.address not in (None, address):
            raise Unsupported(f"{self.name!r} is used in two ways (other groups or layout); leave its family out.")
        self.address = address
        positions = max(1, x[0].numel() * int(torch.Size(address.shape[2:]).numel()))
        for piece in x.split(max(1, _CHUNK // positions)):
            rows = patches(piece.double(), address, sliding)
            found = rows.square().sum(1) if self.diagonal else rows.mT @ rows
            self.total = found if self.total is None else self.total.add_(found)


class _Enough(Exception):
    """Everything wanted of this forward pass has been seen."""


class Watch(TorchDispatchMode):
    """Calls `see(name, address, x, sliding)` before every product with a watched weight.

    Args:
        weights: parameters by name.
        see: the callback.
    """

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[str, Address, Tensor, Sliding | None], None]):
        super().__init__()
        self.weights = {w.data_ptr(): (n, w) for n, w in weights.items()}
        self.see = see

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
            name = self._known(weight)
            if name is not None and weight.shape == self.weights[weight.data_ptr()][1].shape:
                kind = "conv-transpose" if transposed else "conv"
                address = Address(
                    name=name, shape=tuple(weight.shape), kind=kind, output_axis=int(transposed), groups=groups
                )
                sliding = Sliding(tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding))
                self.see(name, address, x, sliding)
        elif function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            x, factor = args[-2:]
            name = self._known(factor)
            if name is not None:
                weight = self.weights[factor.data_ptr()][1]
                for axis, used in ((0, weight.mT), (1, weight)) if weight.ndim == 2 else ():
                    if factor.shape == used.shape and factor.stride() == used.stride():
                        self.see(name, Address(name=name, shape=tuple(weight.shape), output_axis=axis), x, None)
                        break
        return function(*args, **(kwargs or {}))

    def _known(self, tensor: Tensor) -> str | None:
        found = self.weights.get(tensor.data_ptr())
        return found[0] if found else None


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no fused attention that hides its products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def order(model: nn.Module, names: Iterable[str], batch: Batch) -> dict[str, tuple[Address, int]]:
    """Return (layout, number of uses) of the weights among `names` that a batch reaches, in order of first use."""
    found: dict[str, tuple[Address, int]] = {}

    def see(name: str, address: Address, x: Tensor, sliding: Sliding | None) -> None:
        found[name] = (address, found[name][1] + 1 if name in found else 1)

    with _plain(model), Watch(parameters_of(model, dict.fromkeys(names)), see):
        model(*batch.args, **batch.kwargs)
    return found


def gather(
    model: nn.Module,
    uses: Mapping[str, tuple[Address, int]],
    batches: Sequence[Batch],
    *,
    diagonal: bool = False,
) -> dict[str, Gram]:
    """Gather the Gram matrices of some weights in one pass over the data; the pass ends after their last use.

    Args:
        model: run in eval mode; left as it was.
        uses: what `order` returned for these weights.
        batches: the data. Positions that an "attention_mask" keyword marks as padding are left out.
        diagonal: gather only diagonals, which have no limit on their size.

    Raises:
        Unsupported: a layer has more than `LIMIT` columns in a group.
        NonFinite: inputs with NaN or infinity.
        InvalidValue: no data.
    """
    if not batches:
        raise InvalidValue("Gram matrices need at least one batch of data.")
    for name, (address, _) in uses.items():
        width = columns(address)
        if width > LIMIT and not diagonal:
            raise Unsupported(
                f"{name!r} reads {width} columns, more than the {LIMIT} whose Gram matrix is kept in memory; "
                'use oversize="diagonal", which leaves such layers without compensation.'
            )
    sums = {name: _Sum(name, diagonal) for name in uses}
    state: dict[str, Any] = {"left": 0, "valid": None}

    def see(name: str, address: Address, x: Tensor, sliding: Sliding | None) -> None:
        valid = state["valid"]
        if sliding is None and valid is not None and x.shape[0] == valid.numel():
            x = x[valid.reshape(-1).bool()]
        sums[name].add(address, x, sliding)
        state["left"] -= 1
        if not state["left"]:
            raise _Enough

    with _plain(model), Watch(parameters_of(model, uses), see):
        for batch in batches:
            state.update(left=sum(count for _, count in uses.values()), valid=batch.kwargs.get("attention_mask"))
            with contextlib.suppress(_Enough):
                model(*batch.args, **batch.kwargs)
    examples = sum(b.size for b in batches)
    grams: dict[str, Gram] = {}
    for name, total in sums.items():
        assert total.total is not None
        if not bool(torch.isfinite(total.total.sum())):
            raise NonFinite(f"the inputs of {name!r} contain NaN or infinity; check weights and data.")
        grams[name] = Gram(uses[name][0], total.total / examples, examples)
    return grams


def columns(address: Address) -> int:
    """Return how many columns a weight has in each group: inputs times kernel taps."""
    return address.size // address.outputs


def columns_of(address: Address, positions: Tensor) -> list[Tensor]:
    """Return, per group, the columns of some positions on the input axis of a weight.

    Args:
        address: layout of the weight.
        positions: (k,) int64, positions on the weight's own input axis: offsets that all groups of a convolution
            share, but input channels of a transposed one.
    """
    taps = torch.arange(columns(address) // address.inputs, device=positions.device) * address.inputs
    groups = range(address.groups)
    if address.kind == "conv-transpose":
        shares = [positions[positions // address.inputs == g] - g * address.inputs for g in groups]
    else:
        shares = [positions for _ in groups]
    return [(taps[:, None] + share).reshape(-1) for share in shares]
