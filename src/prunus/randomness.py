"""Stateless randomness: every draw comes from a generator keyed by what it is for, never by what ran before."""

from __future__ import annotations

import hashlib

import torch


def key(seed: int, *purpose: object) -> int:
    """Return a 63-bit number that depends only on `seed` and the words and numbers of `purpose`."""
    text = "\x1f".join([str(int(seed)), *(str(p) for p in purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator for one purpose, such as `generator(seed, "shuffle", epoch)`."""
    return torch.Generator(device=device).manual_seed(key(seed, *purpose))
