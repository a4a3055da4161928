"""The table of scores of whole units. No import of torch here. Needs are the parameter names of a score's function."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.catalog import Catalog, Entry
from prunus.scores.registry import SCORES


@dataclass(frozen=True, kw_only=True)
class UnitScoreInfo(Entry):
    """One score that looks at whole units instead of adding up scores of single weights.

    Attributes:
        units: units that it ranks ("channel", "head", "layer", "expert").
        needs: what its function takes: "family" (then it is called once per family), "tensors" (the model's, by name),
            "scales" (scales of norms, by name), or "model", "coupling", "families", "data", "example", "seed" for
            functions that score all families at once; "feature..." for scores of blocks (`structured.layers`).
        data: "none", "inputs" or "labelled".
        fallback: whether families that it says nothing about are ranked by magnitude.
        source: where it comes from.
    """

    units: tuple[str, ...]
    needs: tuple[str, ...]
    data: str
    source: str
    fallback: bool = False


def _u(
    name: str, target: str, units: str, needs: str, data: str, summary: str, source: str, **more: object
) -> UnitScoreInfo:
    return UnitScoreInfo(
        name=name,
        target=f"prunus.structured.{target}",
        units=tuple(units.split()),
        needs=tuple(needs.split()),
        data=data,
        summary=summary,
        source=source,
        **more,  # type: ignore[arg-type]
    )


UNIT_SCORES: Catalog[UnitScoreInfo] = Catalog(
    "score of units",
    [
        _u(
            "bn-scale",
            "unit_scores:bn_scale",
            "channel head",
            "family scales",
            "none",
            "|gamma| of the norms behind a unit",
            "Liu et al., ICCV 2017 (network slimming)",
            fallback=True,
        ),
        _u(
            "fpgm",
            "unit_scores:fpgm",
            "channel head expert",
            "family tensors",
            "none",
            "distance to the other filters: what lies in the middle is replaceable",
            "He et al., CVPR 2019",
            fallback=True,
        ),
        _u(
            "lamp-normalised",
            "unit_scores:lamp_normalised",
            "channel head expert",
            "family tensors",
            "none",
            "norms of slices, each tensor's by LAMP before they are averaged",
            "Lee et al., ICLR 2021, carried over to units",
            fallback=True,
        ),
        _u(
            "obspa",
            "unit_scores:obspa",
            "channel head",
            "model coupling families data example seed",
            "inputs",
            "output error of the readers once their other inputs have made up for a unit; noise without data",
            "Wang et al., arXiv 2403.18955, 2024",
            fallback=True,
        ),
        _u(
            "expect-abs",
            "layers:mean_activity",
            "layer",
            "feature",
            "inputs",
            "mean |activation| of a block's output",
            "Jordao et al., arXiv 2301.10835, 2023",
        ),
        _u(
            "hrank",
            "layers:feature_rank",
            "layer",
            "feature",
            "inputs",
            "mean rank of a block's feature maps",
            "Lin et al., CVPR 2020",
        ),
        _u(
            "kl",
            "layers:divergence",
            "layer",
            "reference changed",
            "inputs",
            "how far the class distribution moves without a block",
            "Jordao et al., arXiv 2301.10835, 2023",
        ),
        _u(
            "pls",
            "layers:variable_importance",
            "layer",
            "features labels components",
            "labelled",
            "importance of a block's features in a partial-least-squares projection",
            "Jordao et al., arXiv 2301.10835, 2023",
        ),
    ],
)

# Everything that `prunus.prune(score=...)` knows, for listings and for suggestions after a misspelling.
EVERY_SCORE: Catalog[Entry] = Catalog("score", [*SCORES, *UNIT_SCORES])
