"""Other ways to run a model on this processor, each as a plain function: what the engine is measured against.

Each takes (model, example, threads, precision) and returns a function without arguments that runs the model on the
example and returns what came out, torch tensors or numpy arrays. All preparation (copies, export, compilation, packing)
is done before it returns. The model is not changed.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.errors import InvalidValue, MissingExtra, Unsupported, unknown
from prunus.graph.record import arguments
from prunus.measure.forwarding import tensors_of
from prunus.measure.latency import using_threads
from prunus.parameters import copied, unwrap

Call = Callable[[], Any]
PRECISIONS = ("fp32", "bf16")


def dense(model: nn.Module, example: Any, threads: int, precision: str = "fp32") -> Call:
    """Run the model in torch, operator by operator.

    Args:
        model: any module on the CPU.
        example: a tensor, a tuple of arguments or a mapping of keyword arguments.
        threads: that torch uses in each call.
        precision: "fp32", or "bf16": weights and inputs in bfloat16.

    Raises:
        InvalidValue: threads below 1, or another precision.
    """
    mine, args, kwargs = _prepared(model, example, threads, precision)

    def run() -> Any:
        with using_threads(threads), torch.inference_mode():
            return mine(*args, **kwargs)

    run()
    return run


def torch_compile(model: nn.Module, example: Any, threads: int, precision: str = "fp32") -> Call:
    """Run the model compiled by torch.compile, for this shape alone and with its weights taken for constants.

    Args and errors as for `dense`.

    Raises:
        Unsupported: torch cannot compile the model; the message holds its reason.
    """
    mine, args, kwargs = _prepared(model, example, threads, precision)

    def made(whole: bool) -> Call:
        compiled = torch.compile(mine, dynamic=False, fullgraph=whole, options={"freezing": True})

        def run() -> Any:
            with using_threads(threads), torch.inference_mode():
                return compiled(*args, **kwargs)

        run()
        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return made(True)
        except Exception:
            # A graph with breaks. Compiled code of other models may have filled torch's cache, and beyond its limit
            # torch would run the model as it is without a word.
            torch.compiler.reset()
            try:
                return made(False)
            except Exception as error:
                raise Unsupported(f"torch.compile cannot compile {type(mine).__name__}: {_first(error)}") from error


def onnxruntime(model: nn.Module, example: Any, threads: int, precision: str = "fp32") -> Call:
    """Run the model in onnxruntime on the CPU, exported by torch.onnx, with all graph optimisations.

    Threads stop spinning when a call ends, so that they do not slow down whatever runs next.

    Args and errors as for `dense`; precision is "fp32" alone.

    Raises:
        MissingExtra: onnxruntime, onnx or onnxscript is not installed.
        Unsupported: the model cannot be exported.
    """
    _needs("onnxruntime", "onnx", "onnxscript")
    if precision != "fp32":
        raise Unsupported(f'onnxruntime is measured in "fp32" alone, not {precision!r}.')
    mine, args, kwargs = _prepared(model, example, threads, precision)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="prunus-") as folder:
        file = onnx_file(mine, args, kwargs, Path(folder))
        try:
            session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise Unsupported(f"onnxruntime cannot load {type(mine).__name__}: {_first(error)}") from error
    arrays = [t.detach().contiguous().numpy() for t in tensors_of((args, kwargs))]
    names = [i.name for i in session.get_inputs()]
    if len(names) != len(arrays):
        raise Unsupported(f"{type(mine).__name__} reads {len(arrays)} tensors, its ONNX export {len(names)}.")
    feeds = dict(zip(names, arrays, strict=True))

    def run() -> Any:
        return session.run(None, feeds)

    run()
    return run


def openvino(model: nn.Module, example: Any, threads: int, precision: str = "fp32") -> Call:
    """Run the model in OpenVINO on the CPU, from its ONNX export, with one stream and the latency hint.

    Without being told, OpenVINO computes in bfloat16 where the processor can; `precision` says what it does here.
    Inputs and outputs are shared, not copied: an output is valid until the next call.

    Args and errors as for `dense`.

    Raises:
        MissingExtra: openvino, onnx or onnxscript is not installed.
        Unsupported: the model cannot be exported.
    """
    _needs("openvino", "onnx", "onnxscript")
    # The precision is a hint to its kernels; the model stays float32.
    _check_precision(precision)
    mine, args, kwargs = _prepared(model, example, threads, "fp32")
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
    }
    with tempfile.TemporaryDirectory(prefix="prunus-") as folder:
        file = onnx_file(mine, args, kwargs, Path(folder))
        try:
            core = ov.Core()
            request = core.compile_model(core.read_model(str(file)), "CPU", settings).create_infer_request()
        except Exception as error:
            raise Unsupported(f"OpenVINO cannot load {type(mine).__name__}: {_first(error)}") from error
    arrays = [t.detach().contiguous().numpy() for t in tensors_of((args, kwargs))]

    def run() -> Any:
        found = request.infer(arrays, share_inputs=True, share_outputs=True)
        return [found[i] for i in range(len(found))]

    run()
    return run


@dataclass(frozen=True)
class Peer:
    """One row of the table of runtimes.

    Attributes:
        make: (model, example, threads, precision) -> call.
        packages: importable names that it needs.
        install: arguments of pip that install them.
    """

    make: Callable[..., Call]
    packages: tuple[str, ...] = ()
    install: str = ""

    def why_not(self) -> str:
        """Return why it cannot run here, with the remedy; "" if it can."""
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if missing:
            return f"{', '.join(missing)} not installed: pip install {self.install}"
        if self.make is torch_compile and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
            return "torch.compile needs a C++ compiler: install g++ or clang"
        return ""


_BENCH = "'prunus[bench]' (with a constraints file that pins torch)"
PEERS: Mapping[str, Peer] = {
    "dense": Peer(dense),
    "onnxruntime": Peer(onnxruntime, ("onnxruntime", "onnx", "onnxscript"), _BENCH),
    "openvino": Peer(openvino, ("openvino", "onnx", "onnxscript"), _BENCH),
    "torch-compile": Peer(torch_compile),
}


def peer(name: str) -> Peer:
    """Return the runtime called `name`.

    Raises:
        UnknownName: there is none.
    """
    if name not in PEERS:
        raise unknown("runtime", name, PEERS)
    return PEERS[name]


def onnx_file(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], folder: Path) -> Path:
    """Export a model for inputs of these shapes and return the file, with weights beside it where they are large.

    Raises:
        Unsupported: torch.onnx cannot export the model.
    """
    file = folder / "model.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(model, args, kwargs=dict(kwargs), dynamo=True, verbose=False)
            assert program is not None
            program.save(str(file))
        except Exception as error:
            raise Unsupported(f"torch.onnx cannot export {type(model).__name__}: {_first(error)}") from error
    return file


def _prepared(
    model: nn.Module, example: Any, threads: int, precision: str
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a copy in eval mode and the arguments of a call, both in the precision asked for."""
    _check_precision(precision)
    with using_threads(threads):
        mine = copied(unwrap(model)).eval()
    args, kwargs = arguments(example)
    if precision == "bf16":
        mine = mine.to(torch.bfloat16)
        args, kwargs = (tree_map(_half, part) for part in (args, kwargs))
    return mine, args, kwargs


def _half(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InvalidValue(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}.")


def _needs(*packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise MissingExtra(f"{', '.join(missing)} not installed: pip install {_BENCH}")


def _first(error: BaseException) -> str:
    """Return the first line of an error, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
