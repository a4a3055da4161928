"""Every registry row through the shared suites; and broken rows, for which each suite must fail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import suites
from awkward import AWKWARD, CONV, MLP, NOTHING_PRUNABLE, case
from prunus.budget.budgets import Budget, Problem, Uniform
from prunus.budget.registry import BUDGETS, BudgetInfo
from prunus.errors import NothingPrunable
from prunus.masks import Masks
from prunus.methods.gmp import GMP
from prunus.methods.itop import ITOP
from prunus.methods.registry import METHODS
from prunus.methods.regrow import rewire
from prunus.methods.rigl import RigL
from prunus.methods.static import Static
from prunus.parameters import prunable
from prunus.scores.registry import SCORES, ScoreInfo
from prunus.units import NM, Row, unit

pytestmark = suites.projected_lstm_notice()


@pytest.fixture(autouse=True)
def one_thread():
    """These nets are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def names(rows):
    return [pytest.param(r, id=r.name) for r in rows]


# -- the suites over the registries -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", suites.UNITS)
def test_units(what):
    for address in suites.ADDRESSES:
        suites.check_unit(unit(what), address)


@pytest.mark.parametrize("info", names(SCORES))
def test_scores(info):
    suites.check_score(info)


@pytest.mark.parametrize("info", names(SCORES))
def test_scores_on_awkward_models(info):
    for awkward in AWKWARD[1:]:
        suites.check_score(info, awkward)


@pytest.mark.parametrize("info", names(BUDGETS))
def test_budgets(info):
    suites.check_budget(info)


@pytest.mark.parametrize("info", names(METHODS))
def test_methods(info):
    suites.check_method(info)


@pytest.mark.parametrize("awkward", AWKWARD, ids=str)
def test_methods_on_awkward_models(awkward):
    for info in METHODS:
        suites.check_method_on(info, awkward)


def test_mask_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    masks = Masks(
        {n: torch.rand(s, generator=generator) < 0.5 for n, s in {"a.weight": (3, 5), "b.weight": (2, 2, 3)}.items()}
    )
    suites.check_masks_file(masks, tmp_path)


def test_model_files(tmp_path):
    masks = Masks({"weight": torch.tensor([[True, False, True]])})
    suites.check_model_file(nn.Linear(3, 1), masks, lambda: nn.Linear(3, 1), tmp_path)


@pytest.mark.parametrize("awkward", [c for c in AWKWARD if c.name != "oddities"], ids=str)
def test_model_files_of_awkward_models(awkward, tmp_path):
    model = awkward.build()
    masks = Masks({n: torch.rand(m.shape) < 0.5 for n, m in Masks.full(model).items()})
    suites.check_model_file(model, masks, lambda: awkward.build(1), tmp_path, every=4001)


def test_nothing_prunable_is_said_with_the_reasons():
    model = NOTHING_PRUNABLE.build()
    with pytest.raises(NothingPrunable, match=r"0\.weight.*vector"):
        prunable(model)
    for info in METHODS:
        if info.kind == "step":
            with pytest.raises(NothingPrunable):
                suites.Loop(suites.short(info), NOTHING_PRUNABLE)


# -- negative controls: what each suite must notice ---------------------------------------------------------------


@dataclass(frozen=True)
class TornRow(Row):
    """Spreads a row without its last element."""

    def spread(self, keep, address):
        mask = super().spread(keep, address).clone()
        mask.view(-1)[-1] = False
        return mask


@dataclass(frozen=True)
class SummedRow(Row):
    """Sums instead of averaging."""

    def pool(self, scores, address):
        return address.rows(scores).sum(1)


@dataclass(frozen=True)
class ShiftedRow(Row):
    """Pools in another order than it spreads."""

    def pool(self, scores, address):
        return super().pool(scores, address).roll(1)


@dataclass(frozen=True)
class LastPattern(NM):
    """Gives ties to the later position."""

    def choose(self, scores, address):
        lines = address.rows(scores).flip(-1)
        return address.unrows(address.rows(super().choose(address.unrows(lines), address)).flip(-1))


