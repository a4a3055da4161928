"""A model and an example from what can be typed: a name, with sizes and a file of weights where wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, unknown
from prunus.models.checkpoints import load_foreign
from prunus.models.create import DOORS, create
from prunus.models.registry import MODELS
from prunus.randomness import generator

_TOKENS = 128
_IMAGE = (3, 224, 224)


def named_model(
    name: str,
    *,
    shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    weights: Path | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, Any]:
    """Return a model in eval mode and one example for it, as (model, example).

    Args:
        name: a model of `prunus ls models`, or "timm/NAME", "torchvision/NAME", "transformers/NAME".
        shape: of one input; images (channels, height, width), tokens (length,). None: what the model was designed for.
        classes: outputs; None for 10, or 1000 in collections of image models.
        weights: file written by prunus (of pruned or smaller models), or any checkpoint (.safetensors, .pt). None:
            random ones, in which norms that start from zero start from one, so that nothing is zero by chance.
        options: of the model's constructor.
        seed: of random weights and of the example.

    Raises:
        UnknownName: no such model.
        InvalidValue: a name with a suffix of files, or sizes that the model cannot have.
        MissingExtra: the collection is not installed.
        DataMissing, DataDamaged, DamagedFile: the weights are not there or do not fit.
    """
    if Path(name).suffix in (".onnx", ".pt", ".pth", ".pt2", ".safetensors"):
        raise InvalidValue(
            f"{name} is a file; weights alone do not say how the network computes. Name the model and give the file as "
            "weights: resnet18 --weights FILE. In Python, any torch module will do."
        )
    door = name.partition("/")[0] if "/" in name else ""
    if door and door not in DOORS:
        raise unknown("model collection", door, DOORS)
    language = door == "transformers" or (not door and MODELS.entry(name).family == "language")
    if not door:
        shape = shape or MODELS.entry(name).input_shape
    number = classes if classes is not None else 1000 if door in ("timm", "torchvision") else 10
    model = create(name, num_classes=number, input_shape=None if language else shape, seed=seed, **dict(options or {}))
    if shape is None:
        config = getattr(model, "default_cfg", None) or {}
        shape = (_TOKENS,) if language else tuple(config.get("input_size", _IMAGE))
    if weights is None:
        _awake(model)
    else:
        _fill(model, weights)
    draw = generator(seed, "example")
    x: Tensor = torch.randint(0, number, (1, *shape), generator=draw) if language else torch.empty(1, *shape)
    if not language:
        x.normal_(generator=draw)
    return model.eval(), ({"input_ids": x} if door == "transformers" else x)


def _awake(model: nn.Module) -> None:
    """Set scales of norms that are all zero to one: a zero scale would make the layer before it free."""
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 1 and not weight.any():
                weight.fill_(1.0)


def _fill(model: nn.Module, path: Path) -> None:
    """Load a file that prunus wrote, or else any checkpoint."""
    # The functions that know prunus' own files stand above this room.
    from safetensors import SafetensorError, safe_open

    ours = False
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                ours = "prunus" in (file.metadata() or {})
        except (SafetensorError, OSError):
            ours = False
    if ours:
        from prunus.oneshot import load

        load(path, model)
    else:
        load_foreign(model, path)


def sizes(text: str, flag: str) -> tuple[int, ...]:
    """Return the whole numbers of "1,16", from 1 up.

    Raises:
        InvalidValue: there is something else in it.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InvalidValue(f"{flag} {text!r} must be whole numbers from 1 up with commas between them, such as 1,16.")
    return tuple(int(part) for part in parts)


def shares(text: str, flag: str) -> tuple[float, ...]:
    """Return the numbers of "0,0.5,0.9".

    Raises:
        InvalidValue: there is something else in it.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InvalidValue(f"{flag} {text!r} must be numbers with commas between them, such as 0,0.5,0.9.") from None
