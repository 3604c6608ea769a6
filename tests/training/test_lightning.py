"""The callback for Lightning: the run folder of trainer.fit, from the start, resumed, with accumulated gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from own_loop import CLASSES, SCHEDULE, STEPS_PER_EPOCH, batch, make_network
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from fastsnap import SnapshotRecorder, SnapshotSGD
from fastsnap.run_folder import RunError

lightning = pytest.importorskip("lightning")
from fastsnap.training.lightning import SnapshotCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of itself and of what it uses


def network_without_dropout() -> nn.Module:
    """Lightning draws from PyTorch's generator too."""
    network = make_network()
    network.get_submodule("3").p = 0.0  # type: ignore[assignment]
    return network


class Module(lightning.LightningModule):
    def __init__(self, network: nn.Module, fused: bool) -> None:
        super().__init__()
        self.network, self.fused = network, fused

    def training_step(self, images_and_labels: Any, index: int) -> torch.Tensor:
        images, labels = images_and_labels
        return functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> Any:
        if self.fused:
            return SnapshotSGD(self.network.named_parameters(), SCHEDULE)
        optimizer = torch.optim.SGD(self.network.parameters(), 1.0, momentum=0.9, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULE.rate_after)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(
    folder: Path,
    steps: int,
    *,
    fused: bool = True,
    checkpoint: Path | None = None,
    accumulate: int = 1,
    batches: int = 200,
) -> Any:
    network = network_without_dropout()
    recorder = SnapshotRecorder(folder, network, SCHEDULE, classes=CLASSES, steps_per_epoch=STEPS_PER_EPOCH)
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        callbacks=[SnapshotCallback(recorder)],
    )
    data = DataLoader([batch(step) for step in range(batches)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(
        Module(network, fused), data, ckpt_path=checkpoint, weights_only=False if checkpoint else None
    )
    return trainer


@pytest.mark.parametrize("fused", [True, False])
def test_a_fit_leaves_a_run_folder_with_every_snapshot(tmp_path: Path, fused: bool) -> None:
    fit(tmp_path / "run", SCHEDULE.steps, fused=fused)
    recorder = SnapshotRecorder(
        tmp_path / "run", make_network(), SCHEDULE, classes=CLASSES, steps_per_epoch=STEPS_PER_EPOCH
    )
    entries = recorder.folder.snapshots()
    assert [entry.step for entry in entries] == [11, 23]
    assert [record["step"] for record in recorder.folder.metrics()] == [4, 8, 12, 16, 20, 23]


def test_the_snapshots_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """With the same batches, optimizer and schedule, to the bit."""
    fit(tmp_path / "run", SCHEDULE.steps)
    network = network_without_dropout()
    optimizer = SnapshotSGD(network.named_parameters(), SCHEDULE)
    folder = SnapshotRecorder(
        tmp_path / "run", network, SCHEDULE, classes=CLASSES, steps_per_epoch=STEPS_PER_EPOCH
    ).folder
    losses = []
    for step in range(SCHEDULE.steps):
        images, labels = batch(step)
        loss = functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    saved = folder.load_snapshot(folder.snapshots()[-1])
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    assert folder.metrics()[0]["train_loss"] == pytest.approx(sum(losses[:4]) / 4, rel=1e-6)


def test_a_run_goes_on_from_lightnings_checkpoint(tmp_path: Path) -> None:
    trainer = fit(tmp_path / "run", 14)
    trainer.save_checkpoint(tmp_path / "lightning.ckpt")
    fit(tmp_path / "run", SCHEDULE.steps, checkpoint=tmp_path / "lightning.ckpt")
    recorder = SnapshotRecorder(
        tmp_path / "run", make_network(), SCHEDULE, classes=CLASSES, steps_per_epoch=STEPS_PER_EPOCH
    )
    assert [entry.step for entry in recorder.folder.snapshots()] == [11, 23]


def test_a_fit_from_the_start_over_a_trained_run_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "run", 14)
    with pytest.raises(RunError, match="holds a run of"):
        fit(tmp_path / "run", SCHEDULE.steps)


def test_accumulated_gradients_are_one_update_with_the_mean_of_their_losses(tmp_path: Path) -> None:
    fit(tmp_path / "run", SCHEDULE.steps, accumulate=2)
    recorder = SnapshotRecorder(
        tmp_path / "run", make_network(), SCHEDULE, classes=CLASSES, steps_per_epoch=STEPS_PER_EPOCH
    )
    assert [entry.step for entry in recorder.folder.snapshots()] == [11, 23]
    network = network_without_dropout()
    optimizer = SnapshotSGD(network.named_parameters(), SCHEDULE)
    means = []
    for step in range(4):
        losses = []
        for part in (2 * step, 2 * step + 1):
            images, labels = batch(part)
            loss = functional.cross_entropy(network(images), labels) / 2
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        means.append(sum(losses))
    assert recorder.folder.metrics()[0]["train_loss"] == pytest.approx(sum(means) / 4, rel=1e-6)


def test_a_training_longer_than_the_schedule_is_refused_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"30 updates, the recorder's schedule 23"):
        fit(tmp_path / "run", 30)
    assert not (tmp_path / "run").exists()
