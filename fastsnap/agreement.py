"""What the ranks of one run must have in common before they begin, each difference named with the host that has it."""

import dataclasses
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastsnap import __version__
from fastsnap.config import TrainConfig
from fastsnap.data.archives import DataError
from fastsnap.data.fingerprint import fingerprints
from fastsnap.data.sources import Dataset
from fastsnap.device import choose_device
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.training.ranks import Ranks

# Hosts may keep their files in different places, and have different numbers of cores.
OF_A_HOST = ("data", "cache", "memory", "threads", "out", "initial")


def require_agreement(config: TrainConfig, folder: RunFolder, ranks: Ranks, *, restart: bool) -> None:
    """Raise ValueError, on all ranks alike, for other versions or flags than rank 0's, a batch of fewer images than
    there are ranks, or a run folder that rank 0 does not see though another rank does.

    config, restart  as asked for on this rank's command line
    """
    if ranks.count == 1:
        return
    versions = {"fastsnap": __version__, "torch": torch.__version__}
    _require_same(versions, ranks, RunError, "ranks must run the same versions: install those of rank 0")
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_A_HOST}
    # "auto" may mean a GPU on one host and none on another.
    flags |= {"restart": restart, "device": choose_device(config.device).type}
    _require_same(flags, ranks, ValueError, "ranks must be started with the same flags")
    if config.batch_size < ranks.count:
        raise ValueError(
            f"batch_size must be at least the number of ranks, whose images together it counts: got "
            f"{config.batch_size} for {ranks.count} ranks; use a larger --batch-size or a smaller --nproc-per-node"
        )
    seen = ranks.gather([folder.exists(), socket.gethostname(), str(folder.path)])
    others = [f"rank {rank} on {host}" for rank, (there, host, _) in enumerate(seen) if there]
    if others and not seen[0][0]:
        raise RunError(
            f"{seen[0][2]} holds a run for {', '.join(others)}, but rank 0 on {seen[0][1]}, which reads and writes it, "
            "does not see it: put --out on a disk that all hosts share, start torchrun so that rank 0 is on the host "
            "that has it (--node-rank 0), or choose another --out"
        )


def require_same_data(dataset: Dataset, ranks: Ranks) -> None:
    """Raise DataError, on all ranks alike, if hosts have other images or labels than rank 0's."""
    if ranks.count > 1:
        _require_same(
            fingerprints(dataset), ranks, DataError, "ranks must train on the same images and labels"
        )


def as_first(config: TrainConfig, first: dict[str, Any]) -> TrainConfig:
    """`config` with all that rank 0 settled, such as the precision; what is the host's own stays."""
    settled = {name: value for name, value in first.items() if name not in OF_A_HOST}
    return dataclasses.replace(config, **settled)


def _require_same(own: dict[str, Any], ranks: Ranks, error: Callable[[str], Exception], rule: str) -> None:
    hosts, others = ranks.gather(socket.gethostname()), ranks.gather(own)
    first_host, first = hosts[0], others[0]
    for rank, (host, other) in enumerate(zip(hosts, others, strict=True)):
        different = [name for name in first if other.get(name) != first[name]]
        if different:
            raise error(f"{rule}. {_differences(different, first, other, rank, host, first_host)}")


def _differences(
    names: Sequence[str], first: dict[str, Any], other: dict[str, Any], rank: int, host: str, first_host: str
) -> str:
    parts = [f"{name}: {other.get(name)} there, {first[name]} on rank 0" for name in names]
    return f"Rank {rank} on {host} differs from rank 0 on {first_host}: {'; '.join(parts)}"
