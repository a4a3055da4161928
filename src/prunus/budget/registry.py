"""The table of budgets. No import of torch here."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.catalog import Catalog, Entry


@dataclass(frozen=True, kw_only=True)
class BudgetInfo(Entry):
    """One budget: who competes with whom, what it needs, where it comes from."""

    scope: str
    needs: str
    source: str


def _b(
    name: str, attribute: str, scope: str, summary: str, source: str, needs: str = "scores", room: str = "budgets"
) -> BudgetInfo:
    return BudgetInfo(
        name=name, target=f"prunus.budget.{room}:{attribute}", scope=scope, summary=summary, source=source, needs=needs
    )


BUDGETS: Catalog[BudgetInfo] = Catalog(
    "budget",
    [
        _b(
            "global",
            "Global",
            "whole net",
            "one ranking over all tensors, optional minimum per tensor",
            "Gupta et al., 2022",
        ),
        _b("uniform", "Uniform", "layer", "the same density in every tensor", "Zhu & Gupta, 2018"),
        _b("uniform-plus", "UniformPlus", "layer", "first tensor dense, last at least 20 %", "Gale et al., 2019"),
        _b(
            "uniform-floor",
            "UniformFloor",
            "layer",
            "uniform, last tensor never below 20 %",
            "Liu et al., NeurIPS 2021",
        ),
        _b("er", "ER", "layer", "Erdos-Renyi densities from outputs and inputs", "Mocanu et al., 2018"),
        _b("erk", "ERK", "layer", "Erdos-Renyi densities with kernel dims", "Evci et al., ICML 2020"),
        _b("erk-plus", "ERKPlus", "layer", "ERK with the last tensor fixed", "Liu et al., ICLR 2022"),
        _b("smart-ratio", "SmartRatio", "layer", "densities falling towards the output", "Su et al., NeurIPS 2020"),
        _b(
            "lamp",
            "LAMP",
            "whole net",
            "one ranking of scores normalised by their layer's tail",
            "Lee et al., ICLR 2021",
        ),
        _b("like", "Like", "layer", "layer ratios taken from another score", "Liu et al., ICLR 2022", "another score"),
        _b("row-wise", "RowWise", "row", "weights compete inside their output row", "Sun et al., ICLR 2024"),
        _b("family", "Family", "module family", "a budget of its own for each module family", "Darji, 2024"),
        _b(
            "rate-distortion",
            "RateDistortion",
            "layer",
            "least summed output distortion, exact dynamic program",
            "Xu et al., ICCV 2023",
            "scores, calibration inputs",
            "rate_distortion",
        ),
        _b(
            "synexp",
            "SynExp",
            "layer",
            "largest expected synaptic flow: as many weights in every tensor, small ones dense",
            "Cai et al., 2022",
            room="synexp",
        ),
    ],
)
