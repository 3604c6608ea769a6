"""How many cores this process may use: what the machine has, the affinity mask and a container's quota allow.

A quota (Docker's --cpus, a Kubernetes limit) shows in neither the number of cores nor the mask. Without looking at it,
a thread per core of the host would fight over a few of them.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

MOST_THREADS = 1024


@dataclass(frozen=True)
class Threads:
    """A number of threads, and why, for the summary of a run."""

    count: int
    reason: str


def choose_threads(asked: int | None, root: Path = Path("/")) -> Threads:
    """The threads that PyTorch and the kernels compute with: `asked`, or what this process may use.

    root  where /proc and /sys lie
    Raises ValueError for a number that cannot be meant.
    """
    if asked is not None:
        if not 1 <= asked <= MOST_THREADS:
            raise ValueError(f"threads must be from 1 to {MOST_THREADS}, got {asked}")
        return Threads(asked, "as asked for")
    if os.environ.get("OMP_NUM_THREADS"):
        return Threads(torch.get_num_threads(), "OMP_NUM_THREADS")
    found = {torch.get_num_threads(): "cores of this machine"}
    if hasattr(os, "sched_getaffinity"):
        found.setdefault(len(os.sched_getaffinity(0)), "cores that this process may run on")
    quota = cpu_quota(root)
    if quota is not None:
        found.setdefault(max(1, math.floor(quota)), f"the container's quota of {quota:g} cores")
    count = min(found)
    return Threads(count, found[count])


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores that the control groups of this process allow, the least of all levels; None without a limit."""
    quotas = [quota for group in _groups(root, "cpu") for quota in _quotas(group)]
    return min(quotas, default=None)


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control groups, of both versions, from its own up to the mount's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    mount, folders = root / "sys/fs/cgroup", []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        own = PurePosixPath(path.lstrip("/"))
        # Within a container the path may be the host's, of which only the mount itself can be seen.
        for top in [mount / controllers, mount / controller] if controllers else [mount]:
            folders += [top / level for level in (own, *own.parents) if (top / level).is_dir()]
    return folders


def _quotas(group: Path) -> list[float]:
    """The limit of one group: cpu.max of version 2, cpu.cfs_* of version 1."""
    quotas = []
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text().strip() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota != "max" and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return quotas
