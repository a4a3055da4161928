"""The contract of benchmarks: what they print, how they judge, how they take turns. No timing is asserted here."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import contract

from prunus.errors import InvalidValue

NAMES = [
    "coverage",
    "engine",
    "import_time",
    "latency_target",
    "loader",
    "mask_overhead",
    "prune_time",
    "structured_accuracy",
    "structured_time",
]


def outcome(*met):
    goals = [contract.equals(f"goal {n}", m, True) for n, m in enumerate(met)]
    return {"results": [{"name": "something", "value": 1}], "goals": goals}


@pytest.mark.parametrize(("met", "code"), [((True,), 0), ((True, True), 0), ((False,), 1), ((True, False, True), 1)])
def test_the_exit_code_is_0_only_if_every_goal_is_met(met, code, capsys):
    assert contract.main(lambda quick: outcome(*met), "text", []) == code
    assert [g["met"] for g in json.loads(capsys.readouterr().out)["goals"]] == list(met)


def test_one_json_object_is_all_of_standard_output(capsys):
    def run(quick):
        print("a library that prints")
        return outcome(True)

    contract.main(run, None, [])
    written = capsys.readouterr()
    parsed = json.loads(written.out)  # json.loads refuses anything before or after one value
    assert set(parsed) == {"results", "goals"}
    assert parsed["results"][0]["what"] == "machine"
    assert {"cpu", "threads", "torch", "load"} <= set(parsed["results"][0])
    assert "a library that prints" in written.err


@pytest.mark.parametrize(("argv", "quick"), [([], False), (["--quick"], True)])
def test_quick_reaches_the_benchmark(argv, quick, capsys):
    seen = []

    def run(quick):
        seen.append(quick)
        return outcome(True)

    contract.main(run, None, argv)
    assert seen == [quick]
    assert json.loads(capsys.readouterr().out)["results"][0]["quick"] is quick


def test_a_benchmark_that_fails_prints_no_json_and_does_not_pass(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text(
        "from benchmarks.contract import main\nimport sys\nsys.exit(main(lambda quick: 1 / 0, None, []))\n"
    )
    root = Path(contract.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env={"PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"results": [], "goals": []}, "without goals"),
        ({"results": []}, "not \\['results'\\]"),
        ({"results": [], "goals": [], "extra": 1}, "extra"),
        ({"results": [], "goals": [{"what": "x", "value": 1, "goal": "<= 1"}]}, "exactly what"),
        ({"results": [], "goals": [{"what": "x", "value": 1, "goal": "<= 1", "met": "yes"}]}, "true or false"),
    ],
)
def test_outcomes_that_could_not_be_judged_are_refused(broken, reason):
    with pytest.raises(InvalidValue, match=reason):
        contract.main(lambda quick: broken, None, [])


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (contract.at_most("x", 1.02, 1.02), True),
        (contract.at_most("x", 1.0201, 1.02), False),
        (contract.at_least("x", 2.0, 2.0), True),
        (contract.at_least("x", 1.99999, 2.0), False),
        (contract.below("x", 1.0, 1.0), False),
        (contract.below("x", 0.99999, 1.0), True),
        (contract.equals("x", 10, 10), True),
        (contract.equals("x", 11, 10), False),
        (contract.at_most("x", math.nan, 1.0), False),
        (contract.at_least("x", math.nan, 1.0), False),
        (contract.at_least("x", -math.inf, 1.0), False),
    ],
)
def test_goals_at_their_limits(goal, met):
    assert goal["met"] is met
    json.dumps(goal, allow_nan=False)


class Clock:
    """Time that passes only when work is done, and twice as slowly from round to round, as on a busy machine."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds * 2 ** ((len(self.calls) - 1) // 2)

        return run


def test_candidates_take_turns_and_ratios_are_taken_within_rounds():
    clock = Clock()
    timings = contract.interleaved({"a": clock.work("a", 3.0), "b": clock.work("b", 1.0)}, 4, warmup=0, clock=clock)
    assert clock.calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert timings.seconds == {"a": [3.0, 6.0, 12.0, 24.0], "b": [1.0, 2.0, 4.0, 8.0]}
    assert timings.ratios("a", "b") == [3.0] * 4


def test_a_slow_machine_slows_both_and_the_ratio_stays():
    seconds = {"ours": [2.0, 4.0, 8.0, 400.0, 2.0], "theirs": [1.0, 2.0, 4.0, 2.0, 1.0]}
    timings = contract.Timings(seconds)
    assert timings.ratio("ours", "theirs") == 2.0  # the one spoiled round (200) does not count
    assert timings.ratio("theirs", "ours", [0, 2]) == 0.5
    assert timings.milliseconds("theirs") == 2000.0
    summary = timings.summary("ours", "theirs")
    assert summary["ratio"] == 2.0
    assert summary["rounds"] == 5
    assert summary["ratio_quartiles"][0] <= 2.0 <= summary["ratio_quartiles"][1]


