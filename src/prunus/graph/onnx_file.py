"""ONNX files in and out: read with every kind of damage named, brought into one form, checked, run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunus.errors import DamagedFile, InvalidValue, MissingExtra, Unsupported
from prunus.files import write_atomic

if TYPE_CHECKING:
    from onnx import ModelProto

Arrays = dict[str, NDArray[Any]]
OLDEST_OPSET = 7  # before it, broadcasting had other rules
_FLOATS = (1, 10, 11, 16)  # float, float16, double, bfloat16 in onnx.TensorProto
LARGEST_BYTES = (1 << 31) - (1 << 20)  # a protobuf message holds 2 GiB; the rest of the model needs some of it


def need_onnx() -> None:
    """Raise `MissingExtra` unless onnx and onnxruntime can be imported."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"ONNX files need {error.name or 'onnx'}; install it with: pip install 'prunus[export]'"
        ) from error


def load_model(source: Path | str | ModelProto) -> ModelProto:
    """Return a checked copy of an ONNX model in one form: functions inlined, weights as initialisers, read directly.

    Exporters store equal vectors (biases and shifts that are all zero) once for many layers; here each use has its
    own, or those layers could only be cut alike. Matrices that several layers share stay shared. Weights kept in files
    beside the model are read into it. Neither file nor given model is changed.

    Raises:
        MissingExtra: onnx or onnxruntime is not installed.
        InvalidValue: no such file, or another kind of object.
        DamagedFile: not an ONNX file, a truncated one, a file of weights beside it is missing, or the model breaks
            the rules of the format.
        Unsupported: its operator set is too old, or it is larger than 2 GiB.
    """
    need_onnx()
    import onnx
    from google.protobuf.message import Error as ProtobufError
    from onnx.external_data_helper import uses_external_data

    if isinstance(source, onnx.ModelProto):
        what, model = "the model", onnx.ModelProto()
        model.CopyFrom(source)
        outside = [t.name for t in model.graph.initializer if uses_external_data(t)]
        if outside:
            raise InvalidValue(
                f"weight {outside[0]!r} of the model is in a file beside it that was not read; give the path of the "
                "model instead, or load it with its external data."
            )
    elif isinstance(source, Path | str):
        what = str(source)
        if not Path(source).is_file():
            raise InvalidValue(f"there is no file {what!r}; give the path of an ONNX model.")
        try:
            model = onnx.load(str(source))
        except FileNotFoundError as error:
            raise DamagedFile(f"a file of weights beside {what} is missing: {error}.") from error
        except onnx.checker.ValidationError as error:
            raise DamagedFile(f"the weights beside {what} cannot be read: {_first_line(error)}") from error
        except (ProtobufError, ValueError, OSError) as error:
            raise DamagedFile(f"{what} is not a readable ONNX file ({type(error).__name__}: {error}).") from error
    else:
        raise InvalidValue(f"give an onnx.ModelProto or the path of an ONNX file, not {type(source).__name__}.")
    if not model.graph.node or not model.opset_import:
        raise DamagedFile(f"{what} holds no ONNX network; it is another kind of file, or empty.")
    opset = opset_of(model)
    if opset < OLDEST_OPSET:
        raise Unsupported(
            f"{what} uses operator set {opset}; {OLDEST_OPSET} is the oldest that is read. Export it anew, or convert "
            "it with onnx.version_converter.convert_version(model, 18)."
        )
    if model.ByteSize() > LARGEST_BYTES:
        raise Unsupported(f"{what} holds {model.ByteSize():,} bytes; models up to 2 GiB can be edited.")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    check(model, what)
    _constants_to_initialisers(model)
    _own_vectors(model)
    return model


