"""What is installed, and that importing does nothing. What imports what: test_rooms.py."""

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = {
    *("nvidia.dali", "matplotlib.pyplot"),
    *("onnx", "onnxruntime", "timm", "lightning", "transformers", "accelerate", "tensorboard"),
}


def test_importing_starts_no_cuda_opens_no_window_and_prints_nothing() -> None:
    extra = ("__init__", "dali_", "lightning", "transformers")  # that need one to be imported
    files = [file for file in (ROOT / "fastsnap").rglob("*.py") if not file.stem.startswith(extra)]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    # Triton is not everywhere.
    plain = [file.stem for file in (ROOT / "kernels").glob("*.py") if "triton" not in file.read_text()]
    modules += [f"fastsnap.kernels.{name}" for name in plain if name != "__init__"]
    code = "; ".join(
        [
            *(f"import {module}" for module in modules),
            "import sys, torch",
            "assert not torch.cuda.is_initialized()",
            f"unwanted = {OPTIONAL} & set(sys.modules)",
            "assert not unwanted, unwanted",
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
import torch
from fastsnap import Schedule, SnapshotSGD, average_members, save_snapshot
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = SnapshotSGD([parameter], Schedule("snapshot", 10, 2, 0.1))
parameter.sum().backward()
optimizer.step()
average_members(torch.zeros(2, 3, 4))
assert not {"torchvision", "matplotlib", "sklearn", "rich", "nvidia.dali"} & set(sys.modules)
try:
    fastsnap.Snapshot
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'fastsnap' has no attribute 'Snapshot'\n"


def copy_source(folder: Path) -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Into the folder of the source."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(source), str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def wheel_in(folder: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(folder.glob("*.whl")))


NO_COMPILER = {"CC": "/no/such/cc", "CXX": "/no/such/c++"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    copy_source(folder)
    build_wheel(folder).check_returncode()
    return wheel_in(folder)


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
    assert "fastsnap/py.typed" in names  # type checkers then read the annotations
    assert "fastsnap/ensemble/page.html" in names


WITHOUT_A_COMPILER = """
import torch
from fastsnap import Schedule, SnapshotSGD, average_members
from fastsnap.nets.build import build_network
from fastsnap.nets.resnet import KERNEL_OPERATIONS, PLAIN_OPERATIONS

def train(operations, make_optimizer):
    torch.manual_seed(0)
    net = build_network("resnet8", classes=10, operations=operations).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(net)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(images).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([parameter.flatten() for parameter in net.parameters()])

ours = train(KERNEL_OPERATIONS, lambda net: SnapshotSGD(net.named_parameters(), Schedule("step", 10, 1, 0.1)))
torchs = train(
    PLAIN_OPERATIONS,
    lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
)
torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
statistics = average_members(torch.zeros(3, 5, 4), torch.arange(5) % 4, probabilities=True)
assert statistics.probabilities.dtype == statistics.confidence.dtype == torch.float32
assert statistics.confidence.eq(0.25).all() and statistics.label_rank[-1].tolist() == [0, 1, 2, 3, 0]
"""


def test_without_a_compiler_it_installs_trains_and_averages_and_says_once_what_is_lost(
    tmp_path: Path,
) -> None:
    copy_source(tmp_path)
    done = build_wheel(tmp_path, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count("fastsnap: installing without its C++ kernels") == 1
    (line,) = [line for line in said.splitlines() if "no C++ compiler with OpenMP works here: " in line]
    assert "/no/such/c" in line

    installed = tmp_path / "installed"
    wheel_in(tmp_path).extractall(installed)
    assert not list(installed.rglob("*.so"))
    command = [sys.executable, "-W", "always", "-c", WITHOUT_A_COMPILER]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=installed
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning: fastsnap was installed without a C++ compiler") == 1
    assert "an update takes about 5 times as long" in done.stderr
    assert "install a C++ compiler" in done.stderr


def test_an_error_in_a_kernel_is_an_error_and_no_lack_of_a_compiler(tmp_path: Path) -> None:
    copy_source(tmp_path)
    (tmp_path / "kernels" / "instructions.cpp").write_text("int broken(")
    assert build_wheel(tmp_path).returncode != 0
    assert not list(tmp_path.glob("*.whl"))


def test_make_names_the_compiler_that_is_missing_before_it_installs_anything(tmp_path: Path) -> None:
    copy_source(tmp_path)
    command = ["make", "train", f"PYTHON={sys.executable}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | NO_COMPILER, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "/no/such/c++ is missing" in done.stderr
    assert not (tmp_path / ".venv").exists()
    command += ["CXX=/no/such/other"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | NO_COMPILER, cwd=tmp_path
    )
    assert "/no/such/other is missing" in done.stderr


@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [
        ("fastsnap.training.lightning", "lightning.pytorch", "lightning"),
        ("fastsnap.training.transformers", "transformers", "transformers"),
    ],
)
def test_a_callback_without_its_library_names_the_extra(
    module: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"pip install 'fastsnap\[{extra}\]'"):
        importlib.import_module(module)
