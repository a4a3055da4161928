"""Structured pruning of every architecture from nothing but a model and one example input, beside torch-pruning.

Half of the channels of each model of torchvision (classification), of at least one model of every timm family and of
tiny configurations of transformers are removed. Ours works on a model if all of these hold:

- prunes: `prunus.prune(model, 0.5, unit="channel", example=x)` returns
- forward: the small model runs on another input; shapes: its outputs have the shapes they had
- macs: the operator counter of torch finds at least 40 % fewer multiply-accumulates
- exact: the small model equals the masked one of full size to 1e-4 relative, on another input
- reload: its file, read into a fresh instance, gives the same outputs
- step: one SGD step in train mode runs

torch-pruning gets the same model, input and ratio, and its output layers named, and works if it prunes and forward,
shapes, macs and step hold. Its way back from a file, a pickled model, is tried and reported but does not count.

Each model and tool has a process of its own with limits on time and memory. Rows are appended to a file of JSON
lines, so `--resume` continues where an earlier call stopped; the table is written from that file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contract import Outcome, at_least, equals, main
from benchmarks.coverage_models import LEFT_OUT, SUITES, Entry, entries
from prunus.errors import InvalidValue
from prunus.measure.forwarding import call, evaluating, tensors_of
from prunus.models.vision_repair import repair_torchvision
from prunus.randomness import generator

RATIO = 0.5
EXACT = 1e-4
MACS = 0.4
GOALS = {"torchvision": 1.0, "timm": 0.97, "transformers": 1.0}
OURS, THEIRS = TOOLS = ("prunus", "torch-pruning")
COUNTED = {
    OURS: ("prunes", "forward", "shapes", "macs", "exact", "reload", "step"),
    THEIRS: ("prunes", "forward", "shapes", "macs", "step"),
}
RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


# -- what is measured on one model ----------------------------------------------------------------------------------


class Checks:
    """Outcomes by name, and for each that does not hold the reason.

    Attributes:
        model: whose module names tell where an error arose.
        held: outcome of each check so far.
        reasons: reason of each check that failed.
        seconds: time of each check.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.held: dict[str, bool] = {}
        self.reasons: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Note whether the block runs through; an error inside it ends the block, and this check only."""
        start = time.perf_counter()
        self.held[name] = False
        try:
            yield
        except Exception as error:  # whatever it is, it is the finding
            self.reasons[name] = described(error, self.model)
        else:
            self.held[name] = name not in self.reasons
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def miss(self, name: str, reason: str) -> None:
        """Say within the block of a check that it does not hold."""
        self.reasons[name] = reason


def described(error: BaseException, model: nn.Module) -> str:
    """Return type and first line of an error, the innermost module of `model` it passed, and its place in a tool."""
    names = {id(module): name for name, module in model.named_modules()}
    module, place, trace = "", "", error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            module = f" in {names[id(owner)] or 'the model itself'} ({type(owner).__name__})"
        path = Path(frame.f_code.co_filename)
        if {"prunus", "torch_pruning"} & set(path.parts[-4:]) and path.name != "forwarding.py":
            place = f" at {path.name}:{trace.tb_lineno} {frame.f_code.co_name}"
        trace = trace.tb_next
    text = next(iter(str(error).strip().splitlines()), "")[:300]
    return f"{type(error).__name__}: {text}{module}{place}"


def macs_of(model: nn.Module, example: Any) -> int:
    """Return the multiply-accumulates of one forward pass as torch's operator counter sees them."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    counted = {torch.ops.aten._grouped_mm: _grouped}
    with contextlib.suppress(AttributeError):
        counted[torch.ops.transformers.grouped_mm_fallback] = _grouped
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Fused kernels hide their products from the counter: attention, whole transformer layers, recurrent layers.
    torch.backends.mha.set_fastpath_enabled(False)
    for parameter in learning:  # else the counter follows gradients even where none are computed, and trips over views
        parameter.requires_grad_(False)
    try:
        with (
            evaluating(model),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False) if recurrent else contextlib.nullcontext(),
            FlopCounterMode(display=False, custom_mapping=counted) as counter,
        ):
            call(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in learning:
            parameter.requires_grad_(True)
    return counter.get_total_flops() // 2


def _grouped(rows: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * int(rows[-2]) * int(rows[-1]) * int(weight[-1])


def another(example: Any) -> Any:
    """Return an input of the same kind with other numbers: new normal values, or the token numbers turned round."""
    if isinstance(example, Mapping):
        return {name: another(value) for name, value in example.items()}
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator(1, "benchmark", "another"))
    return example.flip(-1)


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Return the tensors a model gives in eval mode."""
    with evaluating(model), torch.no_grad():
        return [tensor.detach() for tensor in tensors_of(call(model, example))]


def sound_outputs(model: nn.Module, example: Any, row: Row) -> list[Tensor]:
    """Return `outputs` and note the seconds they took.

    Raises:
        RuntimeError: an output is not finite, so nothing could be compared with it.
    """
    start = time.perf_counter()
    found = outputs(model, example)
    row["forward_seconds"] = round(time.perf_counter() - start, 3)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
        raise RuntimeError("the model before pruning gives outputs that are not finite")
    return found


def step(model: nn.Module, example: Any) -> None:
    """Take one SGD step in train mode on the mean square of all outputs.

    Raises:
        RuntimeError: no parameter got a gradient, or one of a wrong shape.
    """
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    found = [t for t in tensors_of(call(model, example)) if t.requires_grad]
    torch.stack([t.float().square().mean() for t in found]).sum().backward()
    gradients = [p for p in model.parameters() if p.grad is not None]
    if not gradients or any(p.grad is None or p.grad.shape != p.shape for p in gradients):
        raise RuntimeError("parameters got no gradient of their shape")
    optimizer.step()


def compare_shapes(checks: Checks, before: list[Tensor], after: list[Tensor]) -> None:
    """Hold the check "shapes" if both lists have tensors of the same shapes."""
    with checks.check("shapes"):
        was, now = ([tuple(t.shape) for t in tensors] for tensors in (before, after))
        if was != now:
            checks.miss("shapes", f"outputs were {was} and are {now}")


def compare_macs(checks: Checks, row: Row, before: int, small: nn.Module, example: Any) -> None:
    """Hold the check "macs" if `small` needs at most 60 % of the multiply-accumulates it needed before."""
    with checks.check("macs"):
        after = macs_of(small, example)
        row["macs"] = [before, after]
        row["macs_removed"] = round(1 - after / before, 4)
        if row["macs_removed"] < MACS:
            checks.miss("macs", f"only {row['macs_removed']:.1%} of the multiply-accumulates are gone")


def size_of(model: nn.Module) -> int:
    """Return how many numbers the parameters hold."""
    return sum(parameter.numel() for parameter in model.parameters())


def with_prunus(entry: Entry, row: Row) -> Checks:
    """Prune one model with Prunus and check what came out."""
    import prunus

    model, example = entry.build(), entry.example()
    other = another(example)
    dense = sound_outputs(model, other, row)
    before = macs_of(model, example)
    checks = Checks(model)
    out: Any = None
    with checks.check("prunes"):
        out = prunus.prune(model, RATIO, unit="channel", example=example, measure=False)
    if out is None:
        return checks
    row["parameters"] = [size_of(model), size_of(out.model)]
    report = out.report
    row["prune_seconds"] = round(report.seconds, 3)
    row["blocked"] = [len(report.blocked), *sorted(set(report.blocked.values()))[:3]]
    row["without_rule"], row["notes"] = report.without_rule, list(report.notes)
    row["unprunable"] = dict(Counter(report.unprunable.values()).most_common(8))
    checks.model = out.model
    small: list[Tensor] = []
    with checks.check("forward"):
        small = outputs(out.model, other)
    if not checks.held["forward"]:
        return checks
    compare_shapes(checks, dense, small)
    compare_macs(checks, row, before, out.model, example)
    with checks.check("exact"):
        row["difference"] = float(out.plan.verify(model, other))
        if not row["difference"] <= EXACT:
            checks.miss("exact", f"removed differs from masked by {row['difference']:.2e} relative")
    del model, dense
    with checks.check("reload"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        out.save(path)
        row["file_bytes"] = path.stat().st_size
        again = outputs(prunus.load(path, entry.fresh(seed=1)), other)
        if len(again) != len(small) or not all(torch.equal(a, b) for a, b in zip(again, small, strict=True)):
            checks.miss("reload", "the reloaded model gives other outputs")
    with checks.check("step"):
        step(out.model, example)
    return checks


def with_torch_pruning(entry: Entry, row: Row) -> Checks:
    """Prune one model with torch-pruning as its guide does, the output layers excepted, and check what came out."""
    import torch_pruning as peer

    model, example = entry.build().eval(), entry.example()
    other = another(example)
    sound_outputs(model, other, row)
    dense = answer(model, other)
    before, size = macs_of(model, example), size_of(model)
    ignored = output_layers(model, example)
    checks = Checks(model)
    with checks.check("prunes"):
        importance = peer.importance.MagnitudeImportance(p=2)
        pruner = peer.pruner.BasePruner(
            model, example, importance=importance, pruning_ratio=RATIO, global_pruning=False, ignored_layers=ignored
        )
        pruner.step()
    if not checks.held["prunes"]:
        return checks
    row["parameters"] = [size, size_of(model)]
    small = dense
    with checks.check("forward"):
        small = answer(model, other)
    if not checks.held["forward"]:
        return checks
    compare_shapes(checks, [dense], [small])
    compare_macs(checks, row, before, model, example)
    with checks.check("reload"):
        try:
            entry.fresh(seed=1).load_state_dict(model.state_dict())
        except RuntimeError:
            row["reload"] = "pickle only"
        else:
            row["reload"] = "state dict"
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = answer(torch.load(file, weights_only=False), other)
        if not torch.equal(again, small):
            checks.miss("reload", "the unpickled model gives other outputs")
    with checks.check("step"):
        step(model, example)
    return checks


def answer(model: nn.Module, example: Any) -> Tensor:
    """Return the logits of a model, or the first tensor it gives."""
    with evaluating(model), torch.no_grad():
        output = call(model, example)
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else next(tensors_of(output))


def output_layers(model: nn.Module, example: Any) -> list[nn.Module]:
    """Return the layers that make the answer: as many channels, as many numbers; else the last of as many channels."""
    wanted = answer(model, example)
    called: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, _: Any, result: Any) -> None:
        width = getattr(module, "out_features", getattr(module, "out_channels", None))
        if isinstance(result, Tensor) and width in (wanted.shape[-1], wanted.shape[1]):
            called.append((module, result))

    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    outputs(model, example)
    for hook in hooks:
        hook.remove()
    makers = [module for module, result in called if result.numel() == wanted.numel()]
    return makers or [module for module, _ in called[-1:]]


MEASURE: dict[str, Callable[[Entry, Row], Checks]] = {OURS: with_prunus, THEIRS: with_torch_pruning}


# -- one process for each model and tool ----------------------------------------------------------------------------


def measured(entry: Entry, tool: str) -> Row:
    """Return the row of one model and tool; an error in building the model is a reason too."""
    row: Row = {"suite": entry.suite, "name": entry.name, "tool": tool, "note": entry.note}
    start = time.perf_counter()
    try:
        checks = MEASURE[tool](entry, row)
    except Exception as error:  # of the model or of this benchmark
        row |= {"works": False, "checks": {}, "reasons": {"builds": described(error, nn.Module())}, "seconds": {}}
    else:
        row |= {"checks": checks.held, "reasons": checks.reasons, "seconds": checks.seconds}
        row["works"] = all(checks.held.get(name, False) for name in COUNTED[tool])
    row["seconds"]["all"] = round(time.perf_counter() - start, 3)
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _child(entry: Entry, tool: str, limit: float, memory: float, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 5))  # ended by SIGXCPU
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        pipe.send(measured(entry, tool))
    pipe.close()


def measure_all(
    tasks: Sequence[tuple[Entry, str]], *, jobs: int, limit: float, memory: float, done: Callable[[Row], None]
) -> None:
    """Measure every task in a forked process of its own.

    Args:
        tasks: model and tool.
        jobs: how many at a time, one thread each.
        limit: seconds of processor time after which one is ended and noted as failed; ten times that in wall time.
        memory: GiB one may allocate.
        done: called with each row.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(tasks))
    patience = 10 * limit
    running: dict[Connection, tuple[BaseProcess, float, Entry, str]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            entry, tool = waiting.pop()
            ours, its = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(entry, tool, limit, memory, its), daemon=True)
            process.start()
            its.close()
            running[ours] = (process, time.monotonic(), entry, tool)
        oldest = min(start for _, start, _, _ in running.values())
        ready = set(wait(list(running), timeout=max(0.0, oldest + patience - time.monotonic())))
        for pipe in list(running):
            process, start, entry, tool = running[pipe]
            late = time.monotonic() - start > patience
            if pipe not in ready and not late:
                continue
            row: Row | None = None
            if pipe in ready:
                with contextlib.suppress(EOFError):
                    row = pipe.recv()
            else:
                process.kill()
            process.join()
            pipe.close()
            del running[pipe]
            late = late or process.exitcode == -signal.SIGXCPU
            done(row or _ended(entry, tool, process.exitcode, limit if late else None))


