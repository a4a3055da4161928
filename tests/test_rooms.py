"""The shape of the house: rooms import only rooms below them, catalogues import no torch, names mean what docs say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "prunus"

# Ground floor first; modules on one line may import each other.
FLOORS = [
    ["errors", "catalog", "files", "randomness"],
    ["parameters", "units", "schedule"],
    ["masks", "hold", "evidence", "input_norms", "stats", "scores", "budget", "distributed"],
    ["keep", "methods", "sparsifier"],
    ["data", "models"],
    ["measure"],
    ["graph"],
    ["train"],
    ["structured"],
    ["runtime"],
    ["run.lock", "run.store", "run.stages", "run.recipe_files", "run.recipe", "run.progress", "run.doctor"],
    ["procedures"],
    ["report"],
    ["oneshot"],
    ["run.cells", "run.plan", "run.driver", "run.verify"],
    ["cli", "__main__"],
]


def floor_of(module: str) -> int:
    """Return the floor of "prunus.room.file"."""
    inner = module.removeprefix("prunus.")
    for number, names in enumerate(FLOORS):
        if any(inner == n or inner.startswith(n + ".") for n in names):
            return number
    raise AssertionError(f"{module} has no floor; add its room to FLOORS and to docs/architecture.md")


def modules() -> dict[str, Path]:
    """Return every module with code of its own."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name != "__init__.py":
            found["prunus." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)] = path
    return found


def imports(tree: ast.AST, *, top_only: bool) -> set[str]:
    """Return the modules that a file imports, at its top level or anywhere, type-checking blocks left out."""
    found: set[str] = set()
    nodes = list(tree.body) if top_only else list(ast.walk(tree))  # type: ignore[attr-defined]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def typing_only(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            found |= {n.module for n in ast.walk(node) if isinstance(n, ast.ImportFrom) and n.module}
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_room_imports_only_rooms_below_it(module: str) -> None:
    tree = ast.parse(modules()[module].read_text())
    # Imports inside functions are how a door opens upward on purpose (`Masks.hold`); only the top level is structure.
    for other in imports(tree, top_only=True):
        if other.startswith("prunus.") and other != "prunus.__version__":
            assert floor_of(other) <= floor_of(module), f"{module} imports {other}, which stands above it"


def test_the_check_can_fail() -> None:
    assert floor_of("prunus.masks") < floor_of("prunus.train.loop")
    with pytest.raises(AssertionError):
        floor_of("prunus.attic")


def test_catalogues_and_packages_import_no_torch() -> None:
    names = [m for m in modules() if m.endswith(".registry")]
    packages = ["prunus." + ".".join(p.parent.relative_to(SOURCE).parts) for p in SOURCE.glob("*/__init__.py")]
    code = "import sys, importlib\n" + "".join(f"importlib.import_module({n!r})\n" for n in [*names, *packages])
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists() -> None:
    import prunus

    for name in prunus.__all__:
        assert getattr(prunus, name) is not None


def test_library_code_does_not_print_or_pickle() -> None:
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        used = imports(tree, top_only=False) - typing_only(tree)
        assert not used & {"pickle", "dill", "joblib", "cloudpickle", "socket.socket", "requests", "urllib.request"}, (
            module
        )
        if module in ("prunus.cli", "prunus.__main__"):
            continue
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert not [c for c in calls if c.func.id == "print"], f"{module} prints"  # type: ignore[attr-defined]


def test_foreign_checkpoints_are_read_as_weights_only() -> None:
    for module, path in modules().items():
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, f"{module}: {call}"


def test_the_architecture_page_names_every_room() -> None:
    text = (SOURCE.parent.parent / "docs" / "architecture.md").read_text()
    for room in sorted(p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists()):
        assert f"{room}/" in text, room
