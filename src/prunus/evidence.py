"""Where evidence comes from: batches in one form, a loss, and a model that is left exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.errors import InvalidValue
from prunus.parameters import Address, parameters_of

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch in the form every gatherer reads: how to call the model, and the target if there is one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any

    @property
    def size(self) -> int:
        """Number of examples."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return int(first.shape[0])


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def read_batch(batch: Any, device: torch.device) -> Batch:
    """Read (x, y), (x, y, ids), x alone, or a dict of model keywords (with "labels") as a `Batch`.

    Raises:
        InvalidValue: none of these, or a batch without examples.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Tensor):
        read = Batch((batch.to(device),), {}, None)
    elif isinstance(batch, Mapping) and batch:
        moved = {k: _to(v, device) for k, v in batch.items()}
        read = Batch((), moved, moved.get("labels"))
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and 1 <= len(batch) <= 3:
        target = batch[1] if len(batch) > 1 else None
        read = Batch((_to(batch[0], device),), {}, _to(target, device))
    else:
        raise InvalidValue(
            f"a batch must be x, (x, y), (x, y, ids) or a dict of model keywords, not {type(batch).__name__}."
        )
    first = next(iter((*read.args, *read.kwargs.values())))
    if isinstance(first, Tensor) and first.ndim and first.shape[0] == 0:
        raise InvalidValue(f"a batch has no examples (shape {tuple(first.shape)}); leave empty batches out.")
    return read


def default_loss(output: Any, target: Any) -> Tensor:
    """Return the model's own `.loss` when it computed one, else mean cross-entropy of logits (last axis or axis 1).

    Raises:
        InvalidValue: there is neither a loss nor a target.
    """
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    logits = getattr(output, "logits", output)
    if target is None:
        raise InvalidValue("this score needs labels; give data as (inputs, labels) batches, or pass loss=.")
    if logits.ndim == 3 and target.ndim == 2 and logits.shape[:2] == target.shape:
        logits = logits.flatten(0, 1)
        target = target.flatten()
    return F.cross_entropy(logits, target)


@contextlib.contextmanager
def preserved(model: nn.Module, *, train: bool = False) -> Iterator[None]:
    """Put the model in eval (or train) mode with all floating parameters differentiable; restore everything after."""
    modes = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    buffers = {b: b.clone() for b in model.buffers()} if train else {}
    model.train(train)
    try:
        for parameter in flags:
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


@dataclass
class Source:
    """Where evidence comes from: the model, its prunable tensors, batches, and how loss is computed."""

    model: nn.Module
    addresses: Mapping[str, Address]
    batches: list[Batch]
    loss: Loss
    seed: int
    round: int
    train: bool

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The prunable parameters by name."""
        return parameters_of(self.model, self.addresses)

    def need_batches(self, what: str) -> list[Batch]:
        """Return the batches, or raise `InvalidValue` saying that `what` needs data."""
        if not self.batches:
            raise InvalidValue(
                f"{what} is computed from data; pass data= (batches of inputs, or of inputs and labels)."
            )
        return self.batches

    def run(self, batch: Batch) -> Any:
        """Return the model's output for a batch."""
        return self.model(*batch.args, **batch.kwargs)

    def gradients(self, loss: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
        """Return dLoss/dw for every prunable tensor; zeros where the loss does not depend on it."""
        parameters = self.parameters
        grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph, allow_unused=True)
        return {
            n: g if g is not None else torch.zeros_like(p) for (n, p), g in zip(parameters.items(), grads, strict=True)
        }
