"""Channels that are pushed out or starve while training goes on: MaskSparsity, group norms, Chase."""

from __future__ import annotations

import torch

from claims.bench import Bench, world
from claims.claim import Claim, Experiment
from claims.rules import Above, Exactly, Inside, NotBelow, Ordered
from prunus.budget.select import keep_best
from prunus.graph.plan import Plan
from prunus.masks import Masks
from prunus.methods.chase import channel_scores, origin_of
from prunus.methods.mask_sparsity import MaskSparsity, agreed, scale_masks
from prunus.procedures.chase import chase, weights_of
from prunus.procedures.common import cut, dense, shorter
from prunus.procedures.cutting import coupling_of, cut_state
from prunus.procedures.group_norm import group_norm
from prunus.procedures.mask_sparsity import scaled_families, scales_of
from prunus.run.stages import State
from prunus.scores.channel import channel_density
from prunus.train.training import Training

MASK_SPARSITY = "Jiang et al., Pruning-aware Sparse Regularization for Network Pruning, 2022"
DEPGRAPH = "Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023"
CHASE = "Yin et al., Dynamic Sparsity Is Channel-Level Sparsity Learner, NeurIPS 2023"
STRENGTH = 0.02  # a few hundred steps take the place of the paper's half a million, so the pull is stronger


def victims_alone(bench: Bench) -> dict[str, float]:
    """Train three epochs on with three penalties, then make the same cut of half the channels."""
    trained = dense(bench)
    coupling = coupling_of(bench, trained)
    families = tuple(scaled_families(coupling))
    search = bench.train("search", start=trained, method=MaskSparsity(strength=STRENGTH))
    keep = scale_masks(scales_of(list(families), search), "ratio", ratio=0.5)
    plan = Plan.from_keep(coupling, agreed(keep, families))
    ends = {
        "victims": bench.train("victims", start=trained, method=MaskSparsity(strength=STRENGTH, keep=keep)),
        "all scales": search,
        "no penalty": bench.train("plain", start=trained),
    }
    found = {}
    for arm, state in ends.items():
        state = State.of(state.weights)
        found[f"{arm}, before"] = bench.accuracy(state)
        found[arm] = bench.accuracy(cut_state(bench, state, plan))
        kept = torch.cat([state.weights[n][k].abs() for n, k in keep.items()])
        found[f"{arm}, kept scales"] = float(kept.mean())
    return found


def regularised_groups(bench: Bench) -> dict[str, float]:
    """Train on with and without the group norm, then cut to 40% of the arithmetic; compare before any tuning."""
    found = {}
    for arm, strength in (("group norm", 0.01), ("no penalty", 0.0)):
        inner = bench.within(arm.replace(" ", "-"))
        outcome = group_norm(inner, sparsity=0.6, strength=strength, dense_epochs=10, epochs=10, tune_epochs=5)
        pushed = State.of(bench.trained[f"{arm.replace(' ', '-')}/sparse"].weights)
        assert outcome.state.shape is not None
        found[arm] = bench.accuracy(cut_state(bench, pushed, outcome.state.shape.plan))  # type: ignore[attr-defined]
        found[f"{arm}, tuned"] = bench.accuracy(outcome.state)
    return found


def starving(bench: Bench) -> dict[str, float]:
    """Train sparse with and without removal of channels; cut a dense network to the same widths and weights."""
    choices = {"sparsity": 0.9, "every": "20ba", "channel_every": "1ep"}
    narrow = chase(bench.within("narrow"), channel_sparsity=0.4, **choices)  # type: ignore[arg-type]
    wide = chase(bench.within("wide"), channel_sparsity=0.0, **choices)  # type: ignore[arg-type]
    assert wide.state.masks is not None
    assert narrow.state.masks is not None
    small = _by_magnitude(bench, narrow.details["channels_kept"])
    kept = narrow.details["kept"]
    masks = cut(bench, "one-shot/masks", small, 1 - kept / narrow.details["room"])
    tuned = bench.train(
        "one-shot/tuned", start=small, masks=masks, training=shorter(bench.training, 4, lr=bench.training.lr / 2)
    )
    density = [channel_density(wide.state.masks[n.rpartition(":")[0]]) for n in narrow.details["channels"]]
    starved = torch.cat([d < d.mean() / 2 for d in density])
    return {
        "narrow": bench.accuracy(narrow.state),
        "wide": bench.accuracy(wide.state),
        "one-shot": bench.accuracy(tuned),
        "starved channels": float(starved.float().mean()),
        "weights that differ": float(abs(narrow.state.masks.kept - wide.state.masks.kept) + abs(masks.kept - kept)),
    }


