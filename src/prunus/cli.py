"""The command line: thin verbs. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunus import __version__
from prunus.errors import DataDamaged, DataMissing, InvalidValue, PrunusError, unknown

_EPILOG = """examples:
  prunus run                                   embedded digits, seven methods, about a minute, report at the end
  prunus run fashion-mnist --seeds 0,1         a recipe that comes with Prunus, with two seeds
  prunus run my.yaml --method RigL --method.sparsity 0.95 --training.lr 0.05
  prunus plan my.yaml                          what it would train, without training
  prunus resume runs/digits-1a2b3c4d           go on where a stopped or killed run was
  prunus ls methods                            what there is
  prunus explain rigl                          one method, its options and its source
  prunus prune net.onnx --macs 0.5 -o small.onnx   really remove channels until half the arithmetic is left

exit codes: 0 done, 2 bad usage, 3 failed, 4 an expectation missed, 5 damaged input, 75 stopped and resumable
"""

_CATALOGS = {
    "methods": "prunus.methods.registry:METHODS",
    "scores": "prunus.structured.registry:EVERY_SCORE",
    "budgets": "prunus.budget.registry:BUDGETS",
    "models": "prunus.models.registry:MODELS",
    "datasets": "prunus.data.registry:DATASETS",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except PrunusError as error:
        print(f"prunus: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader left (`| head`); silence the complaint at interpreter exit
        return 0


def _dispatch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prunus",
        description="Prune neural networks and the data they learn from, together.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prunus {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, (function, text, arguments_of) in _VERBS.items():
        verb = verbs.add_parser(
            name,
            help=text,
            description=(function.__doc__ or text),
            add_help=name != "run",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        arguments_of(verb)
    verb_name = next((a for a in arguments if not a.startswith("-")), None)
    if verb_name is not None and verb_name not in _VERBS:
        raise unknown("verb", verb_name, _VERBS)
    if verb_name in ("run", "plan"):
        at = arguments.index(verb_name) + 1
        own, recipe, flags = _split(arguments[at:])
        known = parser.parse_args([*arguments[:at], *own])
        known.recipe, known.flags = recipe, flags
    else:
        known = parser.parse_args(arguments)
    if known.verb is None:
        parser.print_help()
        return 0
    return _VERBS[known.verb][0](known)


_OWN_FLAGS = {"--out": 1, "--fresh": 0, "--quiet": 0, "--json": 0, "--help": 0, "-h": 0}


def _split(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Split what follows `run` or `plan` into the verb's own flags, the recipe, and the recipe's flags.

    The recipe is the word right behind the verb; any later word may be the value of a recipe's flag, which argparse,
    not knowing those flags, could not tell.
    """
    rest = list(words)
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else "digits"
    own: list[str] = []
    flags: list[str] = []
    while rest:
        word = rest.pop(0)
        values = _OWN_FLAGS.get(word.partition("=")[0])
        if values is None:
            flags.append(word)
        else:
            own.append(word)
            if values and "=" not in word and rest:
                own.append(rest.pop(0))
    return own, recipe, flags


def _say(text: str = "") -> None:
    print(text)


def _print_json(value: Any) -> None:
    _say(json.dumps(value, indent=2, sort_keys=False))


# -- run, plan, resume ------------------------------------------------------------------------------------------


def _recipe_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "recipe", nargs="?", default="digits", help="YAML file, or name of a recipe (`prunus ls recipes`)"
    )
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")


def _run_arguments(verb: argparse.ArgumentParser) -> None:
    _recipe_arguments(verb)
    verb.add_argument("-h", "--help", action="store_true", help="show this help, with every flag of a recipe")
    verb.add_argument("--out", type=Path, help="run folder (default: runs/TITLE-HASH; the same recipe continues there)")
    verb.add_argument("--fresh", action="store_true", help="make a new folder even if this recipe was run before")
    verb.add_argument("--quiet", action="store_true", help="no progress")


