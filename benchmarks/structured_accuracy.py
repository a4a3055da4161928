"""Accuracy of trained networks after channel pruning without and with one epoch of fine-tuning, beside torch-pruning.

CIFAR-10 ResNet-20 and ResNet-56 as published, 10 % to 70 % of the multiply-accumulates removed, every score for
channels of both tools, ranked within layers ("local") or over all ("global"), in all channels or only in those inside
blocks ("inner", the residual streams stay whole). Settings:

- data-free: only what needs no data, BatchNorm statistics as they were
- calibrated: scores and compensation may see calibration images from the training set
- re-estimated: the same, and BatchNorm statistics are measured anew on the calibration images
- one epoch: the best of "re-estimated" fine-tuned for one epoch by the same loop

Both are compared at equal multiply-accumulates, counted by torch's operator counter: ours are asked for directly, the
peer's ratio is found by bisection (its ratios of layers are spread by a thousandth, so that layers do not step at
once), and cuts more than one point off do not count. What is best is chosen on 2,000 validation images that are set
aside from the training set: 500 of them see every cut, all of them the best of each tool and setting, and only what
was chosen sees the test set. (The published networks were trained on all training images, those of the validation set
included; that favours neither.)

The peer's Hessian importance keeps only the gradient of its last example; a version over all examples runs beside it.
The peer takes the zero channels of a parameter-free shortcut for channels of the stream, which its cuts of all
channels suffer from; "inner" cuts do not.

Rows are appended to a file of JSON lines and never measured twice; those that failed are tried again. Data and
checkpoints are looked for in PRUNUS_DATA and PRUNUS_CHECKPOINTS (default: `checkpoints` in PRUNUS_DATA).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contract import Outcome, at_least, main, threads
from benchmarks.coverage import macs_of
from prunus.data.balanced import balanced_batch
from prunus.data.batches import Batches
from prunus.data.examples import Examples, Splits
from prunus.data.load import load
from prunus.errors import DataMissing
from prunus.graph.plan import Plan
from prunus.graph.record import record
from prunus.measure.accuracy import evaluate
from prunus.measure.recalibrate import recalibrate
from prunus.models.checkpoints import IMAGENET_MEAN, IMAGENET_STD, load_foreign
from prunus.models.create import create
from prunus.procedures.common import spread_over
from prunus.structured.compensate import compensate
from prunus.structured.importance import unit_scores
from prunus.structured.prune import coupled
from prunus.structured.select import Limits, to_target
from prunus.train.loop import fit
from prunus.train.tensors import digest
from prunus.train.training import Training

OURS, THEIRS = TOOLS = ("prunus", "torch-pruning")
MODELS = {"resnet20": "cifar10_resnet20-12fca82f.th", "resnet56": "cifar10_resnet56-4bfd9763.th"}
POINTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
NEAR = 0.01  # how far the removed share of multiply-accumulates may lie from a point
SPREAD = 1e-3
SCOPES = ("local", "global")
WHERE = ("all", "inner")
CALIBRATION, SMALL_CALIBRATION = 1000, 250  # images; the smaller set where a Gram matrix per layer is gathered
GRAMS = ("obspa",)
RESULTS = Path(__file__).parent / "results"
STREAM = "*bn2.weight"  # norms at the end of blocks: what they belong to lies on a residual stream

OUR_SCORES = {
    "magnitude": "none",
    "magnitude-squared": "none",
    "bn-scale": "none",
    "fpgm": "none",
    "lamp-normalised": "none",
    "synflow": "shape",
    "random": "none",
    "obspa": "noise",
    "taylor": "calibration",
    "snip": "calibration",
    "fisher": "calibration",
    "grasp": "calibration",
    "wanda": "calibration",
    "obspa-data": "calibration",
}
THEIR_SCORES = {
    "GroupMagnitude p=1": "none",
    "GroupMagnitude p=2": "none",
    "Magnitude p=1": "none",
    "Magnitude p=2": "none",
    "BNScale": "none",
    "FPGM": "none",
    "LAMP": "none",
    "Random": "none",
    "Taylor": "calibration",
    "Hessian": "calibration",
    "Hessian, all examples": "calibration",
    "OBDC": "calibration",
    "Activation": "calibration",
}
COMPENSATIONS = {"udfc": "none", "obspa": "noise", "obspa-data": "calibration"}
# Setting -> (validation accuracy it is chosen by, whether calibration images may be used).
SETTINGS = {
    "data-free": ("validation", False),
    "calibrated": ("validation", True),
    "re-estimated": ("validation_bn", True),
    "one epoch": ("validation_tuned", True),
}
UNTUNED = tuple(SETTINGS)[:-1]

Row = dict[str, Any]
Key = tuple[str, float, str, str, int]

TUNING = Training(epochs=1, batch_size=128, lr=0.01, weight_decay=1e-4, augment="crop4,flip")


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        models, points, seeds: of every combination; a seed draws calibration images, random scores and data order.
        ours, theirs: scores.
        shortlist: how many cuts of each tool and setting are validated on all images.
        finalists: how many of our best cuts of each setting are compensated.
        tuned: how many of the best cuts of each tool are fine-tuned; 0 leaves that setting out.
        training: of the fine-tuning.
        screen, validation, test: images that every cut sees, the shortlist, and what is chosen in the end.
    """

    models: tuple[str, ...] = tuple(MODELS)
    points: tuple[float, ...] = POINTS
    seeds: tuple[int, ...] = (0, 1, 2)
    ours: tuple[str, ...] = tuple(OUR_SCORES)
    theirs: tuple[str, ...] = tuple(THEIR_SCORES)
    shortlist: int = 4
    finalists: int = 2
    tuned: int = 2
    training: Training = TUNING
    screen: int = 500
    validation: int = 2000
    test: int = 10_000

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that are compared."""
        return tuple(name for name in SETTINGS if self.tuned or name in UNTUNED)


FULL = Extent()
QUICK = Extent(
    models=("resnet20",),
    points=(0.3, 0.6),
    seeds=(0,),
    ours=("magnitude-squared", "taylor"),
    theirs=("GroupMagnitude p=2", "Taylor"),
    shortlist=1,
    finalists=1,
    tuned=1,
    training=replace(TUNING, epochs=None, steps=5),
    screen=125,
    validation=250,
    test=500,
)


@dataclass(frozen=True)
class Cut:
    """One way to choose channels.

    Attributes:
        tool: "prunus" or "torch-pruning".
        score: a name in `OUR_SCORES` or `THEIR_SCORES`.
        scope: "local" or "global".
        where: "all" channels, or those "inner" to blocks.
        compensation: a name in `COMPENSATIONS`, or "".
    """

    tool: str
    score: str
    scope: str
    where: str
    compensation: str = ""

    @property
    def name(self) -> str:
        """What tells it apart within its tool."""
        return ", ".join(filter(None, (self.score, self.scope, self.where, self.compensation)))

    @property
    def data_free(self) -> bool:
        """Whether it needs no calibration images."""
        scores = OUR_SCORES if self.tool == OURS else THEIR_SCORES
        return "calibration" not in (scores[self.score], COMPENSATIONS.get(self.compensation))


# -- the network and its data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """One trained network, its data, and what was computed for one seed.

    Attributes:
        name: a name in `MODELS`.
        seed: draws calibration images, random scores, noise and data order.
        splits: training images without the 2,000 of validation, validation, test; normalised as the network wants.
        extent: how much is measured.
    """

    name: str
    seed: int
    splits: Splits
    extent: Extent

    @cached_property
    def model(self) -> nn.Module:
        """The trained network, in eval mode."""
        return load_foreign(create(self.name), checkpoint(MODELS[self.name])).eval()

    @cached_property
    def example(self) -> Tensor:
        """One image of zeros."""
        return torch.zeros(1, 3, 32, 32)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the whole network for one image."""
        return macs_of(self.model, self.example)

    def removed(self, small: nn.Module) -> float:
        """Return the share of the multiply-accumulates that a smaller network does not need."""
        return 1 - macs_of(small, self.example) / self.macs

    def images(self, count: int = CALIBRATION) -> list[tuple[Tensor, Tensor]]:
        """Return class-balanced training images and labels in batches of 250."""
        x, y, _ = balanced_batch(self.splits.train, count // 10, seed=self.seed)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.seed))
        return list(zip(x[order].split(250), y[order].split(250), strict=True))

    @cached_property
    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """The calibration images."""
        return self.images()

    def accuracy(self, model: nn.Module, use: str) -> float:
        """Return the accuracy on the "screen", "validation" or "test" images that the extent allows."""
        examples: Examples = self.splits.test if use == "test" else self.splits.validation
        return evaluate(model, Batches(spread_over(examples, getattr(self.extent, use)), 250, shuffle=False)).accuracy

    def reestimated(self, model: nn.Module, use: str) -> nn.Module:
        """Return a copy with BatchNorm statistics of the calibration images, of a part of them for the screen."""
        model = copy.deepcopy(model)
        recalibrate(model, self.calibration[:1] if use == "screen" else self.calibration)
        return model

    def tuned(self, model: nn.Module) -> nn.Module:
        """Return a copy after fine-tuning."""
        model = copy.deepcopy(model)
        fit(model, self.splits.train, self.extent.training, seed=self.seed)
        return model.eval()


def checkpoint(file: str) -> Path:
    """Return where a published checkpoint lies.

    Raises:
        DataMissing: it is not there.
    """
    folder = os.environ.get("PRUNUS_CHECKPOINTS") or f"{os.environ.get('PRUNUS_DATA', 'data')}/checkpoints"
    path = Path(folder) / file
    if not path.is_file():
        raise DataMissing(f"there is no checkpoint {path}; set PRUNUS_CHECKPOINTS to the folder with {file}.")
    return path


# -- ours -----------------------------------------------------------------------------------------------------------


class Ours:
    """Cuts one network with ours; scores are computed once and serve all points, scopes and places."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.graph = record(subject.model, subject.example)
        self.scores: dict[str, dict[str, Tensor]] = {}

    def data(self, name: str, use: str) -> list[Any] | None:
        """Return the batches that a score or compensation sees, None without; "shape" is one image of zeros."""
        if use != "calibration":
            return [self.subject.example] if use == "shape" else None
        small = name.removesuffix("-data") in GRAMS
        return self.subject.images(SMALL_CALIBRATION) if small else self.subject.calibration

    def cut(self, cut: Cut, point: float) -> nn.Module:
        """Return a smaller network; the model is untouched. The same as `prunus.prune` gives with `macs=1 - point`."""
        subject, seed = self.subject, self.subject.seed
        protect = (STREAM,) if cut.where == "inner" else ()
        coupling, families, protected = coupled(self.graph, "channel", protect, "auto", None)
        if cut.score not in self.scores:
            self.scores[cut.score] = unit_scores(
                subject.model,
                families,
                cut.score.removesuffix("-data"),
                coupling=coupling,
                data=self.data(cut.score, OUR_SCORES[cut.score]),
                example=subject.example,
                seed=seed,
            )
        kept = to_target(
            families,
            self.scores[cut.score],
            coupling.macs,
            (1 - point) * coupling.macs({}),
            Limits(protected=protected),
            cut.scope,
            what="macs",
        )
        plan = Plan.from_keep(coupling, kept)
        model = subject.model
        if cut.compensation:
            method = cut.compensation.removesuffix("-data")
            options: dict[str, Any] = {"recalibrate": False} if method == "obspa" else {}
            data = self.data(cut.compensation, COMPENSATIONS[cut.compensation])
            done = compensate(method, model, coupling, plan, data=data, example=subject.example, seed=seed, **options)
            model, plan = done.model, done.plan
        return plan.apply(model).eval()


# -- theirs ---------------------------------------------------------------------------------------------------------


class Theirs:
    """Cuts one network with torch-pruning; gradients are computed once and given to copies of the network."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.tried: dict[Cut, dict[float, float]] = {}

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Gradient of the mean loss over the calibration images, by parameter name."""
        model = copy.deepcopy(self.subject.model)
        for x, y in self.subject.calibration:
            F.cross_entropy(model(x), y).backward()
        return {n: p.grad / len(self.subject.calibration) for n, p in model.named_parameters() if p.grad is not None}

    @cached_property
    def squares(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the peer accumulates over single examples, and the mean square of all of them, by parameter name."""
        import torch_pruning as peer

        model = copy.deepcopy(self.subject.model)
        importance = peer.importance.HessianImportance()
        mean = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        count = 0
        for xs, ys in self.subject.calibration:
            for x, y in zip(xs.split(1), ys.split(1), strict=True):
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
                importance.accumulate_grad(model)
                count += 1
                for n, p in model.named_parameters():
                    mean[n] += p.grad.square()  # type: ignore[union-attr]
        shipped = {n: importance._accu_grad[p] / importance._counter[p] for n, p in model.named_parameters()}
        return shipped, {n: m / count for n, m in mean.items()}

    @cached_property
    def fisher(self) -> tuple[dict[str, Tensor], int]:
        """Diagonals of the peer's OBD-C, by module name, and how many batches they sum."""
        import torch_pruning as peer

        model = copy.deepcopy(self.subject.model)
        importance = peer.importance.OBDCImportance(num_classes=10)
        # What its `_prepare_model` is for, which fails in 1.6.1 on every network without attention.
        for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
            importance.modules.append(layer)
            layer.register_forward_pre_hook(importance._save_input)
            layer.register_full_backward_hook(importance._save_grad_output)
        draws = torch.Generator().manual_seed(self.subject.seed)
        for x, _ in self.subject.calibration:  # labels are drawn from the model, as its authors do
            logits = model(x)
            drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=draws)[:, 0]
            model.zero_grad()
            F.cross_entropy(logits, drawn).backward()
            importance.step()
        names = {m: n for n, m in model.named_modules()}
        return {names[m]: f for m, f in importance.Fisher.items()}, importance.steps

    def prepared(self, cut: Cut) -> tuple[nn.Module, Any]:
        """Return a copy of the network that holds the gradients an importance reads, and the importance."""
        from torch_pruning import importance as peer

        model = copy.deepcopy(self.subject.model)
        made: dict[str, Callable[[], Any]] = {
            "GroupMagnitude p=1": partial(peer.GroupMagnitudeImportance, p=1),
            "GroupMagnitude p=2": partial(peer.GroupMagnitudeImportance, p=2),
            "Magnitude p=1": partial(peer.MagnitudeImportance, p=1, group_reduction="first", normalizer=None),
            "Magnitude p=2": partial(peer.MagnitudeImportance, p=2, group_reduction="first", normalizer=None),
            "BNScale": peer.BNScaleImportance,
            "FPGM": peer.FPGMImportance,
            "LAMP": peer.LAMPImportance,
            "Random": peer.RandomImportance,
            "Taylor": peer.TaylorImportance,
            "Hessian": peer.HessianImportance,
            "Hessian, all examples": peer.HessianImportance,
            "OBDC": partial(peer.OBDCImportance, num_classes=10),
            "Activation": peer.ActivationImportance,
        }
        importance = made[cut.score]()
        given: Mapping[str, Tensor] = {}
        if cut.score in ("Taylor", "OBDC"):
            given = self.gradients
        elif cut.score.startswith("Hessian"):
            given = self.squares[0 if cut.score == "Hessian" else 1]
        for name, parameter in model.named_parameters():
            parameter.grad = given[name].clone() if name in given else None
        if cut.score == "OBDC":
            diagonals, importance.steps = self.fisher
            importance.Fisher = {model.get_submodule(n): f.clone() for n, f in diagonals.items()}
        if cut.score == "Activation":
            x = torch.cat([x for x, _ in self.subject.calibration])
            with torch.no_grad(), importance.compute_importance(model):
                model(x[:SMALL_CALIBRATION])
        return model, importance

    def pruner(self, model: nn.Module, importance: Any, cut: Cut, ratio: float) -> Any:
        """Return the peer's pruner of a model."""
        import torch_pruning as peer

        whole = [m for m in model.modules() if isinstance(m, nn.Linear)]
        named = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        layers = list(named.values())
        if cut.where == "inner":
            whole += [m for n, m in named.items() if not n.endswith("conv1") or "." not in n]
        spread = {m: min(1.0, ratio + SPREAD * i / len(layers)) for i, m in enumerate(layers)}
        return peer.pruner.BasePruner(
            model,
            self.subject.example,
            importance=importance,
            pruning_ratio=ratio,
            pruning_ratio_dict=spread if cut.scope == "local" else None,
            global_pruning=cut.scope == "global",
            ignored_layers=whole,
        )

    def at(self, cut: Cut, ratio: float) -> nn.Module:
        """Return the smaller network that a ratio gives."""
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(self.subject.seed)
            model, importance = self.prepared(cut)
            torch.manual_seed(self.subject.seed)
            self.pruner(model, importance, cut, ratio).step()
        model.zero_grad()
        return model.eval()

    def cut(self, cut: Cut, point: float) -> nn.Module:
        """Return the smaller network whose removed share lies nearest to `point`, by bisection of the ratio.

        The peer leaves layers whole that would lose everything, so that more may stay at a higher ratio; where
        bisection ends too far off, ratios from 1/32 to 31/32 are tried.
        """
        tried = self.tried.setdefault(cut, {0.0: 0.0})

        def bracket() -> tuple[float, float]:
            below = max(r for r, removed in tried.items() if removed <= point)
            return below, min((r for r, removed in tried.items() if r > below), default=1.0)

        def distance() -> float:
            return min(abs(removed - point) for removed in tried.values())

        for _ in range(16):
            low, high = bracket()
            ratio = (low + high) / 2
            if high - low < 1e-5 or distance() < NEAR / 5:
                break
            tried[ratio] = self.subject.removed(self.at(cut, ratio))
        for ratio in (i / 32 for i in range(1, 32)):
            if distance() > NEAR and ratio not in tried:
                tried[ratio] = self.subject.removed(self.at(cut, ratio))
        return self.at(cut, min(tried, key=lambda r: abs(tried[r] - point)))