def _by_magnitude(bench: Bench, channels: dict[str, int]) -> State:
    """Return a dense network trained for eight epochs without its channels of least magnitude."""
    trained = dense(bench, shorter(bench.training, 8))
    coupling = coupling_of(bench, trained)
    weights = weights_of(bench, trained)
    whole = Masks({n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()})
    keep = {}
    for name, count in channels.items():
        family = coupling[name]
        score = channel_scores(family, weights, whole, origin_of([family], weights)[name])
        keep[name] = keep_best(score, count)
    return cut_state(bench, trained, Plan.from_keep(coupling, keep))


VICTIMS = Experiment(
    name="penalised-victims",
    setup="3,000 images of Fashion-MNIST, ResNet-20 with 8 to 32 channels, 3 epochs at rate 0.1; then 3 more with a "
    f"penalty of {STRENGTH} on no scale, on all, or on the half that a search with a penalty on all gives up; then the "
    "same cut for all (residual stages vote), judged without tuning",
    world=world("fashion-mnist", "resnet20", Training(epochs=3), limit=3000, model_options={"width": 8}),
    measure=victims_alone,
    cost=150,
    needs="fashion-mnist",
    seeds=3,
)
GROUPS = Experiment(
    name="penalised-groups",
    setup="digits, six convolutions of 8 to 32 channels with batch norm, 10 epochs at rate 0.1, 10 more with a group "
    "norm of 0.01 or without, then the units of least norm go until 40% of the arithmetic is left; judged before and "
    "after 5 epochs of tuning",
    world=world("digits", "vgg-small", Training(epochs=25), model_options={"width": 8}),
    measure=regularised_groups,
    cost=25,
)
STARVING = Experiment(
    name="starving-channels",
    setup="4,000 images of Fashion-MNIST, six convolutions of 16 to 64 channels with batch norm, 12 epochs at rate "
    "0.1, 10% of the weights, 40% of the channels removed in 10 cuts or none; one-shot: 8 epochs dense, one cut by "
    "magnitude to the same widths and the same number of weights, 4 epochs at half the rate",
    world=world("fashion-mnist", "vgg-small", Training(epochs=12), limit=4000, model_options={"width": 16}),
    measure=starving,
    cost=260,
    needs="fashion-mnist",
    seeds=3,
)

CLAIMS = [
    Claim(
        name="mask-sparsity-survives-the-cut",
        method="mask-sparsity",
        source=MASK_SPARSITY,
        statement="Right after the same cut a penalty on its victims leaves more accuracy than one on all scales, and "
        "that more than none.",
        experiment=VICTIMS,
        rule=Ordered(("victims", "all scales", "no penalty")),
    ),
    Claim(
        name="mask-sparsity-spares-what-stays",
        method="mask-sparsity",
        source=MASK_SPARSITY,
        statement="Scales of channels that stay are not smaller than after training without any penalty.",
        experiment=VICTIMS,
        rule=NotBelow("victims, kept scales", "no penalty, kept scales", 0.02),
        unit="number",
    ),
    Claim(
        name="slimming-shrinks-what-stays",
        method="mask-sparsity",
        source=MASK_SPARSITY,
        statement="A penalty on all scales also shrinks those of channels that stay.",
        experiment=VICTIMS,
        rule=Above("no penalty, kept scales", "all scales, kept scales"),
        unit="number",
    ),
    Claim(
        name="group-norm-survives-the-cut",
        method="group-norm",
        source=DEPGRAPH,
        statement="Right after a cut to 40% of the arithmetic, training under the group norm leaves more accuracy.",
        experiment=GROUPS,
        rule=Above("group norm", "no penalty"),
    ),
    Claim(
        name="group-norm-helps-tuning",
        method="group-norm",
        source=DEPGRAPH,
        statement="After tuning the regularised network is not worse than the one cut without the group norm.",
        experiment=GROUPS,
        rule=NotBelow("group norm, tuned", "no penalty, tuned", 0.005),
    ),
    Claim(
        name="chase-keeps-up-with-all-channels",
        method="chase",
        source=CHASE,
        statement="Without 40% of its channels, at the same number of weights, the network is at most a point worse.",
        experiment=STARVING,
        rule=NotBelow("narrow", "wide", 0.01),
    ),
    Claim(
        name="chase-beats-one-shot",
        method="chase",
        source=CHASE,
        statement="Removing channels on the way beats one cut by magnitude to the same widths and number of weights.",
        experiment=STARVING,
        rule=Above("narrow", "one-shot"),
    ),
    Claim(
        name="chase-channels-starve",
        method="soft-bound-dst",
        source=CHASE,
        statement="Sparse training starves channels by itself: over a tenth end below half of their layer's density.",
        experiment=STARVING,
        rule=Inside("starved channels", 0.1, 1.0),
    ),
    Claim(
        name="chase-weights-stay",
        method="chase",
        source=CHASE,
        statement="The number of weights does not depend on how many channels go.",
        experiment=STARVING,
        rule=Exactly("weights that differ", 0.0),
        unit="count",
    ),
]
