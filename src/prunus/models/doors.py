"""Lazy doors to large model collections: timm, torchvision and transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from prunus.data.options import check_options
from prunus.errors import InvalidValue, MissingExtra, Unsupported, unknown
from prunus.models.vision_repair import repair_torchvision

TASKS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "base": "AutoModel",
}


def open_door(
    door: str, name: str, *, num_classes: int, input_shape: tuple[int, ...] | None, **options: Any
) -> nn.Module:
    """Build the model `name` of the collection `door`; weights are random unless `pretrained=True` is among options.

    Raises:
        UnknownName: no such model or option.
        MissingExtra: the collection is not installed.
        InvalidValue: the collection refuses the options or the input shape.
    """
    doors: dict[str, Callable[..., nn.Module]] = {
        "timm": timm_model,
        "torchvision": torchvision_model,
        "transformers": transformers_model,
    }
    build = doors[door]
    check_options(build, options, f"option of the door {door!r}")
    return build(name, num_classes, input_shape, **options)


def timm_model(
    name: str, num_classes: int, input_shape: tuple[int, ...] | None, *, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Build a timm model; `options` go to timm's constructor.

    Models that are built for one image size get the size of `input_shape`.
    """
    repair_torchvision()
    try:
        import timm
    except ImportError as error:
        raise MissingExtra(_extra("timm", "vision")) from error
    if not timm.is_model(name):
        raise unknown("timm model", name, _near(name, timm.list_models()))
    if input_shape is not None:
        options.setdefault("in_chans", _image(input_shape)[0])
        config = timm.models.get_pretrained_cfg(name)
        if config is not None and config.fixed_input_size:
            options.setdefault("img_size", tuple(input_shape[1:]))
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except (TypeError, AssertionError) as error:
        raise InvalidValue(f"timm/{name} cannot be built with {options}: {error}") from error


def torchvision_model(
    name: str, num_classes: int, input_shape: tuple[int, ...] | None, *, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Build a torchvision model; `options` go to its constructor, `pretrained=True` takes its default weights.

    Raises:
        Unsupported: an input that has not three channels.
    """
    repair_torchvision()
    try:
        import torchvision
    except ImportError as error:
        raise MissingExtra(_extra("torchvision", "vision")) from error
    names = torchvision.models.list_models()
    if name not in names:
        raise unknown("torchvision model", name, _near(name, names))
    if input_shape is not None and _image(input_shape)[0] != 3:
        raise Unsupported(f"torchvision/{name} reads three channels, got input_shape={input_shape}; timm takes others")
    try:
        return torchvision.models.get_model(
            name, weights="DEFAULT" if pretrained else None, num_classes=num_classes, **options
        )
    except (TypeError, ValueError) as error:
        raise InvalidValue(
            f"torchvision/{name} cannot be built with {num_classes} classes, {options}: {error}"
        ) from error


def transformers_model(
    name: str,
    num_classes: int,
    input_shape: tuple[int, ...] | None,
    *,
    task: str = "sequence-classification",
    config: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Build a transformers model from a configuration, without the network.

    Args:
        name: the kind of model, such as "bert" or "llama"; with `pretrained=True` a checkpoint's name or folder.
        num_classes: labels of the classification heads; language models take their vocabulary from `config`.
        input_shape: for "image-classification" (C, H, W), put into the configuration; not used otherwise.
        task: a key of `TASKS`.
        config: fields of the configuration class that differ from its defaults.
        pretrained: load published weights instead of random ones.
    """
    repair_torchvision()
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(_extra("transformers", "llm")) from error
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    auto = getattr(transformers, TASKS[task])
    fields: dict[str, Any] = dict(config or {})
    if task.endswith("classification"):
        fields.setdefault("num_labels", num_classes)
    if task == "image-classification" and input_shape is not None:
        channels, height, width = _image(input_shape)
        fields.setdefault("num_channels", channels)
        fields.setdefault("image_size", height if height == width else (height, width))
    if pretrained:
        return auto.from_pretrained(name, **fields).train()
    kinds = transformers.CONFIG_MAPPING
    if name not in kinds:
        raise unknown("transformers model", name, _near(name, list(kinds.keys())))
    default = kinds[name]()
    for field in fields:
        # Configurations keep any keyword, so a misspelt one would be lost without a word.
        if field != "num_labels" and not hasattr(default, field):
            raise unknown(f"field of the configuration of {name!r}", field, list(default.to_dict()))
    try:
        return auto.from_config(kinds[name](**fields)).train()
    except ValueError as error:
        raise InvalidValue(f"transformers/{name} cannot be built for {task}: {str(error).splitlines()[0]}") from error


def _image(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(input_shape) != 3:
        raise InvalidValue(f"an image shape (channels, height, width) is needed, got {input_shape}")
    return input_shape


def _near(name: str, names: list[str]) -> list[str]:
    """Shorten a list of hundreds of names to those that an error message can hold."""
    import difflib

    return difflib.get_close_matches(name, names, n=12, cutoff=0.4) or sorted(names)[:12]


def _extra(library: str, extra: str) -> str:
    return (
        f"{library} is not installed: pip install 'prunus[{extra}]' (with a constraints file that pins your torch, or "
        "pip may replace it)"
    )
