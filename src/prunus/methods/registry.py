"""The table of methods. No import of torch here.

Every column is filled for every method; the shared suites are generated from this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunus.catalog import Catalog, Entry


@dataclass(frozen=True, kw_only=True)
class MethodInfo(Entry):
    """One method, on the axes of the pruning literature.

    Attributes:
        kind: "step" (attaches to any training loop) or "procedure" (runs whole trainings as stages).
        unit: what goes: "weight", "N:M", ...
        when: "at initialisation", "during training", "after training", or combinations.
        score: what ranks.
        scope: who competes.
        data: what it needs beyond the training loop: "none", "labelled batch", "calibration inputs".
        retraining: whether training goes on after pruning: "trains sparse", "fine-tunes", "retrains", "no".
        fusion: what it combines with.
        speedup: "specific" (needs sparse kernels or hardware) or "universal".
        source: where it comes from.
        note: what deviates from the source, or is not verified there.
    """

    kind: str
    unit: str
    when: str
    score: str
    scope: str
    data: str
    retraining: str
    fusion: str
    speedup: str
    source: str
    note: str


_DURING = "during training"

METHODS: Catalog[MethodInfo] = Catalog(
    "method",
    [
        MethodInfo(
            name="random-pruning",
            aliases=("static", "random"),
            target="prunus.methods.static:Static",
            summary="fixed random mask with ERK, uniform or other layer ratios, trained from scratch",
            unit="weight, row, block, N:M",
            when="at initialisation",
            score="random (any loop score)",
            scope="ERK by default, any budget",
            data="none",
            retraining="trains sparse",
            fusion="any training recipe",
            source="Liu et al., ICLR 2022",
            note="exact counts where the reference code draws each entry independently",
            kind="step",
            speedup="specific",
        ),
        MethodInfo(
            name="gmp-cubic",
            aliases=("gmp", "gradual"),
            target="prunus.methods.gmp:GMP",
            summary="gradual magnitude pruning with the cubic ramp",
            unit="weight, row, block",
            when=_DURING,
            score="magnitude (any loop score)",
            scope="layer by default, any budget",
            data="none",
            retraining="trains on while pruning",
            fusion="any budget, any schedule curve",
            source="Zhu & Gupta, ICLR workshop 2018",
            note="nested masks; the TensorFlow code lets masked weights return",
            kind="step",
            speedup="specific",
        ),
        MethodInfo(
            name="global-mp",
            target="prunus.methods.global_mp:GlobalMP",
            summary="one magnitude threshold for the net with a minimum per layer",
            unit="weight",
            when="after training or during training",
            score="magnitude",
            scope="whole net with floor",
            data="none",
            retraining="fine-tunes",
            fusion="gradual ramp",
            source="Gupta et al., 2022 (arXiv 2209.14624, identifier not verified)",
            note="the floor is met exactly, without the reference code's rescaling loop",
            kind="step",
            speedup="specific",
        ),
        MethodInfo(
            name="lamp",
            target="prunus.methods.lamp:LAMPPruning",
            summary="global ranking of magnitudes normalised by their layer's tail",
            unit="weight",
            when="after training or during training",
            score="LAMP-normalised magnitude",
            scope="whole net",
            data="none",
            retraining="fine-tunes",
            fusion="gradual ramp, iterative rounds",
            source="Lee et al., ICLR 2021",
            note="none",
            kind="step",
            speedup="specific",
        ),
        MethodInfo(
            name="set",
            target="prunus.methods.set:SET",
            summary="sparse evolutionary training: drop small weights, grow random ones",
            unit="weight",
            when="from initialisation, during training",
            score="magnitude drop, random growth",
            scope="layer, ERK start",
            data="none",
            retraining="trains sparse",
            fusion="any optimizer",
            source="Mocanu et al., Nature Communications 2018",
            note="exact growth counts",
            kind="step",
            speedup="specific",
        ),
        MethodInfo(
            name="rigl",
            target="prunus.methods.rigl:RigL",
            summary="drop small weights, grow where the dense gradient is largest",
            unit="weight",
            when="from initialisation, during training",
            score="magnitude drop, gradient growth",
            scope="layer, ERK start",
            data="none",
            retraining="trains sparse",
            fusion="any optimizer",
            source="Evci et al., ICML 2020",
            note="the exchange follows the optimizer step instead of replacing it",
            kind="step",
            speedup="specific",
        ),
        MethodInfo(
            name="itop",
            target="prunus.methods.itop:ITOP",
            summary="RigL or SET that explores to the end; reports the exploration rate",
            unit="weight",
            when="from initialisation, during training",
            score="magnitude drop, gradient or random growth",
            scope="layer, ERK start",
            data="none",
            retraining="trains sparse",
            fusion="any optimizer",
            source="Liu et al., ICML 2021",
            note="intervals as shares of training; the paper's are 4,000 and 1,500 of 97,700 steps",
            kind="step",
            speedup="specific",
        ),
        MethodInfo(
            name="granet",
            target="prunus.methods.granet:GraNet",
            summary="global cubic ramp plus regrowth at every pruning step, from dense or half-sparse",
            unit="weight",
            when="from initialisation, during training",
            score="magnitude drop, gradient growth",
            scope="whole net ramp, layer exchange",
            data="none",
            retraining="trains sparse",
            fusion="LAMP or floor in the ramp",
            source="Liu et al., NeurIPS 2021",
            note="meets the target exactly where the reference code stops early; ImageNet figures unverified",
            kind="step",
            speedup="specific",
        ),
        MethodInfo(
            name="iss-p",
            target="prunus.methods.iss_p:ISSP",
            summary="unimportant weights shrink by a factor each step and may return; cut at the end of the search",
            unit="weight, N:M",
            when=_DURING,
            score="magnitude",
            scope="layer",
            data="none",
            retraining="fine-tunes",
            fusion="N:M patterns",
            source="Wang et al., ICCV 2023",
            note="length of the search is a choice; in the reference code it follows from a penalty counter",
            kind="step",
            speedup="specific",
        ),
        MethodInfo(
            name="nm-sparsity",
            aliases=("sr-ste", "srste"),
            target="prunus.methods.sr_ste:SRSTE",
            summary="N:M training from scratch with a sparse-refined straight-through estimator",
            unit="N:M",
            when=_DURING,
            score="magnitude",
            scope="group of M inputs",
            data="none",
            retraining="trains sparse",
            fusion="any optimizer",
            source="Zhou et al., ICLR 2021",
            note="groups run along input channels (channels last); dense weights stay beside the model",
            kind="step",
            speedup="specific",
        ),
    ],
)
