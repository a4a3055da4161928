"""Run folders: what a run was asked, what it measured, and the finished stages that need not be done again.

recipe.json         the resolved recipe
environment.json    versions of Python and libraries, threads, machine
metrics.jsonl       one line per epoch of every stage, no clock times: equal runs give equal bytes
timing.jsonl        seconds per stage
stages/NAME/        files of a finished stage, and manifest.json, written last
stages/NAME/checkpoints/    of a stage that is not finished
lock                held by the one process that works here
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from prunus.errors import DamagedFile, DataMissing, InvalidValue, RecipeChanged, StorageFailed
from prunus.files import canonical_json, write_atomic
from prunus.run.lock import Lock
from prunus.train.checkpoint import difference
from prunus.train.manifest import MANIFEST, read_files, read_manifest, write_files

RECIPE = "recipe.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
CHECKPOINTS = "checkpoints"
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*(/[A-Za-z0-9][A-Za-z0-9._=+-]*)*")


def environment() -> dict[str, Any]:
    """Return what a result may depend on beside the recipe: versions, threads and machine, as JSON values."""
    import torch

    versions: dict[str, str | None] = {}
    for name in ("prunus", "torch", "numpy", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


class Store:
    """A run folder. `Store.create` opens it for work (and locks it), `Store.open` for reading.

    Attributes:
        folder: where it lies.
        recipe: the resolved recipe.
        environment: where the run was started.
        environment_now: where it is being worked on, None when it was opened for reading. Another version or
            number of threads may change the last bits of results; `environment_change` says what differs.
    """

    def __init__(self, folder: Path, recipe: Any, environment: Any, lock: Lock | None, environment_now: Any = None):
        self.folder = folder
        self.recipe = recipe
        self.environment = environment
        self.environment_now = environment_now
        self._lock = lock
        self._last: tuple[int, int] | None = None

    # -- opening --------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, folder: Path | str, recipe: Mapping[str, Any], environment_now: Mapping[str, Any] | None = None
    ) -> Store:
        """Make a run folder, or open the one that the same recipe made, and lock it.

        Args:
            folder: its parents are made as needed.
            recipe: JSON values.
            environment_now: for tests; default `environment()`.

        Raises:
            RecipeChanged: the folder was made by another recipe; nothing in it is touched.
            InvalidValue: the folder holds other things than a run, or the recipe is not JSON.
            RunLocked: another process works in it.
            DamagedFile: its recipe.json cannot be read.
            StorageFailed: it cannot be written.
        """
        path = Path(folder)
        data = canonical_json(recipe)
        now = dict(environment() if environment_now is None else environment_now)
        _refuse_other(path, data)
        try:
            (path / "stages").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageFailed(
                f"the run folder {str(path)!r} cannot be made: {error.strerror}; choose a folder you may write to."
            ) from error
        lock = Lock(path / "lock")
        try:
            # Once more, now that nobody else can write: two processes may have started on one empty folder.
            _refuse_other(path, data)
            if not (path / ENVIRONMENT).exists():
                write_atomic(path / ENVIRONMENT, canonical_json(now))
            if not (path / RECIPE).exists():
                write_atomic(path / RECIPE, data)
            return cls(path, json.loads(data), _read_json(path / ENVIRONMENT), lock, now)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, folder: Path | str) -> Store:
        """Open a run folder for reading; no lock is taken.

        Raises:
            DataMissing: there is no run in this folder.
            DamagedFile: its recipe or environment cannot be read.
        """
        path = Path(folder)
        if not (path / RECIPE).is_file():
            raise DataMissing(f"{str(path)!r} is not a run folder: it has no {RECIPE}.")
        return cls(path, _read_json(path / RECIPE), _read_json(path / ENVIRONMENT), None)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def environment_change(self) -> str:
        """What differs between the environment of the start and now, "" when nothing does."""
        return "" if self.environment_now is None else difference(self.environment, self.environment_now)

    # -- stages ---------------------------------------------------------------------------------------------

    def stage_folder(self, name: str) -> Path:
        """Return where a stage lies.

        Raises:
            InvalidValue: not a stage name (words of letters, digits and ._=+- , joined by "/").
        """
        if not _STAGE_NAME.fullmatch(name) or CHECKPOINTS in name.split("/"):
            raise InvalidValue(
                f"stage name {name!r} must be words of letters, digits, '.', '_', '=', '+' and '-', joined by '/', "
                f"none of them {CHECKPOINTS!r}."
            )
        return self.folder / "stages" / name

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the facts of every finished stage by name, in the order in which they were finished.

        A stage whose manifest is damaged is left out here; `load_stage` is what reports it.
        """
        found = {}
        root = self.folder / "stages"
        for path in root.rglob(MANIFEST):
            name = path.parent.relative_to(root)
            if CHECKPOINTS not in name.parts:
                with contextlib.suppress(DamagedFile):
                    found[name.as_posix()] = read_manifest(path.parent)["facts"]
        return dict(sorted(found.items(), key=lambda item: (item[1]["number"], item[0])))

    def load_stage(self, name: str, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]] | None:
        """Return (facts, files) of a finished stage, or None when it is not finished.

        Raises:
            RecipeChanged: it was finished with other inputs.
            DamagedFile: a file, the manifest, or the stage's lines in metrics.jsonl are not as they were written.
        """
        folder = self.stage_folder(name)
        if not (folder / MANIFEST).exists():
            return None
        try:
            manifest = read_manifest(folder)
            facts = manifest["facts"]
            if facts["inputs"] != json.loads(canonical_json(inputs)):
                raise RecipeChanged(
                    f"stage {name!r} in {str(self.folder)!r} was made from other inputs: "
                    f"{difference(facts['inputs'], json.loads(canonical_json(inputs)))}. "
                    "Use the inputs it was made with, or another run folder."
                )
            files = read_files(folder, manifest)
            lines = facts["metrics_lines"]
            if _segment_hash(self.folder / METRICS, lines["begin"], lines["end"]) != lines["sha256"]:
                raise DamagedFile(f"{self.folder / METRICS} lacks or changed the lines of stage {name!r}.")
        except DamagedFile as error:
            raise DamagedFile(f"{error} Delete the folder {str(folder)!r} to compute this stage again.") from error
        return facts, files

    def begin_stage(self, name: str) -> int:
        """Start a stage: drop the metrics of a stage that was cut, and return where those of this one begin.

        Raises:
            StorageFailed: metrics.jsonl cannot be changed.
            DamagedFile: metrics.jsonl is shorter than the finished stages left it.
        """
        self._check_working()
        folder = self.stage_folder(name)
        path = self.folder / METRICS
        _, end = self._last_stage()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".*.tmp"):
                left.unlink()
            with open(path, "ab") as stream:
                size = stream.tell()
                if size > end:
                    stream.truncate(end)
        except OSError as error:
            raise _failed(path, error) from error
        if size < end:
            raise DamagedFile(f"{path} has {size} bytes, but finished stages wrote {end}; restore it from a copy.")
        return end

    def finish_stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        files: Mapping[str, bytes],
        facts: Mapping[str, Any],
        begin: int,
        seconds: float,
    ) -> None:
        """Write a stage's files and, last, its manifest.

        Args:
            begin: what `begin_stage` returned.
            seconds: how long it took, for timing.jsonl.

        Raises:
            StorageFailed: the disk refused; the stage counts as unfinished.
        """
        self._check_working()
        path = self.folder / METRICS
        end = path.stat().st_size
        if end > begin:
            _sync(path)
        lines = {"begin": begin, "end": end, "sha256": _segment_hash(path, begin, end)}
        number = self._last_stage()[0] + 1
        known = {**facts, "inputs": dict(inputs), "metrics_lines": lines, "number": number}
        write_files(self.stage_folder(name), files, json.loads(canonical_json(known)))
        self._last = (number, end)
        _append(self.folder / TIMING, {"stage": name, "seconds": round(seconds, 6)})

    def checkpoints_folder(self, name: str) -> Path:
        """Return where a stage keeps its checkpoints while it runs."""
        return self.stage_folder(name) / CHECKPOINTS

    def _last_stage(self) -> tuple[int, int]:
        """Return the number of the stage finished last (-1 before the first) and the end of all finished metrics."""
        if self._last is None:
            known = self.finished().values()
            number = max((facts["number"] for facts in known), default=-1)
            self._last = number, max((facts["metrics_lines"]["end"] for facts in known), default=0)
        return self._last

    def _check_working(self) -> None:
        if self._lock is None:
            raise InvalidValue(f"the run folder {str(self.folder)!r} is open for reading; Store.create opens it.")

    # -- metrics --------------------------------------------------------------------------------------------

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; keys are sorted, so that equal rows are equal bytes.

        Raises:
            StorageFailed: the disk refused; the file ends with the line before.
            InvalidValue: the row is not JSON (NaN, infinity, other types).
        """
        self._check_working()
        _append(self.folder / METRICS, row)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl.

        Raises:
            DamagedFile: a line is not JSON.
        """
        path = self.folder / METRICS
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise DamagedFile(f"{path} holds a line that is not JSON: {error}.") from error


