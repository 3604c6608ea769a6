"""What a run in training is worth so far: each fresh snapshot, and all until it together, on the held-out images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsnap.data.datasets import Dataset
from fastsnap.ensemble.combination import TINY
from fastsnap.ensemble.forwards import Forwards, Passes
from fastsnap.ensemble.metrics import Metrics, summarise
from fastsnap.kernels.averaging import average_members
from fastsnap.run_folder import RunFolder
from fastsnap.run_schema import SnapshotEntry
from fastsnap.training.ranks import Ranks


class CycleValidation:
    """Called at the end of an epoch in which a cycle ended. It keeps the sum of the probabilities of the snapshots that
    it has seen; a run that goes on forwards the earlier ones once more.

    config  that Forwards needs: that of the run, settled
    ranks   that train, which share the images; all of them make this and call it
    """

    def __init__(
        self,
        config: dict[str, Any],
        dataset: Dataset,
        folder: RunFolder,
        device: torch.device,
        *,
        batch_size: int,
        precision: str,
        ranks: Ranks,
    ) -> None:
        passes = Passes.of(config, [], split="validation", batch_size=batch_size, precision=precision)
        self._forwards = Forwards(passes, folder, dataset, None, device, ranks, check_memory=False)
        self._seen: list[SnapshotEntry] = []
        self._sum_NC: Tensor | None = None
        self._fresh: Metrics | None = None

    def __call__(self, entries: Sequence[SnapshotEntry]) -> dict[str, float]:
        """Figures of the newest of `entries`, and of all together, run_schema.MetricsRecord's; of the first rank."""
        if self._seen != list(entries[: len(self._seen)]):
            self._seen, self._sum_NC = [], None
        labels_N = self._forwards.labels
        for entry in entries[len(self._seen) :]:
            logits_NC = self._forwards.logits([entry])[0]
            if self._forwards.ranks.is_first:
                self._fresh = summarise(average_members(logits_NC[None], labels_N), labels_N)[0]
                probabilities_NC = torch.softmax(logits_NC, 1)
                self._sum_NC = probabilities_NC if self._sum_NC is None else self._sum_NC + probabilities_NC
        self._seen = list(entries)
        if self._sum_NC is None or self._fresh is None:
            return {}
        log_NC = (self._sum_NC / len(entries)).clamp_min(TINY).log()
        together = summarise(average_members(log_NC[None], labels_N), labels_N)[0]
        return {
            "validation_error": self._fresh.error,
            "validation_loss": self._fresh.nll,
            "ensemble_error": together.error,
            "ensemble_loss": together.nll,
        }