# -- rows -----------------------------------------------------------------------------------------------------------


class Book:
    """The file of rows: the newest of every (model, point, tool, name, seed); a torn last line is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Key, Row] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                self.rows[key(row)] = row

    def write(self, row: Row) -> Row:
        """Append a row, in place of an older one."""
        self.rows[key(row)] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def at(self, model: str, point: float, seed: int, tool: str | None = None) -> list[Row]:
        """Return the rows of one point."""
        found = (r for r in self.rows.values() if (r["model"], r["point"], r["seed"]) == (model, point, seed))
        return [r for r in found if tool in (None, r["tool"])]

    def same(self, row: Row, value: str) -> float | None:
        """Return a value that was measured of an equal network; of the same seed, unless no seed enters it."""
        for other in self.rows.values():
            alike = other.get("digest") == row["digest"] and other["model"] == row["model"]
            if alike and value in other and ("_" not in value or other["seed"] == row["seed"]):
                return float(other[value])
        return None


def key(row: Row) -> Key:
    """Return what tells rows apart."""
    return row["model"], row["point"], row["tool"], row["name"], row["seed"]


def cut_of(row: Row) -> Cut:
    """Return the cut that a row is about."""
    return Cut(row["tool"], row["score"], row["scope"], row["where"], row["compensation"])


def ranked(rows: Sequence[Row], setting: str, use: str = "validation") -> list[Row]:
    """Return the rows that count in a setting, best first on "validation" or "screen"; equal ones by name."""
    value, calibrated = SETTINGS[setting]
    value = value.replace("validation", use)
    fit_in = [r for r in rows if value in r and abs(r["removed"] - r["point"]) <= NEAR]
    fit_in = [r for r in fit_in if calibrated or r["data_free"]]
    return sorted(fit_in, key=lambda r: (-r[value], r["name"]))


def tested(setting: str) -> str:
    """Return the name of the test accuracy that belongs to a setting."""
    return SETTINGS[setting][0].replace("validation", "test")


class Study:
    """Measures what is missing for one network and seed."""

    def __init__(self, subject: Subject, book: Book) -> None:
        self.subject, self.book = subject, book
        self.cutters: dict[str, Ours | Theirs] = {OURS: Ours(subject), THEIRS: Theirs(subject)}
        self.made: dict[Cut, nn.Module] = {}  # of the present point

    def point(self, point: float) -> None:
        """Measure all cuts at one point, compensate and fine-tune the best, and test what is best in the end."""
        extent = self.subject.extent
        self.made.clear()
        for tool, scores in ((OURS, extent.ours), (THEIRS, extent.theirs)):
            for cut in (Cut(tool, s, scope, where) for s in scores for where in WHERE for scope in SCOPES):
                self.row(cut, point)
        self.shortlist(point)
        for cut in self.finals(point):
            self.row(cut, point)
        self.shortlist(point)
        for tool in TOOLS:
            for row in ranked(self.here(point, tool), "re-estimated")[: extent.tuned]:
                self.add(row, "validation_tuned", "test_tuned")  # one fine-tuning serves both
            for setting in extent.settings:
                for row in ranked(self.here(point, tool), setting)[:1]:
                    self.add(row, tested(setting))

    def shortlist(self, point: float) -> None:
        """Validate on all images what is best on some of them."""
        for tool in TOOLS:
            for setting in UNTUNED:
                for row in ranked(self.here(point, tool), setting, "screen")[: self.subject.extent.shortlist]:
                    self.add(row, "validation", "validation_bn")

    def here(self, point: float, tool: str) -> list[Row]:
        """Return the rows of a point and tool."""
        return self.book.at(self.subject.name, point, self.subject.seed, tool)

    def finals(self, point: float) -> list[Cut]:
        """Return our best cuts of each setting, with every compensation that the setting allows."""
        plain = [r for r in self.here(point, OURS) if not r["compensation"]]
        found = {}
        for setting in UNTUNED:
            for row in ranked(plain, setting)[: self.subject.extent.finalists]:
                for name, use in COMPENSATIONS.items():
                    if (setting == "data-free") == (use == "noise") or use == "none":
                        found[replace(cut_of(row), compensation=name)] = None
        return list(found)

    def small(self, cut: Cut, point: float) -> nn.Module:
        """Return the smaller network of a cut, which is made once for each point."""
        if cut not in self.made:
            self.made[cut] = self.cutters[cut.tool].cut(cut, point)
        return self.made[cut]

    def row(self, cut: Cut, point: float) -> None:
        """Cut and screen, unless that has been done."""
        subject = self.subject
        row: Row = {"model": subject.name, "point": point, "seed": subject.seed, "name": cut.name}
        row |= {"tool": cut.tool, "score": cut.score, "scope": cut.scope, "where": cut.where}
        row |= {"compensation": cut.compensation, "data_free": cut.data_free}
        known = self.book.rows.get(key(row))
        if known is not None and "reason" not in known:
            return
        start = time.perf_counter()
        try:
            small = self.small(cut, point)
            row["removed"] = round(subject.removed(small), 5)
            row["digest"] = digest(small.state_dict())
            if abs(row["removed"] - point) <= NEAR:
                row |= self.values(row, ("screen", "screen_bn"), lambda: small)
        except Exception as error:  # whatever it is, it is the finding
            row["reason"] = f"{type(error).__name__}: {str(error)[:200]}"
        row["seconds"] = round(time.perf_counter() - start, 1)
        self.say(self.book.write(row))

    def add(self, row: Row, *wanted: str) -> None:
        """Add accuracies that a row lacks, such as "validation", "test_bn" or "validation_tuned"."""
        missing = [name for name in wanted if name not in row]
        if missing:
            start = time.perf_counter()
            found = self.values(row, missing, lambda: self.small(cut_of(row), row["point"]))
            self.say(self.book.write(row | found | {"seconds": round(time.perf_counter() - start, 1)}))

    def values(self, row: Row, wanted: Sequence[str], make: Callable[[], nn.Module]) -> dict[str, float]:
        """Return accuracies of a cut, where one was measured those of an equal network."""
        found: dict[str, float] = {}
        changed: dict[tuple[str, bool], nn.Module] = {}
        for name in wanted:
            known = self.book.same(row, name)
            if known is None:
                use, _, how = name.partition("_")
                form = (how, use == "screen")
                if form not in changed:
                    small = make()
                    small = self.subject.reestimated(small, use) if how == "bn" else small
                    changed[form] = self.subject.tuned(small) if how == "tuned" else small
                known = self.subject.accuracy(changed[form], use)
            found[name] = known
        return found

    def say(self, row: Row) -> None:
        """Print a line about a row."""
        shares = [f"{k} {row[k]:.4f}" for k in row if k.startswith(("screen", "validation", "test"))]
        head = f"{row['model']} seed {row['seed']} {row['point']:.0%} {row['tool']:13} {row['name']:36}"
        text = row.get("reason") or f"removed {row['removed']:.2%} {'  '.join(shares) or 'too far off'}"
        print(f"{head} {row['seconds']:6.1f} s  {text}", flush=True)


# -- the report -----------------------------------------------------------------------------------------------------


def best(book: Book, extent: Extent, model: str, point: float, setting: str, tool: str) -> list[tuple[Row, float]]:
    """Return for every seed that has one the cut chosen on validation, and its test accuracy."""
    value = tested(setting)
    chosen = [ranked(book.at(model, point, seed, tool), setting)[:1] for seed in extent.seeds]
    return [(rows[0], rows[0][value]) for rows in chosen if rows and value in rows[0]]


def judged(book: Book, extent: Extent) -> Outcome:
    """Return the best of both tools at every point and setting; ours is to be as good, on the mean over seeds."""
    results, goals = [], []
    for model in extent.models:
        for setting in extent.settings:
            for point in extent.points:
                found = {tool: best(book, extent, model, point, setting, tool) for tool in TOOLS}
                means = {tool: mean([value for _, value in pairs]) for tool, pairs in found.items()}
                row: Row = {"model": model, "setting": setting, "point": point}
                for tool, pairs in found.items():
                    row[tool] = {
                        "test": [round(value, 4) for _, value in pairs],
                        "cuts": [chosen["name"] for chosen, _ in pairs],
                        "removed": [chosen["removed"] for chosen, _ in pairs],
                        "measured": len([r for s in extent.seeds for r in book.at(model, point, s, tool)]),
                    }
                results.append(row)
                gained = means[OURS] - means[THEIRS]
                goals.append(at_least(f"{model} {setting} {point:.0%}: our best minus its best", gained, 0.0))
    return {"results": results, "goals": goals}


def mean(values: Sequence[float]) -> float:
    """Return the mean, NaN of nothing."""
    return statistics.fmean(values) if values else math.nan


def table(book: Book, extent: Extent) -> str:
    """Return the report in Markdown: the best of both tools, then every cut on validation."""
    lines = ["# Accuracy after removing channels, at equal multiply-accumulates", ""]
    lines += ["CIFAR-10 test accuracy in percent (mean over seeds, lowest to highest) of the cut that is best on"]
    lines += ["validation images. Settings and rules: `benchmarks/structured_accuracy.py`.", ""]
    length = f"{extent.training.steps} steps" if extent.training.steps else f"{extent.training.epochs} epoch"
    lines += [f'{extent.test:,} test images, {len(extent.seeds)} seeds at most; "one epoch" means {length} here.', ""]
    lines += [f"Compensation ({', '.join(COMPENSATIONS)}) exists in {OURS} only and adds cuts to choose from.", ""]
    for model in extent.models:
        for setting in extent.settings:
            lines += [f"## {model}, {setting}", ""]
            lines += [f"| MACs removed | {OURS} | cut | {THEIRS} | cut | difference |", f"|{'---|' * 6}"]
            for point in extent.points:
                cells, means = [f"{point:.0%}"], []
                for tool in TOOLS:
                    pairs = best(book, extent, model, point, setting, tool)
                    values = [value for _, value in pairs]
                    means.append(mean(values))
                    spread = f" ({min(values):.2%} - {max(values):.2%}, {len(values)})" if len(set(values)) > 1 else ""
                    cells += [f"{mean(values):.2%}{spread}" if values else "", "; ".join(_names(pairs))]
                gained = means[0] - means[1]
                lines.append(f"| {' | '.join(cells)} | {'' if math.isnan(gained) else f'{100 * gained:+.2f}'} |")
            lines.append("")
        lines += _every(book, extent, model)
    failed = [r for r in book.rows.values() if "reason" in r]
    off = [r for r in book.rows.values() if "removed" in r and abs(r["removed"] - r["point"]) > NEAR]
    lines += [f"{len(book.rows)} cuts, {len(failed)} failed, {len(off)} more than a point off their target.", ""]
    reasons = {f"- {r['tool']} {r['name']}: {r['reason']}".replace("|", "\\|") for r in failed}
    return "\n".join([*lines, *sorted(reasons)]).rstrip() + "\n"


def _names(pairs: Sequence[tuple[Row, float]]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row, _ in pairs))


def _every(book: Book, extent: Extent, model: str) -> list[str]:
    """Return two tables of accuracies on the screen, with BatchNorm statistics as they were and re-estimated."""
    lines = []
    for value, title in (("screen", "statistics as they were"), ("screen_bn", "statistics re-estimated")):
        rows = [r for r in book.rows.values() if r["model"] == model and value in r]
        lines += [f"## {model}, every cut on {extent.screen} validation images, {title}", ""]
        lines += [f"| tool | cut | {' | '.join(f'{p:.0%}' for p in extent.points)} |"]
        lines += [f"|{'---|' * (2 + len(extent.points))}"]
        for tool, name in sorted({(r["tool"], r["name"]) for r in rows}):
            mine = [r for r in rows if (r["tool"], r["name"]) == (tool, name)]
            shares = [mean([r[value] for r in mine if r["point"] == p]) for p in extent.points]
            cells = " | ".join("" if math.isnan(s) else f"{s:.1%}" for s in shares)
            lines.append(f"| {tool} | {name} | {cells} |")
        lines.append("")
    return lines


def plot(book: Book, extent: Extent, path: Path) -> None:
    """Draw test accuracy against removed multiply-accumulates, one row of panels for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (len(extent.models), len(extent.settings))
    figure, axes = pyplot.subplots(*size, figsize=(4 * size[1], 3.4 * size[0]), squeeze=False, sharey="row")
    for panels, model in zip(axes, extent.models, strict=True):
        for panel, setting in zip(panels, extent.settings, strict=True):
            for tool, colour in zip(TOOLS, ("C0", "C1"), strict=True):
                found = {p: [v for _, v in best(book, extent, model, p, setting, tool)] for p in extent.points}
                xs = sorted(p for p, values in found.items() if values)
                panel.plot([100 * p for p in xs], [100 * mean(found[p]) for p in xs], "o-", color=colour, label=tool)
                low, high = [100 * min(found[p]) for p in xs], [100 * max(found[p]) for p in xs]
                panel.fill_between([100 * p for p in xs], low, high, color=colour, alpha=0.2)
            panel.set(title=f"{model}, {setting}", xlabel="MACs removed, %")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("test accuracy, %")
        panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