def test_warmup_is_not_counted_and_preparing_is_not_timed():
    clock = Clock()
    clock.work = lambda name, seconds: lambda: (clock.calls.append(name), setattr(clock, "now", clock.now + seconds))
    finished = []
    timings = contract.interleaved(
        {"a": clock.work("a", 1.0), "b": clock.work("b", 2.0)},
        3,
        warmup=2,
        prepare={"a": clock.work("prepare", 100.0)},
        after=lambda name, number: finished.append((name, number)),
        clock=clock,
    )
    assert timings.seconds == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert clock.calls.count("a") == clock.calls.count("prepare") == 5
    assert sorted(finished) == [(n, i) for n in "ab" for i in range(3)]


def test_rounds_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="zip"):
        contract.Timings({"a": [1.0, 2.0], "b": [1.0]}).ratio("a", "b")


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with contract.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_an_environment_is_made_once_for_each_set_of_packages(tmp_path, monkeypatch):
    made, installed = [], []

    class Builder:
        def __init__(self, **options):
            self.options = options

        def create(self, place):
            made.append(place)
            place.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(contract.venv, "EnvBuilder", Builder)
    limits = tmp_path / "constraints.txt"
    limits.write_text("peer==1\n")

    def install(packages):
        return contract.environment(
            packages, folder=tmp_path, constraints=limits, run=lambda command, **_: installed.append(command)
        )

    first = install(["peer", "other"])
    assert install(["other", "peer"]) == first
    assert len(made) == len(installed) == 1
    assert installed[0][1:] == ["-m", "pip", "install", "--quiet", "--constraint", str(limits), "peer", "other"]
    limits.write_text("peer==2\n")
    assert install(["peer", "other"]) != first


def test_an_environment_whose_installation_failed_is_made_again(tmp_path, monkeypatch):
    attempts = []
    monkeypatch.setattr(contract.venv.EnvBuilder, "create", lambda self, place: Path(place).mkdir(exist_ok=True))

    def failing(command, **_):
        attempts.append(command)
        raise subprocess.CalledProcessError(1, command)

    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            contract.environment(["peer"], folder=tmp_path, run=failing)
    assert len(attempts) == 2


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_the_face_that_the_contract_asks_for(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.run)
    assert module.main is contract.main
    assert module.__doc__


def test_no_benchmark_is_forgotten_here():
    folder = Path(contract.__file__).parent
    assert (
        sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "contract", "coverage_models"))
        == NAMES
    )


def test_sizes_of_the_nets_that_are_pruned():
    from benchmarks.prune_time import NETS

    from prunus.parameters import prunable

    with torch.device("meta"):
        nets = {name: make() for name, make in NETS.items()}
    assert prunable(nets["resnet50"]).total == 25_502_912
    assert prunable(nets["transformer-124m"]).total == 12 * 12 * 768**2
    assert sum(p.numel() for p in nets["transformer-124m"].parameters()) == pytest.approx(124e6, rel=0.01)


def test_both_pruners_keep_the_same_weights():
    from benchmarks.prune_time import SPARSITY, with_prunus, with_torch

    layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(40, 30)])
    other = torch.nn.ModuleList([torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(40, 30)])
    other.load_state_dict(layers.state_dict())
    total = 8 * 3 * 9 + 1200
    assert with_prunus(layers) == with_torch(other) == total - round(SPARSITY * total)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, other))


def test_the_peak_of_a_process_is_its_own():
    """A parent that holds much must not show in the child's peak, as it does in `ru_maxrss`."""
    from benchmarks.contract import memory_of_process

    held = torch.ones(50_000_000)
    code = "from benchmarks.contract import memory_of_process as m; print(m('VmRSS'), m('VmHWM'))"
    light = "import torch; print([l for l in open('/proc/self/status') if 'VmHWM' in l][0].split()[1])"
    root = Path(contract.__file__).parents[1]
    resident, peak = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).split())
    alone = int(subprocess.check_output([sys.executable, "-c", light], text=True)) * 1024
    assert resident <= peak < alone + 0.5 * held.nbytes
    assert memory_of_process("VmHWM") >= held.nbytes


def test_imports_are_read_from_pythons_own_report():
    from benchmarks.import_time import cpu_seconds, imported

    assert "decimal" in imported([sys.executable, "-c", "import decimal"])
    assert "decimal" not in imported([sys.executable, "-c", "import json"])
    assert 0 < cpu_seconds([sys.executable, "-c", "pass"]) < 60
    with pytest.raises(subprocess.CalledProcessError):
        cpu_seconds([sys.executable, "-c", "raise SystemExit(3)"])


def test_engine_cases_and_masks_are_what_they_say():
    from benchmarks.engine import PATTERNS, cases, masked, turns

    for quick in (True, False):
        found = cases(quick)
        assert len(set(found)) == len(found)
        assert {case.pattern for case in found} <= set(PATTERNS)
        assert any(case.goal for case in found)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3), torch.nn.Linear(16, 10))
    masked(model, "4x1", 0.5)
    assert (model[0].weight != 0).all()
    columns = (model[1].weight != 0).reshape(4, 4, -1)
    assert (columns == columns[:, :1]).all()
    assert 0.3 < columns.float().mean() < 0.7
    assert (model[2].weight != 0).all()  # 10 rows are no multiple of 4
    seconds = turns({"a": lambda: None, "b": lambda: None}, 3)
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3}