def _recipe(known: argparse.Namespace) -> Any:
    from prunus.run.recipe import from_flags
    from prunus.run.recipe_files import find, read

    path = find(known.recipe)
    return from_flags(read(path), known.flags, source=str(path))


def _run(known: argparse.Namespace) -> int:
    """Train what a recipe says, continue if it was started before, and write a report.

    Every value of a recipe is a flag of the same name: --training.lr 0.05, --seeds 1,2,3, --sparsities 0.9,0.98.
    --method NAME replaces the methods (repeat it for several); --method.OPTION VALUE sets an option of the method
    before it; --method.sparsity sets the sparsities; --data.OPTION and --model.OPTION set options of data and model.
    """
    if known.help:
        return _run_help()
    from prunus.run.driver import default_folder

    recipe = _recipe(known)
    folder = known.out or default_folder(recipe)
    if known.fresh:
        number, base = 1, folder
        while folder.exists():
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    return _carry_out(recipe, folder, known)


def _run_help() -> int:
    import inspect

    from prunus.run.recipe import parser

    head = argparse.ArgumentParser(
        prog="prunus run", add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    head.description = inspect.cleandoc(_run.__doc__ or "")
    _run_arguments(head)
    _say(head.format_help())
    flags = parser().format_help()
    _say("recipe values:\n" + flags.partition("\n\n")[2])
    return 0


def _carry_out(recipe: Any, folder: Path, known: argparse.Namespace) -> int:
    import contextlib
    import signal

    from prunus.report.summary import findings, summarise
    from prunus.run.driver import execute
    from prunus.run.progress import Progress

    progress = Progress(quiet=known.quiet)
    stop = {"asked": False}

    def ask(signum: int, frame: Any) -> None:
        if stop["asked"]:
            raise KeyboardInterrupt
        stop["asked"] = True

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, ask))
        stack.callback(progress.close)
        if not known.quiet:
            print(f"run folder {folder}", file=sys.stderr)
        try:
            finished = execute(
                recipe,
                folder,
                on_plan=progress.plan,
                on_step=progress.step,
                on_cell=progress.cell,
                should_stop=lambda: stop["asked"],
            )
        except PrunusError as error:
            if error.exit_code == 75:
                print(f"\nprunus: {error} Go on with: prunus resume {folder}", file=sys.stderr)
                return 75
            raise
    rows = summarise(finished.results)
    if known.json:
        _print_json({"folder": str(folder), "summary": [r.as_dict() for r in rows], "seconds": finished.seconds})
        return 0
    from rich.console import Console

    from prunus.report.tables import rich_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(rich_table(rows, finished.results["title"]))
    for sentence in findings(rows):
        _say(sentence)
    _say(f"report: {finished.reports['html']}  ({finished.seconds:.0f} s)")
    return 0


def _plan(known: argparse.Namespace) -> int:
    """List the trainings a recipe asks for, with their optimizer steps, without training anything."""
    from prunus.run.cells import cells
    from prunus.run.driver import load_data, root_runs
    from prunus.run.plan import plan

    recipe = _recipe(known)
    splits = load_data(recipe)
    steps = plan(cells(recipe), root_runs(recipe, splits, None))
    if known.json:
        _print_json({"recipe": recipe.to_dict(), "stages": steps, "steps": sum(steps.values())})
        return 0
    width = max(len(n) for n in steps)
    for name, count in steps.items():
        _say(f"{name:<{width}}  {count:>9,} steps")
    _say(f"{len(steps)} trainings, {sum(steps.values()):,} optimizer steps; nothing was trained.")
    return 0


def _resume_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", type=Path, help="run folder")
    verb.add_argument("--recipe", help="recipe that the folder must have been made by")
    verb.add_argument("--quiet", action="store_true", help="no progress")
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")


def _resume(known: argparse.Namespace) -> int:
    """Go on with a run that was stopped or killed; the result is the same, bit for bit, as if it never had been."""
    from prunus.run.recipe import build
    from prunus.run.recipe_files import find, read
    from prunus.run.store import Store

    recipe = build(Store.open(known.folder).recipe, source=str(known.folder / "recipe.json"))
    if known.recipe:
        path = find(known.recipe)
        # Opening the folder with another recipe shows the difference and stops.
        recipe = build(read(path), source=str(path))
    return _carry_out(recipe, known.folder, known)