def _ended(entry: Entry, tool: str, code: int | None, limit: float | None) -> Row:
    reason = (
        f"took longer than {limit:g} s of processor time"
        if limit is not None
        else f"its process ended with code {code}"
    )
    row: Row = {"suite": entry.suite, "name": entry.name, "tool": tool, "note": entry.note, "works": False}
    return row | {"checks": {}, "reasons": {"prunes": reason}, "seconds": {"all": limit or 0.0}, "peak_mib": None}


# -- files ----------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[tuple[str, str, str], Row]:
    """Return the newest row of each (suite, name, tool) in a file of JSON lines; a torn last line is left out."""
    rows: dict[tuple[str, str, str], Row] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["suite"], row["name"], row["tool"]] = row
    return rows


def share(rows: Sequence[Row], check: str = "") -> float:
    """Return the share of rows that work, or in which one check holds."""
    good = sum(bool(row["checks"].get(check)) if check else bool(row["works"]) for row in rows)
    return good / len(rows) if rows else float("nan")


def table(rows: Sequence[Row], left_out: Mapping[str, str]) -> str:
    """Return the report in Markdown: counts by suite and check, one line for each model, and every failure."""
    by_tool = {tool: [row for row in rows if row["tool"] == tool] for tool in TOOLS}
    lines = ["# Structured pruning of half the channels, from a model and one example input", ""]
    names = list(dict.fromkeys(name for tool in TOOLS for name in COUNTED[tool]))
    lines += [f"| suite | tool | models | works | {' | '.join(names)} |", f"|{'---|' * (4 + len(names))}"]
    for suite in SUITES:
        for tool, found in by_tool.items():
            these = [row for row in found if row["suite"] == suite]
            if these:
                cells = [f"{share(these, n):.0%}" if n in COUNTED[tool] else "" for n in names]
                works = f"{sum(r['works'] for r in these)} ({share(these):.1%})"
                lines.append(f"| {suite} | {tool} | {len(these)} | {works} | {' | '.join(cells)} |")
    lines += ["", "## Models", ""]
    head = ["suite", "model", OURS, "MACs removed", "removed - masked", "prune s", THEIRS, "MACs removed", "prune s"]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    pairs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row["suite"], row["name"]), {})[row["tool"]] = row
    for (suite, name), pair in sorted(pairs.items(), key=lambda item: (list(SUITES).index(item[0][0]), item[0][1])):
        ours, theirs = (pair.get(tool) for tool in TOOLS)
        cells = [_verdict(ours), _percent(ours), _difference(ours), _seconds(ours)]
        cells += [_verdict(theirs), _percent(theirs), _seconds(theirs)]
        lines.append(f"| {suite} | {name} | {' | '.join(cells)} |")
    for tool, found in by_tool.items():
        failed = [row for row in found if not row["works"]]
        if found:
            lines += ["", f"## {len(failed)} of {len(found)} do not work with {tool}", ""]
            lines += [f"- {row['suite']} {row['name']}: {reason_of(row)}" for row in failed]
    if left_out:
        lines += ["", "## Left out", "", *(f"- {name}: {reason}" for name, reason in left_out.items())]
    return "\n".join(lines) + "\n"


