"""The plot of `prunus bench`: time against sparsity for each pattern, other runtimes as lines, break-even marked."""

from __future__ import annotations

from itertools import pairwise

from prunus.errors import InvalidValue
from prunus.report.plots import BAND, DASHES, INK, Style, _figure, _label_ends, _svg
from prunus.runtime.bench import ENGINE, Bench, Timing


def bench_plot(found: Bench, *, batch: int | None = None, threads: int | None = None) -> str:
    """Return milliseconds against sparsity as SVG, for one batch size and one number of threads.

    Lines with markers are the engine, one per pattern; broken lines across are the other runtimes, whose time does not
    depend on zeros (medians over all settings); circles are where the engine becomes the faster one.

    Args:
        found: with sparsities.
        batch, threads: default the first that were measured.

    Raises:
        InvalidValue: nothing was measured there at given sparsities.
        MissingExtra: matplotlib is not installed.
    """
    swept = [t for t in found.timings if t.sparsity is not None]
    batch = batch if batch is not None or not swept else swept[0].batch
    threads = threads if threads is not None or not swept else swept[0].threads
    here = [t for t in swept if (t.batch, t.threads) == (batch, threads)]
    if not here:
        raise InvalidValue(
            "there is nothing to plot: measure with sparsities, and name a batch size that was measured."
        )
    patterns = list(dict.fromkeys(t.pattern for t in here))
    others = list(dict.fromkeys(t.runtime for t in here if t.runtime != ENGINE))
    style = Style(patterns)
    with _figure("bench", 7.2, 4.2) as (figure, axes):
        ends = []
        for pattern in patterns:
            mine = sorted((t for t in here if (t.pattern, t.runtime) == (pattern, ENGINE)), key=_sparsity)
            options = style.of(pattern)
            axes.plot([100 * _sparsity(t) for t in mine], [t.median_ms for t in mine], **options)  # type: ignore[arg-type]
            ends.append((pattern, mine[-1].median_ms, options))
        for number, runtime in enumerate(others):
            times = sorted(t.median_ms for t in here if t.runtime == runtime)
            level = times[len(times) // 2]
            dash = DASHES[1 + number % 3]
            axes.axhline(level, color=BAND, linewidth=1.3, linestyle=dash, zorder=1)
            ends.append((runtime, level, {"color": BAND, "marker": "None"}))
        for b in found.break_even:
            if (
                (b.batch, b.threads) != (batch, threads)
                or b.sparsity is None
                or not b.within
                or b.pattern not in patterns
            ):
                continue
            mine = sorted((t for t in here if (t.pattern, t.runtime) == (b.pattern, ENGINE)), key=_sparsity)
            axes.plot(
                [100 * b.sparsity],
                [_between(mine, b.sparsity)],
                marker="o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=INK,
                linestyle="none",
                zorder=5,
            )
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("sparsity % (circles: the engine becomes faster than a runtime)")
        axes.set_ylabel("milliseconds per call")
        axes.set_title(f"{found.model}, batch {batch}, {threads} thread{'s' if threads != 1 else ''}")
        axes.grid(axis="y")
        _label_ends(figure, axes, ends)
        return _svg(figure, f"bench-{batch}-{threads}", "Milliseconds against sparsity, by pattern of zeros")


def _sparsity(timing: Timing) -> float:
    return timing.sparsity or 0.0


def _between(points: list[Timing], sparsity: float) -> float:
    """Return the time that the line through the points has at a sparsity."""
    for a, b in pairwise(points):
        if _sparsity(a) <= sparsity <= _sparsity(b):
            share = (sparsity - _sparsity(a)) / max(_sparsity(b) - _sparsity(a), 1e-12)
            return a.median_ms + share * (b.median_ms - a.median_ms)
    return points[-1].median_ms
