"""Loading weights that others trained into our networks, without unpickling code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import DataDamaged, DataMissing, InvalidValue

# Statistics of ImageNet per channel, in units of 0..1, with which many published networks were trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "params")


def load_foreign(
    model: nn.Module, path: str | os.PathLike[str], *, rename: Mapping[str, str] | None = None
) -> nn.Module:
    """Load a checkpoint file (.pt, .pth, .th or .safetensors) into `model`, every name and shape checked.

    A state under "state_dict" (or a like name) is unwrapped, the prefix "module." of parallel training removed.
    Batch norm counters may be absent, as they are in files of old torch versions.

    Args:
        model: the network to fill, changed in place.
        path: the file; read with weights_only=True onto the CPU.
        rename: prefixes of names in the file to prefixes of names in the model, such as {"convnet.c1": "conv1"};
            whole parts between dots are compared, the longest match wins.

    Returns:
        `model`.

    Raises:
        DataMissing: no such file.
        DataDamaged: the file cannot be read as plain tensors.
        InvalidValue: names or shapes do not fit; the message lists them and nothing was loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise DataMissing(f"no checkpoint at {path.absolute()}")
    found = {_renamed(name, rename or {}): value for name, value in tensors(path).items()}
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in wanted]
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{what} {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise InvalidValue(
            f"{path} does not fit {type(model).__name__}: {'; '.join(parts)}. Build the model with the options it was "
            "trained with, or map names with rename="
        )
    model.load_state_dict(found, strict=False)
    return model


def tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file by name, unwrapped and without the prefix "module.".

    Raises:
        DataDamaged: the file cannot be read, or holds no named tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damage shows as many kinds of error, from unpickling, zip reading or storage sizes.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataDamaged(
            f"{path} cannot be read as plain tensors ({reason}). Files that hold whole modules run code when they are "
            "read and are refused; save a state_dict instead"
        ) from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    named = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not named or len(named) != len(content):
        raise DataDamaged(f"{path} holds {type(content).__name__} with {len(named)} named tensors, not a state_dict")
    if all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): value for name, value in named.items()}
    return named


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    for old in sorted(rename, key=len, reverse=True):
        if name == old or name.startswith(f"{old}."):
            return f"{rename[old]}{name[len(old) :]}"
    return name
