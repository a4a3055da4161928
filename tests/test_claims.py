"""The harness of claims: it can say yes, no and undecided, it forgets nothing and it invents nothing."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from claims import registry, runner, table  # noqa: E402
from claims.__main__ import main  # noqa: E402
from claims.claim import ERROR, NOT_RUN, Claim, Experiment, judge  # noqa: E402
from claims.rules import (  # noqa: E402
    FAILS,
    HOLDS,
    UNDECIDED,
    Above,
    Alike,
    Every,
    Exactly,
    Inside,
    NotBelow,
    Ordered,
    Rule,
)

from prunus.errors import InvalidValue, NonFinite, UnknownName  # noqa: E402

HIGH = [0.95, 0.96, 0.94, 0.95, 0.97]
LOW = [0.71, 0.69, 0.72, 0.74, 0.70]
NOISY = [0.70, 0.99, 0.52, 0.93, 0.61]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- rules ------------------------------------------------------------------------------------------------------

ARMS: dict[str, list[float]] = {
    "high": HIGH,
    "low": LOW,
    "noisy": NOISY,
    "middle": [0.85, 0.83, 0.84, 0.86, 0.85],
    "near": [v + e for v, e in zip(HIGH, (0.001, -0.002, 0.001, 0.0, -0.001))],
    "zero": [0.0] * 5,
    "once": [0.0, 0.0, 0.0, 0.0, 1e-9],
}


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        (Above("high", "low"), HOLDS),
        (Above("low", "high"), FAILS),
        (Above("noisy", "middle"), UNDECIDED),
        (Above("high", "low", by=0.2), HOLDS),
        (Above("high", "low", by=0.3), FAILS),
        (Above("zero", "zero"), FAILS),
        (NotBelow("near", "high", 0.01), HOLDS),
        (NotBelow("low", "high", 0.01), FAILS),
        (NotBelow("noisy", "middle", 0.01), UNDECIDED),
        (NotBelow("high", "low", 0.01), HOLDS),
        (Alike("near", "high", 0.01), HOLDS),
        (Alike("high", "low", 0.01), FAILS),
        (Alike("low", "high", 0.01), FAILS),
        (Alike("noisy", "middle", 0.01), UNDECIDED),
        (Inside("low", 0.6, 0.8), HOLDS),
        (Inside("low", 0.8, math.inf), FAILS),
        (Inside("low", -math.inf, 0.6), FAILS),
        (Inside("noisy", 0.7, 0.8), UNDECIDED),
        (Exactly("zero", 0.0), HOLDS),
        (Exactly("once", 0.0), FAILS),
        (Ordered(("high", "middle", "low")), HOLDS),
        (Ordered(("high", "low", "middle")), FAILS),
        (Ordered(("high", "noisy")), UNDECIDED),
        (Ordered(("low", "high", "noisy")), FAILS),
        (Every((Above("high", "low"), Exactly("zero", 0.0))), HOLDS),
        (Every((Above("noisy", "middle"), Exactly("once", 0.0))), FAILS),
        (Every((Above("noisy", "middle"), Exactly("zero", 0.0))), UNDECIDED),
    ],
)
def test_verdicts(rule: Rule, verdict: str) -> None:
    assert rule.judge(ARMS, "percent").verdict == verdict


def test_pairing_separates_what_seeds_share() -> None:
    better = [v + 0.01 + e for v, e in zip(NOISY, (0.001, -0.001, 0.002, 0.0, -0.002))]
    assert Above("a", "b").judge({"a": better, "b": NOISY}, "percent").verdict == HOLDS
    shuffled = [better[i] for i in (3, 0, 4, 2, 1)]
    assert Above("a", "b").judge({"a": shuffled, "b": NOISY}, "percent").verdict == UNDECIDED


@pytest.mark.parametrize("rule", [Above("a", "b"), NotBelow("a", "b", 0.1), Alike("a", "b", 0.1), Inside("a", 0, 1)])
def test_one_seed_decides_nothing(rule: Rule) -> None:
    assert rule.judge({"a": [0.9], "b": [0.1]}, "percent").verdict == UNDECIDED


def test_one_seed_refutes_an_identity() -> None:
    assert Exactly("a", 0.0).judge({"a": [1.0]}, "number").verdict == FAILS


def test_error_rate_of_the_rule_itself() -> None:
    """Where nothing differs, "holds" and "does not hold" each come up in 2.5% of tables."""
    draws = random.Random(0)
    found = []
    for _ in range(2000):
        a, b = ([draws.gauss(0.9, 0.02) for _ in range(5)] for _ in range(2))
        found.append(Above("a", "b").judge({"a": a, "b": b}, "percent").verdict)
    for verdict in (HOLDS, FAILS):
        assert 0.015 < found.count(verdict) / len(found) < 0.036


def test_what_is_printed() -> None:
    assert Above("a", "b").expected("percent") == "a > b"
    assert Above("a", "b", by=0.01).expected("percent") == "a > b + 1 points"
    assert NotBelow("a", "b", 0.005).expected("percent") == "a > b - 0.5 points"
    assert Alike("a", "b", 0.2).expected("number") == "a = b to 0.2"
    assert Inside("a", 0.0, 0.15).expected("percent") == "0 < a < 15"
    assert Inside("a", -math.inf, -0.05).expected("number") == "a < -0.05"
    assert Ordered(("a", "b", "c")).expected("percent") == "a > b > c"
    judgement = Ordered(("high", "middle", "low")).judge(ARMS, "percent")
    assert re.fullmatch(r"differences \d+\.\d\d ± \d+\.\d\d, \d+\.\d\d ± \d+\.\d\d", judgement.evidence)


# -- claims -----------------------------------------------------------------------------------------------------


def experiment(measure: Callable[[Any], Mapping[str, float]], **choices: Any) -> Experiment:
    given: dict[str, Any] = {
        "name": "made-up",
        "setup": "numbers without a network",
        "world": lambda store, seed: SimpleNamespace(store=store, seed=seed),
        "measure": measure,
        "cost": 0.01,
    }
    return Experiment(**given | choices)


def claim(name: str, made: Experiment, rule: Rule, **choices: Any) -> Claim:
    return Claim(name=name, method="x", source="nobody", statement="So it is.", experiment=made, rule=rule, **choices)


def numbers(bench: Any) -> dict[str, float]:
    return {"good": 0.9 + 0.003 * (bench.seed % 3), "bad": 0.5 + 0.004 * (bench.seed % 2), "chance": 0.1}


def test_a_false_claim_is_reported_as_failing() -> None:
    measured = {seed: numbers(SimpleNamespace(seed=seed)) for seed in range(1, 6)}
    made = experiment(numbers)
    assert judge(claim("true", made, Above("good", "bad")), measured).verdict == HOLDS
    finding = judge(claim("false", made, Above("bad", "good")), measured)
    assert finding.verdict == FAILS
    assert finding.seeds == (1, 2, 3, 4, 5)
    assert finding.measured.startswith("bad 50.2 ± 0.3; good 90.4 ± 0.3; difference -40.12 ± 0.48")
    assert finding.measured.endswith("(n = 5)")


def test_what_cannot_be_judged() -> None:
    made = experiment(numbers)
    with pytest.raises(InvalidValue, match="'best', which 'made-up' did not measure for seed 1; it measured bad"):
        judge(claim("c", made, Above("best", "bad")), {1: {"bad": 0.1}})
    with pytest.raises(InvalidValue, match="no seed"):
        judge(claim("c", made, Above("good", "bad")), {})
    with pytest.raises(NonFinite, match="good = nan for seed 2"):
        judge(claim("c", made, Above("good", "bad")), {1: numbers(SimpleNamespace(seed=1)), 2: {"good": math.nan}})
    with pytest.raises(InvalidValue, match="unit 'parts'"):
        claim("c", made, Above("good", "bad"), unit="parts")


# -- the registry -----------------------------------------------------------------------------------------------


def test_names_are_unique_and_plain() -> None:
    claims = registry.every()
    names = [c.name for module in registry.FAMILIES.values() for c in module.CLAIMS]
    assert len(names) == len(set(names)) == len(claims)
    experiments = {c.experiment.name for c in claims.values()}
    for name in [*names, *experiments]:
        assert re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", name), name


def test_two_of_one_name_are_refused() -> None:
    first = claim("same", experiment(numbers), Above("good", "bad"))
    with pytest.raises(InvalidValue, match="two claims are called 'same'"):
        registry.gather([[first], [first]])
    other = claim("other", experiment(numbers), Above("good", "bad"))
    with pytest.raises(InvalidValue, match="two experiments are called 'made-up'"):
        registry.gather([[first, other]])


def test_the_table_has_a_control() -> None:
    controls = [c for c in registry.every().values() if c.control]
    assert len(controls) == 1
    mirrored = [c for c in registry.every().values() if not c.control and c.rule == Above("RigL 2%", "static 2%")]
    assert controls[0].rule == Above("static 2%", "RigL 2%")
    assert mirrored


def test_every_claim_is_complete() -> None:
    for made in registry.every().values():
        assert made.statement.endswith("."), made.name
        assert made.source, made.name
        assert made.rule.arms, made.name
        assert made.experiment.seeds >= 3, made.name
        assert made.rule.expected(made.unit), made.name


def test_quick_is_quick() -> None:
    quick = registry.select([], quick=True)
    experiments = {c.experiment.name: c.experiment for c in quick}
    assert len(quick) >= 20
    assert not any(e.needs for e in experiments.values())
    # Two seeds on two cores within 90 seconds, even where everything takes twice as long.
    assert sum(e.cost for e in experiments.values()) < 40


def test_selection() -> None:
    assert [c.name for c in registry.select(["rigl-beats-set-2"])] == ["rigl-beats-set-2"]
    assert {c.method for c in registry.select(["granet"])} == {"granet"}
    assert {c.experiment.name for c in registry.select(["plasticity"])} == {"plasticity"}
    assert len(registry.select(["lamp-*"])) >= 6
    assert len(registry.select([])) == len(registry.every())
    with pytest.raises(UnknownName, match="rigl-beats-set-2"):
        registry.select(["rigl-beats-sets"])


# -- running ----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts made-up claims in place of the registry's."""

    def put(*claims: Claim) -> None:
        monkeypatch.setattr(registry, "every", lambda: registry.gather([claims]))

    return put


