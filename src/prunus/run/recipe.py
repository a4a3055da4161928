"""Recipes: what a run does, as YAML, as flags and as Python values, with one set of names and strict checking."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from prunus.errors import InvalidValue, PrunusError, RecipeError, did_you_mean
from prunus.run.recipe_files import parse_yaml
from prunus.train.training import Training

Named = str | dict[str, Any]

_OWN_METHOD_KEYS = ("name", "label", "start", "training")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on.

    Attributes:
        title: heading of the report and name of the run folder.
        data: a data set's name, or {"name": ..., options of its reader, "validation", "limit"}.
        model: a model's name, or {"name": ..., its options}.
        training: how every method trains, see `prunus.train.training.Training`.
        methods: method names, or {"name": ..., options, "label": ..., "training": {changes}, "start": "dense"};
            "dense" is the unpruned network.
        sparsities: shares of zeros, each method is run at each.
        seeds: each method is run with each.
        include, exclude: shell patterns of parameter names to prune or to leave alone.
        checkpoint_seconds: how often a long training saves its state.
        threads: CPU threads while the recipe runs, None for torch's own number. Tiny models are fastest with one.
    """

    title: str = "run"
    data: Named = "digits"
    model: Named = "mlp"
    training: Training = field(default_factory=Training)
    methods: list[Named] = field(default_factory=lambda: ["dense", "rigl"])
    sparsities: list[float] = field(default_factory=lambda: [0.9])
    seeds: list[int] = field(default_factory=lambda: [0])
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    checkpoint_seconds: float = 30.0
    threads: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe as JSON-ready values."""
        return asdict(self) | {"training": self.training.describe()}


def check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise `RecipeError` naming the first key that is not known, with the nearest ones."""
    for key in values:
        if key not in known:
            raise RecipeError(f"{where} has no {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}.")


def named(value: Any, where: str) -> dict[str, Any]:
    """Return "x" or {"name": "x", ...} as the latter (raises `RecipeError`)."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise RecipeError(f"{where} names a class path; recipes name things by their catalogue name (`prunus ls`).")
        if isinstance(value.get("name"), str):
            return dict(value)
        raise RecipeError(f"{where} has no name; write 'name: ...' first.")
    raise RecipeError(f"{where} must be a name or a mapping with a name, not {value!r}.")


@contextmanager
def _as_recipe_errors() -> Iterator[None]:
    try:
        yield
    except PrunusError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"{error}") from error


def build(values: Mapping[str, Any], *, source: str = "the recipe") -> Recipe:
    """Return the recipe that plain values describe, with every name in it checked.

    Raises:
        RecipeError: unknown keys, wrong types.
        UnknownName: unknown data set, model, method, or option; the message suggests near ones.
        InvalidValue: a value out of range.
    """
    known = [f.name for f in fields(Recipe)]
    check_keys(values, known, source)
    training = values.get("training", {})
    if isinstance(training, Mapping):
        check_keys(training, [f.name for f in fields(Training)], f"training in {source}")
    parsed = _typed(values)
    recipe = Recipe(
        **{n: getattr(parsed, n) for n in known if n != "training"}, training=Training(**vars(parsed.training))
    )
    _check(recipe)
    return recipe


def _typed(values: Mapping[str, Any]) -> Any:
    """Check types through jsonargparse, which the flags use as well."""
    from jsonargparse import ArgumentError

    try:
        return parser().parse_object(dict(values))
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        raise RecipeError(f"the recipe is not valid: {text}") from error


def parser() -> Any:
    """Return the jsonargparse parser with one flag per recipe value."""
    from jsonargparse import ArgumentParser

    made = ArgumentParser(prog="prunus run", exit_on_error=False, description=None)
    made.add_class_arguments(Recipe, None)
    return made


def _check(recipe: Recipe) -> None:
    from prunus.budget.allocate import check_fraction
    from prunus.data.registry import DATASETS
    from prunus.models.registry import MODELS

    DATASETS.entry(named(recipe.data, "data")["name"])
    model = named(recipe.model, "model")["name"]
    if "/" not in model:
        MODELS.entry(model)
    for name in ("methods", "sparsities", "seeds"):
        if not getattr(recipe, name):
            raise RecipeError(f"{name} is empty; give at least one.")
    for sparsity in recipe.sparsities:
        check_fraction("sparsity", sparsity, one_allowed=False)
    for name in ("sparsities", "seeds"):
        values = getattr(recipe, name)
        if len(set(values)) != len(values):
            raise RecipeError(f"{name} {values} names one twice.")
    if recipe.checkpoint_seconds <= 0:
        raise InvalidValue(f"checkpoint_seconds {recipe.checkpoint_seconds} must be above 0.")
    if recipe.threads is not None and recipe.threads < 1:
        raise InvalidValue(f"threads {recipe.threads} must be at least 1.")
    for spec in recipe.methods:
        check_method(spec)
    labels = [slug(label_of(m)) for m in recipe.methods]
    twice = sorted({n for n in labels if labels.count(n) > 1})
    if twice:
        raise RecipeError(f"two methods are called {twice[0]!r}; give one a 'label'.")


def check_method(spec: Named) -> None:
    """Raise unless `spec` names a known method with options it takes."""
    import inspect

    from prunus.errors import unknown
    from prunus.methods.registry import METHODS

    values = named(spec, "method")
    if values["name"] == "dense":
        check_keys(values, ["name", "label", "training"], "method 'dense'")
        return
    entry = METHODS.entry(values["name"])
    options = [p for p in inspect.signature(entry.load()).parameters if p not in ("run", "sparsity")]
    for option in values:
        if option not in (*_OWN_METHOD_KEYS, *options, "sparsity"):
            raise unknown(f"option of method {entry.name!r}:", option, [*options, *_OWN_METHOD_KEYS[1:], "sparsity"])
    if values.get("start", "dense") not in ("dense", "initial"):
        raise RecipeError(f"start {values['start']!r} of method {entry.name!r} must be 'dense' or 'initial'.")
    changes = values.get("training", {})
    if not isinstance(changes, Mapping):
        raise RecipeError(f"training of method {entry.name!r} must hold names and values.")
    check_keys(changes, [f.name for f in fields(Training)], f"training of method {entry.name!r}")


def label_of(spec: Named) -> str:
    """Return the name of a method in tables: its label, or its catalogue name."""
    from prunus.methods.registry import METHODS

    values = named(spec, "method")
    if "label" in values:
        label = str(values["label"])
        if not slug(label):
            raise RecipeError(f"the label {label!r} of a method has no letters or digits.")
        return label
    return "dense" if values["name"] == "dense" else METHODS.entry(values["name"]).name


def slug(label: str) -> str:
    """Return a label as a folder name: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.")


