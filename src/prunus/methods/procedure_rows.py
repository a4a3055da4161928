"""The rows of the table of methods that run whole trainings as stages. No import of torch here."""

from __future__ import annotations

from prunus.methods.info import MethodInfo


def _p(
    name: str,
    target: str,
    summary: str,
    *,
    when: str,
    source: str,
    note: str,
    aliases: tuple[str, ...] = (),
    unit: str = "weight",
    score: str = "magnitude",
    scope: str = "whole net, any budget",
    data: str = "none",
    retraining: str = "retrains",
    fusion: str = "any score, budget and training recipe",
) -> MethodInfo:
    """Make a row; masks on single weights need sparse kernels or hardware to be fast, so `speedup` is "specific"."""
    return MethodInfo(
        name=name,
        target=f"prunus.procedures.{target}",
        summary=summary,
        aliases=aliases,
        kind="procedure",
        unit=unit,
        when=when,
        score=score,
        scope=scope,
        data=data,
        retraining=retraining,
        fusion=fusion,
        speedup="specific",
        source=source,
        note=note,
    )


_AFTER = "after training"
_INIT = "at initialisation"
_UNITS = "weight, row, block, N:M"

PROCEDURES: tuple[MethodInfo, ...] = (
    _p(
        "one-shot",
        "oneshot:oneshot",
        "train dense, prune once, retrain",
        aliases=("oneshot", "magnitude"),
        when=_AFTER,
        unit=_UNITS,
        score="magnitude (any score)",
        data="none, or what score and budget need",
        fusion="any score, unit, budget and retraining schedule",
        source="Han et al., NeurIPS 2015; retraining after Renda et al., ICLR 2020, and Zimmer et al., ICLR 2023",
        note="one cut instead of the rounds of Han et al.",
    ),
    _p(
        "lth-imp",
        "imp:imp",
        "iterative magnitude pruning with weight, late or learning-rate rewinding or fine-tuning, and its controls",
        aliases=("imp",),
        when="after training, in rounds",
        score="magnitude (any score)",
        data="none, or what score and budget need",
        retraining="retrains from rewound weights, retrains, or fine-tunes",
        source="Frankle & Carbin, ICLR 2019; Frankle et al., 2019 (arXiv 1903.01611); Renda et al., ICLR 2020",
        note="exact counts where the reference code drops one more weight per round; equal rounds end on the target; "
        "rewinding points of the papers are unverified, so `rewind_to` has no default but 0",
    ),
    _p(
        "snip",
        "at_init:snip",
        "prune the untrained network by connection sensitivity, then train",
        when=_INIT,
        unit=_UNITS,
        score="|w dL/dw|",
        data="labelled batch",
        retraining="trains sparse",
        fusion="any budget, sanity-check controls",
        source="Lee et al., ICLR 2019",
        note="scores ten examples per class",
    ),
    _p(
        "grasp",
        "at_init:grasp",
        "prune the untrained network so that gradient flow is preserved, then train",
        when=_INIT,
        unit=_UNITS,
        score="w (H g)",
        data="labelled batch",
        retraining="trains sparse",
        fusion="any budget for non-negative or signed scores, sanity-check controls",
        source="Wang et al., ICLR 2020",
        note="scores ten examples per class, with the logits divided by 200 as in the authors' code",
    ),
    _p(
        "synflow",
        "at_init:synflow",
        "prune the untrained network by synaptic flow in 100 rounds, then train",
        when=_INIT,
        unit=_UNITS,
        score="|w| dR/d|w|",
        data="shape of one input",
        retraining="trains sparse",
        fusion="any budget, sanity-check controls",
        source="Tanaka et al., NeurIPS 2020",
        note="products of weights are taken in float64",
    ),
    _p(
        "pai-baselines",
        "at_init:at_init",
        "pruning at initialisation by any score, with the controls shuffle-layers, shuffle-all and reinit",
        when=_INIT,
        unit=_UNITS,
        score="any score",
        data="none, or what score and budget need",
        retraining="trains sparse",
        fusion="any score, unit and budget; ratios of one score with positions of another",
        source="Frankle et al., ICLR 2021; Su et al., NeurIPS 2020",
        note="fresh weights of 'reinit' come from another seed of the same initialiser",
    ),
    _p(
        "sparse-model-soups",
        "soups:soups",
        "prune, retrain several copies under one mask, average them, and go on from the average",
        aliases=("sms",),
        when="after training, in phases",
        score="magnitude (any score)",
        data="none; validation examples for greedy soups, training inputs for BatchNorm",
        fusion="any score, budget and retraining schedule",
        source="Zimmer, Spiegel & Pokutta, ICLR 2024",
        note="ranges of weight decay and retraining length are choices of ours (half to twice); the paper's are "
        "unverified. BatchNorm examples are every n-th of the training set, not its first part; a soup of one member "
        "keeps its own statistics",
    ),
    _p(
        "rethinking-pruning",
        "rethinking:rethinking",
        "fine-tuning against training the same masks from scratch for equal epochs or equal arithmetic",
        aliases=("scratch",),
        when=_AFTER,
        score="magnitude (any score)",
        retraining="fine-tunes, or trains sparse from new weights",
        fusion="any score and budget; an evaluation protocol",
        source="Liu et al., ICLR 2019",
        note="single weights only; counts arithmetic under the masks, which the reference script for CIFAR misses; the "
        "sparse-fan initialisation is used for linear layers too, where the authors prune convolutions alone; last "
        "weights instead of the best on test data",
    ),
    _p(
        "three-regime",
        "three_regime:three_regime",
        "prune dense networks of several temperatures, retrain in pairs, and advise from connectivity and CKA",
        when=_AFTER,
        score="magnitude (any score)",
        scope="layer, any budget",
        data="training examples for diagnoses",
        fusion="any score and budget; SAM as a knob of the dense training",
        source="Zhou et al., ICML 2023",
        note="borders of the regimes are phenomenological: -0.05 in connectivity and the median CKA of connected "
        "networks (0.95 for a single one) are choices of ours; no sharpness of the Hessian",
    ),
    _p(
        "activating-while-pruning",
        "activating:ap",
        "rounds of pruning that spend a small share on negative weights that hardly moved, against dead units",
        aliases=("ap",),
        when="after training, in rounds",
        score="magnitude, then movement of negative weights",
        retraining="retrains from rewound weights, retrains, or fine-tunes",
        fusion="any base score and budget, the rewinding modes of lth-imp",
        source="Liu et al., TMLR 2023",
        note="written from the released script; variants and ablations of the paper are not covered. The output layer "
        "is spared by default (our choice), vectors are not pruned, one training per round, and the base pruner "
        "takes what too few negative weights leave",
    ),
    _p(
        "rnn-sparsity",
        "rnn:rnn_sparsity",
        "prune input-hidden, hidden-hidden or both gate matrices of recurrent layers by one threshold, then retrain",
        when=_AFTER,
        scope="targeted matrices of all layers together",
        retraining="retrains",
        fusion="any recurrent model and retraining schedule; random-graph-rnn for sparse structure",
        source="Darji, master's thesis, University of Passau, 2024 (arXiv 2407.20601, identifier not verified)",
        note="masks cover the targeted matrices alone; exact counts instead of a percentile; retraining schedule LLR "
        "where the thesis keeps Adam's constant rate (retrain='FT' under a constant schedule gives that)",
    ),
    _p(
        "rd-layer-adaptive",
        "rate_distortion:rd",
        "layer sparsities of least summed output distortion, at once or in rounds, on inputs or on noise",
        aliases=("rd",),
        when="after training, at once or in rounds",
        scope="layer, exact dynamic program",
        data="calibration inputs, or none (noise)",
        retraining="fine-tunes",
        fusion="any retraining schedule",
        source="Xu et al., ICCV 2023 (arXiv 2308.10438, identifier not verified)",
        note="the dynamic program is derived anew: the reference code's base cases are not optimal; mean distortion "
        "only, without its worst-case variant; no budget of multiply-accumulates",
    ),
)