@dataclass(frozen=True)
class FlatPattern(NM):
    """Groups along memory instead of along inputs."""

    def choose(self, scores, address):
        groups = scores.reshape(-1, self.m)
        order = groups.argsort(dim=1, descending=True, stable=True)
        return torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, order[:, : self.n], True).reshape(scores.shape)


@pytest.mark.parametrize(
    ("what", "address", "message"),
    [
        (TornRow(), 0, "spreading all True"),
        (SummedRow(), 0, "does not pool"),
        (ShiftedRow(), 0, "does not pool"),
        (LastPattern(2, 5), 0, "not the best N"),
        (FlatPattern(2, 4), 6, "not the best N"),
    ],
)
def test_broken_units_are_noticed(what, address, message):
    with pytest.raises(AssertionError, match=message):
        suites.check_unit(what, suites.ADDRESSES[address])


def fine_score(weight: Tensor) -> Tensor:
    return weight.abs()


def signed_score(weight: Tensor) -> Tensor:
    return weight


def flat_score(weight: Tensor) -> Tensor:
    return weight.abs().reshape(-1)


def inverse_score(weight: Tensor) -> Tensor:
    return 1 / (weight - weight)


def writing_score(weight: Tensor) -> Tensor:
    return weight.abs_()


def drawing_score(weight: Tensor) -> Tensor:
    return torch.rand(weight.shape)


def half_score(weight: Tensor) -> Tensor:
    return weight.abs().half()


def stuck_score(noise: Tensor) -> Tensor:
    return torch.ones_like(noise)


def scored(function: str, **more: object) -> ScoreInfo:
    columns = {
        "name": "broken",
        "target": f"test_suites:{function}",
        "summary": "broken on purpose",
        "needs": ("weight",),
        "data": "none",
        "source": "none",
    }
    return ScoreInfo(**{**columns, **more})


def test_the_control_of_scores_is_sound():
    suites.check_score(scored("fine_score"))
    suites.check_score(scored("signed_score", non_negative=False))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (scored("fine_score", needs=("gradient",)), "takes"),
        (scored("fine_score", source=" "), "column 'source' is empty"),
        (scored("fine_score", data="plenty"), "is not one of"),
        (scored("fine_score", name="Broken Score"), "lower case"),
        (scored("fine_score", rounds=0), "0 rounds"),
        (scored("signed_score"), "negative"),
        (scored("flat_score"), "shape"),
        (scored("inverse_score"), "NaN"),
        (scored("writing_score"), "changed the values"),
        (scored("drawing_score"), "global random state"),
        (scored("half_score"), "float16"),
        (scored("stuck_score", needs=("noise",)), "another seed"),
    ],
    ids=lambda value: value.target.partition(":")[2] if isinstance(value, ScoreInfo) else value,
)
def test_broken_scores_are_noticed(info, message):
    with pytest.raises(AssertionError, match=message):
        suites.check_score(info)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda m: m.train(), "training mode"),
        (lambda m: m[0].weight.requires_grad_(False), "requires_grad"),
        (lambda m: setattr(m[0].weight, "grad", torch.zeros_like(m[0].weight)), r"\.grad"),
        (lambda m: m[2].register_forward_hook(lambda *a: None), "hooks"),
        (lambda m: torch.rand(1), "random state of torch"),
        (lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())), "replaced a parameter"),
    ],
)
def test_the_watch_over_a_model_notices(harm, message):
    model = MLP.build().eval()
    with pytest.raises(AssertionError, match=message), suites.untouched(model, "it"):
        harm(model)


def budgeted(attribute: str, **more: object) -> BudgetInfo:
    columns = {
        "name": "broken",
        "target": f"test_suites:{attribute}",
        "summary": "broken on purpose",
        "scope": "layer",
        "needs": "scores",
        "source": "none",
    }
    return BudgetInfo(**{**columns, **more})


@dataclass(frozen=True, kw_only=True)
class FineBudget(Uniform):
    """Nothing wrong here."""


@dataclass(frozen=True, kw_only=True)
class LavishBudget(Uniform):
    """Keeps one more than asked."""

    def choose(self, problem: Problem) -> dict[str, Tensor]:
        kept = min(problem.keep + 1, sum(problem.alive))
        return super().choose(replace(problem, keep=kept))


