"""Checking what lies on disk: every hash of a run folder, a mask file or a model file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunus.errors import DamagedFile, DataMissing, PrunusError
from prunus.run.store import Store


@dataclass(frozen=True)
class Verdict:
    """What was found: number of things checked, and one line per problem."""

    path: str
    checked: int
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: Path | str) -> Verdict:
    """Check a run folder, or a file written by `Masks.save`, `Pruned.save` or `Compressed.save` (`.prunus`).

    Raises:
        DataMissing: there is nothing at `path`.
    """
    target = Path(path)
    if target.is_dir():
        return _folder(target)
    if not target.is_file():
        raise DataMissing(f"there is nothing at {str(target)!r} to verify.")
    return _file(target)


def _folder(folder: Path) -> Verdict:
    from prunus.train.manifest import MANIFEST, read_files, read_manifest

    problems: list[str] = []
    checked = 0
    try:
        store = Store.open(folder)
        checked += 2
        for row in store.metrics():
            checked += 1 if row else 0
    except PrunusError as error:
        if isinstance(error, DataMissing):
            raise
        problems.append(str(error))
    for manifest in sorted((folder / "stages").rglob(MANIFEST)):
        try:
            content = read_manifest(manifest.parent)
            checked += 1 + len(read_files(manifest.parent, content))
        except DamagedFile as error:
            problems.append(str(error))
    return Verdict(str(folder), checked, tuple(problems))


def _file(path: Path) -> Verdict:
    from prunus.masks import Masks
    from prunus.oneshot import read_packed
    from prunus.runtime.package import read

    try:
        if path.suffix == ".prunus":
            try:
                read(path)
            except DamagedFile as error:
                return Verdict(str(path), 1, (str(error),))
            return Verdict(str(path), 1, ())
        try:
            Masks.load(path)
        except DamagedFile as first:
            try:
                read_packed(path)
            except DamagedFile as second:
                reason = first if "mask" in path.name else second
                return Verdict(str(path), 1, (str(reason),))
    except OSError as error:
        return Verdict(str(path), 1, (f"{path} cannot be read: {error}.",))
    return Verdict(str(path), 1, ())
