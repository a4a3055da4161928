"""Running a model only to look at it: its modes are kept, its device is followed, its inputs are found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue


@contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """Put every `nn.Module` among `models` in eval mode, and give each submodule its own mode back at the end."""
    modes = [(m, m.training) for model in models if isinstance(model, nn.Module) for m in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer of `model`; the CPU when it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch given as x, (x,), (x, y) or (x, y, ids)."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def to_device(value: Any, device: torch.device) -> Any:
    """Return `value` with every tensor in it (in tuples, lists and mappings) on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, device) for v in value)
    return value


def call(model: Any, inputs: Any) -> Any:
    """Call `model` on inputs: a mapping becomes keyword arguments, a tuple positional ones, all else one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: the tensor itself, or the `logits` attribute of a structured output.

    Raises:
        InvalidValue: the output is neither.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise InvalidValue(
            f"the model returned {type(output).__name__}; expected a tensor of logits or an object with `.logits`."
        )
    return logits


def batch_size(inputs: Any) -> int:
    """Return the leading size of the first tensor in `inputs` (a tensor, or tensors in tuples, lists and mappings).

    Raises:
        InvalidValue: there is no tensor, or the first one is a single number.
    """
    first = next(tensors_of(inputs), None)
    if first is None or first.ndim == 0:
        raise InvalidValue("the inputs must hold a tensor with a batch axis in front.")
    return len(first)


def first_example(example: Any) -> Any:
    """Return `example` cut to batch size 1: every tensor in it that has the leading size of the first one.

    Raises:
        InvalidValue: there is no tensor with a non-empty batch axis.
    """
    size = batch_size(example)
    if size == 0:
        raise InvalidValue("the example must have at least one row; it is empty.")

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:1] if value.ndim > 0 and value.shape[0] == size else value
        if isinstance(value, Mapping):
            return {k: cut(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(cut(v) for v in value)
        return value

    return cut(example)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors inside nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
