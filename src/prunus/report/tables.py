"""The same rows as a terminal table, plain text and Markdown."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunus.measure.statistics import format_interval
from prunus.report.summary import Row, percent

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """One column: its heading, whether it holds numbers (right aligned), and the text of its cells."""

    heading: str
    numeric: bool
    cell: Callable[[Row], str]


def whole(value: float | None) -> str:
    """Return a count with thousands separated; "≈" marks a mean over seeds that differ."""
    if value is None:
        return NOTHING
    return f"{int(value):,}" if float(value).is_integer() else f"≈ {value:,.1f}"


def share(part: float | None, total: float | None) -> str:
    """Return "kept / total"."""
    return NOTHING if part is None or total is None else f"{whole(part)} / {whole(total)}"


def sparsity(value: float | None) -> str:
    """Return a realised share of zeros with two digits, never rounded up to 100 % while something is left."""
    if value is None:
        return NOTHING
    text = f"{100 * value:.2f} %"
    return f"{percent(value)}" if text == "100.00 %" and value < 1.0 else text


def accuracy(row: Row) -> str:
    """Return "mean ± half" in percent, "(single seed)" after a lone number, or that nothing is finished."""
    return "not finished" if row.accuracy is None else format_interval(row.accuracy)


def seeds(row: Row) -> str:
    """Return how many seeds are finished, of how many when some are missing."""
    finished = len(row.seeds)
    return str(finished) if row.complete else f"{finished} of {finished + len(row.missing)}, incomplete"


COLUMNS: tuple[Column, ...] = (
    Column("Method", False, lambda row: row.method),
    Column("Sparsity asked", True, lambda row: percent(row.sparsity)),
    Column("Realised", True, lambda row: sparsity(row.realised)),
    Column("Accuracy %", True, accuracy),
    Column("Seeds", True, seeds),
    Column("Kept / prunable", True, lambda row: share(row.kept, row.total)),
    Column("Kept / all", True, lambda row: share(row.kept_all, row.total_all)),
    Column("MACs left", True, lambda row: NOTHING if row.mac_share is None else f"{100 * row.mac_share:.1f} %"),
    Column("Steps", True, lambda row: whole(row.steps)),
)


def columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that have something to say about these rows."""
    return [c for c in COLUMNS if not c.numeric or any(c.cell(row) != NOTHING for row in rows)]


def grid(rows: Sequence[Row]) -> tuple[list[Column], list[list[str]]]:
    """Return the columns and the texts of all cells, row by row."""
    shown = columns(rows)
    return shown, [[column.cell(row) for column in shown] for row in rows]


def layer_grid(rows: Sequence[Row], level: float) -> tuple[list[str], list[list[str]]]:
    """Return headings and lines of the per-layer table at one sparsity: layer, weights, and kept of each method.

    Empty lines when no row at this sparsity knows its layers.
    """
    here = [row for row in rows if row.sparsity == level and row.layers]
    tables = [{layer.name: layer for layer in row.layers} for row in here]
    names = list(dict.fromkeys(name for table in tables for name in table))
    lines = []
    for name in names:
        found = [table.get(name) for table in tables]
        total = next(layer.total for layer in found if layer is not None)
        kept = [NOTHING if l is None else f"{whole(l.kept)} ({100 * l.density:.1f} %)" for l in found]
        lines.append([name, whole(total), *kept])
    return ["Layer", "Weights", *(row.method for row in here)], lines


def text_table(rows: Sequence[Row]) -> str:
    """Return the table as aligned plain text with a rule under the headings, ending in a newline."""
    shown, cells = grid(rows)
    lines = [[c.heading for c in shown], *cells]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(shown))]

    def draw(line: list[str]) -> str:
        padded = [_pad(text, width, c.numeric) for text, width, c in zip(line, widths, shown)]
        return "  ".join(padded).rstrip()

    return "\n".join([draw(lines[0]), "  ".join("-" * w for w in widths), *map(draw, cells)]) + "\n"


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table as GitHub-flavoured Markdown, ending in a newline."""
    shown, cells = grid(rows)
    return markdown_grid([(c.heading, c.numeric) for c in shown], cells)


def markdown_grid(headings: Sequence[tuple[str, bool]], cells: Sequence[Sequence[str]]) -> str:
    """Return any table as Markdown; `headings` are (text, numeric), and texts are shown as they are."""
    lines = [
        [escape_markdown(text) for text, _ in headings],
        ["---:" if numeric else ":---" for _, numeric in headings],
        *([escape_markdown(text) for text in line] for line in cells),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rich_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """Return the table for a `rich` console; user texts are shown as they are, not read as markup."""
    from rich.table import Table
    from rich.text import Text

    shown, cells = grid(rows)
    table = Table(title=None if title is None else Text(title))
    longest = max((len(row.method) for row in rows), default=0)
    for column in shown:
        if column.numeric:
            # Headings on two lines leave the width to the numbers and to the names of methods.
            table.add_column(column.heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
        else:
            table.add_column(column.heading, min_width=min(longest, 24))
    previous = ""
    for row, line in zip(rows, cells):
        if previous not in ("", row.method):
            table.add_section()
        previous = row.method
        table.add_row(*(Text(text) for text in line))
    return table


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~" else c for c in flat)


def _width(text: str) -> int:
    """Return how many terminal cells a text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space
