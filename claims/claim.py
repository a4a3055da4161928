"""What a claim and the experiment behind it are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from claims.rules import FAILS, HOLDS, UNDECIDED, UNITS, Rule, shown
from prunus.errors import InvalidValue, NonFinite
from prunus.measure.statistics import interval

NOT_RUN = "not run"
ERROR = "error"
VERDICTS = (HOLDS, FAILS, UNDECIDED, NOT_RUN, ERROR)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Trainings and measurements that claims are judged by; claims of one experiment share them.

    Attributes:
        name: lower case words joined by "-".
        setup: data, network and training in a sentence.
        world: makes the run of one seed: a function of (store or None, seed), see `claims.bench`.
        measure: a function from that run to numbers by arm; accuracies as shares.
        cost: seconds per seed on one idle core, for the estimate of the time left.
        quick: part of `--quick`.
        needs: name of a data set whose files must be there, "" when it comes with the package.
        seeds: repetitions unless asked otherwise.
    """

    name: str
    setup: str
    world: Callable[[Any, int], Any]
    measure: Callable[[Any], Mapping[str, float]]
    cost: float
    quick: bool = False
    needs: str = ""
    seeds: int = 5


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of a paper, made testable.

    Attributes:
        name: lower case words joined by "-".
        method: the method it is about, by its name in the library.
        source: the paper.
        statement: what is claimed, in words, at the scale it is tested here.
        experiment: what measures it.
        rule: when it holds; part of the claim, so fixed before anything is measured.
        unit: "percent" (shares, printed times 100), "number" or "count".
        control: True for a sentence known to be false, which a sound harness must report as not holding.
    """

    name: str
    method: str
    source: str
    statement: str
    experiment: Experiment
    rule: Rule
    unit: str = "percent"
    control: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise InvalidValue(f"claim {self.name!r}: unit {self.unit!r} is none of {', '.join(UNITS)}.")


@dataclass(frozen=True)
class Finding:
    """A claim with what was measured.

    Attributes:
        claim: the claim.
        verdict: one of `VERDICTS`.
        measured: arms with their intervals and the evidence of the rule, or the reason why there is nothing.
        seeds: the seeds measured.
        values: arm -> one number per seed.
    """

    claim: Claim
    verdict: str
    measured: str
    seeds: tuple[int, ...] = ()
    values: Mapping[str, tuple[float, ...]] | None = None

    def describe(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        claim = self.claim
        arms = {arm: interval(v) for arm, v in (self.values or {}).items()}
        return {
            "name": claim.name,
            "method": claim.method,
            "source": claim.source,
            "statement": claim.statement,
            "experiment": claim.experiment.name,
            "expected": claim.rule.expected(claim.unit),
            "control": claim.control,
            "verdict": self.verdict,
            "measured": self.measured,
            "arms": {a: {"mean": i.mean, "half": i.half, "n": i.n} for a, i in arms.items()},
            "seeds": list(self.seeds),
            "command": command(claim, len(self.seeds) or claim.experiment.seeds),
        }


def command(claim: Claim, seeds: int) -> str:
    """Return what to type to measure this claim again."""
    start = "PRUNUS_DATA=... " if claim.experiment.needs else ""
    return f"{start}python -m claims {claim.name} --seeds {seeds}"


def judge(claim: Claim, measured: Mapping[int, Mapping[str, float]]) -> Finding:
    """Apply the rule of a claim to what its experiment measured.

    Args:
        claim: the claim.
        measured: seed -> arm -> number.

    Raises:
        InvalidValue: no seeds, or the experiment lacks an arm that the rule looks at.
        NonFinite: a number is NaN or infinite.
    """
    seeds = tuple(sorted(measured))
    if not seeds:
        raise InvalidValue(f"claim {claim.name!r} has nothing to be judged by: no seed was measured.")
    for arm in claim.rule.arms:
        for seed in seeds:
            if arm not in measured[seed]:
                known = ", ".join(sorted(measured[seed]))
                raise InvalidValue(
                    f"claim {claim.name!r} looks at {arm!r}, which {claim.experiment.name!r} did not measure for seed "
                    f"{seed}; it measured {known}."
                )
            if not math.isfinite(measured[seed][arm]):
                raise NonFinite(f"{claim.experiment.name!r} measured {arm} = {measured[seed][arm]} for seed {seed}.")
    values = {arm: tuple(measured[s][arm] for s in seeds) for arm in claim.rule.arms}
    judgement = claim.rule.judge(values, claim.unit)
    arms = "; ".join(f"{arm} {shown(interval(v), claim.unit)}" for arm, v in values.items())
    evidence = f"; {judgement.evidence}" if judgement.evidence else ""
    return Finding(claim, judgement.verdict, f"{arms}{evidence} (n = {len(seeds)})", seeds, values)
