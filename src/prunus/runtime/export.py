"""`prunus.export`: a pruned model in the forms that other tools read, each read back and compared."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunus.errors import InvalidValue, MissingExtra, PrunusError, StorageFailed, Unsupported, unknown
from prunus.files import canonical_json, sha256_bytes
from prunus.graph.edit import Passing, unsaved
from prunus.graph.plan import Plan, difference
from prunus.graph.record import arguments, plain_forward
from prunus.parameters import copied, unwrap
from prunus.runtime import standalone
from prunus.runtime.compress import Compressed, compress, whole_network
from prunus.runtime.package import load
from prunus.runtime.trace import any_batch, program_of
from prunus.structured.saved import untied

FORMATS = ("safetensors", "hf", "onnx", "pt2", "prunus")
FORMAT = "prunus-export-1"
TOLERANCE = 1e-4  # of an exported network's outputs, relative to the largest
_LARGEST_ONNX = 1 << 30  # bytes of weights above which they get a file of their own


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        format: one of `FORMATS`.
        path: the file or folder.
        files: name -> bytes of each.
        dense_bytes: of the model's parameters and buffers, zeros included.
        difference: of the outputs of what was read back from those of the model, relative to the largest output; for
            weights, 0.0 says that every bit came back.
        batch: how many examples one call takes; None for any number.
    """

    format: str
    path: str
    files: dict[str, int]
    dense_bytes: int
    difference: float
    batch: int | None = None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self) | {"bytes": self.bytes}

    def __str__(self) -> str:
        batch = "" if self.batch is None else f", for batches of {self.batch}"
        return (
            f"{self.format}: {self.path}, {self.bytes:,} bytes ({self.bytes / max(self.dense_bytes, 1):.0%} of the "
            f"tensors as they are){batch}; read back, outputs differ by {self.difference:.1e} of the largest"
        )


