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


# -- profile, bench ---------------------------------------------------------------------------------------------


def _model_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", help="a name of `prunus ls models`, or timm/NAME, torchvision/NAME, transformers/NAME")
    verb.add_argument("--weights", type=Path, metavar="FILE", help="saved by prunus, or a checkpoint (default: random)")
    verb.add_argument("--shape", help="of one input, such as 3,224,224 (default: the model's own)")
    verb.add_argument("--classes", type=int, metavar="N", help="outputs (default 10, or 1000 of image collections)")
    verb.add_argument("--batch", default="1", help="examples per call (default 1)")
    verb.add_argument("--threads", help="default: as many as torch takes")
    verb.add_argument("--seed", type=int, default=0, help="of random weights, masks and inputs (default 0)")
    verb.add_argument("--rounds", type=int, metavar="N", help="timed calls of each (default: a few seconds)")
    verb.add_argument("--quiet", action="store_true", help="no progress")
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")
    verb.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the JSON to a file as well")


def _model(known: argparse.Namespace) -> Any:
    from prunus.runtime.named import named_model, sizes

    shape = sizes(known.shape, "--shape") if known.shape else None
    return named_model(known.model, shape=shape, classes=known.classes, weights=known.weights, seed=known.seed)


def _measured(known: argparse.Namespace, found: Any) -> int:
    """Print and write what was measured."""
    if known.output is not None:
        from prunus.files import write_atomic

        write_atomic(known.output, (json.dumps(found.to_dict(), indent=2) + "\n").encode())
    if known.json:
        _print_json(found.to_dict())
    else:
        _say(str(found))
    return 0


def _telling(known: argparse.Namespace) -> Callable[[str], None]:
    return lambda text: None if known.quiet else print(f"prunus: {text} ...", file=sys.stderr, flush=True)


def _profile_arguments(verb: argparse.ArgumentParser) -> None:
    _model_arguments(verb)
    verb.add_argument("--compress", action="store_true", help="profile what prunus.compress makes of the model")


def _profile(known: argparse.Namespace) -> int:
    """Measure what a model costs, layer by layer: parameters, arithmetic, bytes, time, and what holds each back."""
    from prunus.runtime.named import sizes
    from prunus.runtime.profile import at_batch, profile

    batch, threads = sizes(known.batch, "--batch"), sizes(known.threads, "--threads") if known.threads else (None,)
    if len(batch) > 1 or len(threads) > 1:
        raise InvalidValue("profile takes one batch size and one number of threads; `prunus bench` compares several.")
    model, example = _model(known)
    tell = _telling(known)
    if known.compress:
        from prunus.measure.latency import using_threads
        from prunus.runtime.compress import compress

        with using_threads(threads[0]):
            model = compress(model, at_batch(example, batch[0]), on_stage=tell)
    found = profile(model, example, batch=batch[0], threads=threads[0], rounds=known.rounds, on_stage=tell)
    return _measured(known, found)


def _bench_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = """examples:
  prunus bench timm/resnet50 --sparsity 0,0.5,0.8,0.9,0.95 --pattern unstructured,16x1 --plot resnet50.svg
  prunus bench torchvision/mobilenet_v2 --batch 1,16 --threads 1,2 --against dense,onnxruntime --json
  prunus bench resnet20 --weights pruned.safetensors -o result.json

Runtimes that are not installed are skipped and named: pip install 'prunus[bench]' brings onnxruntime and openvino.
"""
    _model_arguments(verb)
    verb.add_argument(
        "--against",
        default="dense,onnxruntime,openvino,torch-compile",
        help="runtimes: dense (torch), onnxruntime, openvino, torch-compile (default: all)",
    )
    verb.add_argument("--sparsity", default="", help="shares of zeros to draw at random, such as 0,0.5,0.9")
    verb.add_argument(
        "--pattern", default="unstructured", help="of those zeros: unstructured, 4x1 (blocks of output channels), 2:4"
    )
    verb.add_argument("--precision", default="fp32", help="of the other runtimes: fp32 (default) or bf16")
    verb.add_argument(
        "--engine", default="always", help="always (default), or auto: leave layers to torch where that is faster"
    )
    verb.add_argument("--plot", type=Path, metavar="FILE.svg", help="time against sparsity, at the first batch size")


