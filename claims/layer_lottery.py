"""Removing whole residual blocks before training, against the whole network and against removing filters."""

from __future__ import annotations

from claims.bench import Bench, world
from claims.claim import Claim, Experiment
from claims.rules import Inside, NotBelow
from prunus.budget.select import keep_top
from prunus.data.balanced import balanced_batch
from prunus.masks import Masks
from prunus.parameters import prunable
from prunus.procedures.imp import rewound
from prunus.procedures.layer_lottery import layer_lottery
from prunus.run.stages import State
from prunus.scores.second_order import grasp
from prunus.stats import gather
from prunus.train.training import Training

SOURCE = "Jordao et al., When Layers Play the Lottery, all Tickets Win at Initialization, 2023"
REMOVED = 2


def without_filters(bench: Bench, count: int) -> State:
    """Remove `count` filters of convolutions at initialisation by the GraSP score of each, and train the rest."""
    x, y, _ = balanced_batch(bench.splits.train, 10, seed=bench.seed)
    model = bench.model
    addresses = {n: a for n, a in prunable(model).items() if a.kind == "conv"}
    evidence = gather(model, addresses, ("weight", "hessian_gradient"), data=[(x, y)], train=True)
    rows = {n: a.rows(grasp(**evidence[n])).sum(1) for n, a in addresses.items()}
    kept = keep_top(rows, sum(len(r) for r in rows.values()) - count)
    masks = Masks(
        {n: a.unrows(kept[n][:, None].expand(-1, a.size // a.outputs).contiguous()) for n, a in addresses.items()}
    )
    return bench.train("filters", start=rewound(bench.initial, masks, bench), masks=masks)


def tickets(bench: Bench) -> dict[str, float]:
    """Train whole, without two blocks by three scores, and without as many filters as these blocks have."""
    found = {"dense": bench.accuracy(bench.train("dense"))}
    for arm, score in (("GraSP", "grasp"), ("SNIP", "snip"), ("random", "random")):
        outcome = layer_lottery(bench.within(score), blocks=REMOVED, score=score)
        found[arm] = bench.accuracy(outcome.state)
        if arm == "GraSP":
            found["arithmetic"] = outcome.details["macs_share"]
            model = bench.model
            removed = [model.get_submodule(name) for name in outcome.details["removed"]]
            filters = sum(p.shape[0] for block in removed for p in block.parameters() if p.ndim == 4)
            found["filters"] = bench.accuracy(without_filters(bench, filters))
    rewound_ticket = layer_lottery(bench.within("rewound"), blocks=REMOVED, score="kl", when="trained", rewind_to="1ep")
    return found | {"KL, rewound": bench.accuracy(rewound_ticket.state)}


TICKETS = Experiment(
    name="layer-lottery",
    setup="4,000 images of Fashion-MNIST, ResNet-20 of 8 to 32 channels, 10 epochs at rate 0.1; two of seven removable "
    "blocks go before training, ten images per class are scored; KL: after training, weights rewound to one epoch",
    world=world("fashion-mnist", "resnet20", Training(epochs=10), limit=4000, model_options={"width": 8}),
    measure=tickets,
    cost=600,
    needs="fashion-mnist",
    seeds=3,
)

CLAIMS = [
    *(
        Claim(
            name=f"{arm}-layer-ticket-wins".lower(),
            method="layer-lottery",
            source=SOURCE,
            statement=f"Without two residual blocks chosen by {arm} at initialisation, ResNet-20 loses at most half a "
            "point (Fashion-MNIST).",
            experiment=TICKETS,
            rule=NotBelow(arm, "dense", 0.005),
        )
        for arm in ("GraSP", "SNIP", "random")
    ),
    Claim(
        name="rewound-layer-ticket-wins",
        method="layer-lottery",
        source=SOURCE,
        statement="Without the two blocks that change the trained network's answers least, rewound to the first epoch, "
        "ResNet-20 is at most half a point less accurate (Fashion-MNIST).",
        experiment=TICKETS,
        rule=NotBelow("KL, rewound", "dense", 0.005),
    ),
    Claim(
        name="layers-not-below-filters",
        method="layer-lottery",
        source=SOURCE,
        statement="Removing two blocks is no worse than removing as many filters by the same score (Fashion-MNIST).",
        experiment=TICKETS,
        rule=NotBelow("GraSP", "filters", 0.005),
    ),
    Claim(
        name="two-blocks-save-arithmetic",
        method="layer-lottery",
        source=SOURCE,
        statement="Two blocks of ResNet-20 are 23% of its arithmetic, wherever they are.",
        experiment=TICKETS,
        rule=Inside("arithmetic", 0.75, 0.79),
    ),
]
