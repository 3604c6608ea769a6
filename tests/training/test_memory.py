"""What a run will take of memory and disk: against what runs take, and refused where there is less."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastsnap.limits import Room
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunFolder
from fastsnap.training.memory import (
    Footprint,
    evaluation_needs,
    footprint,
    require_disk,
    require_memory,
    require_training_memory,
    training_needs,
)

FACTOR = 1.25  # between estimate and measurement
LIVE_FACTOR = 2.0  # the peak of one net varied from run to run between 500 and 800 MB
GB = 10**9
# What a process took at its peak above what it had before, images of CIFAR-100 in batches of 64, one thread.
MEASURED = {
    ("resnet20", "fp32"): 176e6,
    ("resnet20", "bf16"): 100e6,
    ("resnet110", "fp32"): 648e6,
    ("resnet110", "bf16"): 398e6,
    ("resnet32x4", "fp32"): 917e6,
    ("resnet32x4", "bf16"): 485e6,
}


def size_of(net: str, classes: int = 100, channels: int = 3, pixels: int = 32) -> Footprint:
    network = build_network(net, classes=classes, in_channels=channels, device="meta")
    return footprint(network, (channels, pixels, pixels))


def total(net: str, images: int, precision: str = "fp32") -> int:
    return sum(training_needs(size_of(net), images, half=precision != "fp32").values())


@pytest.mark.parametrize(("net", "precision"), MEASURED)
def test_the_estimate_is_near_what_was_measured(net, precision):
    assert 1 / FACTOR < total(net, 64, precision) / MEASURED[net, precision] < FACTOR


MEASURE = """
import resource, sys, torch
from fastsnap.config import make_config
from fastsnap.data.datasets import load_dataset
from fastsnap.run_folder import RunFolder
from fastsnap.assembly import build_trainer, settle
from fastsnap.training.allocator import keep_freed_memory
from fastsnap.training.progress import ProgressDisplay
from rich.console import Console

torch.set_num_threads(1)
keep_freed_memory()
layer = torch.nn.Conv2d(16, 16, 3)  # forward and backward, so that the libraries are there
layer(torch.randn(1, 16, 8, 8)).sum().backward()
data = load_dataset("digits", train_images=int(sys.argv[2]))
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
trainer = build_trainer(settle(make_config(net=sys.argv[1], epochs=1, cycles=1, batch_size=int(sys.argv[2]),
                        precision="fp32", loader="torch", out=sys.argv[3])), data, RunFolder(sys.argv[3]))
with ProgressDisplay(Console(quiet=True), 0, trainer.schedule.steps) as display:
    trainer.run(display)
