"""`prunus bench`: the engine against other runtimes on this machine, and the sparsity from which it is faster."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.errors import InvalidValue, MissingExtra, Unsupported
from prunus.graph.record import arguments
from prunus.keep import choose
from prunus.measure.forwarding import call, evaluating, tensors_of
from prunus.measure.latency import latency, using_threads
from prunus.parameters import copied, unwrap
from prunus.runtime.compress import compress
from prunus.runtime.peers import PEERS, peer
from prunus.runtime.profile import at_batch
from prunus.units import NM, Block, Unit, Weight
from prunus.units import unit as unit_of

ENGINE = "engine"
AGAINST = tuple(PEERS)
_SECONDS = 4.0  # of timing for one row of the table, roughly


@dataclass(frozen=True)
class Timing:
    """One runtime at one setting.

    Attributes:
        runtime: `ENGINE`, or a name of `prunus.runtime.peers.PEERS`.
        pattern: of the zeros; "as given" without masks of our own.
        sparsity: share of zeros asked for, of the masked weights; None as given.
        batch, threads: examples per call, and threads.
        median_ms, low_ms, high_ms: median and quartiles of a call.
        speedup: time of this runtime over that of the engine, the median over rounds: above 1 the engine is faster.
        difference: largest difference from torch's outputs, relative to the largest output; None where they cannot be
            compared.
        rounds: timed calls.
    """

    runtime: str
    pattern: str
    sparsity: float | None
    batch: int
    threads: int
    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float
    difference: float | None
    rounds: int


@dataclass(frozen=True)
class BreakEven:
    """The sparsity from which the engine is faster than one runtime.

    Attributes:
        pattern, against, batch, threads: what was compared.
        sparsity: None if no measured sparsity was enough.
        within: whether it lies between two measured sparsities; otherwise the engine was faster at all of them, and
            `sparsity` is the lowest.
    """

    pattern: str
    against: str
    batch: int
    threads: int
    sparsity: float | None
    within: bool


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        model: its name.
        shapes: of the inputs, without batch.
        precision: of the runtimes; the engine computes in float32.
        machine: processor, cores, torch, instruction set of the engine.
        timings: all rows.
        skipped: runtime, with its setting where others worked -> why.
        break_even: per pattern, runtime, batch size and number of threads.
    """

    model: str
    shapes: tuple[tuple[int, ...], ...]
    precision: str
    machine: dict[str, Any]
    timings: tuple[Timing, ...]
    skipped: dict[str, str]
    break_even: tuple[BreakEven, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        found = asdict(self)
        for key in ("timings", "break_even"):
            found[key] = list(found[key])
        return found | {"shapes": [list(s) for s in self.shapes]}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Bench:
        """Return what `to_dict` described.

        Raises:
            InvalidValue: it is no such description.
        """
        try:
            return cls(
                **dict(found)
                | {
                    "shapes": tuple(tuple(s) for s in found["shapes"]),
                    "timings": tuple(Timing(**t) for t in found["timings"]),
                    "break_even": tuple(BreakEven(**b) for b in found["break_even"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise InvalidValue(f"this is no result of `prunus bench` ({error}).") from error

    def __str__(self) -> str:
        m = self.machine
        lines = [f"{self.model}, {self.precision}; {m['cpu']}, engine with {m['instruction_set']}, torch {m['torch']}"]
        head = ["zeros", "batch", "threads", "runtime", "ms", "quartiles", "of the engine", "difference"]
        rows = [head]
        for t in self.timings:
            zeros = t.pattern if t.sparsity is None else f"{t.sparsity:.1%} {t.pattern}"
            ratio = "" if t.runtime == ENGINE else f"{t.speedup:.2f}x its time"
            spread = f"{t.low_ms:.3f} to {t.high_ms:.3f}"
            off = "" if t.difference is None else f"{t.difference:.1e}"
            cells = [zeros, t.batch, t.threads, t.runtime, f"{t.median_ms:.3f}", spread, ratio, off]
            rows.append([str(c) for c in cells])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines += ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths)).rstrip() for row in rows]
        lines += [f"{name} skipped: {why}" for name, why in self.skipped.items()]
        for b in self.break_even:
            where = f"{b.pattern}, batch {b.batch}, {b.threads} threads: "
            if b.sparsity is None:
                lines.append(f"{where}never faster than {b.against} at what was measured")
            elif b.within:
                lines.append(f"{where}faster than {b.against} from {b.sparsity:.1%} zeros on")
            else:
                lines.append(f"{where}faster than {b.against} at every sparsity measured")
        return "\n".join(lines)


def bench(
    model: nn.Module,
    example: Any,
    *,
    against: Sequence[str] = AGAINST,
    batches: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    sparsities: Sequence[float] = (),
    patterns: Sequence[str] = ("unstructured",),
    precision: str = "fp32",
    engine: str = "always",
    rounds: int | None = None,
    seed: int = 0,
    name: str | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Bench:
    """Time the engine and other runtimes in turns, on this machine.

    In each round every runtime is called once untimed and once timed, in alternating order, so that a slow moment falls
    on all; none pays for what the one before left behind. The other runtimes multiply zeros like all numbers, so each
    is prepared once per batch size and number of threads, with the weights as given.

    Args:
        model: pruned or dense; not changed.
        example: a tensor, a tuple of arguments or a mapping of keyword arguments, with a batch axis in front.
        against: names of `prunus.runtime.peers.PEERS`; what is not installed, or cannot run the model, is skipped and
            named with the reason.
        batches: examples per call; the first row of the example is repeated. None for the example as it is.
        threads: None for as many as torch has now.
        sparsities: masks of each sparsity are drawn at random and put on a copy of the weights; none for the weights as
            given. Every prunable tensor gets the same sparsity.
        patterns: "unstructured"; "4x1", "16x1"... for blocks of output channels that go together; "2:4" (N of M stay),
            which has a sparsity of its own and is measured once.
        precision: of the other runtimes, "fp32" or "bf16"; the engine computes in float32.
        engine: as for `prunus.compress`: "always" measures the engine alone, "auto" leaves regions to torch where that
            is faster.
        rounds: timed calls of each; None for about four seconds per setting, between 5 and 40.
        seed: of the masks.
        name: of the model in the report; default its class.
        on_stage: called with a sentence when a part of the work begins.

    Raises:
        InvalidValue: a number out of its range, no batches or threads, or a model that cannot run the example.
        UnknownName: a runtime or pattern that there is not.
        Unsupported: there is no native engine here, or torch.export cannot read the model.
    """
    sizes, counts = _whole("batches", batches), _whole("threads", threads)
    _whole("rounds", None if rounds is None else [rounds])
    settings = _settings(sparsities, patterns)
    rows = {runtime: peer(runtime) for runtime in dict.fromkeys(against)}
    tell = on_stage or (lambda text: None)
    bare = unwrap(model)
    timings: list[Timing] = []
    skipped = {runtime: why for runtime, row in rows.items() if (why := row.why_not())}
    for size, count in product(sizes, counts):
        inputs = at_batch(example, size)
        args, kwargs = arguments(inputs)
        batch = int(next(tensors_of((args, kwargs))).shape[0])
        with using_threads(count) as used:
            where = f"batch {batch}, {used} threads"
            with evaluating(bare), torch.inference_mode():
                try:
                    wanted = call(bare, inputs)
                except Exception as error:
                    raise InvalidValue(
                        f"the model cannot run the example ({type(error).__name__}: {error})."
                    ) from error
            calls: dict[str, Callable[[], Any]] = {}
            differences: dict[str, float | None] = {}
            for runtime, row in rows.items():
                if runtime in skipped:
                    continue
                tell(f"preparing {runtime} ({where})")
                try:
                    calls[runtime] = row.make(bare, inputs, used, precision)
                except (Unsupported, MissingExtra) as error:
                    skipped[f"{runtime}, {where}"] = str(error)
                    continue
                differences[runtime] = difference(calls[runtime](), wanted)
            for pattern, sparsity in settings:
                what = "" if sparsity is None else f", {sparsity:.1%} {pattern}"
                tell(f"preparing the engine ({where}{what})")
                ours = bare if sparsity is None else masked(bare, sparsity, pattern, seed)
                fast = compress(ours, inputs, engine=engine)
                assert fast.report is not None
                turns = rounds or _turns([partial(call, fast, inputs), *calls.values()])
                tell(f"timing {1 + len(calls)} runtimes ({where}{what})")
                found = latency(
                    {ENGINE: partial(call, fast, inputs), **calls},
                    (),
                    repeats=turns,
                    warmup=1,
                    primed=True,
                )
                for runtime, t in found.items():
                    off = None if runtime == ENGINE else differences[runtime]
                    if runtime == ENGINE and math.isfinite(fast.report.difference):
                        off = fast.report.difference
                    ms = (1e3 * t.median, 1e3 * t.low, 1e3 * t.high)
                    timings.append(Timing(runtime, pattern, sparsity, batch, used, *ms, t.ratio, off, t.repeats))
    shapes = tuple(tuple(t.shape[1:]) for t in tensors_of(arguments(example)))
    return Bench(
        name or type(bare).__name__, shapes, precision, _machine(), tuple(timings), skipped, break_evens(timings)
    )


def masked(model: nn.Module, sparsity: float, pattern: str, seed: int = 0) -> nn.Module:
    """Return a copy of a model with zeros drawn at random in a pattern, the same share in every prunable tensor."""
    copy = copied(model)
    masks = choose(
        copy,
        None if isinstance(pattern_unit(pattern), NM) else sparsity,
        unit=pattern_unit(pattern),
        score="random",
        budget="uniform",
        seed=seed,
    )
    masks.apply(copy)
    return copy


def pattern_unit(pattern: str) -> Unit:
    """Return the unit of a pattern.

    Raises:
        UnknownName: there is none of that name.
        InvalidValue: whole rows, channels and the like are no patterns of zeros in a layer.
    """
    if pattern.strip().lower() == "unstructured":
        return Weight()
    found = unit_of(pattern)
    if not isinstance(found, Weight | NM | Block):
        raise InvalidValue(f"pattern {pattern!r} must be unstructured, ROWSxCOLUMNS such as 4x1, or N:M such as 2:4.")
    return found


def _settings(sparsities: Sequence[float], patterns: Sequence[str]) -> list[tuple[str, float | None]]:
    """Return (pattern, sparsity) of every setting; a pattern with a density of its own comes once."""
    for sparsity in sparsities:
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
            raise InvalidValue(f"sparsity {sparsity!r} must lie in [0, 1).")
    units = {pattern: pattern_unit(pattern) for pattern in dict.fromkeys(patterns)}
    if not units:
        raise InvalidValue("there is no pattern to measure.")
    if not sparsities:
        fixed = [(p, 1.0 - u.density) for p, u in units.items() if u.density is not None]
        return [*fixed] or [("as given", None)]
    found: list[tuple[str, float | None]] = []
    for pattern, what in units.items():
        if what.density is not None:
            found.append((pattern, 1.0 - what.density))
        else:
            found += [(pattern, float(s)) for s in sorted(set(sparsities))]
    return found


def _whole(what: str, values: Sequence[int] | None) -> Sequence[int | None]:
    if values is None:
        return [None]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidValue(f"{what} must be whole numbers from 1 up, not {value!r}.")
    if not values:
        raise InvalidValue(f"there are no {what} to measure with.")
    return list(dict.fromkeys(values))


def _turns(calls: Sequence[Callable[[], Any]]) -> int:
    """Return how many rounds fit the time that a setting may take."""
    once = sum(t.median for t in latency({str(i): c for i, c in enumerate(calls)}, (), repeats=1, warmup=1).values())
    return max(5, min(40, int(_SECONDS / (2 * once + 1e-6))))


def difference(found: Any, wanted: Any) -> float | None:
    """Return the largest difference of outputs, relative to the largest one; None for other shapes, or no numbers."""
    mine = [t.detach().float().numpy() if isinstance(t, Tensor) else np.asarray(t) for t in _leaves(found)]
    theirs = [t.detach().float().numpy() for t in _leaves(wanted)]
    if len(mine) != len(theirs) or any(a.shape != b.shape for a, b in zip(mine, theirs)):
        return None
    worst = 0.0
    for a, b in zip(mine, theirs, strict=True):
        if a.size:
            off = float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30))
            worst = max(worst, off) if math.isfinite(off) else math.inf
    return worst if math.isfinite(worst) else None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Tensor | np.ndarray):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    return [leaf for item in value or () for leaf in _leaves(item)] if not isinstance(value, str | int | float) else []