@dataclass(frozen=True, kw_only=True)
class BackwardsBudget(Uniform):
    """Keeps the worst."""

    def choose(self, problem: Problem) -> dict[str, Tensor]:
        turned = {n: torch.where(s > -torch.inf, -s, s) for n, s in problem.scores.items()}
        return super().choose(replace(problem, scores=turned))


@dataclass(frozen=True, kw_only=True)
class RevivingBudget(Uniform):
    """Forgets what was pruned before."""

    def choose(self, problem: Problem) -> dict[str, Tensor]:
        return super().choose(
            replace(problem, scores={n: s.nan_to_num(neginf=99.0) for n, s in problem.scores.items()})
        )


@dataclass(frozen=True, kw_only=True)
class LaterBudget(Uniform):
    """Gives ties to the later position."""

    def choose(self, problem: Problem) -> dict[str, Tensor]:
        flipped = {n: s.reshape(-1).flip(0).reshape(s.shape) for n, s in problem.scores.items()}
        chosen = super().choose(replace(problem, scores=flipped))
        return {n: m.reshape(-1).flip(0).reshape(m.shape) for n, m in chosen.items()}


@dataclass(frozen=True, kw_only=True)
class CrumblingBudget(Uniform):
    """Ignores units."""

    def choose(self, problem: Problem) -> dict[str, Tensor]:
        return super().choose(replace(problem, unit=unit("weight")))


def deaf_budget(**options: object) -> Budget:
    return Uniform()


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("LavishBudget", "keeps .* instead of"),
        ("BackwardsBudget", "drops"),
        ("RevivingBudget", "revives"),
        ("LaterBudget", "earlier positions"),
        ("CrumblingBudget", "2:4 pattern"),
        ("deaf_budget", "unknown option"),
    ],
)
def test_broken_budgets_are_noticed(attribute, message, monkeypatch):
    rows = [*BUDGETS, budgeted(attribute)]
    monkeypatch.setattr("prunus.budget.registry.BUDGETS", type(BUDGETS)("budget", rows))
    with pytest.raises(AssertionError, match=message):
        suites.check_budget(budgeted(attribute))


def test_the_control_of_budgets_is_sound(monkeypatch):
    rows = [*BUDGETS, budgeted("FineBudget")]
    monkeypatch.setattr("prunus.budget.registry.BUDGETS", type(BUDGETS)("budget", rows))
    suites.check_budget(budgeted("FineBudget"))


@dataclass(frozen=True)
class HandlessStatic(Static):
    """Claims that its state is dense, so nothing clears it, and puts weights back."""

    def after(self, s):
        with torch.no_grad():
            for parameter in s.parameters.values():
                parameter.add_(0.01)


@dataclass(frozen=True)
class LooseRegrow(RigL):
    """Grows one weight more than it drops."""

    def rewire_layer(self, mask, drop, grow, fraction, alive, weight):
        new = super().rewire_layer(mask, drop, grow, fraction, alive, weight).clone()
        new.view(-1)[int((~new).reshape(-1).nonzero()[0])] = True
        return new


@dataclass(frozen=True)
class WarmRegrow(RigL):
    """Starts grown weights at something else than zero."""

    def after(self, s):
        before = s.masks
        super().after(s)
        with torch.no_grad():
            for name, parameter in s.parameters.items():
                parameter[s.masks[name] & ~before[name]] = 0.1


@dataclass(frozen=True)
class ShyGMP(GMP):
    """Forgets its last cut."""

    def after(self, s):
        if s.step < self.schedule(s.steps, s.steps_per_epoch).end:
            super().after(s)


@dataclass(frozen=True)
class ForgetfulGMP(GMP):
    """Prunes by a random state of its own that no checkpoint holds."""

    def after(self, s):
        if not hasattr(s, "turns"):
            s.turns = 0
        s.turns += 1
        if s.turns > 4:
            super().after(s)


@dataclass(frozen=True)
class LuckyStatic(Static):
    """Draws from the global random state."""

    def start(self, s):
        torch.rand(1)
        return super().start(s)


