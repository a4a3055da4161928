"""Small models as files: weights and plan in one safetensors file, rebuilt on a fresh instance of the user's class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from prunus.parameters import load_exact, unwrap

FORMAT = "prunus-small-model-1"


def pack_small(model: nn.Module, plan: Plan) -> bytes:
    """Return state and plan as safetensors bytes with a content hash; tied tensors are stored once."""
    state, aliases = untied(unwrap(model))
    tensors = {n: t.contiguous().clone() for n, t in state.items()}
    header: dict[str, Any] = {"format": FORMAT, "plan": plan.to_dict(), "aliases": aliases}
    header["sha256"] = content_hash([FORMAT, header["plan"], aliases], tensors)
    # One key only: safetensors writes several in random order, and equal models should be equal files.
    return safetensors_save(tensors, metadata={"prunus": json.dumps(header, sort_keys=True)})


def untied(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (state on the CPU with tied tensors once, other name -> first name of those that are tied).

    Raises:
        Unsupported: a part of the state is not a tensor.
    """
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise Unsupported(f"state {name!r} is a {type(value).__name__}, not a tensor, and cannot be saved.")
        place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        state[name] = value.detach().cpu()
    return state, aliases


def content_hash(facts: Sequence[Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of JSON-ready facts and of every tensor's name, type, shape and bytes."""
    described = [
        f"{n}|{t.dtype}|{list(t.shape)}|{sha256_bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())}"
        for n, t in sorted(tensors.items())
    ]
    return sha256_bytes("\n".join([json.dumps(facts, sort_keys=True), *described]).encode())


def check_fits(source: str, model: nn.Module, state: Mapping[str, Tensor], *, named: str) -> None:
    """Raise `MaskMismatch` unless a state has the names and shapes of the model's own (`named` in the message)."""
    theirs = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    mine = {n: tuple(t.shape) for n, t in state.items()}
    different = sorted(n for n in theirs.keys() | mine.keys() if theirs.get(n) != mine.get(n))
    if different:
        first = different[0]
        raise MaskMismatch(
            f"{source} does not fit {named}: {len(different)} tensors differ, first {first!r} "
            f"(file {mine.get(first, 'absent')}, model {theirs.get(first, 'absent')})."
        )


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
        plan, aliases = Plan.from_dict(header["plan"]), header["aliases"]
        facts = [header["format"], header["plan"], aliases]
        sound = header["format"] == FORMAT and header["sha256"] == content_hash(facts, tensors)
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
    check_fits(str(path), plan.apply(bare), state, named=type(bare).__name__)
    plan.apply(bare, inplace=True)
    load_exact(bare, state)
    return bare
