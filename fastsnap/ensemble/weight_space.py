"""Networks between the snapshots of a run: averages of their weights, and points on the line between two of them.

Running statistics of BatchNorm belong to the weights that they were gathered with, so those of a network in between are
gathered anew over training images (Izmailov et al., Averaging Weights Leads to Wider Optima, 2018, section 3.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsnap.data.plan import Pipeline
from fastsnap.device import AUTOCAST_DTYPES
from fastsnap.ensemble.forwards import Forwards
from fastsnap.ensemble.ways import label_log_probabilities
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_schema import SnapshotEntry
from fastsnap.snapshot import load_plain

STATISTICS_IMAGES = 10_000  # training images that statistics are gathered over
POINTS = 11  # on a line, its ends included


def mixed_state(folder: RunFolder, parts: Sequence[tuple[SnapshotEntry, float]]) -> dict[str, Tensor]:
    """The sum of snapshots' state_dicts, each times its factor; what is no floating-point number is the last one's.

    Raises RunError for snapshots that are damaged or of different networks.
    """
    total: dict[str, Tensor] = {}
    for entry, factor in parts:
        state = folder.load_snapshot(entry)
        if total and {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in total.items()}:
            raise RunError(f"snapshot {entry.number} of {folder.path} is of another network than the others")
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                total[name] = tensor
            elif name in total:
                total[name] += tensor * factor
            else:
                total[name] = tensor * factor
    return total


@torch.no_grad()
def gather_statistics(network: nn.Module, batches: Pipeline, images: int, precision: str) -> bool:
    """Give BatchNorm the mean of the statistics of the first batches of training images, `images` of them or more.

    Returns whether the network has any. Weights and all else stay as they are; the network is left in evaluation.
    """
    norms = [
        norm for norm in network.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None
    ]
    network.eval()
    if not norms:
        return False
    sums = [(torch.zeros_like(mean), torch.zeros_like(variance)) for mean, variance in map(_running, norms)]
    momenta = [norm.momentum for norm in norms]
    dtype = AUTOCAST_DTYPES.get(precision)
    device = next(network.parameters()).device
    seen = 0
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # the running statistics are then the batch's
        with torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            for inputs, _ in batches.epoch(0):
                network(inputs)
                for norm, totals in zip(norms, sums, strict=True):
                    for total, value in zip(totals, _running(norm), strict=True):
                        total += value * len(inputs)
                seen += len(inputs)
                if seen >= images:
                    break
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    for norm, totals in zip(norms, sums, strict=True):
        for total, value in zip(totals, _running(norm), strict=True):
            value.copy_(total / seen)
    return True


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


class WeightSpace:
    """What networks in between say of the images of a split, in the network of `forwards`.

    training  batches of training images as training saw them
    say       is told what is computed, since it takes as long as evaluating a snapshot
    """

    def __init__(
        self,
        forwards: Forwards,
        folder: RunFolder,
        training: Pipeline,
        precision: str,
        say: Callable[[str], object] = str,
    ) -> None:
        self.forwards, self._folder, self._say = forwards, folder, say
        self._training, self._precision = training, precision

    def logits(self, parts: Sequence[tuple[SnapshotEntry, float]], *, gathered: bool = True) -> Tensor:
        """Logits float32 [N, C] of the mixed weights. Raises RunError if they are NaN or infinite.

        gathered  whether running statistics are gathered for them, instead of mixed
        """
        names = ", ".join(str(entry.number) for entry, _ in parts)
        self._say(f"mixing the weights of snapshots {names}" if len(parts) > 1 else "the running average")
        network = self.forwards.network
        load_plain(network, mixed_state(self._folder, parts))
        if gathered:
            gather_statistics(network, self._training, STATISTICS_IMAGES, self._precision)
        logits_NC = self.forwards.own_logits()
        if not torch.isfinite(logits_NC).all():
            raise RunError(
                f"the mixed weights of snapshots {names} give NaN or infinite logits: leave one out"
            )
        return logits_NC


def mean_of(entries: Sequence[SnapshotEntry]) -> list[tuple[SnapshotEntry, float]]:
    """All alike."""
    return [(entry, 1 / len(entries)) for entry in entries]


def mean_nll(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Mean negative log-likelihood, nats."""
    return -label_log_probabilities(logits_NC[None], labels_N)[0].mean().item()


def choose_soup(
    space: WeightSpace, entries: Sequence[SnapshotEntry], member_nlls: Sequence[float]
) -> list[SnapshotEntry]:
    """The snapshots whose averaged weights do best on the images of `space`, which must be held out: from the best one
    on, the next best joins where the average becomes no worse.

    Wortsman et al., Model soups (ICML 2022), recipe 1, by NLL.
    """
    by_quality = sorted(zip(member_nlls, entries, strict=True), key=lambda pair: (pair[0], -pair[1].number))
    best, taken = by_quality[0][0], [by_quality[0][1]]
    for _, entry in by_quality[1:]:
        trial = sorted([*taken, entry], key=lambda member: member.number)
        nll = mean_nll(space.logits(mean_of(trial)), space.forwards.labels)
        if nll <= best:
            best, taken = nll, trial
    return taken


@dataclass(frozen=True)
class LinePoint:
    """Of a network part * first + (1 - part) * second: error in percent and NLL in nats, without and with statistics
    of its own.
    """

    part: float
    error: float
    nll: float
    gathered_error: float
    gathered_nll: float


@dataclass(frozen=True)
class Line:
    """Between snapshots numbered `first` and `second`, from the first on."""

    first: int
    second: int
    points: tuple[LinePoint, ...]

    @property
    def barrier(self) -> float:
        """How far the largest gathered error lies above the straight line between those of the ends, points."""
        ends = self.points[0].gathered_error, self.points[-1].gathered_error
        return max(
            point.gathered_error - point.part * ends[0] - (1 - point.part) * ends[1] for point in self.points
        )


def measure_line(space: WeightSpace, first: SnapshotEntry, second: SnapshotEntry) -> Line:
    """Along the straight line, as figure 5 of the paper does between snapshots (without statistics of their own)."""
    points = []
    labels_N = space.forwards.labels
    for index in range(POINTS):
        part = 1 - index / (POINTS - 1)
        figures = []
        for gathered in (False, True):
            logits_NC = space.logits([(first, part), (second, 1 - part)], gathered=gathered)
            error = 100 * (logits_NC.argmax(1) != labels_N).double().mean().item()
            figures += [error, mean_nll(logits_NC, labels_N)]
        points.append(LinePoint(part, *figures))
    return Line(first.number, second.number, tuple(points))
