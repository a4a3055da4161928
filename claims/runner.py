"""Running experiments: one task per experiment and seed, remembered on disk, so that a cut run goes on.

A finished task is a small JSON file under the cache; an unfinished one is a run folder beside it, whose stages and
checkpoints the next call continues. Both are known by a hash of the source code that produced them and of the
versions of Python, torch and numpy, so nothing measured by other code is ever reported.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import prunus
from claims import registry
from claims.claim import ERROR, NOT_RUN, Claim, Experiment, Finding, judge
from prunus.errors import DataMissing, PrunusError
from prunus.files import canonical_json, write_atomic
from prunus.run.store import Store

HERE = Path(__file__).resolve().parent
# What every experiment passes through; the rest of this folder only plans, judges and prints.
SHARED = ("bench.py", "runner.py")


@dataclass(frozen=True)
class Task:
    """One experiment with one seed."""

    experiment: str
    seed: int


@dataclass(frozen=True)
class Result:
    """What came of a task.

    Attributes:
        task: which.
        values: arm -> number, or None when it failed.
        problem: why it failed, "" otherwise.
        missing: whether it failed because the files of its data set are not there.
        seconds: how long it took.
    """

    task: Task
    values: dict[str, float] | None
    problem: str = ""
    missing: bool = False
    seconds: float = 0.0


@functools.cache
def source_digest() -> str:
    """Return the SHA-256 (hex) of all source files of the package and of what all experiments share."""
    root = Path(prunus.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in [*sorted(root.rglob("*.py")), *(HERE / name for name in SHARED)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def digest_of(experiment: Experiment) -> str:
    """Return the hash under which results of an experiment are remembered."""
    versions = [platform.python_version(), torch.__version__, importlib.metadata.version("numpy")]
    digest = hashlib.sha256("\0".join([source_digest(), *versions]).encode())
    digest.update(Path(inspect.getfile(experiment.measure)).read_bytes())
    return digest.hexdigest()[:16]


def perform(task: Task, cache: Path) -> Result:
    """Do a task, or load what came of it before. Errors come back as a result, an interruption is raised."""
    torch.set_num_threads(1)  # tasks run side by side, and the last bits must not depend on how many
    started = time.perf_counter()
    try:
        values = _measured(task, cache)
    except DataMissing as error:
        return Result(task, None, str(error), missing=True)
    except Exception as error:
        kind = "" if isinstance(error, PrunusError) else f"{type(error).__name__}: "
        return Result(task, None, f"{kind}{error}", seconds=time.perf_counter() - started)
    return Result(task, values, seconds=time.perf_counter() - started)


def _measured(task: Task, cache: Path) -> dict[str, float]:
    experiment = registry.experiment(task.experiment)
    folder = cache / experiment.name / f"{digest_of(experiment)}-seed-{task.seed}"
    done = folder.with_suffix(".json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {arm: float(v) for arm, v in json.loads(done.read_bytes())["values"].items()}
    recipe = {"experiment": experiment.name, "seed": task.seed}
    with Store.create(folder, recipe) as store:
        measured = experiment.measure(experiment.world(store, task.seed))
    values = {arm: float(value) for arm, value in measured.items()}
    write_atomic(done, canonical_json(recipe | {"values": values}))
    shutil.rmtree(folder, ignore_errors=True)
    return values


def run(
    claims: Sequence[Claim],
    *,
    seeds: int | None,
    jobs: int,
    cache: Path,
    say: Callable[[str], None],
) -> tuple[list[Finding], dict[str, dict[int, dict[str, float]]]]:
    """Measure everything that the claims need, and judge them.

    Args:
        claims: what is wanted.
        seeds: repetitions (seeds 1, 2, ...); None: what each experiment asks for.
        jobs: processes; results do not depend on it.
        cache: folder of finished and unfinished tasks.
        say: takes lines of progress.

    Returns:
        A finding per claim, in order, and what was measured: experiment -> seed -> arm -> number.
    """
    experiments = {c.experiment.name: c.experiment for c in claims}
    absent = {name for name, e in experiments.items() if e.needs and not os.environ.get("PRUNUS_DATA")}
    wanted = {name: e for name, e in experiments.items() if name not in absent}
    tasks = [Task(name, seed) for name, e in wanted.items() for seed in range(1, (seeds or e.seeds) + 1)]
    # The longest first, so that no process is left alone with one of them at the end.
    tasks.sort(key=lambda t: (-wanted[t.experiment].cost, t.experiment, t.seed))
    progress = _Progress(wanted, len(tasks), sum(wanted[t.experiment].cost for t in tasks), jobs, say)
    progress.begin()
    measured: dict[str, dict[int, dict[str, float]]] = {name: {} for name in wanted}
    problems: dict[str, str] = {}
    for result in _results(tasks, jobs, cache):
        progress.tell(result)
        if result.values is not None:
            measured[result.task.experiment][result.task.seed] = result.values
        elif result.missing:
            absent.add(result.task.experiment)
        else:
            problems[result.task.experiment] = f"seed {result.task.seed}: {result.problem}"
    return [_finding(c, measured, problems, absent) for c in claims], {n: m for n, m in measured.items() if m}


def _finding(
    claim: Claim, measured: Mapping[str, Mapping[int, dict[str, float]]], problems: Mapping[str, str], absent: set[str]
) -> Finding:
    name = claim.experiment.name
    if name in absent:
        return Finding(claim, NOT_RUN, f"set PRUNUS_DATA to the folder of {claim.experiment.needs}")
    if name in problems:
        return Finding(claim, ERROR, problems[name])
    try:
        return judge(claim, measured[name])
    except PrunusError as error:
        return Finding(claim, ERROR, str(error))


def merged(
    findings: Sequence[Finding], measured: Mapping[str, Mapping[int, dict[str, float]]], committed: Mapping[str, Any]
) -> tuple[list[Finding], dict[str, dict[int, dict[str, float]]], dict[str, list[str]]]:
    """Put findings between those of an earlier table.

    Args:
        findings, measured: what was measured now, of some claims.
        committed: an earlier table as JSON.

    Returns:
        A finding per claim there is, judged from numbers of now or of the earlier table; the numbers; and which
        experiments are kept, by the SHA-256 of the code that measured them.
    """
    values = {n: {int(s): dict(arms) for s, arms in e["values"].items()} for n, e in committed["experiments"].items()}
    origin = committed["provenance"]
    before = {name: source for source, names in origin.get("kept_from_earlier_code", {}).items() for name in names}
    every = registry.every()
    now = {f.claim.name: f for f in findings}
    wanted = {c.experiment.name for c in every.values()}
    numbers = {n: v for n, v in (values | {n: dict(m) for n, m in measured.items()}).items() if n in wanted and v}
    kept: dict[str, list[str]] = {}
    for name in numbers:
        if name not in measured:
            kept.setdefault(str(before.get(name, origin["source_sha256"])), []).append(name)
    result = []
    for claim in every.values():
        if claim.name in now:
            result.append(now[claim.name])
        elif claim.experiment.name in numbers:
            result.append(judge(claim, numbers[claim.experiment.name]))
        else:
            result.append(Finding(claim, NOT_RUN, f"`python -m claims {claim.experiment.name} --update` measures it"))
    return result, numbers, kept


def _results(tasks: Sequence[Task], jobs: int, cache: Path) -> Iterator[Result]:
    """Yield results as they come."""
    if jobs == 1 or len(tasks) < 2:
        yield from (perform(task, cache) for task in tasks)
        return
    # Fresh processes: forked ones may hang in libraries that had started threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
        try:
            waiting: set[Future[Result]] = {pool.submit(perform, task, cache) for task in tasks}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Progress:
    """Lines of progress with the time that is left, from how fast declared costs were worked off so far."""

    def __init__(
        self, experiments: Mapping[str, Experiment], count: int, cost: float, jobs: int, say: Callable[[str], None]
    ):
        self.experiments = experiments
        self.count = count
        self.left = cost
        self.jobs = jobs
        self.say = say
        self.done = 0
        self.cost = 0.0
        self.seconds = 0.0

    def begin(self) -> None:
        """Say what is ahead."""
        if self.count:
            about = _spoken(self.left / self.jobs)
            self.say(f"{self.count} tasks, {self.jobs} at a time, about {about} on idle cores if none is done yet")

    def tell(self, result: Result) -> None:
        """Say what is done, and about how long the rest will take."""
        cost = self.experiments[result.task.experiment].cost
        self.done += 1
        self.left -= cost
        if result.seconds > 0.1 * cost:  # what was loaded from the cache says nothing about speed
            self.cost += cost
            self.seconds += result.seconds
        pace = self.seconds / self.cost if self.cost else 1.0
        left = max(0.0, self.left) * pace / self.jobs
        outcome = "files missing" if result.missing else result.problem or f"{result.seconds:.1f} s"
        about = f", about {_spoken(left)} left" if self.done < self.count else ""
        self.say(f"[{self.done}/{self.count}] {result.task.experiment} seed {result.task.seed}: {outcome}{about}")


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def provenance(command: str) -> dict[str, object]:
    """Return what the results depend on, without a date: versions, machine, source code, command."""
    return {
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "prunus": importlib.metadata.version("prunus"),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads_per_task": 1,
        "source_sha256": source_digest(),
        "platform": sys.platform,
    }
