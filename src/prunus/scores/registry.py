"""The table of scores. No import of torch here. The needs of a score are the parameter names of its function."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.catalog import Catalog, Entry


@dataclass(frozen=True, kw_only=True)
class ScoreInfo(Entry):
    """One score.

    Attributes:
        needs: evidence it takes, by the names `prunus.stats` gathers.
        data: "none", "inputs", "labelled" or "example" (one input, for its shape).
        rounds: scoring rounds the method's authors use; density falls exponentially over them.
        non_negative: whether all values are >= 0 (LAMP needs that).
        units: what it ranks; scores of single weights rank every unit, pooled over what belongs to one.
        source: where it comes from.
    """

    needs: tuple[str, ...]
    data: str
    source: str
    rounds: int = 1
    non_negative: bool = True
    units: tuple[str, ...] = ("any",)


def _s(name: str, target: str, needs: str, data: str, summary: str, source: str, **more: object) -> ScoreInfo:
    return ScoreInfo(
        name=name,
        target=f"prunus.scores.{target}",
        needs=tuple(needs.split()),
        data=data,
        summary=summary,
        source=source,
        **more,  # type: ignore[arg-type]
    )


SCORES: Catalog[ScoreInfo] = Catalog(
    "score",
    [
        _s("magnitude", "magnitude:magnitude", "weight", "none", "|w|", "Han et al., NeurIPS 2015", aliases=("l1",)),
        _s(
            "magnitude-squared",
            "magnitude:magnitude_squared",
            "weight",
            "none",
            "w^2",
            "Han et al., NeurIPS 2015",
            aliases=("l2",),
        ),
        _s("random", "magnitude:random", "noise", "none", "uniform noise", "baseline"),
        _s("snip", "gradient:snip", "weight gradient", "labelled", "|w dL/dw|", "Lee et al., ICLR 2019"),
        _s(
            "snip-iterative",
            "gradient:snip",
            "weight gradient",
            "labelled",
            "|w dL/dw| over many rounds",
            "de Jorge et al., ICLR 2021; Verdenius et al., 2020",
            rounds=100,
        ),
        _s(
            "grasp",
            "second_order:grasp",
            "weight hessian_gradient",
            "labelled",
            "w (H g), gradient flow",
            "Wang et al., ICLR 2020",
            non_negative=False,
        ),
        _s(
            "synflow",
            "path:synflow",
            "weight flow_gradient",
            "example",
            "|w| dR/d|w|, path products",
            "Tanaka et al., NeurIPS 2020",
            rounds=100,
        ),
        _s("taylor", "gradient:taylor", "weight gradient", "labelled", "|w dL/dw|", "Molchanov et al., CVPR 2019"),
        _s(
            "taylor-squared",
            "gradient:taylor_squared",
            "weight gradient",
            "labelled",
            "(w dL/dw)^2",
            "Molchanov et al., CVPR 2019",
        ),
        _s(
            "fisher",
            "second_order:fisher",
            "weight squared_gradient",
            "labelled",
            "w^2 E[g^2] / 2, diagonal Fisher",
            "LeCun et al., 1990; Theis et al., 2018",
        ),
        _s("wanda", "activation:wanda", "weight input_norm", "inputs", "|w| ||x||", "Sun et al., ICLR 2024"),
        _s(
            "movement",
            "gradient:movement",
            "movement",
            "labelled",
            "-sum of w dL/dw over steps",
            "Sanh et al., NeurIPS 2020",
            non_negative=False,
        ),
        _s("gradient", "gradient:gradient_magnitude", "gradient", "labelled", "|dL/dw|", "Evci et al., ICML 2020"),
    ],
)