@dataclass(frozen=True)
class DeafStatic(Static):
    """Accepts any sparsity."""

    def check(self, steps, steps_per_epoch):
        return None

    def start(self, s):
        return Static(0.6).start(s)


@dataclass(frozen=True)
class SpeechlessStatic(Static):
    """Describes itself with something that JSON cannot hold."""

    def describe(self):
        return {"method": type(self)}


@dataclass(frozen=True)
class LazyITOP(ITOP):
    """Never exchanges."""

    def exchange(self, s, masks):
        return masks


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("HandlessStatic", "weights at pruned places"),
        ("LooseRegrow", "counts per layer"),
        ("WarmRegrow", "grow from zero"),
        ("ShyGMP", "in the end"),
        ("ForgetfulGMP", "resumed"),
        ("LuckyStatic", "global random state"),
        ("DeafStatic", "is accepted"),
        ("SpeechlessStatic", "JSON"),
        ("LazyITOP", "never exchanged"),
    ],
)
def test_broken_methods_are_noticed(attribute, message):
    row = replace(METHODS.entry("rigl"), name="broken", target=f"test_suites:{attribute}")
    with pytest.raises((AssertionError, TypeError), match=message):
        suites.check_method(row)


@dataclass(frozen=True)
class BurningStatic(Static):
    """Lets weights explode."""

    def after(self, s):
        with torch.no_grad():
            for parameter in s.parameters.values():
                parameter.mul_(1e30)


def test_methods_that_break_the_model_are_noticed():
    row = replace(METHODS.entry("random-pruning"), name="broken", target="test_suites:BurningStatic")
    with pytest.raises(AssertionError, match="not finite"):
        suites.check_method_on(row, MLP)


def test_unmasked_optimizer_state_is_noticed(monkeypatch):
    monkeypatch.setattr("prunus.hold.state_tensors", lambda optimizer, parameter: ())
    with pytest.raises(AssertionError, match=r"optimizer state of .* survives"):
        suites.check_method(METHODS.entry("gmp-cubic"))


def test_hooks_that_stay_after_detach_are_noticed(monkeypatch):
    monkeypatch.setattr("prunus.hold.Hold.detach", lambda self: None)
    with pytest.raises(AssertionError, match="after detach"):
        suites.check_method(METHODS.entry("random-pruning"))


def test_late_checks_are_noticed(monkeypatch):
    monkeypatch.setattr("prunus.methods.regrow.Regrow.check", lambda self, steps, steps_per_epoch: None)
    with pytest.raises(AssertionError, match=r"never exchanges|is accepted"):
        suites.check_method(METHODS.entry("rigl"))


def test_model_files_without_a_hash_are_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr("prunus.oneshot.content_hash", lambda facts, tensors: "0" * 64)
    masks = Masks({"weight": torch.tensor([[True, False, True]])})
    with pytest.raises(AssertionError, match="flipped"):
        suites.check_model_file(nn.Linear(3, 1), masks, lambda: nn.Linear(3, 1), tmp_path)


def test_empty_columns_of_methods_are_noticed():
    for column in ("source", "note", "fusion", "scope", "retraining"):
        with pytest.raises(AssertionError, match=column):
            suites.check_method(replace(METHODS.entry("rigl"), **{column: ""}))
    with pytest.raises(AssertionError, match="kind"):
        suites.check_method(replace(METHODS.entry("rigl"), kind="magic"))


class Trusting(Masks):
    """Reads mask files without looking at their hash."""

    @classmethod
    def from_bytes(cls, data, *, source="masks"):
        try:
            return Masks.from_bytes(data, source=source)
        except Exception as error:
            if "hash" in str(error):
                return Masks({})
            raise


def test_trusting_readers_are_noticed(tmp_path):
    with pytest.raises(AssertionError, match="as if nothing had happened"):
        suites.check_masks_file(Masks({"a": torch.ones(3, 3, dtype=torch.bool)}), tmp_path, masks_type=Trusting)


def test_rewire_is_what_the_controls_bend():
    mask = torch.tensor([True, True, False, False])
    new = rewire(mask, torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 2.0]), 1)
    assert new.tolist() == [True, False, False, True]
    assert CONV in AWKWARD
    assert case("tiny") in AWKWARD
