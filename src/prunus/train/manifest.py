"""Folders that can be trusted: files first, then a manifest with the SHA-256 of each, so that any damage shows."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.errors import DamagedFile, InvalidValue, StorageFailed
from prunus.files import canonical_json, sha256_bytes, write_atomic

MANIFEST = "manifest.json"


def manifest_bytes(files: Mapping[str, bytes], facts: Mapping[str, Any]) -> bytes:
    """Return the manifest of `files`: their sizes and hashes, `facts` (JSON), and a hash of the manifest itself."""
    content = {
        "facts": dict(facts),
        "files": {name: {"bytes": len(data), "sha256": sha256_bytes(data)} for name, data in files.items()},
    }
    return canonical_json({**content, "sha256": sha256_bytes(canonical_json(content))})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return {"facts": ..., "files": ...} of a folder whose manifest is bit for bit as it was written.

    Raises:
        DamagedFile: the manifest is missing, cannot be read, or was changed in any bit.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}.") from error
    try:
        content = json.loads(data)
        own = content.pop("sha256")
        # Comparing the spelling as well catches a flipped bit in white space, which JSON would forgive.
        sound = own == sha256_bytes(canonical_json(content)) and data == canonical_json({**content, "sha256": own})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidValue):
        sound = False
    if not sound:
        raise DamagedFile(f"{path} is not as it was written ({len(data)} bytes); it was cut short or changed.")
    return content


def read_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the content of every file that the manifest lists.

    Raises:
        DamagedFile: one is missing, or differs from what was written in length or in any bit.
    """
    contents = {}
    for name, wanted in manifest["files"].items():
        path = folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DamagedFile(f"{path} cannot be read: {error.strerror}; the manifest beside it lists it.") from error
        if len(data) != wanted["bytes"]:
            raise DamagedFile(f"{path} has {len(data)} bytes where {wanted['bytes']} were written.")
        if sha256_bytes(data) != wanted["sha256"]:
            raise DamagedFile(
                f"{path} does not match its SHA-256 {wanted['sha256'][:12]}...; it was changed or damaged."
            )
        contents[name] = data
    return contents


def write_files(folder: Path, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
    """Write `files` into an existing folder and the manifest last: without it the folder counts as unfinished.

    Raises:
        StorageFailed: the disk refused; the manifest is then not there.
    """
    for name, data in files.items():
        write_atomic(folder / name, data)
    write_atomic(folder / MANIFEST, manifest_bytes(files, facts))


def write_folder(folder: Path, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
    """Make `folder` with `files` and their manifest, whole or not at all (hidden folder, fsync, one rename).

    Raises:
        StorageFailed: the disk refused, or a folder of that name is already there.
    """
    hidden: str | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        hidden = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
        os.chmod(hidden, 0o755)
        for name, data in (*files.items(), (MANIFEST, manifest_bytes(files, facts))):
            with open(os.path.join(hidden, name), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        sync_folder(hidden)
        os.rename(hidden, folder)
        hidden = None
        sync_folder(folder.parent)
    except OSError as error:
        raise StorageFailed(
            f"could not write the folder {str(folder)!r}: {error.strerror or error}. "
            "Free space or choose a folder you may write to, then run the same command again."
        ) from error
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder; what cannot be deleted stays, since nothing reads a folder without a sound manifest.

    The manifest goes first, so that a folder cut in half never looks whole.
    """
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path | str) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