# -- the benchmark --------------------------------------------------------------------------------------------------


def options_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cuts of ResNet-20 at two points, in files of its own")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this one; repeatable")
    parser.add_argument("--point", action="append", type=float, help="only this share of MACs; repeatable")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--tune", type=int, help="how many cuts of each tool are fine-tuned at each point; 0: none")
    parser.add_argument("--table", action="store_true", help="measure nothing, judge and write what the file has")
    return parser.parse_args(argv)


def extent_of(quick: bool, options: argparse.Namespace) -> Extent:
    """Return how much the options ask for."""
    extent = QUICK if quick else FULL
    asked: dict[str, Any] = {
        "models": options.model and tuple(options.model),
        "points": options.point and tuple(options.point),
        "seeds": options.seeds and tuple(range(options.seeds)),
        "tuned": options.tune,
    }
    return replace(extent, **{k: v for k, v in asked.items() if v is not None})


def subjects(extent: Extent) -> Iterator[Subject]:
    """Yield every network with every seed, the first seed of all networks first."""
    splits = load("cifar10", validation=2000).map(lambda part: part.normalised_by(IMAGENET_MEAN, IMAGENET_STD))
    for seed in extent.seeds:
        for model in extent.models:
            yield Subject(model, seed, splits, extent)


def run(quick: bool, options: argparse.Namespace | None = None) -> Outcome:
    """Measure what is asked for and not yet in the file, then write table and plot.

    Args:
        quick: few cuts of the small network at two points.
        options: of the command line; default none.

    Raises:
        DataMissing: images or checkpoints are not there.
    """
    options = options_of([]) if options is None else options
    extent = extent_of(quick, options)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("structured_accuracy-quick.jsonl" if quick else "structured_accuracy.jsonl")
    book = Book(path)
    with threads(1):
        for subject in [] if options.table else subjects(extent):
            study = Study(subject, book)
            for point in extent.points:
                study.point(point)
                path.with_suffix(".md").write_text(table(book, extent))
    path.with_suffix(".md").write_text(table(book, extent))
    plot(book, extent, path.with_suffix(".svg"))
    return judged(book, extent)


if __name__ == "__main__":
    given = options_of()
    sys.exit(main(partial(run, options=given), __doc__, ["--quick"] if given.quick else []))