def break_evens(timings: Sequence[Timing]) -> tuple[BreakEven, ...]:
    """Return from which sparsity on the engine is faster, for each pattern, runtime, batch size and thread count.

    It is the lowest measured sparsity at which, and above which, the engine was never slower; where the one below it
    was too low, the line between the logarithms of both ratios says where they meet.
    """
    curves: dict[tuple[str, str, int, int], list[tuple[float, float]]] = {}
    for t in timings:
        if t.runtime != ENGINE and t.sparsity is not None:
            curves.setdefault((t.pattern, t.runtime, t.batch, t.threads), []).append((t.sparsity, t.speedup))
    found = []
    for (pattern, runtime, batch, count), points in curves.items():
        points = sorted(points)
        if len(points) < 2:
            continue
        fast = len(points)
        while fast and points[fast - 1][1] >= 1.0:
            fast -= 1
        if fast == len(points):
            found.append(BreakEven(pattern, runtime, batch, count, None, False))
        elif fast == 0:
            found.append(BreakEven(pattern, runtime, batch, count, points[0][0], False))
        else:
            (a, slow), (b, quick) = points[fast - 1], points[fast]
            low, high = np.log(slow), np.log(quick)
            at = a + (b - a) * float(-low / (high - low))
            found.append(BreakEven(pattern, runtime, batch, count, at, True))
    return tuple(found)


def _machine() -> dict[str, Any]:
    import os

    from prunus.runtime.library import engine, why_not

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "instruction_set": "none" if why_not() else engine().sets[0],
    }


__all__ = ["AGAINST", "Bench", "BreakEven", "Timing", "bench", "break_evens", "masked", "pattern_unit"]