def _bench(known: argparse.Namespace) -> int:
    """Time the sparse engine against other runtimes on this machine, and find the sparsity from which it is faster."""
    from prunus.runtime.bench import bench
    from prunus.runtime.named import shares, sizes

    if known.plot is not None and not known.sparsity:
        raise InvalidValue("--plot draws time against sparsity; give --sparsity, such as 0,0.5,0.8,0.9,0.95.")
    batches, threads = sizes(known.batch, "--batch"), sizes(known.threads, "--threads") if known.threads else None
    sparsities = shares(known.sparsity, "--sparsity")
    model, example = _model(known)
    found = bench(
        model,
        example,
        against=[name for name in known.against.split(",") if name],
        batches=batches,
        threads=threads,
        sparsities=sparsities,
        patterns=known.pattern.split(","),
        precision=known.precision,
        engine=known.engine,
        rounds=known.rounds,
        seed=known.seed,
        name=known.model,
        on_stage=_telling(known),
    )
    if known.plot is not None:
        from prunus.files import write_atomic
        from prunus.report.bench import bench_plot

        write_atomic(known.plot, bench_plot(found).encode())
    return _measured(known, found)


# -- export -----------------------------------------------------------------------------------------------------


def _export_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = """examples:
  prunus export resnet20 --weights small.safetensors --format onnx -o small.onnx
  prunus export timm/resnet18 --weights small.safetensors --shape 3,224,224 --format prunus -o small.prunus
  prunus export my_package.nets:MyNet --option width=64 --weights small.safetensors -o folder
  prunus export transformers/bert --option task=base --inputs ids.npz --format pt2 -o bert.pt2

ids.npz holds one array per argument of the model's forward, by its name: numpy.savez("ids.npz", input_ids=x).
Formats: safetensors (folder with a load.py that needs no Prunus), hf (folder of a transformers model), onnx, pt2
(torch.export), prunus (runs in the engine without torch: prunus.runtime.package.load).
"""
    verb.add_argument("model", help="a name of `prunus ls models`, timm/NAME and the like, or module:function")
    verb.add_argument("--weights", type=Path, metavar="FILE", help="saved by prunus, or a checkpoint (default: random)")
    verb.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the model (repeatable; JSON or text)"
    )
    verb.add_argument("--shape", help="of one input, such as 3,224,224 (default: the model's own)")
    verb.add_argument("--classes", type=int, metavar="N", help="outputs (default 10, or 1000 of image collections)")
    verb.add_argument("--inputs", type=Path, metavar="FILE.npz", help="an example input, instead of a random one")
    verb.add_argument("--format", default="safetensors", help="safetensors (default), hf, onnx, pt2 or prunus")
    verb.add_argument("-o", "--output", type=Path, required=True, help="file or folder to write")
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")


def _export(known: argparse.Namespace) -> int:
    """Write a pruned model in a form that other tools read; it is read back and compared before it is there."""
    options: dict[str, Any] = {}
    for pair in known.option:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise InvalidValue(f"--option {pair!r} must be NAME=VALUE, such as width=64.")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    from prunus.runtime.export import FORMATS, export, made_by, opened
    from prunus.runtime.named import named_model, sizes

    if known.format not in FORMATS:
        raise unknown("format", known.format, FORMATS)
    shape = sizes(known.shape, "--shape") if known.shape else None
    given = None if known.inputs is None else _read_arrays(known.inputs)
    import torch

    if ":" in known.model:
        sys.path.insert(0, "")  # as for `python -m`: the user's own code lies here
        model = made_by(known.model, options, known.weights)
        if shape is None and given is None and known.format not in ("safetensors", "hf"):
            raise InvalidValue("say what one input looks like: --shape 3,224,224, or --inputs FILE.npz.")
        example: Any = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0)) if shape else None
    else:
        model, example = named_model(
            known.model, shape=shape, classes=known.classes, weights=known.weights, options=options
        )
    if given is not None:
        example = {name: torch.from_numpy(array) for name, array in given.items()}
    made = export(opened(model, known.weights), known.output, format=known.format, example=example)
    if known.json:
        weights = None if known.weights is None else str(known.weights)
        _print_json({"model": known.model, "weights": weights} | made.to_dict())
    else:
        _say(str(made))
    return 0


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
    "profile": (_profile, "measure what a model costs, layer by layer", _profile_arguments),
    "bench": (_bench, "time the sparse engine against other runtimes", _bench_arguments),
    "export": (_export, "write a pruned model for other tools", _export_arguments),
    "ls": (_ls, "list methods, scores, budgets, models, data sets, recipes", _ls_arguments),
    "explain": (_explain, "show what a name stands for, its options and source", _explain_arguments),
    "new": (_new, "write a recipe to start from", _new_arguments),
    "doctor": (_doctor, "check this machine", _doctor_arguments),
}

if __name__ == "__main__":
    sys.exit(main())
