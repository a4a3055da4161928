"""All claims, in the order of the table."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from claims import (
    allocation,
    architecture,
    at_init,
    calibrated,
    compensation,
    connectivity,
    dynamic,
    images,
    layer_lottery,
    lottery,
    narrowing,
    nm,
    precrop,
    rethinking,
    rnn,
    soft,
    soups,
    static,
    structural,
)
from claims.claim import Claim, Experiment
from prunus.errors import InvalidValue, unknown

FAMILIES = {
    "static": static,
    "allocation": allocation,
    "dynamic": dynamic,
    "soft": soft,
    "nm": nm,
    "lottery": lottery,
    "rethinking": rethinking,
    "at-init": at_init,
    "calibrated": calibrated,
    "compensation": compensation,
    "soups": soups,
    "connectivity": connectivity,
    "rnn": rnn,
    "images": images,
    "structural": structural,
    "architecture": architecture,
    "precrop": precrop,
    "layer-lottery": layer_lottery,
    "narrowing": narrowing,
}


def gather(families: Iterable[Iterable[Claim]]) -> dict[str, Claim]:
    """Return claims by name.

    Raises:
        InvalidValue: two claims, or two experiments, have one name.
    """
    found: dict[str, Claim] = {}
    experiments: dict[str, Experiment] = {}
    for claim in (c for family in families for c in family):
        if claim.name in found:
            raise InvalidValue(f"two claims are called {claim.name!r}; give one of them another name.")
        known = experiments.setdefault(claim.experiment.name, claim.experiment)
        if known is not claim.experiment:
            raise InvalidValue(f"two experiments are called {claim.experiment.name!r}; give one of them another name.")
        found[claim.name] = claim
    return found


def every() -> dict[str, Claim]:
    """Return all claims by name."""
    return gather(module.CLAIMS for module in FAMILIES.values())


def experiment(name: str) -> Experiment:
    """Return the experiment called `name`."""
    return next(c.experiment for c in every().values() if c.experiment.name == name)


def select(patterns: Sequence[str], *, quick: bool = False) -> list[Claim]:
    """Return the claims that are asked for.

    Args:
        patterns: names or shell patterns of claims, experiments, methods or families; none: all.
        quick: only those of quick experiments that come with their data.

    Raises:
        UnknownName: a pattern fits nothing.
    """
    claims = every()
    labels = {
        claim.name: (claim.name, claim.experiment.name, claim.method, family)
        for family, module in FAMILIES.items()
        for claim in module.CLAIMS
    }
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(label, pattern) for names in labels.values() for label in names):
            raise unknown("claim", pattern, {label for names in labels.values() for label in names})
    return [
        claim
        for name, claim in claims.items()
        if (not patterns or any(fnmatch.fnmatchcase(label, p) for label in labels[name] for p in patterns))
        and (not quick or (claim.experiment.quick and not claim.experiment.needs))
    ]