def opset_of(model: ModelProto) -> int:
    """Return the version of the standard operators that a model uses (0: none)."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)


def check(model: ModelProto, what: str) -> ModelProto:
    """Return the model with the shapes that onnx infers.

    Raises:
        DamagedFile: the model breaks the rules of ONNX, or its shapes contradict each other.
    """
    import onnx

    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise DamagedFile(f"{what} is not a valid ONNX model: {_first_line(error)}") from error
    try:
        return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        # Behind operators that onnx does not know, missing types are no contradiction.
        wrong = [line for line in str(error).splitlines() if "Error]" in line and "instead is null" not in line]
        if wrong:
            raise DamagedFile(f"the shapes of {what} contradict each other: {wrong[0].strip()[:400]}") from error
        return model


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:400]


def _constants_to_initialisers(model: ModelProto) -> None:
    """Replace Constant nodes of tensors by initialisers, so that all stored numbers are in one place."""
    import onnx

    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            attribute = node.attribute[0]
            tensor = onnx.TensorProto()
            if attribute.name == "value":
                tensor.CopyFrom(attribute.t)
            elif attribute.name in ("value_int", "value_ints"):
                held = attribute.i if attribute.name == "value_int" else list(attribute.ints)
                tensor = onnx.numpy_helper.from_array(np.array(held, np.int64))
            elif attribute.name in ("value_float", "value_floats"):
                number = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                tensor = onnx.numpy_helper.from_array(np.array(number, np.float32))
            else:
                kept.append(node)
                continue
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
        else:
            kept.append(node)
    if len(kept) != len(model.graph.node):
        kept = [_copied(n) for n in kept]
        del model.graph.node[:]
        model.graph.node.extend(kept)
    if model.ir_version < 4:
        model.ir_version = 4  # initialisers need not be inputs from then on


def _own_vectors(model: ModelProto) -> None:
    """Let nodes read initialisers without Identity between, and give every use of a vector a copy of its own."""
    import onnx

    stored = {t.name: t for t in model.graph.initializer}
    outputs = {o.name for o in model.graph.output}
    inner = any(a.HasField("g") or a.graphs for n in model.graph.node for a in n.attribute)
    alias: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = alias.get(name, name)
        if node.op_type == "Identity" and node.input[0] in stored and node.output[0] not in outputs and not inner:
            alias[node.output[0]] = node.input[0]
        else:
            kept.append(_copied(node))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    defaults = {i.name for i in model.graph.input}
    taken = set(stored) | {n for node in kept for n in (*node.input, *node.output)}
    used: set[str] = set()
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            tensor = stored.get(name)
            if tensor is None or name in defaults:
                continue
            longest = max(tensor.dims, default=1)
            vector = longest > 1 and int(np.prod(tensor.dims, dtype=np.int64)) == longest
            if vector and tensor.data_type in _FLOATS and name in used:
                number = 2
                while f"{name}.{number}" in taken:
                    number += 1
                own = onnx.TensorProto()
                own.CopyFrom(tensor)
                own.name = node.input[place] = f"{name}.{number}"
                taken.add(own.name)
                model.graph.initializer.append(own)
            used.add(name)


def _copied(message: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    return made


def save_model(model: ModelProto, path: Path | str) -> None:
    """Write a model; an older file stays whole until the new one is complete.

    Raises:
        StorageFailed: the file cannot be written.
    """
    write_atomic(Path(path), model.SerializeToString(deterministic=True))


def inputs_of(model: ModelProto) -> dict[str, Any]:
    """Return the inputs a caller gives: name -> `TypeProto`; initialisers with defaults are none."""
    stored = {t.name for t in model.graph.initializer}
    return {i.name: i.type for i in model.graph.input if i.name not in stored}


class Session:
    """A model loaded into onnxruntime on the CPU.

    Args:
        model: the model.
        extra: names of further values to return.

    Raises:
        Unsupported: onnxruntime cannot load the model.
    """

    def __init__(self, model: ModelProto, extra: Mapping[str, Any] | tuple[str, ...] | list[str] = ()) -> None:
        import onnx
        import onnxruntime

        self.outputs = [o.name for o in model.graph.output]
        if extra:
            wider = onnx.ModelProto()
            wider.CopyFrom(model)
            for name in extra:
                if name not in self.outputs:
                    wider.graph.output.append(onnx.ValueInfoProto(name=name))
            model = wider
            self.outputs += [n for n in extra if n not in self.outputs]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # problems come as exceptions
        options.intra_op_num_threads = torch.get_num_threads()
        # Sessions that wait in a loop would slow down the others they are timed against.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own types derive from Exception alone
            raise Unsupported(f"onnxruntime cannot load the model: {_first_line(error)}") from error

    def __call__(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the model; raises `InvalidValue` with onnxruntime's reason when it cannot."""
        try:
            found = self._session.run(self.outputs, dict(feeds))
        except Exception as error:  # onnxruntime's own types derive from Exception alone
            raise InvalidValue(f"onnxruntime cannot run the model on these inputs: {_first_line(error)}") from error
        return dict(zip(self.outputs, found, strict=True))
