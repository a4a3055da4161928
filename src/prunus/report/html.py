"""One HTML file that holds the whole report: no script, no request, readable anywhere and for ever."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prunus.report.plots import GRID, INK, PALETTE, accuracy_plot, curve_plot, layer_plot
from prunus.report.summary import Row, findings, percent, sparsities, summarise
from prunus.report.tables import NOTHING, grid, layer_grid, whole

# The palette again, lighter, for a dark page; same order, same hues.
_DARK_PALETTE = ("#4ba3e3", "#f28444", "#2fc49a", "#e29bc3", "#86cdf5", "#f2b63c", "#c49a7c", "#a996e0")

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f8fa; --ink: #1f2328; --soft: #57606a;
  --line: #d8dee4; --accent: #7a3e9d; SERIES }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #171c22; --ink: #e6e9ec; --soft: #9aa4af;
  --line: #333c46; --accent: #cfa3e6; DARK_SERIES } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main, footer { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; }
p, li { max-width: 50rem; overflow-wrap: anywhere; }
.task { color: var(--soft); margin: 0 0 1rem; }
.findings { background: var(--card); border-left: 4px solid var(--accent); padding: 0.75rem 1rem; margin: 1rem 0; }
.findings ul { margin: 0; padding-left: 1.1rem; }
.findings li + li { margin-top: 0.4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th.number, td.number { text-align: right; }
tbody tr.first td { border-top: 2px solid var(--line); }
tr.incomplete td { color: var(--soft); font-style: italic; }
.hash { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.8rem; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; max-width: 50rem; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif !important; }
figcaption { color: var(--soft); font-size: 0.9rem; max-width: 50rem; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; font-weight: 600; padding: 0.25rem 0; }
pre { background: var(--card); padding: 0.75rem; overflow-x: auto; font-size: 0.85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.timing { border: 1px dashed var(--line); padding: 0 1rem 0.75rem; margin-top: 2rem; }
footer { color: var(--soft); font-size: 0.9rem; }
@media print { :root { --page: #ffffff; --card: #f4f4f4; --ink: #000000; --soft: #444444; --line: #bbbbbb; SERIES }
  body { font-size: 10pt; } main, footer { max-width: none; padding: 0; } table { font-size: 8pt; }
  th, td { white-space: normal; padding: 0.2rem 0.4rem; } figure, tr { break-inside: avoid; }
  figure svg { min-width: 0; } h2 { break-after: avoid; } }
"""


def html_report(results: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> str:
    """Return the report as one self-contained HTML document; equal arguments give equal text.

    Args:
        results: as `prunus.report.summary` describes; texts in it are shown as they are, never read as markup.
        timing: measured times of this machine, nested dictionaries of numbers and texts; shown in a section of its
            own, because they differ from run to run.

    Raises:
        InvalidValue: results without cells, or with cells that lack method, sparsity or seed.
        MissingExtra: matplotlib is not installed.
    """
    rows = summarise(results)
    title = str(results.get("title") or "Prunus report")
    task = results.get("task") or {}
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{_style()}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="task">{escape(task_sentence(task))}</p>' if task else "",
        '<section class="findings">',
        _list(findings(rows)),
        "</section>",
        _texts("Claims", results.get("claims")),
        _texts("Notes", results.get("notes")),
        "<h2>Results</h2>",
        _main_table(rows),
        "<p>Accuracy is measured on test data, as mean ± half of the 95 % Student-t interval over seeds. "
        "Sparsity is the share of zeros among prunable weights; MACs are multiply-accumulates of one example.</p>",
        _plots(results, rows),
        _layer_tables(rows),
        _cell_table(results),
        _timing(timing),
        "</main>",
        _footer(results),
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def task_sentence(task: Mapping[str, Any]) -> str:
    """Return what was trained on what, in one sentence."""
    known = dict(task)
    model, data = known.pop("model", None), known.pop("data", None)
    parts = []
    if model is not None or data is not None:
        parts.append(" on ".join(str(v) for v in (model, data) if v is not None))
    counts = [(key, known.pop(key)) for key in ("train", "validation", "test") if known.get(key) is not None]
    if counts:
        texts = [f"{number:,} {key}" if isinstance(number, int) else f"{number} {key}" for key, number in counts]
        parts.append(", ".join(texts) + " examples")
    classes, epochs = known.pop("num_classes", None), known.pop("epochs", None)
    if classes is not None:
        parts.append(f"{classes} classes")
    if epochs is not None:
        parts.append(f"{epochs} epochs")
    checkpoint = known.pop("checkpoint", None)
    if checkpoint is not None:
        parts.append(f"evaluated checkpoint: {checkpoint}")
    parts.extend(f"{key.replace('_', ' ')}: {value}" for key, value in known.items() if value is not None)
    return "; ".join(parts) + "."


def _style() -> str:
    light = " ".join(f"--series-{i}: {color};" for i, color in enumerate(PALETTE))
    dark = " ".join(f"--series-{i}: {color};" for i, color in enumerate(_DARK_PALETTE))
    return _STYLE.replace("DARK_SERIES", dark).replace("SERIES", light)


def _themed(svg: str) -> str:
    """Tie the colours of a plot to the page, so that it follows dark mode and print."""
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    for index, color in enumerate(PALETTE):
        svg = svg.replace(color, f"var(--series-{index})")
    return svg


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(str(text))}</li>" for text in sentences) + "</ul>"


