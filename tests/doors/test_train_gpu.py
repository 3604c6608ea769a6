"""Training on a GPU, end to end: the CUDA graph, both precisions, resuming and evaluating. python -m pytest -m gpu"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from fastsnap import assembly, train
from fastsnap.config import make_config
from fastsnap.data.datasets import load_dataset
from fastsnap.ensemble.report import report_run
from fastsnap.kernels.schedule import Schedule
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunFolder
from fastsnap.training.optim import SnapshotSGD
from fastsnap.training.progress import ProgressDisplay, Status
from fastsnap.training.step import TrainStep
from fastsnap.training.stopping import TrainingStopped

pytestmark = pytest.mark.gpu
SCHEDULE = Schedule("snapshot", 40, 4, 0.1)


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's own choice of algorithms, and TF32, differ by more than what is tested here."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def console() -> Iterator[Console]:
    """One that nobody reads."""
    with open(os.devnull, "w") as nowhere:
        yield Console(file=nowhere)


def batches(count: int, last: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of 32 images, the last of `last`."""
    generator = torch.Generator().manual_seed(0)
    sizes = [32] * (count - 1) + [last]
    made = [
        (torch.randn(n, 3, 16, 16, generator=generator), torch.randint(10, (n,), generator=generator))
        for n in sizes
    ]
    return [(images.cuda().to(memory_format=torch.channels_last), labels.cuda()) for images, labels in made]


def trained(*, precision: str, graphed: bool, compiled: bool = False, steps: int = 12) -> nn.Module:
    network = build_network("resnet8", classes=10).cuda().to(memory_format=torch.channels_last).train()
    optimizer = SnapshotSGD(network.named_parameters(), SCHEDULE)
    device = torch.device("cuda")
    step = TrainStep(network, optimizer, device, precision=precision, compiled=compiled, graphed=graphed)
    for images, labels in batches(steps, last=17):  # a partial batch at the end
        step(images, labels)
    assert optimizer.updates() == steps
    assert step.totals[0].isfinite()
    return network


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_cuda_graph_trains_as_the_steps_it_was_captured_from(precision: str) -> None:
    eager, graphed = (trained(precision=precision, graphed=graphed) for graphed in (False, True))
    tolerance = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}[precision]
    for one, other in zip(eager.parameters(), graphed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # off, so that fp32 is compared with fp32
def test_a_compiled_step_trains_as_an_eager_one() -> None:
    eager, compiled = (trained(precision="fp32", graphed=on, compiled=on) for on in (False, True))
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_run_learns_and_is_evaluated(loader: str, tmp_path: Path, console: Console) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    given = {"net": "resnet8", "epochs": 6, "cycles": 3, "device": "cuda", "loader": loader}
    config = make_config("digits", out=str(tmp_path / "run"), **given)
    folder, dataset = train.train(config, console)
    assert [entry.number for entry in folder.snapshots()] == [1, 2, 3]
    report = report_run(folder, dataset=dataset, device=torch.device("cuda"), console=console)
    assert report.metrics.last_m[-1].error < 30
    records = folder.metrics()
    assert records[-1]["train_error"] < records[0]["train_error"] / 2


class StopsAfter(ProgressDisplay):
    """Asks the run to stop, as SIGTERM does, when its step has come."""

    stop_step = 70

    def show(self, status: Status, *, epoch_ended: bool) -> None:
        if status.step >= self.stop_step:
            signal.raise_signal(signal.SIGTERM)


def test_a_stopped_run_goes_on_from_where_it_was(tmp_path: Path, console: Console) -> None:
    config = make_config(
        "digits", out=str(tmp_path / "run"), net="resnet8", epochs=6, cycles=3, device="cuda"
    )
    dataset = load_dataset("digits")
    folder = RunFolder(config.out)
    trainer = assembly.build_trainer(assembly.settle(config), dataset, folder)
    folder.write_json("config.json", assembly.describe(assembly.settle(config), dataset))
    with pytest.raises(TrainingStopped):
        trainer.run(StopsAfter(console, 0, trainer.schedule.steps))
    assert trainer.step >= StopsAfter.stop_step
    resumed = assembly.build_trainer(assembly.settle(config), dataset, folder)
    assert resumed.resume()
    assert resumed.step == resumed.optimizer.updates() == trainer.step
    assert torch.equal(resumed.optimizer.flat.data, trainer.optimizer.flat.data)
    assert torch.equal(resumed.optimizer.momentum, trainer.optimizer.momentum)
    for one, other in zip(resumed.network.buffers(), trainer.network.buffers(), strict=True):
        assert torch.equal(one, other)
    train.train(config, console)
    assert [entry.number for entry in folder.snapshots()] == [1, 2, 3]
    assert folder.metrics()[-1]["train_error"] < 10
