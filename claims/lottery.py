"""Lottery tickets: rounds against one cut, rewinding against reinitialising, and waking up dead units."""

from __future__ import annotations

from typing import Any

from claims.bench import Bench, digits
from claims.claim import Claim, Experiment
from claims.rules import Above, NotBelow, Ordered, Rule
from prunus.procedures.activating import ap
from prunus.procedures.common import cut, dense, length
from prunus.procedures.imp import imp, rewound, rounds_for
from prunus.run.stages import State

LTH = "Frankle and Carbin, The Lottery Ticket Hypothesis, ICLR 2019"
RENDA = "Renda, Frankle and Carbin, Comparing Rewinding and Fine-tuning, ICLR 2020"
AP = "Liu et al., AP: Selective Activation for De-sparsifying Pruned Neural Networks, TMLR 2023"
SPARSITY = 1 - 0.7**11


def fine_tuned(bench: Bench) -> State:
    """Prune in the same rounds, but go on at the constant rate 0.01 from the kept weights after each."""
    state, masks = dense(bench), None
    for number, target in enumerate(rounds_for(SPARSITY, 0.3), start=1):
        masks = cut(bench, f"masks-{number}", state, target, masks=masks)
        start = rewound(State.of(state.weights), masks, bench)
        state = bench.train(f"round-{number}", start=start, masks=masks, rates=[0.01] * length(bench))
    return state


def tickets(bench: Bench) -> dict[str, float]:
    """Find tickets of 2% in eleven rounds; train them and their controls; cut once for comparison."""
    rounds: dict[str, Any] = {"sparsity": SPARSITY, "rate": 0.3}
    one: dict[str, Any] = {"sparsity": SPARSITY, "rate": SPARSITY, "budget": "lamp"}
    plain, lamp = bench.within("imp"), bench.within("lamp")
    states = {
        "dense": dense(bench),
        "rewind": imp(plain, **rounds).state,
        "reinit": imp(plain, **rounds, branch="reinit").state,
        "shuffle": imp(plain, **rounds, branch="shuffle-layers").state,
        "rate rewinding": imp(bench.within("learning-rate"), **rounds, rewind="learning-rate").state,
        "fine-tuning": fine_tuned(bench.within("finetune")),
        "one-shot global": imp(bench.within("one-shot"), **rounds, branch="oneshot").state,
        "one-shot LAMP": imp(lamp, **one).state,
        "one-shot LAMP reinit": imp(lamp, **one, branch="reinit").state,
    }
    return {arm: bench.accuracy(state) for arm, state in states.items()}


def activation(bench: Bench) -> dict[str, float]:
    """Prune to 3.5% in fifteen rounds with 0, 2 and 5% of the weights taken by selective activation."""
    found = {}
    for share in (0.0, 0.02, 0.05):
        outcome = ap(bench.within(f"share-{share}"), sparsity=1 - 0.8**15, rate=0.2, share=share)
        found[f"dead at {share * 100:g}%"] = outcome.details["rounds"][-1]["dead_rate"]
        found[f"share {share * 100:g}%"] = bench.accuracy(outcome.state)
    return found


TICKETS = Experiment(
    name="tickets",
    setup="digits, 20 epochs per training, eleven rounds of 30% to 2% density by global magnitude, rewound to the "
    "initial weights; fine-tuning at the constant rate 0.01",
    world=digits(20),
    measure=tickets,
    cost=23,
)
ACTIVATION = Experiment(
    name="activation",
    setup="digits, 20 epochs per training, fifteen rounds of 20% to 3.5% density, rewound to the initial weights; "
    "dead: share of (training image, hidden unit) pairs that are off",
    world=digits(20),
    measure=activation,
    cost=35,
)


def _claim(
    name: str, method: str, source: str, statement: str, experiment: Experiment, rule: Rule, **more: Any
) -> Claim:
    return Claim(name=name, method=method, source=source, statement=statement, experiment=experiment, rule=rule, **more)


CLAIMS = [
    _claim(
        "tickets-need-their-weights",
        "lth-imp",
        LTH,
        "At 2% density a ticket with its initial weights beats the same mask with new ones, and that a shuffled mask.",
        TICKETS,
        Ordered(("rewind", "reinit", "shuffle")),
    ),
    _claim(
        "rounds-beat-one-shot",
        "lth-imp",
        LTH,
        "At 2% density pruning in rounds finds better tickets than one global cut.",
        TICKETS,
        Above("rewind", "one-shot global"),
    ),
    _claim(
        "rounds-beat-one-shot-lamp",
        "lth-imp",
        LTH,
        "At 2% density pruning in rounds finds better tickets than one cut by LAMP.",
        TICKETS,
        Above("rewind", "one-shot LAMP"),
    ),
    _claim(
        "lamp-tickets-need-their-weights",
        "lth-imp",
        LTH,
        "At 2% density a ticket cut at once by LAMP is better with its initial weights than with new ones.",
        TICKETS,
        Above("one-shot LAMP", "one-shot LAMP reinit"),
    ),
    _claim(
        "rate-rewinding-not-below-weight-rewinding",
        "lth-imp",
        RENDA,
        "Rewinding the learning rate matches or beats rewinding the weights.",
        TICKETS,
        NotBelow("rate rewinding", "rewind", 0.005),
    ),
    _claim(
        "rate-rewinding-beats-fine-tuning",
        "lth-imp",
        RENDA,
        "At high compression rewinding the learning rate beats fine-tuning.",
        TICKETS,
        Above("rate rewinding", "fine-tuning"),
    ),
    _claim(
        "weight-rewinding-beats-fine-tuning",
        "lth-imp",
        RENDA,
        "At high compression rewinding the weights beats fine-tuning.",
        TICKETS,
        Above("rewind", "fine-tuning"),
    ),
    _claim(
        "activation-wakes-units",
        "activating-while-pruning",
        AP,
        "The larger the share of selective activation, the fewer units are off.",
        ACTIVATION,
        Ordered(("dead at 0%", "dead at 2%", "dead at 5%")),
        unit="number",
    ),
    _claim(
        "activation-keeps-accuracy",
        "activating-while-pruning",
        AP,
        "A share of 2% for selective activation costs no accuracy.",
        ACTIVATION,
        NotBelow("share 2%", "share 0%", 0.005),
    ),
    _claim(
        "activation-raises-accuracy",
        "activating-while-pruning",
        AP,
        "A share of 2% for selective activation raises accuracy.",
        ACTIVATION,
        Above("share 2%", "share 0%"),
    ),
]
