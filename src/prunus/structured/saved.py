"""Small models as files: weights and plan in one safetensors file, rebuilt on a fresh instance of the user's class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn

from prunus.errors import DamagedFile, MaskMismatch, Unsupported
from prunus.files import sha256_bytes
from prunus.graph.plan import Plan
from prunus.parameters import unwrap

FORMAT = "prunus-small-model-1"


def pack_small(model: nn.Module, plan: Plan) -> bytes:
    """Return state and plan as safetensors bytes with a content hash; tied tensors are stored once."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, value in unwrap(model).state_dict().items():
        if not isinstance(value, Tensor):
            raise Unsupported(f"state {name!r} is a {type(value).__name__}, not a tensor, and cannot be saved.")
        place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    header: dict[str, Any] = {"format": FORMAT, "plan": plan.to_dict(), "aliases": aliases}
    header["sha256"] = _content_hash(header, tensors)
    # One key only: safetensors writes several in random order, and equal models should be equal files.
    return safetensors_save(tensors, metadata={"prunus": json.dumps(header, sort_keys=True)})


def _content_hash(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    facts = json.dumps([header["format"], header["plan"], header["aliases"]], sort_keys=True)
    described = [
        f"{n}|{t.dtype}|{list(t.shape)}|{sha256_bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())}"
        for n, t in sorted(tensors.items())
    ]
    return sha256_bytes("\n".join([facts, *described]).encode())


def header_of(data: bytes) -> dict[str, Any]:
    """Return the header that Prunus put into a safetensors file."""
    return dict(json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["prunus"]))


def read_small(path: Path | str, data: bytes) -> tuple[dict[str, Tensor], Plan]:
    """Return (state dict, plan) of a file written by `SmallModel.save`.

    Raises:
        DamagedFile: the file differs in any bit from what was written.
    """
    try:
        header, tensors = header_of(data), safetensors_load(data)
        sound = header["format"] == FORMAT and header["sha256"] == _content_hash(header, tensors)
        plan, aliases = Plan.from_dict(header["plan"]), header["aliases"]
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedFile(f"{path} is not a readable model file ({error}); restore it from a copy.") from error
    if not sound:
        raise DamagedFile(f"{path} does not match its own hash; it was damaged or changed. Restore it from a copy.")
    return tensors | {n: tensors[original] for n, original in aliases.items()}, plan


def rebuild(path: Path | str, data: bytes, model: nn.Module) -> nn.Module:
    """Cut `model`, a fresh instance of the dense class, by the file's plan and fill it; in place.

    Raises:
        DamagedFile: the file is damaged.
        MaskMismatch: the plan or the weights belong to another architecture; the model is untouched then.
    """
    state, plan = read_small(path, data)
    bare = unwrap(model)
    plan.check(bare)
    small = plan.apply(bare)
    theirs = {n: tuple(t.shape) for n, t in small.state_dict().items()}
    mine = {n: tuple(t.shape) for n, t in state.items()}
    different = sorted(n for n in theirs.keys() | mine.keys() if theirs.get(n) != mine.get(n))
    if different:
        first = different[0]
        raise MaskMismatch(
            f"{path} does not fit {type(bare).__name__}: {len(different)} tensors differ, first {first!r} "
            f"(file {mine.get(first, 'absent')}, model {theirs.get(first, 'absent')})."
        )
    plan.apply(bare, inplace=True)
    bare.load_state_dict(state)
    return bare
