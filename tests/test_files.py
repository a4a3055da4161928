"""Atomic files: the old content or the new content, whatever goes wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import InvalidValue, StorageFailed
from prunus.files import canonical_json, sha256_bytes, sha256_file, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_creates_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, b"first, longer")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert names(tmp_path) == ["report.json"]


def test_empty_content_and_odd_names(tmp_path: Path) -> None:
    for name in ("Ünïcode näme.txt", "x" * 240, ".hidden"):
        write_atomic(tmp_path / name, b"")
        assert (tmp_path / name).read_bytes() == b""


def test_new_files_obey_umask_and_old_ones_keep_their_mode(tmp_path: Path) -> None:
    path = tmp_path / "a"
    old = os.umask(0o027)
    try:
        write_atomic(path, b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o600)
    write_atomic(path, b"2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_missing_folder_names_the_path_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=r"absent/a.*No such file.*run the same command again"):
        write_atomic(tmp_path / "absent" / "a", b"x")


def test_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageFailed, match="directory"):
        write_atomic(tmp_path / "a", b"x")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_interrupted_write_leaves_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(StorageFailed if isinstance(error, OSError) else KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may enter (the test's own temporary folders are private)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_read_only_folder(open_folder: Path) -> None:
    path = open_folder / "a"
    path.write_bytes(b"old")
    open_folder.chmod(0o555)
    # Root may write anywhere, so root first becomes somebody else.
    code = """
import os, sys
from pathlib import Path
from prunus.errors import StorageFailed
from prunus.files import write_atomic
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    write_atomic(Path(sys.argv[1]), b"new")
except StorageFailed as error:
    print(error)
"""
    done = run(code, str(path))
    assert "Permission denied" in done.stdout, done.stderr
    assert path.read_bytes() == b"old"
    assert names(open_folder) == ["a"]


def test_file_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = """
import resource, sys
from pathlib import Path
from prunus.errors import StorageFailed
from prunus.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_atomic(Path(sys.argv[1] + ".small"), b"x" * 4096)
try:
    write_atomic(Path(sys.argv[1]), b"x" * 4097)
except StorageFailed as error:
    print(error)
"""
    done = run(code, str(path))
    assert "4097 bytes" in done.stdout, done.stderr
    assert "too large" in done.stdout
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a", "a.small"]


def test_killed_in_the_middle_leaves_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = """
import os, sys
from pathlib import Path
from prunus import files
os.replace = lambda *a: os.kill(os.getpid(), 9)
files.write_atomic(Path(sys.argv[1]), b"new")
"""
    assert run(code, str(path)).returncode == -9
    assert path.read_bytes() == b"old"


def test_hashes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
    assert sha256_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


words = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner) | st.dictionaries(words, inner),
    max_leaves=10,
)


@given(json_values)
def test_canonical_json_reads_back_and_is_a_fixed_point(value: object) -> None:
    data = canonical_json(value)
    assert canonical_json(json.loads(data)) == data
    assert data.endswith(b"\n")


def test_canonical_json_ignores_the_order_of_keys() -> None:
    expected = '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()
    assert canonical_json({"b": 1, "a": "ü"}) == canonical_json({"a": "ü", "b": 1}) == expected


@pytest.mark.parametrize("value", [math.nan, [1.0, math.inf], {"a": -math.inf}, {1, 2}, b"x", {("a",): 1}, "\ud800"])
def test_canonical_json_refuses_what_json_cannot_say(value: object) -> None:
    with pytest.raises(InvalidValue, match="cannot be written as JSON"):
        canonical_json(value)
