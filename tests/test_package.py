"""What is installed, and that importing does nothing. What imports what: test_rooms.py."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_importing_starts_no_cuda_opens_no_window_and_prints_nothing() -> None:
    files = [
        file for file in (ROOT / "fastsnap").rglob("*.py") if file.stem not in ("__init__", "dali_pipeline")
    ]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    code = "; ".join(
        [
            *(f"import {module}" for module in modules),
            "import sys, torch",
            "assert not torch.cuda.is_initialized()",
            "assert 'nvidia.dali' not in sys.modules and 'matplotlib.pyplot' not in sys.modules",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_library_s_names_come_when_they_are_used_and_the_package_alone_brings_nothing() -> None:
    code = """
import sys, fastsnap
assert "torch" not in sys.modules
assert {"Schedule", "SnapshotSGD", "average_members", "save_snapshot"} <= set(dir(fastsnap))
from fastsnap import Schedule, SnapshotSGD, average_members, save_snapshot
assert Schedule("snapshot", 10, 2, 0.1).rate(0) == 0.1
assert not {"torchvision", "matplotlib", "sklearn", "rich", "nvidia.dali"} & set(sys.modules)
try:
    fastsnap.Snapshot
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'fastsnap' has no attribute 'Snapshot'\n"


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
    for file in (ROOT / "fastsnap").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in names
