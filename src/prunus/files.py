"""Files that are either the old content or the new content, never something in between."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from prunus.errors import InvalidValue, StorageFailed


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`, or leave everything as it was.

    The bytes go to a new file in the same folder, are forced to the disk, and take the final name in one rename;
    the folder entry is then forced to the disk as well. A reader, or a crash at any moment, sees either the old
    content or the new one. The permissions of a file that is replaced are kept. A symbolic link is followed.

    Args:
        path: the file to write; its folder must exist.
        data: the whole new content.

    Raises:
        StorageFailed: the operating system refused (read-only, disk full, file too large, no such folder). The
            previous content is untouched and no temporary file stays behind.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{target.name[:80]}.{secrets.token_hex(8)}.tmp"
    created = False
    try:
        with open(temporary, "xb") as stream:
            created = True
            if target.exists():
                os.fchmod(stream.fileno(), target.stat().st_mode & 0o777)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        created = False
        _sync_folder(target.parent)
    except OSError as error:
        raise StorageFailed(
            f"could not write {str(path)!r} ({len(data)} bytes): {error.strerror or error}. "
            "Free space or choose a folder you may write to, then run the same command again."
        ) from error
    finally:
        # Still true only when the rename did not happen, whatever stopped it (Ctrl-C included).
        if created:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, so that a rename in it survives a power cut.

    The file is complete under its name by now; some file systems cannot open or sync a folder, which is no failure.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits, reading it in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the one spelling of a JSON value: keys sorted, two-space indent, UTF-8, one newline at the end.

    Equal values give equal bytes, so the result can be hashed and compared.

    Raises:
        InvalidValue: the value holds NaN, an infinity, or something JSON has no word for.
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise InvalidValue(
            f"the value cannot be written as JSON: {error}. "
            "Use finite numbers, strings, lists, and dictionaries with string keys; null stands for a missing number."
        ) from error
