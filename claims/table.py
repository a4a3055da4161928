"""The table of claims, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from claims.claim import VERDICTS, Finding, command

_HIDDEN = ("source_sha256", "kept_from_earlier_code")
_INTRODUCTION = """\
# Claims, measured

Sentences of papers, tested with this library at a scale that runs in minutes. Written by `python -m claims`; do not
edit.

How to read it: every claim has a rule that was fixed before anything was measured. A number is the mean over seeds
with its 95% Student-t interval; accuracies are test accuracies in percent of the last weights, and nothing is selected
on test data. A claim **holds** when the whole interval of the paired difference (same seeds) lies where the rule says,
**does not hold** when it lies entirely on the other side, and is **undecided** otherwise. Intervals are not corrected
for the number of claims, so a few verdicts in a hundred are luck. A claim that does not hold here may hold at the scale
of its paper, and the reverse: these are small networks on small images. One sentence is a control that is known to be
false; a table in which it held would be worthless.
"""


def markdown(findings: Sequence[Finding], provenance: Mapping[str, Any]) -> str:
    """Return the page: how to read it, where it comes from, the table, the experiments."""
    counts = Counter(f.verdict for f in findings if not f.claim.control)
    summary = ", ".join(f"{v} {counts[v]}" for v in VERDICTS if counts[v])
    lines = [_INTRODUCTION, f"Of {sum(counts.values())} claims: {summary}{_controls(findings)}.", ""]
    lines += [f"- {name.replace('_', ' ')}: `{value}`" for name, value in provenance.items() if name not in _HIDDEN]
    kept = [name for names in provenance.get("kept_from_earlier_code", {}).values() for name in names]
    lines += [f"- measured with earlier code: {', '.join(kept)}"] if kept else []
    lines += [
        "",
        "| claim | expected | measured (mean ± 95% interval over n seeds) | verdict | command |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(finding) for finding in findings]
    lines += ["", "## Experiments", ""]
    experiments = {f.claim.experiment.name: f.claim.experiment for f in findings}
    lines += [f"- **{name}**: {e.setup}." for name, e in experiments.items()]
    return "\n".join(lines) + "\n"


def _controls(findings: Sequence[Finding]) -> str:
    controls = [f for f in findings if f.claim.control]
    return f"; the control: {', '.join(f.verdict for f in controls)}" if controls else ""


def _row(finding: Finding) -> str:
    claim = finding.claim
    seeds = len(finding.seeds) or claim.experiment.seeds
    cells = [
        f"**{claim.name}** ({claim.method}). {claim.statement} *{claim.source}*",
        claim.rule.expected(claim.unit),
        finding.measured,
        finding.verdict,
        f"`{command(claim, seeds)}`",
    ]
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def text(findings: Sequence[Finding]) -> str:
    """Return the findings for a terminal: one line of verdict and name, one of evidence."""
    width = max((len(f.verdict) for f in findings), default=0)
    lines = []
    for finding in findings:
        lines += [f"{finding.verdict:<{width}}  {finding.claim.name}", f"{'':<{width}}  {finding.measured}"]
    counts = Counter(f.verdict for f in findings)
    lines.append(", ".join(f"{v} {counts[v]}" for v in VERDICTS if counts[v]))
    return "\n".join(lines)


def as_json(
    findings: Sequence[Finding],
    measured: Mapping[str, Mapping[int, Mapping[str, float]]],
    provenance: Mapping[str, Any],
) -> str:
    """Return everything as JSON: provenance, findings, and every number by experiment, seed and arm."""
    experiments = {f.claim.experiment.name: f.claim.experiment for f in findings}
    numbers = {
        name: {
            "setup": e.setup,
            "values": {str(seed): dict(values) for seed, values in sorted(measured.get(name, {}).items())},
        }
        for name, e in experiments.items()
    }
    whole = {"provenance": dict(provenance), "claims": [f.describe() for f in findings], "experiments": numbers}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def listing(findings: Sequence[Any]) -> str:
    """Return the names of claims with what they say, for `--list`."""
    lines = []
    for claim in findings:
        quick = ", quick" if claim.experiment.quick else ""
        needs = f", needs {claim.experiment.needs}" if claim.experiment.needs else ""
        lines.append(f"{claim.name}  [{claim.method}; {claim.experiment.name}{quick}{needs}]")
        lines.append(f"    {claim.statement}")
        lines.append(f"    {claim.rule.expected(claim.unit)}")
    return "\n".join(lines)