def _texts(heading: str, texts: Any) -> str:
    return f"<h2>{heading}</h2>{_list(texts)}" if texts else ""


def _table(headings: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """Return a table; `headings` are (text, numeric), `classes` one CSS class per line."""

    def cell(tag: str, text: str, numeric: bool) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kind = ' class="number"' if numeric else ""
        return f"<{tag}{scope}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, numeric) for text, numeric in headings)
    body = []
    for number, line in enumerate(lines):
        mark = classes[number] if number < len(classes) else ""
        cells = "".join(cell("td", text, numeric) for text, (_, numeric) in zip(line, headings))
        body.append(f'<tr class="{mark}">{cells}</tr>' if mark else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _main_table(rows: Sequence[Row]) -> str:
    columns, cells = grid(rows)
    classes = []
    previous: str | None = None
    for row in rows:
        first = previous is not None and row.method != previous
        classes.append(" ".join(["first"] * first + ["incomplete"] * (not row.complete)))
        previous = row.method
    return _table([(c.heading, c.numeric) for c in columns], cells, classes)


def _plots(results: Mapping[str, Any], rows: Sequence[Row]) -> str:
    figures = [
        _figure(
            accuracy_plot(rows),
            "Test accuracy against sparsity. Markers are means over seeds, bars 95 % intervals; an open marker is a "
            "single seed. The dashed line is the dense network, the band its interval. Points at one sparsity are "
            "drawn side by side.",
        )
    ]
    for level in sparsities(rows):
        figures.append(
            _figure(
                curve_plot(results, level),
                f"Validation accuracy during training at {percent(level)} sparsity: mean over seeds, band from the "
                "lowest to the highest seed.",
            )
        )
    for level in sparsities(rows):
        figures.append(
            _figure(
                layer_plot(rows, level),
                f"Where the weights went: share kept per layer at {percent(level)} sparsity, mean over seeds. On a "
                "logarithmic axis, a marker on the left edge is a layer with nothing left.",
            )
        )
    shown = [figure for figure in figures if figure]
    return "<h2>Plots</h2>" + "\n".join(shown) if shown else ""


def _figure(svg: str | None, caption: str) -> str:
    return "" if svg is None else f"<figure>{_themed(svg)}<figcaption>{escape(caption)}</figcaption></figure>"


def _layer_tables(rows: Sequence[Row]) -> str:
    parts = []
    for level in sparsities(rows):
        headings, lines = layer_grid(rows, level)
        if lines:
            table = _table([(text, number > 0) for number, text in enumerate(headings)], lines)
            parts.append(f"<details><summary>Weights kept at {percent(level)} sparsity</summary>{table}</details>")
    return "<h2>Layers</h2>" + "\n".join(parts) if parts else ""


def _cell_table(results: Mapping[str, Any]) -> str:
    lines = []
    for cell in results["cells"]:
        accuracy, validation = cell.get("accuracy"), cell.get("validation_accuracy")
        lines.append(
            [
                str(cell["method"]),
                percent(float(cell["sparsity"])),
                str(cell["seed"]),
                "not finished" if accuracy is None else f"{100 * accuracy:.2f}",
                NOTHING if validation is None else f"{100 * validation:.2f}",
                whole(cell.get("steps")),
                str(cell.get("digest") or NOTHING),
            ]
        )
    headings = [("Method", False), ("Sparsity", True), ("Seed", True), ("Accuracy %", True)]
    headings += [("Validation %", True), ("Steps", True), ("SHA-256 of the weights", False)]
    table = _table(headings, lines)
    return f"<h2>Single runs</h2><details><summary>All {len(lines)} runs</summary>{table}</details>"


def _timing(timing: Mapping[str, Any] | None) -> str:
    if not timing:
        return ""
    lines = [[name, value] for name, value in flatten(timing)]
    return (
        '<section class="timing"><h2>Timing on this machine (not part of the reproducible results)</h2>'
        + _table([("What", False), ("Measured", True)], lines)
        + "</section>"
    )


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested dictionaries and lists as (path, text) pairs, in their own order."""
    if isinstance(value, Mapping):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        text = f"{value:.6g}" if isinstance(value, float) else NOTHING if value is None else str(value)
        return [(prefix, text)]
    return [pair for key, inner in items for pair in flatten(inner, f"{prefix} / {key}" if prefix else key)]


def _footer(results: Mapping[str, Any]) -> str:
    parts = ["<footer>", "<h2>How this was made</h2>"]
    if results.get("command"):
        parts.append(f"<p>Command</p><pre>{escape(str(results['command']))}</pre>")
    if results.get("environment"):
        lines = [[name, value] for name, value in flatten(results["environment"])]
        parts.append(_table([("Environment", False), ("", False)], lines))
    if results.get("recipe"):
        recipe = json.dumps(results["recipe"], indent=2, ensure_ascii=False, default=str)
        parts.append(f"<details><summary>Resolved recipe</summary><pre>{escape(recipe)}</pre></details>")
    parts.append("</footer>")
    return "\n".join(parts)