# -- flags ------------------------------------------------------------------------------------------------------

_LISTS = ("--seeds", "--sparsities", "--methods", "--include", "--exclude")


def from_flags(base: Mapping[str, Any], flags: Sequence[str], *, source: str) -> Recipe:
    """Return the recipe of `base` with the values that flags change.

    Flags have the names of the recipe: `--training.lr 0.05`, `--seeds 1,2,3`, `--sparsities 0.9,0.98`. `--method NAME`
    replaces the methods (repeat it for several); `--method.OPTION VALUE` sets an option of the method before it,
    `--method.sparsity` the sparsities, `--data.OPTION` and `--model.OPTION` those of the data set and the model.

    Raises:
        RecipeError, UnknownName, InvalidValue: as `build`.
    """
    from jsonargparse import ArgumentError

    # Flags are checked against a valid base, so that a complaint names the flag and not the file.
    recipe = build(base, source=source)
    rest, taken = _take_options(list(flags))
    known = [f"--{f.name}" for f in fields(Recipe)] + [f"--training.{f.name}" for f in fields(Training)]
    for flag in rest:
        name = flag.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise RecipeError(
                f"there is no flag {name!r}.{did_you_mean(name, [*known, '--method', '--out', '--json'])}"
            )
    values = recipe.to_dict()
    changed = parser()
    changed.set_defaults(_flat(values))
    try:
        with _as_recipe_errors():
            parsed = changed.parse_args(_listed(rest))
    except (ArgumentError, SystemExit) as error:
        raise RecipeError(f"a flag is not valid: {' '.join(str(error).split())}") from error
    result = {n: getattr(parsed, n) for n in values if n != "training"}
    result["training"] = _training(values["training"], vars(parsed.training))
    _apply_options(result, taken)
    return build(result, source="the flags")


def _training(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the training values; a length given by flag replaces the other kind of length in the file."""
    if after["steps"] is not None and after["steps"] != before["steps"] and after["epochs"] == before["epochs"]:
        after = after | {"epochs": None}
    if after["epochs"] is not None and after["epochs"] != before["epochs"] and after["steps"] == before["steps"]:
        after = after | {"steps": None}
    return after


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = {n: v for n, v in values.items() if n != "training"}
    return flat | {f"training.{n}": v for n, v in values["training"].items()}


def _listed(flags: list[str]) -> list[str]:
    """Let "--seeds 1,2,3" stand for "--seeds [1,2,3]"."""
    result: list[str] = []
    for i, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if equals and name in _LISTS and not value.startswith("["):
            result.append(f"{name}=[{value}]")
        elif i and flags[i - 1] in _LISTS and not flag.startswith("["):
            result.append(f"[{flag}]")
        else:
            result.append(flag)
    return result


def _take_options(flags: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split off the flags that belong to a named thing: --method, --method.OPTION, --data.OPTION, --model.OPTION."""
    rest: list[str] = []
    taken: list[tuple[str, str]] = []
    i = 0
    while i < len(flags):
        name, equals, value = flags[i].partition("=")
        i += 1
        if name != "--method" and not name.startswith(("--method.", "--data.", "--model.")):
            rest.append(flags[i - 1])
            continue
        if not equals:
            if i >= len(flags):
                raise RecipeError(f"the flag {name} needs a value.")
            value = flags[i]
            i += 1
        taken.append((name.removeprefix("--"), value))
    return rest, taken


def _apply_options(values: dict[str, Any], taken: Sequence[tuple[str, str]]) -> None:
    """Put the options that flags gave into the recipe's values."""
    methods: list[dict[str, Any]] = []
    for name, text in taken:
        kind, _, option = name.partition(".")
        option = option.replace("-", "_")
        if kind == "method" and not option:
            methods.append({"name": text})
            continue
        value = parse_yaml(f"value: {text}", f"--{name}")["value"]
        if kind != "method":
            values[kind] = named(values[kind], kind) | {option: value}
        elif option == "sparsity":
            values["sparsities"] = value if isinstance(value, list) else [value]
        elif not methods:
            raise RecipeError(f"--{name} belongs to a method; give --method NAME before it.")
        else:
            methods[-1][option] = value
    if methods:
        values["methods"] = methods
