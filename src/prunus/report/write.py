"""Writing a report: JSON for programs, Markdown for a repository, HTML for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.errors import StorageFailed
from prunus.files import canonical_json, write_atomic
from prunus.report.html import flatten, html_report, task_sentence
from prunus.report.summary import findings, percent, sparsities, summarise
from prunus.report.tables import escape_markdown, layer_grid, markdown_grid, markdown_table


def write(folder: Path, results: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> dict[str, Path]:
    """Write report.json, report.md and report.html into `folder`, each whole or not at all.

    The first two depend on `results` alone, byte for byte; `timing` goes into the HTML file only.

    Args:
        folder: created when missing.
        results: as `prunus.report.summary` describes. Numbers that are not finite become null.
        timing: measured times of this machine.

    Returns:
        {"json": path, "md": path, "html": path}.

    Raises:
        InvalidValue: results that cannot be summarised or written as JSON.
        StorageFailed: a file could not be written; what was there before is unchanged.
    """
    folder = Path(folder)
    clean = finite(results)
    # All three are made before the first is written: a failure while making leaves the old report whole.
    contents = {
        "json": canonical_json(json_report(clean)),
        "md": markdown_report(clean).encode("utf-8"),
        "html": html_report(clean, finite(timing) if timing else None).encode("utf-8"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailed(
            f"could not make the folder {str(folder)!r}: {error.strerror or error}. Choose one you may write to."
        ) from error
    paths = {kind: folder / f"report.{kind}" for kind in contents}
    for kind, path in paths.items():
        write_atomic(path, contents[kind])
    return paths


def finite(value: Any) -> Any:
    """Return a copy of a JSON-ready value in which every NaN and infinity is None and every key is a string."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [finite(inner) for inner in value]
    return value


def json_report(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results with their summary rows and findings beside them, JSON-ready."""
    rows = summarise(results)
    return {**results, "summary": [row.as_dict() for row in rows], "findings": findings(rows)}


def markdown_report(results: Mapping[str, Any]) -> str:
    """Return the report as GitHub-flavoured Markdown: findings, table, layers, provenance."""
    rows = summarise(results)
    lines = [f"# {escape_markdown(str(results.get('title') or 'Prunus report'))}", ""]
    if results.get("task"):
        lines += [escape_markdown(task_sentence(results["task"])), ""]
    lines += [*(f"- {escape_markdown(sentence)}" for sentence in findings(rows)), ""]
    for key in ("claims", "notes"):
        if results.get(key):
            lines += [f"## {key.capitalize()}", "", *(f"- {escape_markdown(str(t))}" for t in results[key]), ""]
    lines += ["## Results", "", markdown_table(rows)]
    lines += [
        "Accuracy is measured on test data, as mean ± half of the 95 % Student-t interval over seeds. "
        "Sparsity is the share of zeros among prunable weights.",
        "",
    ]
    for level in sparsities(rows):
        headings, cells = layer_grid(rows, level)
        if cells:
            aligned = [(text, number > 0) for number, text in enumerate(headings)]
            lines += [f"## Weights kept per layer at {percent(level)} sparsity", "", markdown_grid(aligned, cells)]
    lines += ["## How this was made", ""]
    if results.get("command"):
        lines += _code(str(results["command"]), "")
    lines += [f"- {escape_markdown(f'{key}: {value}')}" for key, value in flatten(results.get("environment") or {})]
    lines.append("")
    if results.get("recipe"):
        lines += _code(json.dumps(results["recipe"], indent=2, ensure_ascii=False, sort_keys=True), "json")
    return "\n".join(lines).rstrip() + "\n"


def _code(text: str, language: str) -> list[str]:
    """Return a fenced block whose fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{language}", text, fence, ""]
