"""Put exported weights into a fresh model of your class. Needs torch and safetensors, and nothing else as a rule.

    from load import load
    model = load(MyNet())

`MyNet()` is the full-size model, made as it was made for pruning. Where units were removed, modules that are gone
become identities, tensors are replaced by the narrower ones, and the sizes that modules remember are set. Some cuts
change how a module computes (attention with heads of its own number, sizes fixed in code, experts that are never
chosen); then "needs_prunus" in config.json is true, and Prunus has to be installed to repeat the cut.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load as read_tensors
from torch import nn


class First(nn.Identity):
    """Returns the first of its arguments; stands where a module was removed."""

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Return `input`."""
        return input


def load(model: Any, folder: str | Path | None = None) -> Any:
    """Fill `model`, a fresh instance, from the folder this file lies in (or another), in place; returns it.

    Raises:
        ValueError: the files are damaged, or belong to another class.
    """
    place = Path(__file__).resolve().parent if folder is None else Path(folder)
    config = json.loads((place / "config.json").read_bytes())
    data = (place / "model.safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise ValueError(f"{place / 'model.safetensors'} is not the file that was exported; restore it from a copy.")
    state = read_tensors(data)
    try:
        if config["needs_prunus"]:
            from prunus.graph.plan import Plan

            Plan.from_dict(config["plan"]).apply(model, inplace=True)
        else:
            _reshape(model, config)
        made = {name: _put(model, name, tensor) for name, tensor in state.items()}
        for name, original in config["aliases"].items():
            _put(model, name, made[original])
    except (AttributeError, KeyError) as error:
        raise ValueError(f"this is no fresh {config['class']}: {error}.") from error
    have, wanted = set(model.state_dict()), (state.keys() | config["aliases"].keys()) - set(config["unsaved"])
    if have != wanted:
        raise ValueError(f"this is no fresh {config['class']}: {sorted(have ^ wanted)[0]!r} is not in both.")
    return model


def _reshape(model: Any, config: dict[str, Any]) -> None:
    """Remove modules and set the sizes that modules remember."""
    for path in config["identities"]:
        parent, _, name = path.rpartition(".")
        if not isinstance(model.get_submodule(path), nn.Identity):
            setattr(model.get_submodule(parent), name, First())
    for path, numbers in config["numbers"].items():
        module = model.get_submodule(path)
        for name, value in numbers.items():
            old = getattr(module, name, None)  # what only the first call sets is not there yet
            if old is not None and (list(old) if isinstance(old, list | tuple) else old) != value:
                setattr(module, name, tuple(value) if isinstance(old, tuple) else value)
    for path, numbers in config["attributes"].items():
        for spelling, number in numbers.items():
            _set(model.get_submodule(path), spelling.split("."), number)


def _set(holder: Any, parts: list[str], number: int) -> None:
    """Set a number at "name", "name.2" or "settings.name"; settings are copied first, because modules share them."""
    name, *rest = parts
    if not rest:
        setattr(holder, name, number)
        return
    old = getattr(holder, name)
    if rest[0].isdigit():
        new = list(old)
        new[int(rest[0])] = number
        setattr(holder, name, new if isinstance(old, list) else tuple(new))
        return
    held = copy.copy(old)
    _set(held, rest, number)
    setattr(holder, name, held)


def _put(model: Any, name: str, tensor: Any) -> Any:
    """Put a tensor in the place of a parameter or buffer, whatever its size; returns what lies there now."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        old = module._parameters[key]
        if not isinstance(tensor, nn.Parameter):
            wants = bool(old.requires_grad) if old is not None else tensor.is_floating_point()
            tensor = nn.Parameter(tensor.to(old.device) if old is not None else tensor, requires_grad=wants)
        setattr(module, key, tensor)  # recurrent layers look at it
    elif key in module._buffers:
        old = module._buffers[key]
        module._buffers[key] = tensor if old is None or isinstance(tensor, nn.Parameter) else tensor.to(old.device)
        tensor = module._buffers[key]
    else:
        raise KeyError(name)
    return tensor


__all__ = ["First", "load"]
