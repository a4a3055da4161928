"""The command line: what it prints, what it returns, and that a killed run ends like one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prunus.cli import main

TINY = """# A tiny recipe.
title: tiny
data: {name: digits, validation: 100, limit: 300}
model: {name: mlp, hidden: [32]}
training: {epochs: 4, lr: 0.1}
methods: [dense, {name: rigl, every: 2}, {name: gmp-cubic, label: gmp, every: 2}]
sparsities: [0.8]
seeds: [0, 1]
checkpoint_seconds: 0.01
"""


def run(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run([sys.executable, "-m", "prunus", *words], capture_output=True, text=True, env=surroundings)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["ls"],
        ["ls", "methods", "--json"],
        ["run", "--help"],
        ["--version"],
        ["bench", "--help"],
        ["profile", "--help"],
    ],
)
def test_help_and_listings_do_not_import_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom prunus.cli import main\n"
        f"try:\n    code = main({words!r})\nexcept SystemExit as e:\n    code = e.code or 0\n"
        "assert code == 0 and 'torch' not in sys.modules, sorted(m for m in sys.modules if 'torch' in m)[:5]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_run_help_names_every_recipe_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--out", "--seeds", "--sparsities", "--training.lr", "--method.OPTION"):
        assert flag in text


def test_ls_json_has_no_empty_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for row in rows:
        empty = [k for k, v in row.items() if v in ("", None) or (v == [] and k != "aliases")]
        assert not empty, (row["name"], empty)


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["rnu"], 2, "'run'"),
        (["run", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["run", "--trainng.lr", "1"], 2, "--training.lr"),
        (["explain", "rigle"], 2, "'rigl'"),
        (["ls", "methds"], 2, "'methods'"),
        (["status", "nowhere"], 2, "nowhere"),
        (["verify", "nowhere"], 2, "nowhere"),
    ],
)
def test_bad_usage_says_what_to_do(words: list[str], code: int, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    assert hint in capsys.readouterr().err


def test_every_catalogue_entry_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    from prunus.methods.registry import METHODS
    from prunus.scores.registry import SCORES

    for name in (*METHODS.names(), *SCORES.names()):
        assert main(["explain", name]) == 0
    assert "arXiv" in capsys.readouterr().out


def test_new_writes_a_recipe_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    assert main(["new", str(path)]) == 0
    assert main(["new", str(path)]) == 2
    assert "exists" in capsys.readouterr().err


def test_doctor_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert {"torch", "digits"} <= {f["what"] for f in json.loads(capsys.readouterr().out)}


def test_doctor_names_the_live_engine_and_its_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    from prunus.runtime.library import engine, why_not

    if why_not():
        pytest.skip(why_not())
    assert main(["doctor", "--json"]) == 0
    (found,) = [f for f in json.loads(capsys.readouterr().out) if f["what"] == "engine"]
    assert found["ok"]
    assert found["value"].startswith(f"{engine().path}, uses {engine().sets[0]}")


def test_doctor_says_why_there_is_no_engine_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from prunus.runtime import library

    monkeypatch.delenv("PRUNUS_ENGINE", raising=False)
    monkeypatch.setattr(library, "_candidates", lambda: [tmp_path / "_engine.so"])
    library._loaded.cache_clear()
    try:
        assert main(["doctor"]) == 0
    finally:
        library._loaded.cache_clear()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "engine"]
    assert line.startswith("note")
    assert "C++ compiler" in line
    assert "install" in line


def test_plan_counts_the_steps_and_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["plan", str(tiny), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 2 * 3 * 4 * 5  # seeds x methods x epochs x steps per epoch of 300 examples
    assert sorted(tmp_path.iterdir()) == before


def test_a_schedule_that_does_not_fit_stops_before_anything_is_written(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["run", str(tiny), "--out", str(out), "--quiet", "--method", "rigl", "--method.every", "500"]) == 2
    assert not out.exists()


def files(folder: Path) -> dict[str, bytes]:
    """Return everything in a run folder that must not depend on interruptions."""
    skip = {"timing.jsonl", "report.html", "lock"}
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in skip
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("reference")
    (base / "tiny.yaml").write_text(TINY)
    done = run("run", str(base / "tiny.yaml"), "--out", str(base / "out"))
    assert done.returncode == 0, done.stderr
    assert "rigl" in done.stdout
    assert "report.html" in done.stdout
    return base / "out"


def test_a_second_run_only_loads(reference: Path, tiny: Path, tmp_path: Path) -> None:
    before = files(reference)
    done = run("run", str(tiny), "--out", str(reference), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["summary"]
    assert files(reference) == before


def test_verify_finds_one_flipped_bit_in_any_file(reference: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(reference, copy)
    assert main(["verify", str(copy)]) == 0
    for path in sorted(p for p in (copy / "stages").rglob("*") if p.is_file()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        good = path.read_bytes()
        path.write_bytes(bytes(data))
        assert main(["verify", str(copy)]) == 5, path
        path.write_bytes(good)
    assert main(["verify", str(copy)]) == 0


def test_resume_with_another_recipe_shows_the_difference(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(TINY.replace("lr: 0.1", "lr: 0.2"))
    before = files(reference)
    assert main(["resume", str(reference), "--recipe", str(other), "--quiet"]) == 2
    text = capsys.readouterr().err
    assert "lr" in text
    assert "0.2" in text
    assert files(reference) == before


def test_status_of_a_finished_run(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(reference), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


def test_killed_runs_end_bit_equal(reference: Path, tiny: Path, tmp_path: Path) -> None:
    out, rng, kills = tmp_path / "out", random.Random(7), 0
    for _ in range(4):
        words = ["run", str(tiny), "--out", str(out)] if not (out / "recipe.json").exists() else ["resume", str(out)]
        process = subprocess.Popen(
            [sys.executable, "-m", "prunus", *words, "--quiet"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 60
        begun = len(list(out.rglob("*"))) if out.exists() else 0
        # Wait for the first sign of work, then kill at a random moment of it.
        while process.poll() is None and time.monotonic() < deadline:
            if (len(list(out.rglob("*"))) if out.exists() else 0) != begun:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.6))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 2
    done = run("resume", str(out), "--quiet")
    assert done.returncode == 0, done.stderr
    assert files(out) == files(reference)


def test_an_interrupted_run_says_so_and_can_go_on(reference: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "prunus", "run", str(tiny), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (out / "stages").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "prunus resume" in errors
    assert run("resume", str(out), "--quiet").returncode == 0
    assert files(out) == files(reference)


def test_two_processes_cannot_work_in_one_run(reference: Path, tiny: Path) -> None:
    from prunus.run.lock import Lock, holder

    lock = Lock(reference / "lock")
    try:
        assert str(os.getpid()) in str(holder(reference / "lock"))
        done = run("run", str(tiny), "--out", str(reference), "--quiet")
        assert done.returncode == 3
        assert "in use" in done.stderr
    finally:
        lock.release()
    assert holder(reference / "lock") is None


def test_flags_come_in_any_order(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--training.epochs", "3", "--json", "--seeds", "5,6,7", "--method", "rigl", "--method.every", "2"]
    assert main(["plan", str(tiny), *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"]["seeds"] == [5, 6, 7]
    assert plan["steps"] == 3 * 3 * 5


def test_a_full_disk_stops_with_a_clear_error_and_loses_nothing(reference: Path, tiny: Path, tmp_path: Path) -> None:
    import resource

    out = tmp_path / "out"

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with an error instead of killing
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))

    done = subprocess.run(
        [sys.executable, "-m", "prunus", "run", str(tiny), "--out", str(out), "--quiet"],
        capture_output=True,
        text=True,
        preexec_fn=small_files,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 3, done.stderr
    assert "could not write" in done.stderr
    assert "Traceback" not in done.stderr
    assert main(["verify", str(out)]) == 0
    assert run("resume", str(out), "--quiet").returncode == 0
    assert files(out) == files(reference)


def test_a_folder_that_cannot_be_made(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny), "--out", "/proc/nowhere/run", "--quiet"]) == 3
    assert "/proc/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "code"), [("data: cifar10", 2), ("data: {name: image-folder}", 2)])
def test_missing_data_says_where_it_was_looked_for(
    text: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRUNUS_DATA", str(tmp_path / "nothing"))
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert main(["run", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == code
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