# -- status, verify ---------------------------------------------------------------------------------------------


def _folder_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("path", type=Path, help="run folder or file")
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")


def _status(known: argparse.Namespace) -> int:
    """Show how far a run is: finished stages and results so far."""
    from prunus.run.lock import holder
    from prunus.run.store import Store

    store = Store.open(known.path)
    done = store.finished()
    working = holder(known.path / "lock")
    complete = (known.path / "report.json").exists()
    state = "finished" if complete else f"working ({working})" if working else "stopped, resumable"
    results = [n for n in done if n.endswith("/result")]
    if known.json:
        _print_json({"folder": str(known.path), "state": state, "stages": list(done), "results": len(results)})
        return 0
    _say(f"{known.path}: {state}; {len(done)} stages finished, {len(results)} results")
    for name in results:
        row = done[name]["result"]["json"]
        kept = f"kept {row['kept']:,}/{row['total']:,}"
        _say(f"  {name.removesuffix('/result'):<40} accuracy {row['accuracy']:.2%}  {kept}")
    if not complete and not working:
        _say(f"go on with: prunus resume {known.path}")
    return 0


def _verify(known: argparse.Namespace) -> int:
    """Check every hash of a run folder, a mask file or a model file."""
    from prunus.run.verify import verify

    verdict = verify(known.path)
    if known.json:
        _print_json({"path": verdict.path, "checked": verdict.checked, "problems": list(verdict.problems)})
    else:
        for problem in verdict.problems:
            _say(problem)
        _say(f"{verdict.path}: {verdict.checked} checked, {len(verdict.problems)} problems")
    return 0 if verdict.sound else 5


# -- prune ------------------------------------------------------------------------------------------------------


def _prune_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = """examples:
  prunus prune net.onnx --macs 0.5 -o small.onnx                 half the multiply-accumulates
  prunus prune net.onnx --sparsity 0.3 --scope global -o small.onnx   the 30 % weakest channels of the whole net
  prunus prune net.onnx --macs 0.5 --score wanda --calibration images.npz -o small.onnx
  prunus prune vit.onnx --sparsity 0.25 --unit head -o small.onnx
  prunus prune net.onnx --params 1500000 --round-to 8 --protect 'classifier*' -o small.onnx

images.npz holds one array per input of the model, by its name: numpy.savez("images.npz", input=x).
From PyTorch: torch.onnx.export(model, (x,), "net.onnx", dynamo=True). What was removed cannot be trained back in ONNX;
prune the PyTorch model with prunus.prune to fine-tune it.
"""
    verb.add_argument("model", type=Path, help="ONNX file; it is not changed")
    verb.add_argument("-o", "--output", type=Path, required=True, help="ONNX file to write")
    target = verb.add_mutually_exclusive_group(required=True)
    target.add_argument("--macs", help="multiply-accumulates that may remain: a share (0.5), or a number (120e6)")
    target.add_argument("--params", help="parameters that may remain: a share, or a number")
    target.add_argument("--sparsity", help="share of the units to remove")
    verb.add_argument("--unit", default="channel", help="channel (default) or head")
    verb.add_argument("--score", default="magnitude", help="magnitude (default), magnitude-squared, random, or wanda")
    verb.add_argument("--scope", default="local", help="who competes: local (default), global or isomorphic")
    verb.add_argument("--calibration", type=Path, help=".npz file of inputs, for wanda and for the proof")
    verb.add_argument(
        "--round-to", type=int, default=1, metavar="N", help="keep multiples of N units (8 suits kernels)"
    )
    verb.add_argument("--minimum", default="1", help="fewest units that stay in a family: a count, or a share (0.1)")
    verb.add_argument(
        "--protect", action="append", default=[], metavar="PATTERN", help="weights that stay (repeatable)"
    )
    verb.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="AXIS=N",
        help="size of an axis the model leaves open (repeatable)",
    )
    verb.add_argument(
        "--norms",
        default="auto",
        help="axes of layer norms: auto (default), whole (never cut), counted (cut, what went still counts), or anew",
    )
    verb.add_argument("--seed", type=int, default=0, help="of random scores and inputs (default 0)")
    verb.add_argument("--no-verify", action="store_true", help="do not prove the cut in onnxruntime")
    verb.add_argument("--quiet", action="store_true", help="no progress")
    verb.add_argument("--json", action="store_true", help="print the report as JSON")


