"""`create`: one function from a model's name to an initialised network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunus.data.options import check_options
from prunus.errors import InvalidValue, unknown
from prunus.models.registry import MODELS
from prunus.randomness import key

DOORS = ("timm", "torchvision", "transformers")


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Let layers draw their initial values from (seed, purpose); the global CPU generator is put back after.

    Layers of torch can only draw from the global generator, so it is borrowed for the time of construction.
    """
    state = torch.random.get_rng_state()
    torch.random.default_generator.manual_seed(key(seed, *purpose))
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def create(
    name: str,
    *,
    num_classes: int = 10,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Build a network with weights that depend only on `seed`.

    Args:
        name: a name of `prunus.models.registry.MODELS`, or "timm/NAME", "torchvision/NAME", "transformers/NAME".
        num_classes: outputs (the vocabulary of a language model).
        input_shape: shape of one input; default the one the model was designed for, (3, 32, 32) for most.
        seed: key of the initial weights; the global random state is as before afterwards.
        **options: what the constructor of this model takes.

    Returns:
        The network on the CPU, float32, in training mode.

    Raises:
        UnknownName: no such model or option.
        InvalidValue: sizes the model cannot have.
        MissingExtra: a door's library is not installed.
    """
    if num_classes < 1:
        raise InvalidValue(f"num_classes must be 1 or more, got {num_classes}")
    door, slash, rest = name.partition("/")
    if slash:
        if door not in DOORS:
            raise unknown("model collection", door, DOORS)
        from prunus.models import doors

        with seeded(seed, "initialise"):
            return doors.open_door(door, rest, num_classes=num_classes, input_shape=input_shape, **options)
    entry = MODELS.entry(name)
    build = entry.load()
    check_options(build, options, f"option of model {entry.name!r}")
    shape = tuple(input_shape) if input_shape is not None else entry.input_shape
    with seeded(seed, "initialise"):
        return build(num_classes, shape, **options)
