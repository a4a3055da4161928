"""Structural tickets: whole channels and dense blocks made of the masks of iterative pruning, on Fashion-MNIST."""

from __future__ import annotations

from typing import Any

from claims.bench import Bench, world
from claims.claim import Claim, Experiment
from claims.rules import Above, Every, NotBelow
from prunus.masks import Masks
from prunus.procedures.imp import dense_by_way_of, rewound
from prunus.procedures.structure_lth import structure_lth, targets
from prunus.structured.refill import channel_budget, weight_scores, whole_rows
from prunus.train.training import Training

SOURCE = "Chen et al., Coarsening the Granularity, ICML 2022"
KEPT = 0.36
REWIND = "0.05dur"


def structural(bench: Bench) -> dict[str, float]:
    """Prune to 36% in three rounds; train dense blocks, and as many whole channels per layer, and their controls."""
    tickets = bench.within("tickets")
    early, dense, moment = dense_by_way_of(tickets, bench.training, REWIND)
    common: dict[str, Any] = {"sparsity": 1 - KEPT, "rate": 0.3, "rewind_to": REWIND}
    blocks = structure_lth(tickets, **common, conversion="regroup")
    regrouped = blocks.state.masks
    # Channels of the last unstructured ticket, by the L1 norm of what it keeps; as many as the blocks would fill.
    ticket = bench.trained[f"{tickets.name_prefix}round-{len(blocks.details['rounds'])}"]
    assert regrouped is not None
    assert ticket.masks is not None
    addresses = targets(bench)
    scores = weight_scores(ticket.masks, ticket.weights, addresses)
    channels = {}
    for name, address in addresses.items():
        rows = address.rows(regrouped[name])
        channels[name] = address.unrows(whole_rows(scores[name], channel_budget(rows), rows.shape[1]))
    refilled = Masks(channels)
    states = {
        "dense": dense,
        "ticket": ticket,
        "regroup": blocks.state,
        "refill": tickets.train(
            "refill-alike",
            start=rewound(early, refilled, bench),
            masks=refilled,
            start_step=moment,
            continue_optimizer=moment > 0,
        ),
        "random": structure_lth(tickets, **common, conversion="regroup", branch="random").state,
        "regroup reinit": structure_lth(tickets, **common, conversion="regroup", branch="reinit").state,
    }
    found = {arm: bench.accuracy(state) for arm, state in states.items()}
    return found | {"kept by regroup": regrouped.density, "kept by refill": refilled.density}


STRUCTURAL = Experiment(
    name="structural-tickets",
    setup="1,000 images of Fashion-MNIST, six convolutions of 8 to 32 channels, 8 epochs at rate 0.05; three rounds to "
    "36% of all convolutions but the first, rewound to 5% of the training; blocks by the default rules, and per layer "
    "as many whole channels as they would fill, rounded up",
    world=world("fashion-mnist", "vgg-small", Training(epochs=8, lr=0.05), limit=1000, model_options={"width": 8}),
    measure=structural,
    cost=70,
    needs="fashion-mnist",
    seeds=3,
)

CLAIMS = [
    Claim(
        name="regroup-not-below-refill",
        method="structure-lth",
        source=SOURCE,
        statement="At equal density per layer, 36% in all, dense blocks are as accurate as whole channels.",
        experiment=STRUCTURAL,
        rule=NotBelow("regroup", "refill", 0.01),
    ),
    Claim(
        name="structural-tickets-beat-random-channels",
        method="structure-lth",
        source=SOURCE,
        statement="Blocks and channels made of a ticket both beat random channels of the same density.",
        experiment=STRUCTURAL,
        rule=Every((Above("regroup", "random"), Above("refill", "random"))),
    ),
    Claim(
        name="structural-tickets-need-their-weights",
        method="structure-lth",
        source=SOURCE,
        statement="Regrouped tickets are better with rewound weights than with new ones.",
        experiment=STRUCTURAL,
        rule=Above("regroup", "regroup reinit"),
    ),
    Claim(
        name="regrouped-tickets-win",
        method="structure-lth",
        source=SOURCE,
        statement="Regrouped tickets of 36% density are as accurate as the dense network.",
        experiment=STRUCTURAL,
        rule=NotBelow("regroup", "dense", 0.01),
    ),
]