def _prune(known: argparse.Namespace) -> int:
    """Make an ONNX model really smaller: remove channels or heads with everything coupled to them.

    The weakest units go until the target is met. The small model is proved in onnxruntime to give what the full one
    gives with the removed weights at zero; what cannot be cut is left whole and named in the report.
    """
    if known.model.suffix != ".onnx":
        raise InvalidValue(
            f"{known.model} is not an .onnx file. The command line prunes ONNX models only, because weights alone "
            "(.safetensors, .pt) do not say how the network computes; in Python, prunus.prune(model, "
            "unit='channel', example=x) takes any PyTorch model."
        )
    if known.output.exists() and known.model.exists() and known.output.samefile(known.model):
        raise InvalidValue(f"{known.output} is the model itself, which stays as it is; choose another output.")
    from prunus.structured.onnx import prune_onnx

    def tell(text: str) -> None:
        if not known.quiet:
            print(f"prunus: {text} ...", file=sys.stderr, flush=True)

    small = prune_onnx(
        known.model,
        None if known.sparsity is None else _number("--sparsity", known.sparsity),
        macs=None if known.macs is None else _number("--macs", known.macs),
        params=None if known.params is None else _number("--params", known.params),
        unit=known.unit,
        score=known.score,
        scope=known.scope,
        minimum=_number("--minimum", known.minimum),
        round_to=known.round_to,
        protect=known.protect,
        norms=known.norms,
        inputs=None if known.calibration is None else _read_arrays(known.calibration),
        sizes=_named_sizes(known.size),
        seed=known.seed,
        verify=not known.no_verify,
        on_stage=tell,
    )
    small.save(known.output)
    if known.json:
        _print_json({"model": str(known.model), "output": str(known.output), "report": small.report.to_dict()})
    else:
        _say(str(small.report))
        _say(f"wrote {known.output}")
    return 0


