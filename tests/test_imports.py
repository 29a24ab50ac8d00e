"""Imports point one way: down the table in CONTRIBUTING.md, which names every module."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "infuse"
TABLE = re.findall(r"^\| (`.+?`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path.parent != SOURCE or path.stem != "__init__"]


def row(path):
    """The number of a module's row."""
    names = (path.relative_to(SOURCE).as_posix(), f"{path.relative_to(SOURCE).parts[0]}/")
    return next((i for i, cell in enumerate(TABLE) if set(re.findall(r"`(.+?)(?:\*\.py)?`", cell)) & set(names)), None)


def imported(path):
    """Modules of Infuse that a module imports from, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("infuse"):
            above = SOURCE.joinpath(*node.module.split(".")[1:])
            for name in node.names:
                inner = above / f"{name.name}.py"
                yield inner if inner.exists() else above if above.is_dir() else above.with_suffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_down_the_table(path):
    assert row(path) is not None, "CONTRIBUTING.md does not say what this module is for"
    up = [each for each in imported(path) if each != SOURCE and row(each) < row(path)]
    assert not up, f"{path} imports from above: {up}"
