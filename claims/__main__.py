"""`python -m claims`: measure the claims of papers again and write one table of which hold."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICK_SEEDS = 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m claims", description=__doc__)
    made.add_argument(
        "names", nargs="*", metavar="NAME", help="claims, experiments, methods or families; shell patterns; default all"
    )
    made.add_argument("--seeds", type=_positive, help="repetitions (default: what each experiment asks for, 3 or 5)")
    made.add_argument("--quick", action="store_true", help=f"the cheap experiments with {QUICK_SEEDS} seeds")
    made.add_argument(
        "--update", action="store_true", help="write the named ones into the committed table and keep its other rows"
    )
    made.add_argument("--list", action="store_true", help="say what there is, and measure nothing")
    made.add_argument("--json", type=Path, metavar="PATH", help="write every number to this file as well")
    made.add_argument("--jobs", type=_positive, help="processes side by side (default: one per core)")
    made.add_argument(
        "--cache", type=Path, default=HERE / "cache", metavar="DIR", help="where finished work is kept (claims/cache)"
    )
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    return value


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run, and return 0 when everything ran (whatever holds), 1 after an error, 2 for bad usage, 75 when stopped.

    A run of all claims writes claims/RESULTS.md and claims/results.json; a part of them is only printed, or with
    `--update` written between the rows that are there, which are judged again from their numbers.
    """
    chosen = parser().parse_args(arguments)
    # Only now: `--help` need not wait for torch.
    from claims import registry, runner, table
    from claims.claim import ERROR
    from prunus.errors import PrunusError

    try:
        claims = registry.select(chosen.names, quick=chosen.quick)
    except PrunusError as error:
        say(str(error))
        return error.exit_code
    if chosen.list:
        print(table.listing(claims))
        return 0
    jobs = chosen.jobs or len(
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    seeds = chosen.seeds or (QUICK_SEEDS if chosen.quick else None)
    try:
        findings, measured = runner.run(claims, seeds=seeds, jobs=jobs, cache=chosen.cache, say=say)
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was")
        return 75
    data = ["PRUNUS_DATA=..."] if os.environ.get("PRUNUS_DATA") else []
    command = " ".join([*data, "python -m claims", *chosen.names, *_flags(chosen)])
    origin = runner.provenance(command)
    print(table.text(findings))
    numbers = table.as_json(findings, measured, origin)
    if chosen.json is not None:
        chosen.json.write_text(numbers, encoding="utf-8")
    if chosen.update:
        findings, measured, kept = runner.merged(findings, measured, json.loads((HERE / "results.json").read_bytes()))
        origin |= {"kept_from_earlier_code": kept}
        numbers = table.as_json(findings, measured, origin)
    if chosen.update or (not chosen.names and not chosen.quick):
        (HERE / "RESULTS.md").write_text(table.markdown(findings, origin), encoding="utf-8")
        (HERE / "results.json").write_text(numbers, encoding="utf-8")
    return 1 if any(f.verdict == ERROR for f in findings) else 0


def _flags(chosen: argparse.Namespace) -> list[str]:
    """Return the flags that change what is measured."""
    seeds = ["--seeds", str(chosen.seeds)] if chosen.seeds else []
    return [*seeds, *(["--quick"] if chosen.quick else [])]


if __name__ == "__main__":
    sys.exit(main())
