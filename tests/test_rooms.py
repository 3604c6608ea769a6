"""The table of rooms against the imports: from the top to the bottom, never up, and nothing in circles."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top to the bottom: a module imports from its own room and from those below, never up.
ROOMS = (
    ("train", "ensemble_eval", "predict", "export"),
    ("command_line",),
    ("assembly", "agreement"),
    ("config",),
    ("recipes",),
    ("ensemble",),
    ("training",),
    ("data",),
    ("nets",),
    # The run folder, where the stages meet, and below it the device.
    ("run_state",),
    ("run_folder",),
    ("run_checkpoint", "run_schema", "run_lock", "snapshot"),
    ("run_files", "device", "printing"),
    ("limits", "waiting"),
    ("kernels",),
)
HEIGHT = {room: -index for index, rooms in enumerate(ROOMS) for room in rooms}


def module_name(file: Path) -> str:
    """fastsnap.training.flat for fastsnap/training/flat.py, fastsnap.kernels.update for kernels/update.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "fastsnap" else ("fastsnap", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for room in ("fastsnap", "kernels") for file in (ROOT / room).rglob("*.py")}


def imports(module: str) -> set[str]:
    """Modules of the project that `module` imports anywhere in its file, also within functions."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    named: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            named |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return named & FILES.keys()


def names_of_the_package(module: str) -> set[str]:
    """What `module` imports from `fastsnap` itself, modules aside: its lazy names come from all rooms."""
    nodes = [
        node for node in ast.walk(ast.parse(FILES[module].read_text())) if isinstance(node, ast.ImportFrom)
    ]
    named = {
        alias.name for node in nodes if node.module == "fastsnap" and not node.level for alias in node.names
    }
    return {
        name
        for name in named
        if not any(f"fastsnap.{name}" == other or other.startswith(f"fastsnap.{name}.") for other in FILES)
    }


def room(module: str) -> str:
    """Of "fastsnap.training.flat": training."""
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(FILES.keys() - {"fastsnap"}))
def test_a_module_has_a_room_and_imports_nothing_from_above_it(module: str) -> None:
    assert room(module) in HEIGHT
    above = {other for other in imports(module) - {"fastsnap"} if HEIGHT[room(other)] > HEIGHT[room(module)]}
    assert above == set()
    assert names_of_the_package(module) <= {"__version__"}


def test_no_imports_go_in_circles() -> None:
    # A package's __init__ is imported by all that is in it; those of the rooms hold no code.
    graph = {module: imports(module) - {"fastsnap"} for module in FILES if module != "fastsnap"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_doors_do_not_import_each_other() -> None:
    doors = {f"fastsnap.{door}" for door in ROOMS[0]}
    assert [door for door in doors if imports(door) & doors] == []


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for file in (ROOT / "kernels").glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        extra = {"rich"} if file.stem == "report" else set()  # a command line, which prints a table
        assert {name.split(".")[0] for name in named} <= allowed | extra, file