def _number(flag: str, text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidValue(f"{flag} {text!r} is not a number.") from None
    return int(value) if value.is_integer() and "." not in text else value


def _named_sizes(pairs: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for pair in pairs:
        name, _, size = pair.partition("=")
        if not name or not size.isdigit():
            raise InvalidValue(f"--size {pair!r} must be AXIS=N, such as sequence=128.")
        sizes[name] = int(size)
    return sizes


def _read_arrays(path: Path) -> dict[str, Any]:
    import zipfile

    import numpy as np

    if not path.is_file():
        raise DataMissing(f"there is no file {path}; --calibration wants arrays saved with numpy.savez.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays.items())
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataDamaged(f"{path} holds no arrays saved with numpy.savez ({error}).") from error


# -- ls, explain, new, doctor -----------------------------------------------------------------------------------


def _catalog(kind: str) -> Any:
    import importlib

    module, _, name = _CATALOGS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def _ls_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("kind", nargs="?", help=f"one of {', '.join(_CATALOGS)}, recipes (default: all)")
    verb.add_argument("pattern", nargs="?", default="*", help="shell pattern of names")
    verb.add_argument("--json", action="store_true", help="print JSON with all columns")


def _ls(known: argparse.Namespace) -> int:
    """List methods, scores, budgets, models, data sets and recipes."""
    kinds = [known.kind] if known.kind else [*_CATALOGS, "recipes"]
    listing: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds:
        if kind == "recipes":
            from prunus.run.recipe_files import packaged, summary_of

            found = packaged()
            listing[kind] = [{"name": n, "summary": summary_of(p), "path": str(p)} for n, p in found.items()]
            continue
        if kind not in _CATALOGS:
            raise unknown("kind of thing", kind, [*_CATALOGS, "recipes"])
        catalog = _catalog(kind)
        listing[kind] = [catalog.entry(n).describe() for n in catalog.names(known.pattern)]
    if known.json:
        _print_json(listing[known.kind] if known.kind else listing)
        return 0
    for kind, rows in listing.items():
        if not known.kind:
            _say(f"{kind}:")
        width = max((len(r["name"]) for r in rows), default=0)
        for row in rows:
            _say(f"  {row['name']:<{width}}  {row['summary']}")
    return 0


def _explain_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("name", help="method, score, budget, model or data set")


def _explain(known: argparse.Namespace) -> int:
    """Show what one name stands for: its table row, its options with defaults, and its documentation."""
    import inspect

    hits = [(kind, _catalog(kind)) for kind in _CATALOGS]
    hits = [(kind, catalog) for kind, catalog in hits if known.name in catalog]
    if not hits:
        raise unknown("name", known.name, [n for kind in _CATALOGS for n in _catalog(kind).names()])
    for kind, catalog in hits:
        entry = catalog.entry(known.name)
        _say(f"{entry.name} ({kind.rstrip('s')})")
        for key, value in entry.describe().items():
            if key not in ("name", "target") and value not in ("", [], None):
                shown = ", ".join(map(str, value)) if isinstance(value, list) else value
                _say(f"  {key:<12} {shown}")
        made = entry.load()
        _say("options:")
        for parameter in inspect.signature(made).parameters.values():
            if parameter.name != "run" and parameter.kind is not parameter.VAR_KEYWORD:
                default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
                _say(f"  {parameter.name}{default}")
        module = inspect.getmodule(made)
        for text in (module.__doc__ if module else None, made.__doc__):
            if text:
                _say()
                _say(inspect.cleandoc(text))
        _say()
    return 0


def _new_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("path", type=Path, help="file to write, such as my.yaml")
    verb.add_argument("--like", default="digits", help="recipe to start from (`prunus ls recipes`)")


def _new(known: argparse.Namespace) -> int:
    """Write a commented recipe to start from."""
    from prunus.files import write_atomic
    from prunus.run.recipe_files import find

    if known.path.exists():
        raise InvalidValue(f"{known.path} exists already; choose another name.")
    write_atomic(known.path, find(known.like).read_bytes())
    _say(f"wrote {known.path}; edit it and start it with: prunus run {known.path}")
    return 0


def _doctor_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")


def _doctor(known: argparse.Namespace) -> int:
    """Check what this machine has: versions, threads, the native engine, data folders, optional libraries."""
    from prunus.run.doctor import examine

    findings = examine()
    if known.json:
        _print_json([f._asdict() for f in findings])
    else:
        width = max(len(f.what) for f in findings)
        for finding in findings:
            _say(f"{'ok  ' if finding.ok else 'note'}  {finding.what:<{width}}  {finding.value}")
    return 0


Verb = tuple[Callable[[argparse.Namespace], int], str, Callable[[argparse.ArgumentParser], None]]
_VERBS: dict[str, Verb] = {
    "run": (_run, "train what a recipe says and report", _run_arguments),
    "plan": (_plan, "list what a recipe would train", _recipe_arguments),
    "resume": (_resume, "go on with a stopped or killed run", _resume_arguments),
    "status": (_status, "show how far a run is", _folder_arguments),
    "verify": (_verify, "check every hash of a run folder or file", _folder_arguments),
    "prune": (_prune, "make an ONNX model really smaller", _prune_arguments),
    "ls": (_ls, "list methods, scores, budgets, models, data sets, recipes", _ls_arguments),
    "explain": (_explain, "show what a name stands for, its options and source", _explain_arguments),
    "new": (_new, "write a recipe to start from", _new_arguments),
    "doctor": (_doctor, "check this machine", _doctor_arguments),
}

if __name__ == "__main__":
    sys.exit(main())