def reason_of(row: Row) -> str:
    """Return the first check that does not hold and why."""
    for name in ("builds", *COUNTED[row["tool"]]):
        if name in row["reasons"]:
            return f"{name}: {row['reasons'][name]}".replace("|", "\\|")
    return "not measured"


def _verdict(row: Row | None) -> str:
    if row is None:
        return ""
    return "works" if row["works"] else f"no ({reason_of(row).partition(':')[0]})"


def _percent(row: Row | None) -> str:
    return f"{row['macs_removed']:.1%}" if row and "macs_removed" in row else ""


def _difference(row: Row | None) -> str:
    return f"{row['difference']:.0e}" if row and "difference" in row else ""


def _seconds(row: Row | None) -> str:
    return f"{row['seconds']['prunes']:.2f}" if row and "prunes" in row["seconds"] else ""


# -- the benchmark --------------------------------------------------------------------------------------------------


def options_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options.

    Raises:
        InvalidValue: a shard that is not I/N with 1 <= I <= N.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fixed sample of small models, in files of its own")
    parser.add_argument("--suite", action="append", default=[], choices=list(SUITES), help="only this one; repeatable")
    parser.add_argument("--only", default="*", help="only models whose name fits this shell pattern")
    parser.add_argument("--tool", default="both", choices=[*TOOLS, "both"])
    parser.add_argument("--shard", default="1/1", help="the I-th of every N models, as I/N")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="models at a time")
    parser.add_argument(
        "--limit", type=float, help="processor seconds for one model and tool; default 240, 60 with --quick"
    )
    parser.add_argument("--memory", type=float, default=16.0, help="GiB for one model and tool")
    parser.add_argument("--resume", action="store_true", help="do not measure again what the file has")
    parser.add_argument("--retry", action="store_true", help="with --resume: measure again what did not work")
    parser.add_argument("--table", action="store_true", help="measure nothing, judge and write what the file has")
    options = parser.parse_args(argv)
    part, _, parts = options.shard.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise InvalidValue(f"--shard {options.shard!r} is not I/N with 1 <= I <= N, such as 2/4.")
    options.part, options.parts = int(part), int(parts)
    if options.limit is None:
        options.limit = 60.0 if options.quick else 240.0
    return options


