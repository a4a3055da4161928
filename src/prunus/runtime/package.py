"""Networks of the engine as files, and what runs them where there is no torch.

A `.prunus` file holds layers and weights and nothing else: a pruned weight as a bitmask and its kept values where that
is smaller, otherwise as it is. Weight streams and addresses are made anew where it is loaded. The kernels chosen by
timing are in the file, too, with the processor they were timed on; any other processor ignores them.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.errors import DamagedFile, InvalidValue
from prunus.files import write_atomic
from prunus.runtime.check import check
from prunus.runtime.container import Malformed, pack_arrays, read_json, unpack_arrays
from prunus.runtime.library import engine
from prunus.runtime.network import Layer, Network, Shape
from prunus.runtime.pool import Pool
from prunus.runtime.tune import Tuner

Array = NDArray[np.float32]
FORMAT, VERSION = "prunus-engine", 1
_LAYER = {"op", "name", "inputs", "weight", "bias", "residual", "activation", "slope", "options", "label"}
_PACKAGE = {"format", "version", "rows", "shapes", "layers", "outputs", "machine", "found"}
_MACHINE = {"cpu": str, "instruction_set": str, "threads": int}


@dataclass(frozen=True, eq=False)
class Package:
    """What a file holds.

    Attributes:
        network: what is computed.
        shapes: of the inputs, without batch, that it was made for.
        rows: whether inputs are rows of features with any leading axes; otherwise images (N, C, H, W).
        found: the tuner's choices.
        machine: "cpu", "instruction_set" and "threads" that these were found with; None where nothing was timed.
    """

    network: Network
    shapes: tuple[Shape, ...]
    rows: bool
    found: Mapping[str, list[Any]] = field(default_factory=dict)
    machine: Mapping[str, Any] | None = None


def cpu_model() -> str:
    """Return what this machine's processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else "") or platform.processor() or platform.machine()


# -- network to bytes ----------------------------------------------------------------------------------------------


def pack(package: Package) -> bytes:
    """Return a package as bytes; equal packages give equal bytes.

    Raises:
        InvalidValue: the engine cannot compute such a network.
    """
    check(package.network, package.shapes, rows=package.rows)
    arrays: dict[str, NDArray[Any]] = {}
    layers = []
    for number, layer in enumerate(package.network.layers):
        if layer.weight is not None:
            _put_weight(arrays, number, layer.weight)
        if layer.bias is not None:
            arrays[f"{number}.bias"] = layer.bias
        layers.append(
            {
                "op": layer.op,
                "name": layer.name,
                "inputs": list(layer.inputs),
                "weight": None if layer.weight is None else list(layer.weight.shape),
                "bias": layer.bias is not None,
                "residual": layer.residual,
                "activation": layer.activation,
                "slope": layer.slope,
                "options": {k: v if isinstance(v, int) else [int(n) for n in v] for k, v in layer.options.items()},
                "label": layer.label,
            }
        )
    words = {
        "format": FORMAT,
        "version": VERSION,
        "rows": package.rows,
        "shapes": [list(map(int, shape)) for shape in package.shapes],
        "layers": layers,
        "outputs": list(package.network.outputs),
        "machine": None if package.machine is None else dict(package.machine),
        "found": dict(package.found),
    }
    try:
        text = json.dumps(words, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"the layers or choices hold what a file cannot say ({error}).") from error
    data = pack_arrays(arrays, {"prunus": text})
    try:
        unpack(data)
    except DamagedFile as error:
        raise InvalidValue(f"such a network could not be read back: {error}") from error
    return data


