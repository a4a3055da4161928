"""What all benchmarks share: the command line, the JSON at the end, interleaved timing, and who ran it."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.errors import InvalidValue

Outcome = dict[str, Any]  # {"results": [...], "goals": [...]}


# -- goals and the end ----------------------------------------------------------------------------------------------


def at_most(what: str, value: float, limit: float) -> dict[str, Any]:
    """Return the goal that `value` is `limit` or less; a value that is not a number misses it."""
    return {"what": what, "value": _short(value), "goal": f"<= {limit:g}", "met": bool(value <= limit)}


def at_least(what: str, value: float, limit: float) -> dict[str, Any]:
    """Return the goal that `value` is `limit` or more; a value that is not a number misses it."""
    return {"what": what, "value": _short(value), "goal": f">= {limit:g}", "met": bool(value >= limit)}


def below(what: str, value: float, limit: float) -> dict[str, Any]:
    """Return the goal that `value` is less than `limit`; a value that is not a number misses it."""
    return {"what": what, "value": _short(value), "goal": f"< {limit:g}", "met": bool(value < limit)}


def equals(what: str, value: Any, wanted: Any) -> dict[str, Any]:
    """Return the goal that `value` is exactly `wanted`."""
    return {"what": what, "value": value, "goal": f"== {wanted}", "met": bool(value == wanted)}


def _short(value: float) -> float | None:
    return round(value, 4) if isinstance(value, int) or abs(value) < float("inf") else None


def check(outcome: Outcome) -> None:
    """Check what a benchmark returned.

    Raises:
        InvalidValue: other keys than "results" and "goals", no goal at all, or a goal without what, value, goal, met.
    """
    if set(outcome) != {"results", "goals"}:
        raise InvalidValue(f"a benchmark returns 'results' and 'goals', not {sorted(outcome)}.")
    if not outcome["goals"]:
        raise InvalidValue("a benchmark without goals cannot be met or missed; give at least one.")
    for goal in outcome["goals"]:
        if set(goal) != {"what", "value", "goal", "met"} or not isinstance(goal["met"], bool):
            raise InvalidValue(f"goal {goal!r} needs exactly what, value, goal and a true or false met.")


def main(run: Callable[[bool], Outcome], description: str | None, argv: Sequence[str] | None = None) -> int:
    """Read `--quick`, run, print one JSON object, and return the exit code.

    Args:
        run: takes whether to be quick; returns {"results": [...], "goals": [...]}. A line about the machine is put
            in front of its results. What it prints goes to standard error.
        description: text of `--help`.
        argv: arguments; default those of the process.

    Returns:
        0 if every goal is met, else 1.

    Raises:
        InvalidValue: the outcome is not as `check` wants it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under a minute, and less certain")
    quick = parser.parse_args(argv).quick
    before = os.getloadavg()[0]
    with contextlib.redirect_stdout(sys.stderr):
        outcome = run(quick)
    check(outcome)
    described = machine() | {"load_before": round(before, 2), "quick": quick}
    text = json.dumps(
        {"results": [described, *outcome["results"]], "goals": outcome["goals"]}, indent=2, allow_nan=False
    )
    print(text, flush=True)
    return 0 if all(goal["met"] for goal in outcome["goals"]) else 1


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: CPU, cores, torch and its threads, and how busy the machine is."""
    import torch

    return {
        "what": "machine",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def memory_of_process(what: str) -> int:
    """Return the bytes this process holds now ("VmRSS") or held at most ("VmHWM"), from Linux.

    Not `ru_maxrss`: that one survives exec, so a process would report the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":"))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextlib.contextmanager
def threads(count: int) -> Any:
    """Let torch use `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- interleaved timing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """Seconds of each candidate, one number per round; the same position is the same round."""

    seconds: Mapping[str, Sequence[float]]

    def milliseconds(self, name: str) -> float:
        """Return the median time of one candidate."""
        return 1e3 * statistics.median(self.seconds[name])

    def ratios(self, name: str, base: str, rounds: Sequence[int] | None = None) -> list[float]:
        """Return time over time of `base` in each round (or only in those numbered in `rounds`)."""
        pairs = list(zip(self.seconds[name], self.seconds[base], strict=True))
        return [mine / theirs for mine, theirs in (pairs if rounds is None else [pairs[r] for r in rounds])]

    def ratio(self, name: str, base: str, rounds: Sequence[int] | None = None) -> float:
        """Return the median of `ratios`: a burst of other work on the machine spoils single rounds, not the median."""
        return statistics.median(self.ratios(name, base, rounds))

    def summary(self, name: str, base: str) -> dict[str, Any]:
        """Return median time, median ratio and the quartiles of the ratio, ready for the results."""
        ratios = self.ratios(name, base)
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return {
            "name": name,
            "median_ms": round(self.milliseconds(name), 3),
            "ratio": round(self.ratio(name, base), 4),
            "ratio_quartiles": [round(low, 4), round(high, 4)],
            "rounds": len(ratios),
        }


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    after: Callable[[str, int], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time all candidates in turns, `rounds` times; each round starts with another one.

    Args:
        candidates: what to time, by name.
        rounds: how often each is timed.
        warmup: rounds before, which are not counted.
        prepare: work done untimed before a candidate of that name.
        after: called untimed after each counted run with the name and the number of the round.
        clock: seconds.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            if prepare and name in prepare:
                prepare[name]()
            start = clock()
            candidates[name]()
            taken = clock() - start
            if number >= 0:
                seconds[name].append(taken)
                if after is not None:
                    after(name, number)
    return Timings(seconds)


# -- other processes ------------------------------------------------------------------------------------------------


def environment(
    packages: Sequence[str],
    *,
    folder: Path | None = None,
    constraints: Path | None = None,
    run: Callable[..., Any] = subprocess.run,
) -> Path:
    """Return the Python of a virtual environment that holds `packages`, made at first use and kept.

    Peers that must not share our environment are timed in one of these; each set of packages has its own.

    Args:
        packages: requirements as pip takes them.
        folder: where environments are kept; default `~/.cache/prunus/benchmarks`.
        constraints: versions that pip may not leave; part of what tells environments apart.
        run: starts pip.

    Raises:
        subprocess.CalledProcessError: pip failed; the next call tries again.
    """
    pinned = constraints.read_text() if constraints is not None else ""
    name = hashlib.sha256(json.dumps([sorted(packages), pinned, platform.python_version()]).encode()).hexdigest()[:16]
    place = (folder if folder is not None else Path.home() / ".cache" / "prunus" / "benchmarks") / name
    python = place / "bin" / "python"
    finished = place / "finished"
    if not finished.is_file():
        venv.EnvBuilder(with_pip=bool(packages), clear=True).create(place)
        if packages:
            limit = ["--constraint", str(constraints)] if constraints is not None else []
            run([str(python), "-m", "pip", "install", "--quiet", *limit, *packages], check=True, stdout=sys.stderr)
        finished.write_text("\n".join(packages))
    return python
