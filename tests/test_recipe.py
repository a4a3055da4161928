"""Recipes: one set of names for YAML, flags and Python; everything else is refused with the remedy."""

from __future__ import annotations

import pytest

from prunus.errors import InvalidValue, PrunusError, RecipeError, UnknownName
from prunus.methods.registry import METHODS
from prunus.run.cells import cells, make_method
from prunus.run.recipe import Recipe, build, from_flags, named, slug
from prunus.run.recipe_files import MAX_BYTES, find, packaged, parse_yaml, read

BASE = {"title": "t", "data": "digits", "model": "mlp", "methods": ["dense", "rigl"], "training": {"epochs": 3}}


def flags(*words: str) -> Recipe:
    return from_flags(BASE, words, source="base")


def test_yaml_and_flags_give_the_same_recipe() -> None:
    text = "\n".join(
        [
            "title: t",
            "data: digits",
            "model: {name: mlp, hidden: [32]}",
            "methods: [{name: RigL, growth: random}]",
            "sparsities: [0.95]",
            "seeds: [1, 2, 3]",
            "training: {epochs: 3, lr: 0.05}",
        ]
    )
    written = build(parse_yaml(text, "t"))
    typed = flags(
        "--method", "RigL", "--method.growth=random", "--method.sparsity", "0.95", "--seeds", "1,2,3",
        "--training.lr", "0.05", "--model.hidden", "[32]",
    )  # fmt: skip
    assert typed == written


def test_flags_leave_everything_else_as_it_was() -> None:
    assert flags() == build(BASE)
    assert flags("--training.steps", "7").training.epochs is None


@pytest.mark.parametrize("name", sorted(packaged()))
def test_every_packaged_recipe_is_valid_and_survives_a_round_trip(name: str) -> None:
    recipe = build(read(find(name)), source=name)
    assert build(recipe.to_dict()) == recipe
    assert cells(recipe)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: &x [1]\nb: *x", "anchors"),
        ("a: [*x]", "aliases"),
        ("a: !!python/object/apply:os.system [echo]", "tag"),
        ("title: a\ntitle: b", "twice"),
        ("- 1", "list"),
        ("title: [", "YAML"),
        ("1: 2", "not text"),
        ("sparsites: [0.9]", "'sparsities'"),
        ("training: {learning_rate: 1}", "no 'learning_rate'"),
        ("training: {lr: fast}", "lr"),
        ("data: {class_path: os.system}", "class path"),
        ("methods: {class_path: os.system}", "methods"),
        ("methods: [{growth: random}]", "no name"),
        ("methods: []", "empty"),
        ("seeds: [1, 1]", "twice"),
        ("methods: [rigl, {name: rigl, growth: random}]", "label"),
        ("methods: [{name: rigl, label: '///'}]", "label"),
        ("methods: [{name: rigl, start: middle}]", "start"),
        ("title: " + "[" * 5000, "YAML"),
    ],
)
def test_bad_recipes_are_refused(text: str, word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(parse_yaml(text, "bad.yaml"))
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("words", "kind", "hint"),
    [
        (("--trainng.lr", "1"), RecipeError, "--training.lr"),
        (("--training.lr", "abc"), RecipeError, "training.lr"),
        (("--method", "rigle"), UnknownName, "'rigl'"),
        (("--method", "rigl", "--method.grow", "1"), UnknownName, "'growth'"),
        (("--method.growth", "random"), RecipeError, "--method NAME"),
        (("--method",), RecipeError, "needs a value"),
        (("--sparsities", "0.9,1.2"), InvalidValue, "1.2"),
        (("--sparsities", "90"), InvalidValue, "0.9"),
        (("--data", "cifar11"), UnknownName, "cifar10"),
        (("--model", "resnet21"), UnknownName, "resnet20"),
        (("--training.optimizer", "sdg"), UnknownName, "sgd"),
        (("--training.epochs", "-1"), InvalidValue, "epochs"),
    ],
)
def test_bad_flags_are_refused(words: tuple[str, ...], kind: type[PrunusError], hint: str) -> None:
    with pytest.raises(kind) as caught:
        flags(*words)
    assert hint in str(caught.value)


def test_a_huge_recipe_is_not_read(tmp_path) -> None:
    path = tmp_path / "huge.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="at most"):
        read(path)


def test_a_missing_recipe_suggests_packaged_ones() -> None:
    with pytest.raises(RecipeError, match="digits"):
        find("digts")


def test_every_method_of_the_catalogue_can_be_named_in_a_recipe() -> None:
    for entry in METHODS:
        recipe = build(BASE | {"methods": [entry.name]})
        assert cells(recipe)[0].sparsity == 0.9
        method = make_method(recipe.methods[0], 0.9)
        assert (method is None) == (entry.kind == "procedure")


def test_cells_are_every_method_at_every_sparsity_and_dense_once() -> None:
    found = cells(build(BASE | {"sparsities": [0.5, 0.9], "seeds": [3, 4]}))
    assert [(c.name, c.seed) for c in found] == [
        ("dense", 3), ("rigl-0.5", 3), ("rigl-0.9", 3), ("dense", 4), ("rigl-0.5", 4), ("rigl-0.9", 4),
    ]  # fmt: skip


def test_names_and_slugs() -> None:
    assert named("x", "data") == {"name": "x"}
    assert slug("one-shot (l1), 2:4") == "one-shot-l1-2-4"
