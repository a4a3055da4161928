"""Plots as SVG text: the same rows always give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prunus.errors import MissingExtra
from prunus.report.summary import Row, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe colours, without the yellow that vanishes on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f5539", "#6a51a3")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
INK = "#1f2328"
GRID = "#d8dee4"
BAND = "#8c959f"
DENSE_DASH = (0, (5, 3))

End = tuple[str, float, dict[str, str]]  # name, height of the last point, line options

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.id": None,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "text.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.parse_math": False,
}


class Style:
    """Gives every method its colour, marker and dash, by order of first appearance."""

    def __init__(self, methods: Sequence[str]):
        self._order = list(dict.fromkeys(methods))

    def of(self, method: str) -> dict[str, str]:
        """Return the matplotlib line options of a method; colours repeat after eight methods, with another dash."""
        index = self._order.index(method)
        return {
            "color": PALETTE[index % len(PALETTE)],
            "marker": MARKERS[(index + index // len(PALETTE)) % len(MARKERS)],
            "linestyle": DASHES[(index // len(PALETTE)) % len(DASHES)],
        }


def accuracy_plot(rows: Sequence[Row]) -> str | None:
    """Return accuracy against sparsity as SVG; None when no pruned row has an accuracy.

    Points are means, bars 95 % intervals over seeds, open markers single seeds. The horizontal axis is the logarithm
    of the density, so that 90 % and 98 % sparsity are as far apart as 50 % and 90 %. The dense network is a line with
    its interval as a band.
    """
    pruned = [row for row in rows if row.accuracy is not None and 0.0 < row.sparsity < 1.0]
    if not pruned:
        return None
    style = Style([row.method for row in rows if not row.dense])
    methods = list(dict.fromkeys(row.method for row in pruned))
    levels = sorted({row.sparsity for row in pruned})
    with _figure("accuracy", 7.2, 4.2) as (figure, axes):
        _density_axis(axes, levels)
        ends: list[End] = []
        for index, method in enumerate(methods):
            mine = [row for row in pruned if row.method == method]
            options = style.of(method)
            # Side by side within 3 % of a decade, so that intervals at one sparsity do not hide each other.
            shift = 10.0 ** (0.03 * (index - (len(methods) - 1) / 2) / max(1, len(methods) - 1) * 2)
            x = [(1.0 - row.sparsity) / shift for row in mine]
            y = [100.0 * row.accuracy.mean for row in mine if row.accuracy is not None]
            axes.plot(x, y, markerfacecolor="none", **options)  # type: ignore[arg-type]
            several = [
                (a, b, row.accuracy) for a, b, row in zip(x, y, mine) if row.accuracy and not row.accuracy.single
            ]
            if several:
                axes.errorbar(
                    [a for a, _, _ in several],
                    [b for _, b, _ in several],
                    yerr=[100.0 * (i.half or 0.0) for _, _, i in several],
                    color=options["color"],
                    marker=options["marker"],
                    linestyle="none",
                    capsize=3.0,
                    elinewidth=1.2,
                )
            ends.append((method, y[-1], options))
        ends += _dense_band(axes, rows)
        low, high = axes.get_ylim()
        # Wide intervals run past what an accuracy can be, where there is nothing to see.
        tallest, lowest = max(y for _, y, _ in ends), min(y for _, y, _ in ends)
        axes.set_ylim(max(low, min(-0.5, lowest - 0.5)), min(high, max(100.5, tallest + 0.5)))
        axes.set_xlabel("sparsity (share of zeros; logarithmic in the density)")
        axes.set_ylabel("test accuracy %")
        axes.grid(axis="y")
        _label_ends(figure, axes, ends)
        return _svg(figure, "accuracy", "Test accuracy against sparsity, by method")


def _dense_band(axes: Axes, rows: Sequence[Row]) -> list[End]:
    """Draw the dense network as a dashed line with its interval as a band; return its label, if it has a result."""
    dense = next((row.accuracy for row in rows if row.dense and row.accuracy is not None), None)
    if dense is None:
        return []
    if dense.low is not None and dense.high is not None:
        axes.axhspan(100.0 * dense.low, 100.0 * dense.high, color=BAND, alpha=0.22, linewidth=0)
    axes.axhline(100.0 * dense.mean, color=BAND, linewidth=1.4, linestyle=DENSE_DASH, zorder=1)
    return [("dense", 100.0 * dense.mean, {"color": BAND, "marker": "None"})]


def _density_axis(axes: Axes, levels: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic in density, dense to the left, ticks named by sparsity."""
    from matplotlib.ticker import FixedLocator, NullLocator

    densities = [1.0 - level for level in levels]
    axes.set_xscale("log")
    span = math.log10(max(densities) / min(densities))
    room = 10.0 ** max(0.12, 0.06 * span)
    axes.set_xlim(
        min(1.0, max(densities) * room) if max(densities) * room < 1.0 else max(densities) * room, min(densities) / room
    )
    axes.xaxis.set_major_locator(FixedLocator(_spaced(densities, 0.07 * (span + 0.24))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda density, _: percent(1.0 - density))


def _spaced(densities: Sequence[float], gap: float) -> list[float]:
    """Return the densities that can carry a tick label without touching the one before (`gap` in decades)."""
    shown: list[float] = []
    for density in sorted(densities):
        if not shown or math.log10(density / shown[-1]) >= gap:
            shown.append(density)
    return shown


def layer_plot(rows: Sequence[Row], sparsity: float) -> str | None:
    """Return the density of every layer at one sparsity as SVG, one marker per method; None without layers.

    Means over seeds; the horizontal axis is logarithmic when densities differ by more than a factor of eight, and a
    marker on its left edge is a layer with nothing left.
    """
    here = [row for row in rows if row.sparsity == sparsity and row.layers]
    if not here:
        return None
    style = Style([row.method for row in rows if not row.dense])
    names = list(dict.fromkeys(layer.name for row in here for layer in row.layers))
    values = [100.0 * layer.density for row in here for layer in row.layers if layer.density > 0.0]
    with _figure("layers", 7.2, max(1.0 + 0.3 * len(names), 0.8 + 0.2 * len(here))) as (figure, axes):
        logarithmic = bool(values) and max(values) > 8.0 * min(values)
        if logarithmic:
            _percent_log_axis(axes, min(values), max(values))
        else:
            axes.set_xlim(0.0, 1.08 * max(values, default=100.0))
        # Zero has no place on a logarithmic axis; layers without any weight left stand on its left edge.
        floor = axes.get_xlim()[0] if logarithmic else 0.0
        for index, row in enumerate(here):
            options = style.of(row.method)
            offset = 0.5 * (index - (len(here) - 1) / 2) / len(here)
            density = {layer.name: 100.0 * layer.density for layer in row.layers}
            found = [(density[name], position + offset) for position, name in enumerate(names) if name in density]
            axes.plot(
                [max(x, floor) for x, _ in found],
                [y for _, y in found],
                linestyle="none",
                marker=options["marker"],
                color=options["color"],
                label=_shorten(row.method, 22),
                clip_on=False,
            )
        axes.set_yticks(range(len(names)), labels=[_shorten(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        overall = 100.0 * (1.0 - sparsity)
        axes.axvline(overall, color=BAND, linewidth=1.2, linestyle=DENSE_DASH, zorder=1)
        axes.set_xlabel("weights kept % (dashed: share asked for overall)")
        axes.set_title(f"{percent(sparsity)} sparsity")
        axes.grid(axis="x")
        axes.hlines(
            [i + 0.5 for i in range(len(names) - 1)],
            0,
            1,
            transform=axes.get_yaxis_transform(),
            color=GRID,
            linewidth=0.6,
        )
        if len(here) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, handletextpad=0.2)
        return _svg(figure, f"layers-{sparsity}", f"Weights kept per layer at {percent(sparsity)} sparsity, by method")


def _percent_log_axis(axes: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, max(high, 1.0) * 1.15)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    axes.xaxis.set_major_locator(
        FixedLocator([step * 10.0**d for d in decades for step in steps if step * 10.0**d <= 100])
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def curve_plot(results: Mapping[str, Any], sparsity: float) -> str | None:
    """Return learning curves at one sparsity as SVG; None when no cell has one.

    A cell may hold `curve`: [{"step": int, "validation_accuracy": float}, ...]. Lines are means over the seeds that
    have a value at a step, bands run from the lowest to the highest seed.
    """
    series: dict[str, dict[int, list[float]]] = {}
    methods = list(dict.fromkeys(str(c["method"]) for c in results["cells"] if float(c["sparsity"]) > 0.0))
    for cell in results["cells"]:
        if float(cell["sparsity"]) != sparsity:
            continue
        for point in cell.get("curve") or ():
            if point.get("validation_accuracy") is not None:
                by_step = series.setdefault(str(cell["method"]), {})
                by_step.setdefault(int(point["step"]), []).append(100.0 * float(point["validation_accuracy"]))
    if not series:
        return None
    style = Style(methods or list(series))
    with _figure("curves", 7.2, 3.8) as (figure, axes):
        ends: list[End] = []
        for method, by_step in series.items():
            options = style.of(method)
            steps = sorted(by_step)
            mean = [math.fsum(by_step[s]) / len(by_step[s]) for s in steps]
            lone = options["marker"] if len(steps) == 1 else "None"
            axes.plot(steps, mean, color=options["color"], linestyle=options["linestyle"], marker=lone)
            low, high = [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps]
            axes.fill_between(steps, low, high, color=options["color"], alpha=0.15, linewidth=0)
            ends.append((method, mean[-1], options))
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("validation accuracy %")
        axes.set_title(f"{percent(sparsity)} sparsity")
        axes.grid(axis="y")
        _label_ends(figure, axes, ends)
        return _svg(figure, f"curves-{sparsity}", f"Learning curves at {percent(sparsity)} sparsity, by method")


def spread(wanted: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Move heights apart until neighbours are `gap` away, each cluster centred on where it wanted to be.

    Order is kept (equal ones by index). Results stay between `low` and `high` as far as there is room; without enough
    room they run over `high`. Returned in the given order.
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    # Clusters as (sum of the starts their members wish for, size); colliding ones merge (pool adjacent violators).
    clusters: list[tuple[float, int]] = []
    for i in order:
        total, size = wanted[i], 1
        while clusters and clusters[-1][0] / clusters[-1][1] + gap * clusters[-1][1] > total / size:
            below, count = clusters.pop()
            total, size = below + total - gap * count * size, count + size
        clusters.append((total, size))
    heights = [total / size + gap * place for total, size in clusters for place in range(size)]
    last = len(heights) - 1
    heights = [min(y, high - gap * (last - rank)) for rank, y in enumerate(heights)]
    heights = [max(y, low + gap * rank) for rank, y in enumerate(heights)]
    moved = dict(zip(order, heights))
    return [moved[i] for i in range(len(wanted))]


def _label_ends(figure: Figure, axes: Axes, ends: Sequence[End]) -> None:
    """Write each name to the right of the plot at the height of its last point, without overlaps."""
    low, high = axes.get_ylim()
    # Constrained layout leaves about four fifths of the height to the axes.
    gap = 13.0 * (high - low) / (0.8 * figure.get_figheight() * 72.0)
    side = axes.get_yaxis_transform()
    for (name, wanted, options), y in zip(ends, spread([y for _, y, _ in ends], gap, low, high)):
        color, marker = options["color"], options["marker"]
        reach = 1.05 if marker == "None" else 1.025
        axes.plot([1.0, reach], [wanted, y], color=color, linewidth=0.8, transform=side, clip_on=False)
        axes.plot([1.04], [y], color=color, marker=marker, linestyle="none", transform=side, clip_on=False)
        axes.text(1.06, y, _shorten(name, 22), transform=side, va="center_baseline", ha="left")
    axes.set_ylim(low, high)


def _shorten(name: str, limit: int = 34) -> str:
    """Return a name that fits; the end of it tells layers apart, so the middle goes."""
    return name if len(name) <= limit else f"{name[: limit // 3]}…{name[-(limit - limit // 3 - 1) :]}"


@contextmanager
def _figure(purpose: str, width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of its own (inches), drawn under fixed settings and without matplotlib's global state."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("plots need matplotlib; install it with: pip install 'matplotlib>=3.8'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_SETTINGS, "svg.hashsalt": f"prunus-{purpose}"})
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an SVG element without prolog, date or fixed size, its ids made unique by `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{description}">{rest.strip()}\n'
