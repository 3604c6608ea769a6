"""torchensemble (Ensemble-PyTorch), the library that users of snapshot ensembles find first; runs unchanged."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from fastsnap.nets.build import build_network
from harness.paced import Pace
from harness.task import CLASSES, Task
from opponents.loaders import make_loader


class PacedLoader:
    """What torchensemble's fit needs of a DataLoader."""

    def __init__(self, loader: DataLoader, pace: Pace) -> None:
        self._loader, self._pace, self.dataset = loader, pace, loader.dataset

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return self._pace.batches(self._loader)


def fit_loop(pace: Pace, task: Task) -> None:
    """SnapshotEnsembleClassifier.fit; the library offers neither precision nor memory layout."""
    ensemble = make_ensemble(build_network(task.net, classes=CLASSES), task.cycles, task.device)
    ensemble.set_optimizer(
        "SGD",
        lr=task.learning_rate,
        momentum=task.momentum,
        weight_decay=task.weight_decay,
        nesterov=True,
    )
    loader = PacedLoader(make_loader(task), pace)
    # It prints "None" at every log interval.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        ensemble.fit(loader, epochs=task.epochs, log_interval=len(loader), save_model=False)


def make_ensemble(network: nn.Module, members: int, device: str) -> Any:
    """An untrained SnapshotEnsembleClassifier of copies of `network`."""
    from torchensemble import SnapshotEnsembleClassifier

    return SnapshotEnsembleClassifier(estimator=network, n_estimators=members, cuda=device == "cuda")
