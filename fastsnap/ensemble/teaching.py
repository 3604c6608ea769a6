"""An ensemble as the teacher of a network that is trained on the same data."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsnap.data.fingerprint import fingerprint
from fastsnap.data.plan import Pipeline
from fastsnap.data.sources import Dataset
from fastsnap.ensemble.combination import TINY
from fastsnap.ensemble.module import Ensemble

MOST_KEPT = 10**9  # bytes of probabilities of all training images


class EnsembleTeacher:
    """Called with a batch as the student gets it: the ensemble's log-probabilities, float32 [B, classes].

    images  all training images in their order, where each looks the same in every epoch: what is said of them is
            computed once, before the first step, and kept. None: every batch is forwarded, since its images are
            augmented anew
    """

    def __init__(self, ensemble: Ensemble, images: Pipeline | None = None) -> None:
        self._ensemble = ensemble
        self._kept_NC: Tensor | None = None
        if images is not None:
            self._kept_NC = torch.cat([self._log_probabilities(batch) for batch, _ in images.epoch(0)])

    @property
    def kept(self) -> bool:
        """Whether nothing is forwarded while training."""
        return self._kept_NC is not None

    def __str__(self) -> str:
        count = len(self._ensemble.members)
        return f"{count} snapshot{'s' if count > 1 else ''}"

    def __call__(self, images: Tensor, indices: NDArray[np.int64]) -> Tensor:
        if self._kept_NC is not None:
            return self._kept_NC[torch.from_numpy(indices).to(self._kept_NC.device)]
        return self._log_probabilities(images)

    @torch.no_grad()
    def _log_probabilities(self, inputs: Tensor) -> Tensor:
        combination = self._ensemble.combine(self._ensemble.logits_of_inputs(inputs))
        return combination.probabilities.clamp_min(TINY).log()


def keeps(dataset: Dataset) -> bool:
    """Whether the training images look the same in every epoch, and what a teacher says of all can be kept."""
    plain = dataset.augmentation
    varied = plain.flip or plain.padding or plain.jitter or plain.lighting or plain.kind == "resized-crop"
    return not varied and 4 * len(dataset.train.labels) * len(dataset.classes) <= MOST_KEPT


def require_fitting(ensemble: Ensemble, dataset: Dataset, run: str) -> None:
    """Raise ValueError unless the teacher knows the student's classes and sees images as the student does."""
    known = ensemble.preprocessing
    for name, teachers, own in (
        ("classes", known.classes, tuple(dataset.classes)),
        ("images of height, width and channels", tuple(known.image_shape), tuple(dataset.train.shape)),
        ("means of the channels", tuple(known.mean), tuple(dataset.mean)),
        ("deviations of the channels", tuple(known.std), tuple(dataset.std)),
    ):
        if teachers == own:
            continue
        if name == "classes":
            name, teachers, own = _classes(known.classes, dataset.classes)
        raise ValueError(
            f"teacher (--teacher) {run} has {name} {_listed(teachers)}, but this run {_listed(own)}: a teacher must "
            "have been trained on the same classes and images of the same size"
        )


def _classes(teachers: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """How the names differ: in their number, or the first that is another."""
    if len(teachers) != len(own):
        return "classes in number", (f"{len(teachers)}",), (f"{len(own)}",)
    place = next(index for index, pair in enumerate(zip(teachers, own, strict=True)) if pair[0] != pair[1])
    return f"as class {place + 1}", (repr(teachers[place]),), (repr(own[place]),)


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


def has_seen_held_out(config: Mapping[str, Any], dataset: Dataset) -> bool:
    """Whether the teacher, whose config.json this is, may have been trained on images held out of the student's
    training: unless it held out the same.
    """
    if dataset.validation is None:
        return False
    own = fingerprint(dataset.validation)
    return (config.get("fingerprints") or {}).get("validation") != own


def digest_of(ensemble: Ensemble) -> str:
    """SHA-256 of what decides what an ensemble says: its members' files, weights and temperature."""
    facts = [[entry.sha256 for entry in ensemble.members], list(ensemble.weights), ensemble.temperature]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
