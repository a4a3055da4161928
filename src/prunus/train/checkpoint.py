"""Checkpoints: the whole state of a training at one step, so that it can go on bit for bit after any cut.

A checkpoint is a folder `checkpoint-STEP` with `tensors.safetensors`, `values.json` and a manifest written last;
the folder appears by one rename. Two are kept: should the newer be damaged, the older still serves.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.errors import DamagedFile, InvalidValue, RecipeChanged, StorageFailed
from prunus.files import canonical_json
from prunus.train.manifest import read_files, read_manifest, remove_folder, write_folder
from prunus.train.tensors import from_bytes, to_bytes

TENSORS = "tensors.safetensors"
VALUES = "values.json"
_NAME = re.compile(r"checkpoint-(\d{9,})")


@dataclass(frozen=True)
class Snapshot:
    """The state of a training after `step` optimizer steps.

    Attributes:
        step: optimizer steps done.
        tensors: everything with many numbers, by dotted name ("model.0.weight", "optimizer.0.momentum_buffer").
        values: everything else, as JSON values.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors below `prefix`, with the prefix and its dot taken off."""
        start = f"{prefix}."
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}


class Checkpoints:
    """The checkpoints of one training, in one folder.

    Args:
        folder: made when the first checkpoint is saved.
        every_seconds: how often one is due, or None for never by time.
        every_steps: how often one is due in optimizer steps, or None for never by steps.
        identity: what the training is made of, as JSON values; a checkpoint of something else is refused.
        keep: how many are kept, >= 1.
        clock: source of seconds, for tests.

    Raises:
        InvalidValue: an interval or `keep` is not positive.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        every_seconds: float | None = 10.0,
        every_steps: int | None = None,
        identity: Mapping[str, Any] | None = None,
        keep: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ):
        for name, value in (("every_seconds", every_seconds), ("every_steps", every_steps), ("keep", keep)):
            if value is not None and not value > 0:
                raise InvalidValue(f"{name}={value!r} must be above 0.")
        self.folder = Path(folder)
        self.every_seconds = every_seconds
        self.every_steps = every_steps
        self.identity = dict(identity or {})
        self.keep = keep
        self._clock = clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Tell whether a checkpoint should be saved after `step` steps."""
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        return self.every_seconds is not None and self._clock() - self._last >= self.every_seconds

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, then drop those that are more than `keep`.

        Raises:
            StorageFailed: the disk refused; the earlier checkpoints are unchanged.
        """
        folder = self.folder / f"checkpoint-{snapshot.step:09d}"
        files = {TENSORS: to_bytes(snapshot.tensors), VALUES: canonical_json(snapshot.values)}
        remove_folder(folder)
        write_folder(folder, files, {"step": snapshot.step, "identity": self.identity})
        # Later steps can only be left from a checkpoint that was damaged, or training would have gone on from it.
        folders = self._folders()
        kept = [old for step, old in folders if step <= snapshot.step][: self.keep]
        for _, old in folders:
            if old not in kept:
                remove_folder(old)
        self._last = self._clock()

    def newest(self) -> Snapshot | None:
        """Return the newest checkpoint that is sound, or None when there are none at all.

        Raises:
            DamagedFile: there are checkpoints, and every one is damaged.
            RecipeChanged: the checkpoint belongs to a training made of something else.
        """
        problems = []
        for step, folder in self._folders():
            try:
                return self._load(step, folder)
            except DamagedFile as error:
                problems.append(str(error))
        if problems:
            raise DamagedFile(
                f"every checkpoint in {str(self.folder)!r} is damaged: {' '.join(problems)} "
                "Delete that folder to train this stage from its beginning."
            )
        return None

    def clear(self) -> None:
        """Delete all checkpoints."""
        for _, folder in self._folders():
            remove_folder(folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[tuple[int, Path]]:
        try:
            found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageFailed(f"the folder {str(self.folder)!r} cannot be read: {error.strerror}.") from error
        return sorted(found, reverse=True)

    def _load(self, step: int, folder: Path) -> Snapshot:
        manifest = read_manifest(folder)
        if set(manifest["files"]) != {TENSORS, VALUES} or manifest["facts"].get("step") != step:
            raise DamagedFile(f"{folder} is not the checkpoint its name says.")
        files = read_files(folder, manifest)
        identity = manifest["facts"].get("identity", {})
        if identity != self.identity:
            raise RecipeChanged(
                f"the checkpoint {str(folder)!r} belongs to another training: {difference(identity, self.identity)}. "
                "Use the choices it was made with, or another folder."
            )
        return Snapshot(step, from_bytes(files[TENSORS], str(folder / TENSORS)), json.loads(files[VALUES]))


def difference(old: Any, new: Any, limit: int = 8) -> str:
    """Return what differs between two JSON values, as "a.b: 1 -> 2; c: (absent) -> 3"."""
    lines: list[str] = []

    def walk(path: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in sorted({*a, *b}):
                walk(f"{path}.{name}" if path else name, a.get(name, _ABSENT), b.get(name, _ABSENT))
        elif a != b or type(a) is not type(b):
            lines.append(f"{path or 'value'}: {_short(a)} -> {_short(b)}")

    walk("", old, new)
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more


_ABSENT = object()


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(absent)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an optimizer's state apart: tensors by "INDEX.NAME", and the rest (groups, scalars) as JSON values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    groups = []
    for number, group in enumerate(state["param_groups"]):
        kept = {}
        for name, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group-{number}.{name}"] = value
            else:
                kept[name] = list(value) if isinstance(value, tuple) else value
        groups.append(kept)
    return tensors, {"scalars": scalars, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` took apart.

    State of a parameter's shape gets the parameter's memory layout, so that the next step runs the same kernels.

    Raises:
        DamagedFile: the state does not fit the optimizer's parameter groups.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in values["scalars"].items()}
    loose: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.partition(".")
        if owner.startswith("group-"):
            loose.setdefault(int(owner[len("group-") :]), {})[name] = tensor
            continue
        index = int(owner)
        if index < len(parameters) and tensor.shape == parameters[index].shape and tensor.ndim:
            tensor = torch.empty_like(parameters[index], dtype=tensor.dtype).copy_(tensor)
        state.setdefault(index, {})[name] = tensor
    groups = []
    for number, (group, live) in enumerate(zip(values["groups"], optimizer.param_groups, strict=False)):
        restored = {**group, **loose.get(number, {})}
        groups.append({n: tuple(v) if isinstance(live.get(n), tuple) else v for n, v in restored.items()})
    try:
        if len(values["groups"]) != len(optimizer.param_groups):
            raise ValueError(f"{len(values['groups'])} parameter groups for {len(optimizer.param_groups)}")
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise DamagedFile(f"the saved optimizer state does not fit this model and optimizer: {error}.") from error
