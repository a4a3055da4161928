"""Recipe files: strict, plain YAML, and the recipes that come with Prunus."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from prunus.errors import RecipeError, did_you_mean

MAX_BYTES = 1_000_000


class _Strict(yaml.SafeLoader):
    """Plain YAML: no anchors, aliases, tags or repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise RecipeError(f"aliases are not allowed in recipes ({self.peek_event().start_mark}); write it out.")
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise RecipeError(f"anchors are not allowed in recipes ({event.start_mark}); write it out.")
        if getattr(event, "tag", None):
            raise RecipeError(f"the tag {event.tag!r} is not allowed in recipes ({event.start_mark}).")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise RecipeError(f"the key {key!r} is not text ({key_node.start_mark}).")
            if key in seen:
                raise RecipeError(f"the key {key!r} is given twice ({key_node.start_mark}).")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Read plain YAML with text keys.

    Raises:
        RecipeError: not YAML, not a mapping, or with aliases, tags, repeated keys.
    """
    try:
        value = yaml.load(text, Loader=_Strict)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{source} is not valid YAML: {error}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{source} must hold names and values, not a {type(value).__name__}.")
    return value


def packaged() -> dict[str, Path]:
    """Return the recipes that come with Prunus, by name."""
    folder = resources.files("prunus") / "recipes"
    return {Path(str(f)).stem: Path(str(f)) for f in sorted(folder.iterdir(), key=str) if f.name.endswith(".yaml")}


def find(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with Prunus.

    Raises:
        RecipeError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = packaged()
    if str(name) in known:
        return known[str(name)]
    hint = did_you_mean(str(name), known)
    raise RecipeError(
        f"there is no recipe file {str(name)!r}.{hint} Recipes that come with Prunus: {', '.join(known)}."
    )


def read(path: Path) -> dict[str, Any]:
    """Read a recipe file (raises `RecipeError`)."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path} has {path.stat().st_size} bytes; a recipe has at most {MAX_BYTES}.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}.") from error
    return parse_yaml(text, str(path))


def summary_of(path: Path) -> str:
    """Return the first comment line of a recipe file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ")
    return ""
