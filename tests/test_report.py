"""Reports: rows by hand, the same bytes every time, nothing fetched, nothing executed, nothing drawn over itself."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import InvalidValue, StorageFailed
from prunus.report.html import html_report
from prunus.report.plots import MARKERS, PALETTE, Style, accuracy_plot, curve_plot, layer_plot, spread
from prunus.report.summary import findings, percent, summarise
from prunus.report.tables import layer_grid, markdown_table, rich_table, text_table
from prunus.report.write import markdown_report, write

NASTY = "<script>alert('x')</script> & \"q\" | `code` *b* [l](http://e.vil) $x^2$"


def cell(method: str, sparsity: float, seed: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    kept = round(1000 * (1 - sparsity))
    return {
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": accuracy,
        "validation_accuracy": accuracy,
        "loss": 0.5,
        "kept": kept,
        "total": 1000,
        "kept_all": kept + 10,
        "total_all": 1010,
        "macs": 2000,
        "effective_macs": 2 * kept,
        "steps": 300,
        "layers": [
            {"name": "fc1.weight", "kept": kept // 2, "total": 800},
            {"name": "fc2.weight", "kept": kept - kept // 2, "total": 200},
        ],
        "digest": f"{seed:064x}",
        **more,
    }


def results(**more: Any) -> dict[str, Any]:
    cells = [cell("dense", 0.0, s, a) for s, a in enumerate((0.970, 0.972, 0.974))]
    cells += [cell("rigl", 0.9, s, a) for s, a in enumerate((0.960, 0.965, 0.970))]
    cells += [cell("rigl", 0.98, s, a) for s, a in enumerate((0.930, 0.931, 0.932))]
    cells += [cell("magnitude", 0.98, s, a) for s, a in enumerate((0.900, 0.901, 0.902))]
    cells += [cell("magnitude", 0.9, s, a) for s, a in enumerate((0.958, 0.963, 0.968))]
    return {
        "title": "Digits",
        "task": {"data": "digits", "model": "mlp", "train": 900, "validation": 100, "test": 797, "num_classes": 10},
        "recipe": {"method": "rigl"},
        "environment": {"python": "3.11", "torch": "2.13.0"},
        "command": "prunus run",
        "cells": cells,
        "claims": [],
        "notes": ["One note."],
        **more,
    }


# -- rows -----------------------------------------------------------------------------------------------------


def test_rows_keep_the_order_of_methods_and_sort_sparsities() -> None:
    rows = summarise(results())
    assert [(r.method, r.sparsity) for r in rows] == [
        ("dense", 0.0),
        ("rigl", 0.9),
        ("rigl", 0.98),
        ("magnitude", 0.9),
        ("magnitude", 0.98),
    ]


def test_one_row_by_hand() -> None:
    row = summarise(results())[1]
    assert row.accuracy is not None
    assert row.accuracy.mean == pytest.approx(0.965)
    assert row.accuracy.half == pytest.approx(4.302652729696 * 0.005 / math.sqrt(3))
    assert (row.kept, row.total, row.kept_all, row.total_all) == (100, 1000, 110, 1010)
    assert (row.realised, row.mac_share, row.steps) == (pytest.approx(0.9), 0.1, 300)
    assert (row.seeds, row.missing, row.complete) == ((0, 1, 2), (), True)
    assert [(l.name, l.kept, l.density) for l in row.layers] == [("fc1.weight", 50, 0.0625), ("fc2.weight", 50, 0.25)]


def test_unfinished_seeds_are_marked_everywhere() -> None:
    data = results()
    data["cells"] = [c for c in data["cells"] if (c["method"], c["sparsity"], c["seed"]) != ("rigl", 0.98, 2)]
    data["cells"][-1]["accuracy"] = None
    rows = summarise(data)
    assert [r.missing for r in rows] == [(), (), (2,), (2,), ()]
    assert "2 of 3, incomplete" in text_table(rows)
    assert findings(rows)[-1] == "Not all seeds are finished for rigl at 98 %, magnitude at 90 %."
    assert 'class="incomplete"' in html_report(data)


def test_a_row_without_any_result_still_shows() -> None:
    data = results()
    data["cells"].append(cell("set", 0.99, 0, math.nan))
    row = summarise(data)[-1]
    assert (row.accuracy, row.missing) == (None, (0, 1, 2))
    assert "not finished" in text_table([row])
    assert "At 99 % sparsity no run is finished." in findings(summarise(data))
    html_report(data)


def test_single_seed_is_marked() -> None:
    data = {"cells": [cell("dense", 0.0, 0, 0.97), cell("a", 0.9, 0, 0.96), cell("b", 0.9, 0, 0.95)]}
    text = text_table(summarise(data))
    assert text.count("(single seed)") == 3
    assert "±" not in text
    assert "cannot be judged without two shared seeds" in findings(summarise(data))[1]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([], "no cells"),
        ([{"method": "a", "sparsity": 0.5}], "cell 0 .* 'seed'"),
        ([{"method": "a", "sparsity": 90, "seed": 0}], "share between 0 and 1"),
        ([{"method": "a", "sparsity": 0.5, "seed": 0}] * 2, "two cells"),
    ],
)
def test_results_that_make_no_sense_are_refused(cells: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        summarise({"cells": cells})


def test_cells_may_know_nothing_but_the_essentials() -> None:
    data = {"cells": [{"method": "a", "sparsity": 0.5, "seed": 0, "accuracy": 0.9}]}
    headings = text_table(summarise(data)).splitlines()[0]
    assert re.split("  +", headings) == ["Method", "Sparsity asked", "Accuracy %", "Seeds"]
    assert "<svg" in html_report(data)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (0.9, "90 %"), (0.98, "98 %"), (0.985, "98.5 %"), (0.999, "99.9 %"), (1 - 0.035, "96.5 %")],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_findings_tell_apart_only_what_the_seeds_tell_apart() -> None:
    at_90, at_98 = findings(summarise(results()))[1:3]
    # At 90 % the intervals overlap widely, but rigl is ahead by the same 0.2 points for every seed.
    assert "rigl is best: 96.50 ± 1.24 % (3 seeds)" in at_90
    assert "intervals overlap" in at_90
    assert "against magnitude: +0.20 ± 0.00 points, told apart" in at_90
    assert "against the dense network: −0.70 ± 0.75 points, not told apart" in at_90
    assert "intervals do not overlap" in at_98
    assert "against magnitude: +3.00 ± 0.00 points, told apart" in at_98


# -- tables ---------------------------------------------------------------------------------------------------


def test_text_table_is_aligned() -> None:
    lines = text_table(summarise(results())).splitlines()
    assert len({len(line) for line in lines}) == 1
    dense = ["dense", "0 %", "0.00 %", "97.20 ± 0.50", "3", "1,000 / 1,000", "1,010 / 1,010", "100.0 %", "300"]
    assert re.split("  +", lines[2]) == dense


def test_a_share_just_below_one_is_not_rounded_up() -> None:
    row = summarise({"cells": [cell("a", 0.99999, 0, 0.5, kept=1, total=100_000)]})[0]
    assert "99.999 %" in text_table([row])


def test_counts_that_differ_between_seeds_say_so() -> None:
    rows = summarise({"cells": [cell("a", 0.9, 0, 0.5, kept=100), cell("a", 0.9, 1, 0.5, kept=101)]})
    assert "≈ 100.5 / 1,000" in text_table(rows)


def test_markdown_escapes_and_has_one_line_per_row() -> None:
    table = markdown_table(summarise({"cells": [cell(NASTY + "\n| x", 0.9, 0, 0.5)]}))
    lines = table.splitlines()
    assert len(lines) == 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    assert not re.search(r"(?<!\\)[<`*\[]", table)


def test_rich_table_shows_markup_as_text() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(rich_table(summarise({"cells": [cell("[red]x", 0.9, 0, 0.5)]}), title="[b]t"))
        text = console.export_text()
    assert "[red]x" in text
    assert "[b]t" in text


def test_layer_grid() -> None:
    headings, lines = layer_grid(summarise(results()), 0.9)
    assert headings == ["Layer", "Weights", "rigl", "magnitude"]
    assert lines == [
        ["fc1.weight", "800", "50 (6.2 %)", "50 (6.2 %)"],
        ["fc2.weight", "200", "50 (25.0 %)", "50 (25.0 %)"],
    ]


# -- plots ----------------------------------------------------------------------------------------------------


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_plots_are_deterministic_and_name_what_they_show() -> None:
    rows = summarise(results())
    one, two = accuracy_plot(rows), accuracy_plot(summarise(copy.deepcopy(results())))
    assert one == two
    assert one is not None
    assert {"90 %", "98 %", "rigl", "magnitude", "dense", "test accuracy %"} <= set(texts(one))
    layers = layer_plot(rows, 0.98)
    assert layers is not None
    assert {"fc1.weight", "fc2.weight", "rigl", "magnitude", "98 % sparsity"} <= set(texts(layers))
    assert layer_plot(rows, 0.5) is None
    assert curve_plot(results(), 0.9) is None


def test_curves_are_drawn_when_given() -> None:
    data = results()
    for c in data["cells"]:
        c["curve"] = [{"step": s, "validation_accuracy": 0.1 * s} for s in range(5)]
    svg = curve_plot(data, 0.9)
    assert svg is not None
    assert {"rigl", "magnitude", "optimizer steps"} <= set(texts(svg))


def test_a_layer_without_weights_stands_on_the_left_edge() -> None:
    layers = [{"name": n, "kept": k, "total": 100} for n, k in (("a", 0), ("b", 1), ("c", 90))]
    svg = layer_plot(summarise({"cells": [cell("x", 0.7, 0, 0.5, layers=layers)]}), 0.7)
    assert svg is not None
    pattern = r'<use xlink:href="#[^"]*" x="([-0-9.]+)" y="[^"]*" style="fill: #0072b2'
    marks = [float(x) for x in re.findall(pattern, svg)]
    assert len(marks) == 3
    assert 0 < marks[0] < marks[1] < marks[2]


def test_plots_leave_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    accuracy_plot(summarise(results()))
    assert dict(matplotlib.rcParams) == before


def test_mathematics_and_markup_in_names_stay_text() -> None:
    svg = accuracy_plot(summarise({"cells": [cell("$a^2$ <b>", 0.9, 0, 0.5), cell("dense", 0.0, 0, 0.6)]}))
    assert svg is not None
    assert "$a^2$ <b>" in texts(svg)


@pytest.mark.parametrize("count", [1, 9, 20])
def test_methods_never_share_colour_marker_and_dash(count: int) -> None:
    style = Style([str(i) for i in range(count)])
    assert len({tuple(style.of(str(i)).values()) for i in range(count)}) == count
    assert len(PALETTE) == len(MARKERS) == len(set(PALETTE))


@given(st.lists(st.floats(-100, 100), max_size=12), st.floats(0.5, 5))
def test_labels_keep_their_distance_and_order(wanted: list[float], gap: float) -> None:
    moved = spread(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    assert all(moved[b] - moved[a] >= gap - 1e-9 for a, b in itertools.pairwise(order))
    assert sum(moved) == pytest.approx(sum(wanted), abs=1e-6)
    if all(abs(a - b) >= gap + 1e-9 for i, a in enumerate(wanted) for b in wanted[:i]):
        assert moved == pytest.approx(wanted)
    if len(wanted) * gap <= 200:
        assert all(-100 - 1e-9 <= y <= 100 + 1e-9 for y in spread(wanted, gap, -100, 100))


def test_labels_by_hand() -> None:
    assert spread([0.0, 0.0], 1.0) == [-0.5, 0.5]
    assert spread([5.0, 0.0, 5.0, 5.0], 1.0) == [4.0, 0.0, 5.0, 6.0]
    assert spread([5.0, 5.0], 1.0, high=5.0) == [4.0, 5.0]


# -- files ----------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collects tags, attributes and ids, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_html_is_whole_offline_and_has_unique_ids() -> None:
    page = html_report(results())
    parsed = Tags(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    for key, value in parsed.attributes:
        assert key not in ("src", "srcset", "action")
        if key in ("href", "xlink:href"):
            assert value.startswith("#")
    ids = [value for key, value in parsed.attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 0
    references = {v[1:] for k, v in parsed.attributes if k == "xlink:href"}
    references |= {m for _, v in parsed.attributes for m in re.findall(r"url\(#([^)]*)\)", v)}
    assert references <= set(ids)
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_html_escapes_everything_it_is_given() -> None:
    data = results(title=NASTY, notes=[NASTY], claims=[NASTY], command=NASTY, environment={NASTY: NASTY})
    data["recipe"], data["task"]["model"] = {NASTY: NASTY}, NASTY
    for c in data["cells"]:
        c["method"] = c["method"] + NASTY
        c["layers"][0]["name"] = NASTY
        c["digest"] = NASTY
    text = html_report(data, {NASTY: NASTY})
    parsed = Tags(text)
    assert "script" not in parsed.tags
    assert "<script" not in text
    assert not any(key.startswith("on") for key, _ in parsed.attributes)


def test_timing_is_in_the_html_only_and_marked(tmp_path: Path) -> None:
    heading = "Timing on this machine (not part of the reproducible results)"
    plain = write(tmp_path / "a", results())
    timed = write(tmp_path / "b", results(), {"rigl": {"seconds": 1.23456}})
    assert plain["json"].read_bytes() == timed["json"].read_bytes()
    assert plain["md"].read_bytes() == timed["md"].read_bytes()
    assert heading in timed["html"].read_text()
    assert "1.23456" in timed["html"].read_text()
    assert heading not in plain["html"].read_text()


def test_written_twice_is_the_same_and_key_order_does_not_matter_for_json(tmp_path: Path) -> None:
    first = {kind: path.read_bytes() for kind, path in write(tmp_path, results()).items()}
    again = {kind: path.read_bytes() for kind, path in write(tmp_path, copy.deepcopy(results())).items()}
    assert first == again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    turned = dict(reversed(list(results().items())))
    assert write(tmp_path, turned)["json"].read_bytes() == first["json"]


def test_json_report_reads_back_with_null_for_nan(tmp_path: Path) -> None:
    data = results()
    data["cells"][0]["loss"] = math.nan
    data["cells"][1]["loss"] = -math.inf
    report = json.loads(write(tmp_path, data)["json"].read_text())
    assert report["cells"][0]["loss"] is None
    assert report["cells"][1]["loss"] is None
    assert report["summary"][1]["accuracy"]["mean"] == pytest.approx(0.965)
    assert report["summary"][0]["loss"] is None
    assert len(report["findings"]) == 3
    assert (
        write(tmp_path, {k: report[k] for k in data})["json"].read_text()
        == json.dumps(report, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    )


def test_markdown_report_fences_what_it_quotes() -> None:
    text = markdown_report(results(command="echo '```'", title="a # <b>"))
    assert text.startswith("# a \\# \\<b\\>\n")
    assert "````\necho '```'\n````" in text
    assert "## Weights kept per layer at 90 % sparsity" in text


def test_a_failure_leaves_the_old_report_whole(tmp_path: Path) -> None:
    write(tmp_path, results())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InvalidValue):
        write(tmp_path, results(recipe={"bad": {1, 2}}))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="could not make the folder"):
        write(tmp_path / "file" / "inner", results())
