"""Widths before and after a structured cut as SVG text: one bar per family of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunus.report.plots import BAND, PALETTE, _figure, _shorten, _svg

MOST = 60  # bars that stay readable; the narrowest families are left out and counted


def widths_plot(families: Sequence[Mapping[str, Any]]) -> str | None:
    """Return kept units over all units of every family as SVG, in network order; None without families.

    Args:
        families: name, size and kept of each, as in `StructuredReport.families`.
    """
    if not families:
        return None
    shown = list(families)
    if len(shown) > MOST:
        widest = sorted(range(len(shown)), key=lambda i: (-shown[i]["size"], i))[:MOST]
        shown = [shown[i] for i in sorted(widest)]
    left = len(families) - len(shown)
    with _figure("widths", 7.2, 1.2 + 0.22 * len(shown)) as (figure, axes):
        places = range(len(shown))
        axes.barh(places, [f["size"] for f in shown], color=BAND, alpha=0.35, height=0.75, label="before")
        axes.barh(places, [f["kept"] for f in shown], color=PALETTE[0], height=0.75, label="after")
        for place, family in zip(places, shown, strict=True):
            axes.annotate(
                f"{family['kept']:,} of {family['size']:,}",
                (family["size"], place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(places, [_shorten(str(f["name"])) for f in shown], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.16, y=0.01)
        axes.set_xlabel("units" + (f" ({left} narrower families are not shown)" if left else ""))
        axes.grid(axis="x")
        axes.legend(loc="lower right", frameon=False, fontsize=8)
        return _svg(figure, "widths", "Units before and after the cut, by family")
