"""A run folder to evaluate, made without training: random weights, through the run folder's own functions."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastsnap.data.datasets import Dataset, load_dataset
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunFolder

NET = "resnet8"
EPOCHS = 4
UPDATES_PER_EPOCH = 20


@cache
def small_dataset() -> Dataset:
    """The digits, with images held out."""
    return load_dataset("digits", validation=100)


def small_run(path: Path, *, snapshots: int, planned: int = 3, **overrides: Any) -> RunFolder:
    """A run of `planned` cycles on the digits of which `snapshots` are saved, with weights from seeds."""
    folder = RunFolder(path)
    train_images = len(small_dataset().train.labels)
    config = {
        "dataset": "digits",
        "net": NET,
        "shortcut": "A",
        "cycles": planned,
        "epochs": EPOCHS,
        "batch_size": -(-train_images // UPDATES_PER_EPOCH),
        "learning_rate": 0.1,
        "schedule": "snapshot",
        "precision": "fp32",
        "loader": "torch",
        "data": str(path / "data"),
        "validation": 100,
        "train_images": None,
        "seed": 0,
        "images": {"train": train_images, "validation": 100, "test": 360},
    }
    folder.path.mkdir(parents=True)
    folder.write_json("config.json", config | overrides)
    for number in range(1, snapshots + 1):
        step = number * EPOCHS * UPDATES_PER_EPOCH // planned
        folder.save_snapshot(
            snapshot_weights(number),
            step=step,
            cycle=number,
            epoch=-(-step // UPDATES_PER_EPOCH),
            learning_rate=1e-4,
            train_loss=1 / number,
        )
    for epoch in range(1, EPOCHS * snapshots // planned + 1):
        record = {"step": epoch * UPDATES_PER_EPOCH, "epoch": epoch, "lr": 0.01, "train_loss": 2.0 / epoch}
        folder.append_metrics(record)
    return folder


def snapshot_weights(number: int) -> dict[str, torch.Tensor]:
    """The state_dict of snapshot `number`; its running statistics are not those of a fresh network."""
    network = build_network(NET, classes=10, in_channels=1, seed=number)
    generator = torch.Generator().manual_seed(number)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
    return network.state_dict()