def go(claims: list[Claim], cache: Path, **choices: Any) -> tuple[list[Any], Any, list[str]]:
    lines: list[str] = []
    given: dict[str, Any] = {"seeds": None, "jobs": 1}
    findings, measured = runner.run(claims, cache=cache, say=lines.append, **given | choices)
    return findings, measured, lines


def test_finished_work_is_not_repeated(world: Callable[..., None], tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(bench: Any) -> dict[str, float]:
        calls.append(bench.seed)
        return numbers(bench)

    made = claim("c", experiment(counted), Above("good", "bad"))
    world(made)
    first, measured, lines = go([made], tmp_path, seeds=2)
    assert calls == [1, 2]
    assert list(measured["made-up"]) == [1, 2]
    assert lines[0].startswith("2 tasks, 1 at a time")
    assert [line.split(":")[0] for line in lines[1:]] == ["[1/2] made-up seed 1", "[2/2] made-up seed 2"]
    assert "left" in lines[1]
    assert "left" not in lines[2]
    second, again, _ = go([made], tmp_path, seeds=3)
    assert calls == [1, 2, 3]
    assert again["made-up"][1] == measured["made-up"][1]
    assert first[0].verdict == UNDECIDED or second[0].verdict == HOLDS
    assert not [p for p in tmp_path.rglob("*") if p.is_dir() and p.name.endswith("seed-1")]


def test_interrupted_work_goes_on(world: Callable[..., None], tmp_path: Path) -> None:
    """A stage that was finished before the interruption is loaded, not done again."""
    done: list[str] = []
    stop = [True]

    def two_stages(bench: Any) -> dict[str, float]:
        def first() -> float:
            done.append("first")
            return 0.25

        value = bench.compute("first", {"seed": bench.seed}, first)
        if stop[0]:
            raise KeyboardInterrupt
        return {"good": value + 0.5, "bad": value}

    from claims.bench import digits

    made = claim("c", experiment(two_stages, world=digits(1)), Above("good", "bad"))
    world(made)
    with pytest.raises(KeyboardInterrupt):
        go([made], tmp_path, seeds=1)
    stop[0] = False
    _, measured, _ = go([made], tmp_path, seeds=1)
    assert done == ["first"]
    assert measured["made-up"][1] == {"good": 0.75, "bad": 0.25}


def test_a_damaged_result_is_measured_again(world: Callable[..., None], tmp_path: Path) -> None:
    made = claim("c", experiment(numbers), Above("good", "bad"))
    world(made)
    _, measured, _ = go([made], tmp_path, seeds=1)
    (file,) = tmp_path.rglob("*.json")
    for text in ("", "[]", '{"values": 3}', '{"values": {"good": "x"}}'):
        file.write_text(text)
        assert go([made], tmp_path, seeds=1)[1] == measured


def test_an_error_spoils_its_own_claims_only(world: Callable[..., None], tmp_path: Path) -> None:
    def broken(bench: Any) -> dict[str, float]:
        raise ZeroDivisionError("no weights left")

    bad = claim("bad", experiment(broken, name="broken"), Above("good", "bad"))
    good = claim("good", experiment(numbers), Above("good", "bad"))
    unknown_arm = claim("other", good.experiment, Above("better", "bad"))
    world(bad, good, unknown_arm)
    findings, measured, lines = go([bad, good, unknown_arm], tmp_path, seeds=5)
    assert [f.verdict for f in findings] == [ERROR, HOLDS, ERROR]
    assert "ZeroDivisionError: no weights left" in findings[0].measured
    assert "did not measure" in findings[2].measured
    assert any("no weights left" in line for line in lines)
    assert list(measured) == ["made-up"]


def test_missing_data_is_no_error(world: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = claim("c", experiment(numbers, needs="cifar10"), Above("good", "bad"))
    world(made)
    monkeypatch.delenv("PRUNUS_DATA", raising=False)
    findings, measured, lines = go([made], tmp_path / "a")
    assert (findings[0].verdict, measured, lines) == (NOT_RUN, {}, [])
    assert findings[0].measured == "set PRUNUS_DATA to the folder of cifar10"

    from claims.bench import world as real

    from prunus.train.training import Training

    made = claim("c", experiment(numbers, needs="cifar10", world=real("cifar10", "mlp", Training())), Above("a", "b"))
    world(made)
    monkeypatch.setenv("PRUNUS_DATA", str(tmp_path))
    findings, _, lines = go([made], tmp_path / "b", seeds=1)
    assert findings[0].verdict == NOT_RUN
    assert "files missing" in lines[1]


def test_results_are_known_by_the_code_that_made_them() -> None:
    by_module = {c.experiment.measure.__module__: c.experiment for c in registry.every().values()}
    digests = {name: runner.digest_of(e) for name, e in by_module.items()}
    assert len(set(digests.values())) == len(digests)
    assert digests == {name: runner.digest_of(e) for name, e in by_module.items()}


# -- the table and the command ----------------------------------------------------------------------------------


def findings_of(*claims: Claim) -> tuple[list[Any], dict[str, dict[int, dict[str, float]]]]:
    measured = {seed: numbers(SimpleNamespace(seed=seed)) for seed in range(1, 6)}
    return [judge(c, measured) for c in claims], {"made-up": measured}


def test_markdown() -> None:
    made = experiment(numbers)
    odd = Claim(
        name="odd", method="x", source="A | B", statement="One\nor | two.", experiment=made, rule=Above("good", "bad")
    )
    control = claim("control", made, Above("bad", "good"), control=True)
    findings, _ = findings_of(odd, control)
    page = table.markdown(findings, {"command": "python -m claims", "python": "3"})
    rows = [line for line in page.splitlines() if line.startswith("| **")]
    assert len(rows) == 2
    for row in rows:
        assert len(re.split(r"(?<!\\)\|", row)) == 7, row
    assert "One or \\| two." in rows[0]
    assert "`python -m claims odd --seeds 5`" in rows[0]
    assert "Of 1 claims: holds 1; the control: does not hold." in page
    assert "**made-up**: numbers without a network." in page
    assert page == table.markdown(findings, {"command": "python -m claims", "python": "3"})
    assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d", page)


def test_json() -> None:
    made = experiment(numbers)
    findings, measured = findings_of(claim("c", made, Above("good", "bad")))
    read = json.loads(table.as_json(findings, measured, {"python": "3"}))
    (row,) = read["claims"]
    assert row["verdict"] == HOLDS
    assert row["expected"] == "good > bad"
    assert row["arms"]["good"]["n"] == 5
    assert row["arms"]["good"]["half"] == pytest.approx(0.0035, abs=0.0015)
    assert read["experiments"]["made-up"]["values"]["1"]["chance"] == 0.1


def test_text() -> None:
    findings, _ = findings_of(claim("c", experiment(numbers), Above("bad", "good")))
    lines = table.text(findings).splitlines()
    assert lines[0] == "does not hold  c"
    assert lines[-1] == "does not hold 1"


def test_exit_codes_and_files(
    world: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import claims.__main__ as command

    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.delenv("PRUNUS_DATA", raising=False)
    made = claim("c", experiment(numbers), Above("bad", "good"))
    monkeypatch.setattr(registry, "select", lambda names, quick: [made])
    world(made)
    arguments = ["--cache", str(tmp_path / "cache"), "--jobs", "1"]
    assert main(["c", *arguments, "--json", str(tmp_path / "part.json")]) == 0
    assert json.loads((tmp_path / "part.json").read_text())["provenance"]["command"] == "python -m claims c"
    assert not (tmp_path / "RESULTS.md").exists()
    assert main(arguments) == 0
    assert "does not hold" in (tmp_path / "RESULTS.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["claims"][0]["name"] == "c"

    def broken(bench: Any) -> dict[str, float]:
        raise InvalidValue("no")

    made = claim("c", experiment(broken, name="broken"), Above("bad", "good"))
    world(made)
    assert main(["c", *arguments]) == 1

    def stopped(bench: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    made = claim("c", experiment(stopped, name="stopped"), Above("bad", "good"))
    world(made)
    assert main(["c", *arguments]) == 75
    assert "goes on where it was" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}  [" in listed for name in registry.every())
    assert main(["--list", "no-such-claim"]) == 2
    assert "unknown claim 'no-such-claim'" in capsys.readouterr().err


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from claims.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


def test_committed_table_is_of_these_claims() -> None:
    """The rules in the committed results are those of the code: none was changed after measuring."""
    committed = json.loads((ROOT / "claims" / "results.json").read_text())
    found = {row["name"]: row for row in committed["claims"]}
    claims = registry.every()
    assert list(found) == list(claims)
    page = (ROOT / "claims" / "RESULTS.md").read_text()
    for name, row in found.items():
        assert row["expected"] == claims[name].rule.expected(claims[name].unit), name
        assert row["verdict"] != ERROR, name
        assert f"| **{name}** " in page
        values = committed["experiments"][row["experiment"]]["values"]
        if values:
            measured = {int(seed): arms for seed, arms in values.items()}
            assert judge(claims[name], measured).verdict == row["verdict"], name
    assert all(found[c.name]["verdict"] == FAILS for c in claims.values() if c.control)


@pytest.mark.slow
def test_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    chosen = registry.select(["wanda", "layer-collapse"])
    one = go(chosen, tmp_path / "one", seeds=2, jobs=1)[1]
    two = go(chosen, tmp_path / "two", seeds=2, jobs=2)[1]
    assert one == two


def test_a_part_is_put_between_the_rows_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = list(registry.every().values())
    first = next(c for c in claims if c.name == "erk-beats-uniform-5")
    names = {c.experiment.name for c in claims}
    committed = json.loads((ROOT / "claims" / "results.json").read_text())
    values = {int(s): arms for s, arms in committed["experiments"][first.experiment.name]["values"].items()}
    findings = [judge(c, values) for c in claims if c.experiment is first.experiment]
    rows, numbers, kept = runner.merged(findings, {first.experiment.name: values}, committed)
    assert [f.claim.name for f in rows] == [c.name for c in claims]
    earlier = [name for group in kept.values() for name in group]
    assert first.experiment.name not in earlier
    assert set(earlier) | {first.experiment.name} == set(numbers) <= names
    assert all((f.verdict == NOT_RUN) == (f.claim.experiment.name not in numbers) for f in rows)
    again = json.loads(table.as_json(rows, numbers, committed["provenance"] | {"kept_from_earlier_code": kept}))
    assert runner.merged(findings, {first.experiment.name: values}, again)[2] == kept
