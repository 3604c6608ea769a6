"""What is installed, what imports what, and that importing does nothing."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The direction of the data flow: a module may import those of its own line and of the lines before.
FLOW = (
    [
        "allocator",
        "schedule",
        "draws",
        "run_folder",
        "models",
        "progress",
        "flat",
        "optim_checks",
        "archives",
    ],
    ["downloads", "datasets", "optim", "apex", "step", "stopping"],
    ["pipeline", "dali_pipeline", "config", "metrics"],
    ["trainer", "evaluate"],
    ["plots"],
    ["ensemble_eval"],
    ["train"],
)


def imported_modules(file: Path, package: str) -> set[str]:
    """Absolute names of all modules that `file`, of `package`, imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([package, *([node.module] if node.module else [])])
                if node.level
                else str(node.module)
            )
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place_in_the_flow_and_imports_only_what_comes_before() -> None:
    place = {name: position for position, names in enumerate(FLOW) for name in names}
    modules = {file.stem for file in (ROOT / "fastsnap").glob("*.py")} - {"__init__"}
    assert modules == set(place)
    for module in modules:
        for name in imported_modules(ROOT / "fastsnap" / f"{module}.py", "fastsnap"):
            other = name.removeprefix("fastsnap.").split(".")[0]
            if name.startswith("fastsnap.") and other in place and other != module:
                assert place[other] <= place[module], f"{module} imports {other}"


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for file in (ROOT / "kernels").glob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(file, "fastsnap.kernels")}
        extra = {"rich"} if file.stem == "report" else set()  # a command line, which prints a table
        own = {name for name in imported_modules(file, "fastsnap.kernels") if name.startswith("fastsnap.")}
        assert all(name.startswith("fastsnap.kernels") for name in own), file
        assert roots - {"fastsnap"} <= allowed | extra, file


def test_importing_starts_no_cuda_opens_no_window_and_prints_nothing() -> None:
    modules = [name for names in FLOW for name in names if name not in ("dali_pipeline", "apex")]
    code = "; ".join(
        [
            *(f"import fastsnap.{name}" for name in modules),
            "import sys, torch",
            "assert not torch.cuda.is_initialized()",
            "assert 'nvidia.dali' not in sys.modules and 'matplotlib.pyplot' not in sys.modules",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
    ]
    subprocess.run([*command, str(folder), str(copy)], check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_ships_the_kernels_as_fastsnap_kernels_and_no_package_called_kernels(
    wheel: zipfile.ZipFile,
) -> None:
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert "kernels" not in tops
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastsnap"}
    for file in (ROOT / "kernels").glob("*.py"):
        assert f"fastsnap/kernels/{file.name}" in names
    for file in (ROOT / "fastsnap").glob("*.py"):
        assert f"fastsnap/{file.name}" in names
