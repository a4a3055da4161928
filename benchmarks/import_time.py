"""What starting Prunus costs: the import beside torch's own, and the command line, which must not import torch.

Every measurement is the CPU time (user and system) of a fresh process, which other work on the machine disturbs
less than wall time; the processes that are compared run in turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contract import Outcome, at_most, below, equals, interleaved, main

IMPORT_GOAL = 1.10
COMMAND_GOAL = 0.4
TORCH = "import torch"
PROGRAMS = {
    TORCH: ["-c", "import torch"],
    "import torch, prunus": ["-c", "import torch, prunus"],
    "every public name": ["-c", "import torch, prunus; [getattr(prunus, name) for name in prunus.__all__]"],
}


def command() -> list[str]:
    """Return how the command line is started: the installed `prunus` beside this Python, else `python -m prunus`."""
    script = Path(sys.executable).parent / "prunus"
    return [str(script)] if script.is_file() else [sys.executable, "-m", "prunus"]


def cpu_seconds(arguments: Sequence[str]) -> float:
    """Return the user and system seconds of one process.

    Raises:
        CalledProcessError: it failed; a failing program is fast and must not count.
    """
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    # Of this process alone: other children of ours do not come in.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(arguments))
    return usage.ru_utime + usage.ru_stime


def imported(arguments: Sequence[str]) -> set[str]:
    """Return the modules a process imports, from Python's own report."""
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def run(quick: bool) -> Outcome:
    """Measure imports and commands.

    Args:
        quick: 3 rounds instead of 15.
    """
    rounds = 3 if quick else 15
    programs = {name: [sys.executable, *rest] for name, rest in PROGRAMS.items()}
    seconds = _measure(programs, rounds)
    ratios = {n: statistics.median(m / t for m, t in zip(seconds[n], seconds[TORCH], strict=True)) for n in programs}
    results: list[dict[str, Any]] = [
        {"name": n, "cpu_s": round(statistics.median(s), 3), "ratio": round(ratios[n], 4), "rounds": rounds}
        for n, s in seconds.items()
    ]
    goals = [
        at_most("CPU time of 'import torch, prunus' over 'import torch'", ratios["import torch, prunus"], IMPORT_GOAL)
    ]

    commands = {f"prunus {verb}": [*command(), verb] for verb in ("--help", "ls")}
    for name, taken in _measure(commands, rounds).items():
        middle = statistics.median(taken)
        modules = imported(commands[name])
        heavy = sorted({m.partition(".")[0] for m in modules} & {"torch", "numpy", "matplotlib", "sklearn"})
        results.append({"name": name, "cpu_s": round(middle, 3), "modules": len(modules), "heavy": heavy})
        goals.append(below(f"CPU seconds of '{name}'", middle, COMMAND_GOAL))
        goals.append(equals(f"'{name}' imports torch", "torch" in modules, False))
    return {"results": results, "goals": goals}


def _measure(programs: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of each program, one per round, in turns; a first round fills the caches."""
    spent = 0.0

    def starting(arguments: list[str]) -> None:
        nonlocal spent
        spent += cpu_seconds(arguments)

    candidates = {name: lambda arguments=arguments: starting(arguments) for name, arguments in programs.items()}
    timings = interleaved(candidates, rounds, clock=lambda: spent)
    return {name: list(values) for name, values in timings.seconds.items()}


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