def export(model: Any, path: Path | str, *, format: str = "safetensors", example: Any = None) -> Exported:
    """Write a model in a form that other tools read, read it back, and compare.

    Args:
        model: a module, or what `prunus.prune` or `prunus.compress` returned; it is not changed. What is written is its
            eval mode, with zeros where weights are pruned.
        path: file or folder to write. A file there is replaced; a folder must be new or empty.
        format: "safetensors": folder of weights, config.json and a load.py that fills a fresh instance of the model's
            class without Prunus. "hf": folder of a transformers model, as its `save_pretrained` writes it. "onnx":
            file for onnxruntime and others. "pt2": file of `torch.export`. "prunus": file that the engine runs
            without torch.
        example: one input, as for `prunus.prune`; not needed for "safetensors", "hf" and a compressed model.

    Raises:
        InvalidValue: there is no example where one is needed, or the folder holds something.
        UnknownName: there is no such format.
        Unsupported: the format cannot hold this model; nothing is written then.
        MissingExtra: a library is not installed.
        StorageFailed: the file cannot be written.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    plan = getattr(model, "plan", None)
    masks = getattr(model, "masks", None)
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise InvalidValue(f"give a torch module, or what prune or compress returned, not {type(model).__name__}.")
    if isinstance(inner, Compressed) and format != "prunus":
        raise Unsupported(f'a compressed model holds no torch weights for {format!r}; export it as "prunus".')
    if format in ("onnx", "pt2", "prunus") and example is None and not isinstance(inner, Compressed):
        raise InvalidValue(f"format {format!r} needs one input to read the network with; pass example=.")
    target = Path(path)
    folder = format in ("safetensors", "hf")
    if folder and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InvalidValue(f"{target} exists already; choose a new folder, or remove it first.")
    if not folder and target.is_dir():
        raise InvalidValue(f"{target} is a folder; give the name of a file.")
    bare = unwrap(inner)
    if not isinstance(bare, Compressed):
        bare = copied(bare).eval()
        if masks is not None and not isinstance(model, nn.Module):
            masks.apply(bare)
    size = sum(t.numel() * t.element_size() for t in untied(bare)[0].values())
    writers: dict[str, Callable[[Path], tuple[float, int | None]]] = {
        "safetensors": lambda made: (_safetensors(bare, made, plan if isinstance(plan, Plan) else None), None),
        "hf": lambda made: (_transformers(bare, made), None),
        "onnx": lambda made: _onnx(bare, made / target.name, example),
        "pt2": lambda made: _program(bare, made / target.name, example),
        "prunus": lambda made: _package(bare, made / target.name, example),
    }
    with _unfinished(target) as made:
        found, batch = writers[format](made)
        if not found <= TOLERANCE:
            raise Unsupported(
                f"read back from {format}, the outputs differ by {found:.1e} of the largest; not written."
            )
        files = {str(p.relative_to(made)): p.stat().st_size for p in sorted(made.rglob("*")) if p.is_file()}
        if isinstance(bare, Compressed):
            weights = [layer.weight for layer in whole_network(bare)[1].layers]
            size = sum(weight.nbytes for weight in weights if weight is not None)
        _finish(made, target, folder=folder)
    return Exported(format, str(target), files, size, found, batch)


# -- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """Give a folder beside the target to write into; it is gone afterwards, whatever happens."""
    made = target.parent / f".{target.name[:80]}.{secrets.token_hex(8)}.tmp"
    try:
        made.mkdir()
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        if isinstance(error, PrunusError):
            raise
        raise StorageFailed(
            f"could not write {str(target)!r}: {error.strerror or error}. "
            "Free space or choose a folder you may write to."
        ) from error


def _finish(made: Path, target: Path, *, folder: bool) -> None:
    """Force what was written to the disk, and give it its name."""
    for path in (p for p in made.rglob("*") if p.is_file()):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    if folder:
        os.replace(made, target)
        return
    for path in sorted(made.iterdir(), key=lambda p: p.name == target.name):  # weights beside it come first
        os.replace(path, target.parent / path.name)


# -- weights ---------------------------------------------------------------------------------------------------------


def _safetensors(model: nn.Module, folder: Path, plan: Plan | None) -> float:
    """Write weights, what a fresh instance has to be told, and the code that does it."""
    needs = sorted(path or "the model" for path, module in model.named_modules() if _changed(module))
    if needs and plan is None:
        raise Unsupported(
            f"{needs[0]} computes in another way since it was cut, which a fresh instance cannot be told without the "
            'plan; pass what prunus.prune returned instead of its .model, or choose format="onnx" or "pt2".'
        )
    state, aliases = untied(model)
    hidden = unsaved(model) & (plan.shapes.keys() if plan is not None else set())
    buffers = dict(model.named_buffers())
    state |= {name: buffers[name].detach().cpu() for name in sorted(hidden)}
    data = safetensors_save({n: t.contiguous().clone() for n, t in state.items()}, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "sha256": sha256_bytes(data),
        "entries": sum(t.numel() for t in state.values()),
        "nonzero": sum(int(torch.count_nonzero(t)) for t in state.values()),
        "aliases": aliases,
        "unsaved": sorted(hidden),
        "identities": [path for path, module in model.named_modules() if path and isinstance(module, nn.Identity)],
        "numbers": {path: found for path, module in model.named_modules() if (found := _numbers(module))},
        "attributes": {} if plan is None else plan.attributes,
        "needs_prunus": bool(needs),
        "plan": plan.to_dict() if plan is not None and needs else None,
    }
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_bytes(canonical_json(config))
    (folder / "load.py").write_bytes(Path(standalone.__file__).read_bytes())
    if not needs:  # otherwise only a full-size instance can be filled
        _same_state(model, standalone.load(copied(model), folder))
    return 0.0


def _changed(module: nn.Module) -> bool:
    """Whether a module's class is one that a cut put in place of the model's own."""
    ours = any(kind.__module__.startswith("prunus.graph.") for kind in type(module).__mro__)
    return ours and not isinstance(module, Passing)


def _numbers(module: nn.Module) -> dict[str, int | list[int]]:
    """Return the sizes that a module remembers."""
    found: dict[str, int | list[int]] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if type(value) is int:
            found[name] = value
        elif isinstance(value, list | tuple) and 0 < len(value) <= 16 and all(type(v) is int for v in value):
            found[name] = list(value)
    return found


def _same_state(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    both = mine.keys() & theirs.keys()
    different = mine.keys() ^ theirs.keys() | {name for name in both if not _same(mine[name], theirs[name])}
    if different:
        raise Unsupported(f"{min(different)!r} does not come back as it was; nothing was written.")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are alike bit by bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    one, other = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


def _transformers(model: nn.Module, folder: Path) -> float:
    from prunus.models.vision_repair import repair_torchvision

    repair_torchvision()  # transformers imports it
    try:
        from transformers import PreTrainedModel
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtra("format 'hf' needs transformers; install it with: pip install 'prunus[llm]'") from error
    if not isinstance(model, PreTrainedModel):
        raise Unsupported(f'format "hf" is for transformers models, not {type(model).__name__}; choose "safetensors".')
    with torch.device("meta"):
        whole = type(model)(copy.deepcopy(model.config))
    mine, theirs = ({n: t.shape for n, t in m.state_dict().items()} for m in (model, whole))
    other = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if other:
        raise Unsupported(
            f"the configuration of {type(model).__name__} cannot say the sizes of this model ({other[0]!r} among "
            'others); choose "safetensors", "onnx" or "pt2".'
        )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, local_files_only=True, dtype=next(model.parameters()).dtype)
    finally:
        if shown:
            logging.enable_progress_bar()
    _same_state(model, again)
    return 0.0


# -- networks --------------------------------------------------------------------------------------------------------


def _answers(model: nn.Module, example: Any) -> list[Tensor]:
    args, kwargs = arguments(example)
    with plain_forward(model):
        return [t for t in tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]


def _inputs(program: Any, example: Any) -> tuple[list[Any], int | None]:
    """Return examples to compare on, and the batch size the program takes (None for any)."""
    if any_batch(program):
        return [example, tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) else v, example)], None
    sizes = {v.shape[0] for v in tree_leaves(example) if isinstance(v, Tensor) and v.ndim}
    return [example], sizes.pop() if len(sizes) == 1 else None


def _program(model: nn.Module, path: Path, example: Any) -> tuple[float, int | None]:
    example = _plain(example)
    program = program_of(model, example)
    examples, batch = _inputs(program, example)
    wanted = [_answers(model, e) for e in examples]
    torch.export.save(program, path)
    again = torch.export.load(path).module()
    worst = 0.0
    for e, want in zip(examples, wanted, strict=True):
        args, kwargs = arguments(e)
        with torch.no_grad():
            got = [t for t in tree_leaves(again(*args, **kwargs)) if isinstance(t, Tensor)]
        worst = max(worst, difference(want, got))
    return worst, batch


def _onnx(model: nn.Module, path: Path, example: Any) -> tuple[float, int | None]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"format 'onnx' needs {error.name or 'onnxscript'}; install it with: pip install 'prunus[export]'"
        ) from error
    example = _plain(example)
    program = program_of(model, example)
    examples, batch = _inputs(program, example)
    large = sum(t.numel() * t.element_size() for t in untied(model)[0].values()) > _LARGEST_ONNX
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own workings
        try:
            torch.onnx.export(program, (), path, dynamo=True, external_data=large, verbose=False)
        except Exception as error:
            line = str(error).strip().splitlines()[0]
            raise Unsupported(f"torch.onnx cannot write {type(model).__name__}: {line}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for e in examples:
        given = [t.numpy() for t in tree_leaves(arguments(e)) if isinstance(t, Tensor)]
        names = [i.name for i in session.get_inputs()]
        if len(names) != len(given):
            raise Unsupported(f"the network reads {len(names)} of the {len(given)} inputs; leave out the others.")
        found = [torch.from_numpy(np.asarray(a)) for a in session.run(None, dict(zip(names, given, strict=True)))]
        worst = max(worst, difference(_answers(model, e), found))
    return worst, batch


def _package(model: nn.Module, path: Path, example: Any) -> tuple[float, int | None]:
    example = None if example is None else _plain(example)
    fast = model if isinstance(model, Compressed) else compress(model, example, engine="always")
    fast.save(path)
    args, kwargs = arguments(example if example is not None else _random(fast))
    got = load(path, torch.get_num_threads())(*(t.numpy() for t in tree_leaves((args, kwargs))))
    found = [torch.from_numpy(a) for a in (got if isinstance(got, list) else [got])]
    with torch.no_grad():
        wanted = [t for t in tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
    return difference(wanted, found), None


def _random(model: Compressed) -> tuple[Tensor, ...]:
    """Return inputs of the shapes that a model was compressed with."""
    source = torch.Generator().manual_seed(0)
    return tuple(torch.rand((2, *shape), generator=source) for shape in model.shapes or ())


def _plain(example: Any) -> Any:
    """Return an example as (args or kwargs) of tensors on the CPU."""
    args, kwargs = arguments(example)
    value = kwargs if kwargs and not args else args
    return tree_map(lambda v: v.detach().cpu() if isinstance(v, Tensor) else v, value)


# -- from the command line -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A model with the plan by which it was cut, as `prunus.prune` returns them."""

    model: nn.Module
    plan: Plan | None


def opened(model: nn.Module, weights: Path | None) -> Opened:
    """Return a model that was filled from a file, with the plan in that file if there is one."""
    from prunus.oneshot import _is_small
    from prunus.structured.saved import read_small

    small = weights is not None and _is_small(weights)
    return Opened(model, read_small(weights, weights.read_bytes())[1] if weights is not None and small else None)


def made_by(name: str, options: Mapping[str, Any], weights: Path | None) -> nn.Module:
    """Return the model that a function or class "module:name" of the user makes, filled from a file of Prunus.

    Raises:
        InvalidValue: there is no such function, or it gives no model.
        DamagedFile, MaskMismatch: as `prunus.load`.
    """
    import importlib

    from prunus.oneshot import load as load_weights

    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)(**options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InvalidValue(
            f"{name!r} gives no model ({type(error).__name__}: {error}); write module:function."
        ) from error
    if not isinstance(made, nn.Module):
        raise InvalidValue(f"{name!r} gives a {type(made).__name__}, not a torch module.")
    return made if weights is None else load_weights(weights, made)


__all__ = ["FORMATS", "Exported", "Opened", "export", "made_by", "opened"]
