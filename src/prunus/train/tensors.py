"""Tensors to bytes and back (safetensors), and the digest by which equal tensors are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from prunus.errors import DamagedFile


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as one safetensors file; any device, any strides, shared memory allowed (it is written twice)."""
    seen: set[int] = set()
    plain = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        # safetensors refuses tensors that share memory; tied weights do.
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return safetensors_save(plain)


def settled(data: bytes) -> bytes:
    """Return a safetensors file with the entries of its metadata in sorted order.

    The library writes metadata in an order that changes from one call to the next; files that are compared or
    hashed need one spelling.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def from_bytes(data: bytes, source: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, each in memory of its own.

    Memory is aligned as torch aligns it, not as the file happens to lie: kernels may round differently otherwise.

    Raises:
        DamagedFile: not a safetensors file.
    """
    try:
        return {name: tensor.clone() for name, tensor in safetensors_load(data).items()}
    except (SafetensorError, ValueError) as error:
        raise DamagedFile(f"{source} is not a readable tensor file: {error}.") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of names, types, shapes and bits: independent of order, device and strides."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return hasher.hexdigest()
