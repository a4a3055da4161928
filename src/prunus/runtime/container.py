"""Named arrays and a few words in one block of bytes of the safetensors layout, with a hash over all of it.

Eight bytes little-endian: length of the header; the header, JSON; then the arrays, one behind the other, without gaps.
The reader trusts nothing: every number is checked against the bytes that are there before anything is made from it.
Needs neither torch nor the safetensors package, which reads such files, too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.errors import InvalidValue

LARGEST_HEADER = 16 << 20
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "U8": np.dtype("u1")}
_HASH = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_UNKNOWN = "0" * 64


class Malformed(ValueError):
    """Bytes that are no such block; says why."""


def pack_arrays(arrays: Mapping[str, NDArray[Any]], words: Mapping[str, str]) -> bytes:
    """Return arrays (float32 or uint8) and words as bytes; equal content gives equal bytes.

    Raises:
        InvalidValue: names and words take more than `LARGEST_HEADER` bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(words.items())) | {"sha256": _UNKNOWN}}
    parts: list[bytes] = []
    end = 0
    # Floats first, so that they are aligned.
    for name, array in sorted(arrays.items(), key=lambda item: (item[1].dtype != np.float32, item[0])):
        kind = next(k for k, dtype in _TYPES.items() if dtype == array.dtype)
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
        parts.append(np.ascontiguousarray(array).tobytes())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise InvalidValue(f"names and layers take {len(text)} bytes; {LARGEST_HEADER} is the most a file may have.")
    return sealed(b"".join([len(text).to_bytes(8, "little"), text, *parts]))


def sealed(data: bytes) -> bytes:
    """Return a block with the hash in its header set to that of its content."""
    length = int.from_bytes(data[:8], "little")
    found = _HASH.search(data, 8, 8 + length)
    if found is None:
        raise Malformed("its header holds no hash")
    return data[: found.start(1)] + _digest(data, found).encode() + data[found.end(1) :]


def _digest(data: bytes, found: re.Match[bytes]) -> str:
    """Return the SHA-256 of everything, with zeros where the hash itself stands."""
    view = memoryview(data)
    total = hashlib.sha256(view[: found.start(1)])
    total.update(_UNKNOWN.encode())
    total.update(view[found.end(1) :])
    return total.hexdigest()


def unpack_arrays(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return (arrays, words) of what `pack_arrays` made; the arrays are read-only views of the bytes.

    Raises:
        Malformed: any bit differs from what was written, or the block never was a sound one.
    """
    if len(data) < 8:
        raise Malformed(f"it has {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > min(LARGEST_HEADER, len(data) - 8):
        raise Malformed(f"its header would have {length} bytes")
    hashes = list(_HASH.finditer(data, 8, 8 + length))
    if len(hashes) != 1:
        raise Malformed("its header does not hold one hash")
    if _digest(data, hashes[0]).encode() != hashes[0].group(1):
        raise Malformed("it does not match its own hash")
    header = read_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise Malformed("its header is no JSON object")
    words = header.pop("__metadata__", {})
    if not isinstance(words, dict) or not all(isinstance(v, str) for v in words.values()):
        raise Malformed("its words are no texts")
    return _arrays(header, data, 8 + length), words


def read_json(data: bytes | str) -> Any:
    """Return a JSON value that has no key twice, no NaN and no infinity.

    Raises:
        Malformed: it is none.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"its header is no JSON ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _float(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(f"{text[:20]} is too large")
    return found


def _arrays(header: dict[str, Any], data: bytes, start: int) -> dict[str, NDArray[Any]]:
    entries: list[tuple[int, int, str, np.dtype[Any], tuple[int, ...]]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise Malformed(f"array {name[:80]!r} is not described by type, shape and place")
        dtype = _TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        shape, place = entry["shape"], entry["data_offsets"]
        if dtype is None or not _sizes(shape, 4) or not _sizes(place, 2) or len(place) != 2:
            raise Malformed(f"array {name[:80]!r} has no type, shape or place that there is")
        entries.append((place[0], place[1], name, dtype, tuple(shape)))
    found: dict[str, NDArray[Any]] = {}
    at = 0
    for begin, end, name, dtype, shape in sorted(entries, key=lambda e: e[:2]):
        if begin != at or end < begin or start + end > len(data):
            raise Malformed(f"array {name[:80]!r} lies at {begin} to {end}, {at} was to be its start")
        count = math.prod(shape)
        if count * dtype.itemsize != end - begin or (start + begin) % dtype.itemsize:
            raise Malformed(f"array {name[:80]!r} of shape {shape} does not fill its place")
        found[name] = np.frombuffer(data, dtype, count, start + begin).reshape(shape)
        at = end
    if start + at != len(data):
        raise Malformed(f"{len(data) - start - at} bytes belong to no array")
    return found


def _sizes(value: Any, most: int) -> bool:
    """Whether a value is a list of at most `most` sizes."""
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < 1 << 48 for n in value)