def _refuse_other(path: Path, data: bytes) -> None:
    """Raise if `path` is there and is not a run folder made by the recipe `data`."""
    if (path / RECIPE).exists():
        old = _read_json(path / RECIPE)
        if canonical_json(old) != data:
            raise RecipeChanged(
                f"the run folder {str(path)!r} was made by another recipe: {difference(old, json.loads(data))}. "
                "Nothing was changed; use the recipe it was made with, or another folder."
            )
        return
    try:
        names = {p.name for p in path.iterdir() if not p.name.startswith(".")}
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageFailed(f"{str(path)!r} cannot be used as a run folder: {error.strerror}.") from error
    # A run that was killed before its recipe was written leaves these and nothing else.
    foreign = sorted(names - {"lock", "stages", ENVIRONMENT})
    if foreign:
        raise InvalidValue(
            f"the folder {str(path)!r} holds other things ({', '.join(foreign[:3])}) and is not a run folder; "
            "give a new or empty one."
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}; restore it from a copy.") from error
    except ValueError as error:
        raise DamagedFile(f"{path} is not JSON: {error}; restore it from a copy.") from error


def _append(path: Path, row: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"the row {dict(row)!r} cannot be written as JSON: {error}.") from error
    data = (text + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as stream:
            before = stream.tell()
            try:
                if stream.write(data) != len(data):
                    raise OSError(28, os.strerror(28))
            except OSError:
                stream.truncate(before)
                raise
    except OSError as error:
        raise _failed(path, error) from error


def _sync(path: Path) -> None:
    try:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        raise _failed(path, error) from error


def _segment_hash(path: Path, begin: int, end: int) -> str:
    """Return the SHA-256 of the bytes begin..end of a file, of fewer if it is shorter."""
    if end == begin:
        return hashlib.sha256(b"").hexdigest()
    try:
        with open(path, "rb") as stream:
            stream.seek(begin)
            return hashlib.sha256(stream.read(end - begin)).hexdigest()
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}.") from error


def _failed(path: Path, error: OSError) -> StorageFailed:
    return StorageFailed(
        f"could not write {str(path)!r}: {error.strerror or error}. "
        "Free space or choose a folder you may write to, then run the same command again."
    )
