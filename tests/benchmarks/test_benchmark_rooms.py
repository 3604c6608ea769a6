"""Imports of the benchmarks point one way: doors, targets, benchmarks, opponents, harness; none in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).parents[2] / "benchmarks"
DOORS = ("run", "report", "gpu_check", "cost_model")
BENCHMARKS = (*run.BENCHMARKS, "training")
PARTS = ("pictures",)  # of a benchmark: the pipelines
ROOMS = (DOORS, ("targets",), BENCHMARKS, PARTS, ("opponents",), ("harness",))  # from the top to the bottom
HEIGHT = {room: -index for index, rooms in enumerate(ROOMS) for room in rooms}
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in ROOT.rglob("*.py")
    if file.name != "__init__.py"
}


def imports(module: str) -> set[str]:
    """Modules of the benchmarks that `module` imports, also within functions."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: scripts cannot import relatively"
            named |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return named & FILES.keys()


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_file_has_a_room_and_imports_nothing_from_above_it(module: str) -> None:
    assert room(module) in HEIGHT
    above = {other for other in imports(module) if HEIGHT[room(other)] > HEIGHT[room(module)]}
    assert above == set()


def test_benchmarks_do_not_import_each_other() -> None:
    assert [name for name in BENCHMARKS if imports(name) & set(BENCHMARKS)] == []


def test_no_imports_of_benchmarks_go_in_circles() -> None:
    TopologicalSorter({module: imports(module) for module in FILES}).prepare()
