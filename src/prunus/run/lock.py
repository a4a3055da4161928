"""One process per run folder: a lock that the operating system drops when its holder dies, however it dies."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import IO

from prunus.errors import RunLocked, StorageFailed, Unsupported


class Lock:
    """An exclusive lock on `path`, taken when made.

    The file stays behind when the lock is released: deleting it would let two processes lock two files of one
    name. Its content only serves the message of `RunLocked`.

    Raises:
        RunLocked: another process (or another `Lock` of this one) holds it; the message names process and host.
        StorageFailed: the file cannot be opened or written.
        Unsupported: this system has no file locks of this kind.
    """

    def __init__(self, path: Path):
        try:
            import fcntl
        except ImportError as error:
            raise Unsupported("run folders need POSIX file locks, which this system does not have.") from error
        stream: IO[str] | None = None
        try:
            stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open for as long as the lock is held
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.seek(0)
            stream.truncate()
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, stream)
            stream.flush()
        except BlockingIOError:
            assert stream is not None
            holder = _holder(stream)
            stream.close()
            raise RunLocked(
                f"the run folder {str(path.parent)!r} is in use by {holder}. Wait for it or stop it, then try again."
            ) from None
        except OSError as error:
            if stream is not None:
                stream.close()
            raise StorageFailed(
                f"the lock file {str(path)!r} cannot be written: {error.strerror}; choose a folder you may write to."
            ) from error
        self._stream: IO[str] | None = stream

    def release(self) -> None:
        """Let others in; releasing twice is harmless."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def holder(path: Path) -> str | None:
    """Return who holds the lock at `path` ("process 12 on host"), or None when nobody does. Takes nothing."""
    try:
        import fcntl
    except ImportError:
        return None
    if not path.exists():
        return None
    with open(path, encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(stream)
        fcntl.flock(stream, fcntl.LOCK_UN)
    return None


def _holder(stream: IO[str]) -> str:
    stream.seek(0)
    try:
        known = json.loads(stream.read())
        return f"process {known['pid']} on {known['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
