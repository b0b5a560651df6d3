"""The arrows between modules point downward."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever it does so."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_support_imports_nothing_of_the_root_and_has_no_circle():
    arrows = {f"support.{x.stem}": imported(x) for x in (ROOT / "support").glob("*.py")}
    root = {path.stem for path in ROOT.glob("*.py")}
    assert {module: names & root for module, names in arrows.items() if names & root} == {}
    inside = {module: names & arrows.keys() for module, names in arrows.items()}
    assert "support.ranks" in inside["support.runs"]
    TopologicalSorter(inside).prepare()  # raises CycleError
