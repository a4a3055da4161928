"""Run folders: recipes, locks, stages and metrics, and every way in which they can be damaged or refused."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from prunus.errors import (
    DamagedFile,
    DataMissing,
    InvalidValue,
    RecipeChanged,
    RunLocked,
    StorageFailed,
)
from prunus.run import store as store_module
from prunus.run.store import Store, environment

RECIPE = {"method": {"name": "rigl", "sparsity": 0.9}, "seeds": [1, 2]}
HERE = {"versions": {"torch": "0"}}


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def finish(store, name, inputs, rows=(), files=None):
    begin = store.begin_stage(name)
    for row in rows:
        store.append_metrics(row)
    store.finish_stage(name, inputs, files or {"a.bin": b"abc"}, {"result": {}}, begin, 0.5)


def test_a_run_folder_comes_back_as_it_was(tmp_path):
    with Store.create(tmp_path / "a" / "run", RECIPE, HERE) as store:
        finish(store, "one", {"x": 1}, [{"step": 1, "loss": 0.5}])
        finish(store, "seed-1/two", {"x": 2})
    with Store.create(tmp_path / "a" / "run", RECIPE, HERE) as store:
        assert store.recipe == RECIPE
        assert store.load_stage("one", {"x": 1})[1] == {"a.bin": b"abc"}
        assert store.load_stage("three", {}) is None
        assert list(store.finished()) == ["one", "seed-1/two"]
        assert store.metrics() == [{"step": 1, "loss": 0.5}]
    reader = Store.open(tmp_path / "a" / "run")
    assert reader.recipe == RECIPE
    assert reader.environment == HERE
    timing = [json.loads(line) for line in (reader.folder / "timing.jsonl").read_text().splitlines()]
    assert [(t["stage"], t["seconds"]) for t in timing] == [("one", 0.5), ("seed-1/two", 0.5)]
    with pytest.raises(InvalidValue, match="open for reading"):
        reader.append_metrics({})


def test_another_recipe_is_refused_and_nothing_is_touched(tmp_path):
    with Store.create(tmp_path, RECIPE, HERE) as store:
        finish(store, "one", {}, [{"step": 1}])
    before = tree(tmp_path)
    with pytest.raises(RecipeChanged, match=r"method\.sparsity: 0\.9 -> 0\.95; seeds: \[1, 2\] -> \(absent\)"):
        Store.create(tmp_path, {"method": {"name": "rigl", "sparsity": 0.95}}, HERE)
    assert tree(tmp_path) == before


def test_folders_that_are_no_run_folders(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InvalidValue, match=r"thesis\.tex"):
        Store.create(tmp_path, RECIPE, HERE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(DataMissing, match="not a run folder"):
        Store.open(tmp_path)
    with pytest.raises(StorageFailed):
        Store.create(tmp_path / "thesis.tex" / "run", RECIPE, HERE)
    with pytest.raises(StorageFailed):
        Store.create(tmp_path / "thesis.tex", RECIPE, HERE)


def test_a_process_killed_before_the_recipe_was_written_leaves_a_usable_folder(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "lock").touch()
    (tmp_path / ".recipe.json.xyz.tmp").write_bytes(b"{")
    with Store.create(tmp_path, RECIPE, HERE) as store:
        assert store.recipe == RECIPE


def test_a_damaged_recipe_is_named(tmp_path):
    Store.create(tmp_path, RECIPE, HERE).close()
    (tmp_path / "recipe.json").write_bytes(b'{"method":')
    for reopen in (lambda: Store.create(tmp_path, RECIPE, HERE), lambda: Store.open(tmp_path)):
        with pytest.raises(DamagedFile, match=r"recipe\.json is not JSON"):
            reopen()


def test_a_change_of_environment_is_told(tmp_path):
    with Store.create(tmp_path, RECIPE, HERE) as store:
        assert store.environment_change == ""
    with Store.create(tmp_path, RECIPE, {"versions": {"torch": "1"}}) as store:
        assert store.environment_change == 'versions.torch: "0" -> "1"'
    found = environment()
    assert found["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found


def test_stages_with_other_inputs_are_refused(tmp_path):
    with Store.create(tmp_path, RECIPE, HERE) as store:
        finish(store, "one", {"training": {"lr": 0.1}})
        with pytest.raises(RecipeChanged, match=r"stage 'one'.*training\.lr: 0\.1 -> 0\.2"):
            store.load_stage("one", {"training": {"lr": 0.2}})


def test_every_flipped_bit_of_a_stage_is_noticed(tmp_path):
    with Store.create(tmp_path, RECIPE, HERE) as store:
        finish(store, "zero", {}, [{"step": 0}])
        finish(store, "one", {"x": 1}, [{"step": 1}])
        begin = len(b'{"step": 0}\n')
        for path, start in (
            (tmp_path / "stages/one/a.bin", 0),
            (tmp_path / "stages/one/manifest.json", 0),
            (tmp_path / "metrics.jsonl", begin),
        ):
            sound = path.read_bytes()
            for position in range(start, len(sound)):
                damaged = bytearray(sound)
                damaged[position] ^= 1 << (position % 8)
                path.write_bytes(bytes(damaged))
                with pytest.raises(DamagedFile, match="Delete the folder"):
                    store.load_stage("one", {"x": 1})
            path.write_bytes(sound[:-1])
            with pytest.raises(DamagedFile):
                store.load_stage("one", {"x": 1})
            path.write_bytes(sound)
        (tmp_path / "stages/one/a.bin").unlink()
        with pytest.raises(DamagedFile, match=r"a\.bin cannot be read"):
            store.load_stage("one", {"x": 1})


def test_metrics_of_a_cut_stage_are_dropped(tmp_path):
    with Store.create(tmp_path, RECIPE, HERE) as store:
        finish(store, "one", {}, [{"step": 1}])
        store.begin_stage("two")
        store.append_metrics({"step": 2})
        with open(tmp_path / "metrics.jsonl", "ab") as stream:
            stream.write(b'{"half a li')
    with Store.create(tmp_path, RECIPE, HERE) as store:
        finish(store, "two", {}, [{"step": 2}])
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'
        assert store.load_stage("two", {}) is not None
        (tmp_path / "metrics.jsonl").write_bytes(b"")
        with pytest.raises(DamagedFile, match="finished stages wrote 24"):
            store.begin_stage("three")


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    with Store.create(tmp_path, RECIPE, HERE) as store:
        folder = store.stage_folder("one")
        folder.mkdir(parents=True)
        (folder / ".a.bin.xyz.tmp").write_bytes(b"a")
        finish(store, "one", {})
        assert sorted(p.name for p in folder.iterdir()) == ["a.bin", "manifest.json"]


def test_a_missing_manifest_means_unfinished(tmp_path):
    with Store.create(tmp_path, RECIPE, HERE) as store:
        finish(store, "one", {})
        (tmp_path / "stages/one/manifest.json").unlink()
        assert store.load_stage("one", {}) is None
        assert store.finished() == {}


@pytest.mark.parametrize("name", ["", "../x", "/x", "a//b", "a b", ".hidden", "a/checkpoints", "checkpoints", "a/"])
def test_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    with Store.create(tmp_path, RECIPE, HERE) as store, pytest.raises(InvalidValue, match="stage name"):
        store.begin_stage(name)


def test_rows_that_are_not_json_are_refused(tmp_path):
    with Store.create(tmp_path, RECIPE, HERE) as store:
        for value in (float("nan"), float("inf"), object()):
            with pytest.raises(InvalidValue, match="cannot be written as JSON"):
                store.append_metrics({"x": value})
        assert store.metrics() == []
        (tmp_path / "metrics.jsonl").write_bytes(b"{\n")
        with pytest.raises(DamagedFile, match="not JSON"):
            store.metrics()


def test_a_file_size_limit_leaves_whole_lines(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Store.create(tmp_path, RECIPE, HERE) as store:
        store.begin_stage("one")
        store.append_metrics({"text": "x" * 50})
        whole = (tmp_path / "metrics.jsonl").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
        try:
            with pytest.raises(StorageFailed, match=r"metrics\.jsonl"):
                store.append_metrics({"text": "y" * 50})
            with pytest.raises(StorageFailed, match=r"big\.bin"):
                store.finish_stage("one", {}, {"big.bin": b"z" * 5000}, {}, 0, 0.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, old)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        assert store.load_stage("one", {}) is None


def test_a_full_disk_is_a_typed_error(tmp_path, monkeypatch):
    with Store.create(tmp_path, RECIPE, HERE) as store:
        store.begin_stage("one")

        def refuse(*arguments, **named):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(store_module, "open", refuse, raising=False)
        with pytest.raises(StorageFailed, match="No space left on device"):
            store.append_metrics({})
        with pytest.raises(StorageFailed, match="No space left on device"):
            store.begin_stage("two")


HOLDER = textwrap.dedent(
    """
    import sys, time
    from prunus.run.store import Store
    with Store.create(sys.argv[1], {"a": 1}, {}) as store:
        print("held", flush=True)
        time.sleep(60)
    """
)


def test_one_process_per_run_and_a_killed_one_frees_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=rf"process {holder.pid} on \S+"):
            Store.create(tmp_path, {"a": 1}, {})
        assert Store.open(tmp_path).recipe == {"a": 1}
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    Store.create(tmp_path, {"a": 1}, {}).close()


def test_two_stores_of_one_process_exclude_each_other(tmp_path):
    with Store.create(tmp_path, RECIPE, HERE), pytest.raises(RunLocked, match=f"process {os.getpid()}"):
        Store.create(tmp_path, RECIPE, HERE)
    Store.create(tmp_path, RECIPE, HERE).close()