def run(quick: bool, options: argparse.Namespace) -> Outcome:
    """Measure what is asked for and not yet in the file, then write the table.

    Args:
        quick: the fixed sample instead of all models.
        options: of the command line.

    Raises:
        InvalidValue: no model fits the options.
    """
    chosen = entries(options.suite, options.only, quick=quick)[options.part - 1 :: options.parts]
    if not chosen:
        raise InvalidValue("no model fits --suite, --only and --shard; widen them.")
    tools = TOOLS if options.tool == "both" else (options.tool,)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("coverage-quick.jsonl" if quick else "coverage.jsonl")
    known = read_rows(path)

    def due(entry: Entry, tool: str) -> bool:
        row = known.get((entry.suite, entry.name, tool))
        return row is None or not options.resume or (options.retry and not row["works"])

    tasks = [(e, tool) for e in chosen for tool in tools if not options.table and due(e, tool)]
    _preload(chosen)
    with path.open("a") as file:

        def done(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            note = "works" if row["works"] else reason_of(row)
            print(f"{row['tool']:13} {row['suite']:12} {row['name']:36} {row['seconds']['all']:7.1f} s  {note}")

        measure_all(tasks, jobs=options.jobs, limit=options.limit, memory=options.memory, done=done)
    rows = read_rows(path)
    listed = {(e.suite, e.name) for e in entries(quick=quick)}
    path.with_suffix(".md").write_text(table([r for r in rows.values() if (r["suite"], r["name"]) in listed], LEFT_OUT))
    return judged(chosen, tools, rows)


def judged(chosen: Sequence[Entry], tools: Sequence[str], rows: Mapping[tuple[str, str, str], Row]) -> Outcome:
    """Return counts and failures of the chosen models, and the goals."""
    results, goals = [], []
    for suite in SUITES:
        names = [e.name for e in chosen if e.suite == suite]
        for tool in tools:
            found = [rows[suite, name, tool] for name in names if (suite, name, tool) in rows]
            if not names:
                continue
            results.append(
                {
                    "suite": suite,
                    "tool": tool,
                    "models": len(names),
                    "measured": len(found),
                    "works": sum(row["works"] for row in found),
                    "checks": {name: sum(bool(row["checks"].get(name)) for row in found) for name in COUNTED[tool]},
                    "failures": {row["name"]: reason_of(row) for row in found if not row["works"]},
                }
            )
            goals.append(equals(f"{suite}: models measured with {tool}", len(found), len(names)))
            if tool == OURS:
                goals.append(at_least(f"{suite}: share that works with {tool}", share(found), GOALS[suite]))
    return {"results": results, "goals": goals}


def _preload(chosen: Sequence[Entry]) -> None:
    """Import here what every forked process would import again; torch computes nothing before the fork."""
    repair_torchvision()
    suites = {entry.suite for entry in chosen}
    modules = ["prunus.oneshot", "torch_pruning"]
    modules += [suite for suite in suites if suite != "transformers"]
    modules += ["transformers.modeling_utils", "transformers.masking_utils"] if "transformers" in suites else []
    for module in modules:
        if importlib.util.find_spec(module.partition(".")[0]):
            importlib.import_module(module)


if __name__ == "__main__":
    asked = options_of()
    sys.exit(main(partial(run, options=asked), __doc__, ["--quick"] if asked.quick else []))