# Not getrusage's peak, which begins with that of the program that started this one.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(1024 * int(peak.split()[1]) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(("net", "images"), [("resnet44", 1437), ("resnet8x16", 100)])
def test_the_estimate_is_near_what_a_run_takes(net, images, tmp_path):
    """Mostly what the images leave, and mostly parameters; so much that libraries are little beside it."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, net, str(images), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    estimate = sum(training_needs(size_of(net, 10, 1, 8), images, half=False).values())
    assert 1 / LIVE_FACTOR < estimate / int(done.stdout) < LIVE_FACTOR, done.stdout


def test_outputs_and_parameters_are_counted_exactly():
    """ResNet-8: seven convolutions, each with its normalisation, and the linear layer."""
    size = size_of("resnet8", classes=10)
    pairs = [16 * 32 * 32] * 3 + [32 * 16 * 16] * 2 + [64 * 8 * 8] * 2
    assert sorted(size.outputs) == sorted([*pairs, *pairs, 10])
    real = build_network("resnet8", classes=10)
    assert size.parameters == 4 * sum(tensor.numel() for tensor in real.state_dict().values())


@pytest.mark.parametrize("net", ["resnet20", "resnet110", "resnet32x4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_documented_runs_fit_into_8_gb(net, precision):
    half = precision == "bf16"
    room = Room(6 * GB, "free on this machine")  # the rest is the system's and the program's
    require_training_memory(size_of(net), 64, room, half=half)
    require_memory("it", evaluation_needs(size_of(net), 250, 10_000, 100, 5), room, "")


@pytest.mark.parametrize("net", ["resnet8x999", "resnet1202x999"])
def test_a_net_that_fits_nowhere_is_refused_with_figures(net):
    with pytest.raises(
        ValueError, match=r"takes about [\d,]+ GB of memory \(parameters .* 22\.0 GB are free"
    ) as error:
        require_training_memory(size_of(net), 64, Room(22 * GB, "free on this machine"), half=False)
    assert str(error.value).endswith("use a smaller --net")


@pytest.mark.parametrize("images", [10_000, 10**12])
def test_too_large_a_batch_is_refused_and_the_largest_that_fits_is_named(images):
    network, room = size_of("resnet110"), Room(8 * GB, "left of the container's limit of 8.00 GB")
    with pytest.raises(ValueError, match="container's limit of 8") as error:
        require_training_memory(network, images, room, half=False)
    most = int(str(error.value).split("--batch-size ")[1].split(" ")[0].replace(",", ""))
    require_training_memory(network, most, room, half=False)
    with pytest.raises(ValueError, match="would fit"):
        require_training_memory(network, most + 1, room, half=False)


def test_logits_and_images_count_in_an_evaluation():
    network = size_of("resnet20")
    least = evaluation_needs(network, 250, 10_000, 100, 1)
    assert least["logits of 1 snapshots for 10,000 images"] == 4 * 10_000 * 100
    needs = evaluation_needs(network, 250, 10_000, 100, 10_000)
    with pytest.raises(
        ValueError, match=r"it takes about [\d.]+ GB .*logits of 10,000 snapshots .* 40\.0 GB.*: do less"
    ):
        require_memory("it", needs, Room(16 * GB, "free"), "do less")
    assert evaluation_needs(network, 10**12, 360, 10, 1) == evaluation_needs(network, 360, 360, 10, 1)


def test_where_nothing_says_how_much_there_is_nothing_is_refused():
    require_training_memory(size_of("resnet8x999"), 64, None, half=False)


def test_a_copy_of_the_data_set_on_the_device_counts():
    room = Room(2 * GB, "free on the GPU")
    require_training_memory(size_of("resnet20"), 64, room, half=False, copied=10**9)
    with pytest.raises(
        ValueError, match=r"the data set 1\.90 GB.*free on the GPU: --batch-size 22 would fit"
    ):
        require_training_memory(size_of("resnet20"), 64, room, half=False, copied=2 * GB - 10**8)


def test_a_disk_that_cannot_hold_the_snapshots_is_refused_with_figures(tmp_path):
    """resnet8x999 has 71 GB a snapshot, so that no disk holds a million of them."""
    with pytest.raises(
        ValueError, match=r"1,000,000 snapshots of \d+ GB, .* need .* GB more .*free on the disk of"
    ):
        require_disk(size_of("resnet8x999"), tmp_path / "not" / "there", 10**6, 0)
    require_disk(size_of("resnet20"), tmp_path / "not" / "there", 5, 0)
    assert not (tmp_path / "not").exists()


def test_what_is_saved_already_needs_no_more_disk(tmp_path):
    size = size_of("resnet20")
    too_many = shutil.disk_usage(tmp_path).free // size.parameters + 1000
    with pytest.raises(ValueError, match="free some space"):
        require_disk(size, tmp_path, too_many, 0)
    folder = RunFolder(tmp_path)
    for place in ("snapshots", "replaced-2026/snapshots"):
        (tmp_path / place).mkdir(parents=True)
        with (tmp_path / place / "snapshot-01.safetensors").open("wb") as file:
            file.truncate(5000 * size.parameters)  # sparse
    (tmp_path / "snapshots" / "snapshot-02.safetensors").symlink_to("nowhere")
    assert folder.bytes_of_tensors() == 5000 * size.parameters  # what was moved aside will not be overwritten
    require_disk(size, tmp_path, too_many, folder.bytes_of_tensors())