def _put_weight(arrays: dict[str, NDArray[Any]], number: int, weight: Array) -> None:
    """Add a weight, as bitmask and kept values where that is smaller."""
    kept = weight != 0
    count = int(np.count_nonzero(kept))
    if 4 * count + -(-weight.size // 8) < weight.nbytes:
        arrays[f"{number}.mask"] = np.packbits(kept, bitorder="little")
        arrays[f"{number}.kept"] = weight[kept]
    else:
        arrays[f"{number}.weight"] = weight


# -- bytes to network ----------------------------------------------------------------------------------------------


def unpack(data: bytes) -> Package:
    """Return the package that bytes hold; nothing else is read or changed.

    Raises:
        DamagedFile: they differ in any bit from what `pack` made, or hold what the engine cannot compute.
    """
    try:
        arrays, words = unpack_arrays(data)
        if words.keys() != {"prunus", "sha256"}:
            raise Malformed("it is no package of the engine")
        return _package(read_json(words["prunus"]), arrays)
    except (Malformed, InvalidValue) as error:
        raise DamagedFile(f"this is not a sound package of the engine: {error}; restore it from a copy.") from error


def _package(words: Any, arrays: dict[str, NDArray[Any]]) -> Package:
    if not isinstance(words, dict) or words.get("format") != FORMAT:
        raise Malformed("it is no package of the engine")
    if words.get("version") != VERSION:
        raise Malformed(f"it has version {words.get('version')!r}, this version of prunus reads {VERSION}")
    _wants(words.keys() == _PACKAGE and type(words["rows"]) is bool, "its parts are not those of a package")
    shapes = words["shapes"]
    _wants(isinstance(shapes, list) and all(_numbers(s) for s in shapes), "its inputs have no shapes")
    _wants(isinstance(words["layers"], list), "it has no layers")
    layers = tuple(_layer(number, layer, arrays) for number, layer in enumerate(words["layers"]))
    _wants(not arrays, "it holds arrays of no layer")
    _wants(_texts(words["outputs"]), "its outputs have no names")
    network = Network(layers, tuple(words["outputs"]))
    given = tuple(tuple(s) for s in shapes)
    check(network, given, rows=words["rows"])
    found, machine = words["found"], words["machine"]
    _wants(isinstance(found, dict) and _texts(list(found)), "its choices have no names")
    _wants(all(isinstance(v, list) and all(map(_simple, v)) for v in found.values()), "its choices are none")
    if machine is not None:
        _wants(isinstance(machine, dict) and machine.keys() == _MACHINE.keys(), "its processor is not described")
        _wants(all(type(machine[k]) is t for k, t in _MACHINE.items()), "its processor is not described")
        _wants(_texts([machine["cpu"]]) and 1 <= machine["threads"] < 1 << 16, "its processor is not described")
    return Package(network, given, words["rows"], found, machine)


def _layer(number: int, words: Any, arrays: dict[str, NDArray[Any]]) -> Layer:
    _wants(isinstance(words, dict) and words.keys() == _LAYER, f"layer {number} is not described")
    texts = [words["op"], words["name"], words["activation"], words["label"]]
    residual, options, shape = words["residual"], words["options"], words["weight"]
    _wants(_texts(texts) and _texts(words["inputs"]), f"layer {number} has no names")
    _wants(residual is None or _texts([residual]), f"layer {number} has no names")
    _wants(isinstance(options, dict) and _texts(list(options)), f"layer {number} has no options")
    _wants(all(type(v) is int or _numbers(v) for v in options.values()), f"layer {number} has no options")
    _wants(type(words["slope"]) in (int, float) and type(words["bias"]) is bool, f"layer {number} is not described")
    bias = _taken(arrays, f"{number}.bias", np.float32) if words["bias"] else None
    weight = None if shape is None else _weight(number, shape, arrays)
    return Layer(
        op=words["op"],
        name=words["name"],
        inputs=tuple(words["inputs"]),
        weight=weight,
        bias=bias,
        residual=residual,
        activation=words["activation"],
        slope=float(words["slope"]) if abs(words["slope"]) < 1e30 else math.inf,
        options={k: v if isinstance(v, int) else tuple(v) for k, v in options.items()},
        label=words["label"],
    )


def _weight(number: int, shape: Any, arrays: dict[str, NDArray[Any]]) -> Array:
    _wants(_numbers(shape) and len(shape) in (2, 4) and all(n > 0 for n in shape), f"weight {number} has no shape")
    size = math.prod(shape)
    if f"{number}.weight" in arrays:
        dense = _taken(arrays, f"{number}.weight", np.float32)
        _wants(dense.shape == tuple(shape), f"weight {number} has another shape")
        return dense
    mask, kept = (_taken(arrays, f"{number}.{part}", kind) for part, kind in (("mask", np.uint8), ("kept", np.float32)))
    # The mask is there, so a size that fits it is one that memory can be had for.
    _wants(mask.shape == (-(-size // 8),) and kept.ndim == 1, f"the mask of weight {number} has another size")
    bits = np.unpackbits(mask, bitorder="little").view(bool)
    _wants(not bits[size:].any() and np.count_nonzero(bits) == kept.size, f"the mask of weight {number} does not fit")
    weight = np.zeros(size, np.float32)
    weight[bits[:size]] = kept
    return weight.reshape(shape)


def _taken(arrays: dict[str, NDArray[Any]], name: str, kind: Any) -> NDArray[Any]:
    found = arrays.pop(name, None)
    if found is None or found.dtype != kind:
        raise Malformed(f"array {name} is missing")
    return found


def _wants(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Malformed(otherwise)


def _texts(value: Any) -> bool:
    """Whether a value is a list of texts that can be shown."""
    return isinstance(value, list) and all(isinstance(v, str) and (v.isprintable() or not v) for v in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 4 and all(type(n) is int and 0 <= n < 1 << 40 for n in value)


def _simple(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


# -- files ---------------------------------------------------------------------------------------------------------


def save(
    path: Path | str,
    network: Network,
    shapes: Sequence[Shape],
    *,
    rows: bool = False,
    found: Mapping[str, list[Any]] | None = None,
    threads: int = 1,
    instruction_set: str | None = None,
) -> int:
    """Write a network of the engine to a file, all of it or nothing; returns its bytes.

    Args:
        path: ends in `.prunus` by custom.
        network: what to compute.
        shapes: of the inputs, without batch.
        rows: whether inputs are rows of features.
        found: kernels that a `Tuner` chose on this machine, for so many `threads` and this `instruction_set` (None for
            the best).

    Raises:
        InvalidValue: the engine cannot compute such a network.
        StorageFailed: the file cannot be written; an older one there is unchanged.
    """
    machine = None
    if found:
        machine = {"cpu": cpu_model(), "instruction_set": instruction_set or engine().sets[0], "threads": threads}
    data = pack(Package(network, tuple(tuple(s) for s in shapes), rows, dict(found or {}), machine))
    write_atomic(Path(path), data)
    return len(data)


def read(path: Path | str) -> Package:
    """Return what a file holds, without running it (raises `DamagedFile`)."""
    try:
        data = Path(path).read_bytes() if Path(path).is_file() else None
    except (OSError, MemoryError) as error:
        raise DamagedFile(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'too large'}.") from error
    if data is None:
        raise DamagedFile(f"there is no file {str(path)!r}; give the path of a package that `Compressed.save` wrote.")
    try:
        return unpack(data)
    except DamagedFile as error:
        raise DamagedFile(f"{path}: {error}") from error


def load(
    path: Path | str, threads: int | None = None, instruction_set: str | None = None, *, timing: bool = False
) -> Runtime:
    """Return what runs a file.

    Args:
        path: of a file that `save` or `Compressed.save` wrote.
        threads: that a call may use; None for those that the file's kernels were chosen for if that was on such a
            processor, otherwise for all this process may use.
        instruction_set: one of those of `prunus doctor`; None for the best.
        timing: choose kernels by timing, where the file's own choices say nothing, when a batch size is first seen.

    Raises:
        DamagedFile: the file is missing, or differs in any bit from what was written.
        InvalidValue: no such instruction set, or fewer than one thread.
        Unsupported: there is no native engine here.
    """
    return Runtime(read(path), threads, instruction_set, timing=timing)


class Runtime:
    """A package, ready to run; several threads may call it at once.

    Attributes:
        package: what the file holds.
        threads: that a call uses.
        chosen: whether the file's kernels are used: they were found on such a processor with this instruction set.
    """

    def __init__(
        self, package: Package, threads: int | None = None, instruction_set: str | None = None, *, timing: bool = False
    ) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InvalidValue(f"threads {threads!r} must be a whole number from 1 up.")
        live = engine()
        uses = live.sets[live.number(instruction_set)]
        machine = package.machine or {}
        self.package = package
        self.chosen = (machine.get("cpu"), machine.get("instruction_set")) == (cpu_model(), uses)
        self.threads = threads or (min(int(machine["threads"]), _cores()) if self.chosen else _cores())
        found = {k: list(v) for k, v in package.found.items()} if self.chosen else {}
        tuner = Tuner(self.threads, instruction_set=instruction_set, timing=timing, found=found)
        self.pool = Pool(package.network, rows=package.rows, tuner=tuner)

    def __call__(self, *inputs: NDArray[Any]) -> Array | list[Array]:
        """Return the output, or a list of them, for float32 arrays with any batch size, zero included.

        Arrays that are not C-contiguous are copied. Images may have any height and width that the weights can read.

        Raises:
            InvalidValue: another number of inputs, type or shape.
        """
        arrays = self._checked(inputs)
        # The shapes are checked before memory is had for them.
        self.pool.batch([x.shape for x in arrays])
        outputs = [np.empty(shape, np.float32) for shape in self.pool.shapes([x.shape for x in arrays])]
        self.pool.run(arrays, self.threads, outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _checked(self, inputs: Sequence[NDArray[Any]]) -> list[Array]:
        package = self.package
        if len(inputs) != len(package.shapes):
            raise InvalidValue(f"the package takes {len(package.shapes)} inputs, {len(inputs)} were given.")
        for x, shape in zip(inputs, package.shapes, strict=True):
            if not isinstance(x, np.ndarray):
                raise InvalidValue(f"the package reads numpy arrays, not {type(x).__name__}.")
            if x.dtype != np.float32:
                raise InvalidValue(f"the package reads float32, the input is {x.dtype}; convert it.")
            inner = x.shape[-1:] if package.rows else x.shape[1:]
            if x.ndim < 1 or len(inner) != len(shape) or not all(inner):
                raise InvalidValue(f"the package reads inputs of (batch, {str(shape)[1:-1]}), not {x.shape}.")
        return [np.require(x, requirements=["C", "A"]) for x in inputs]


def _cores() -> int:
    """Return on how many cores this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


__all__ = ["Package", "Runtime", "cpu_model", "load", "pack", "read", "save", "unpack"]
