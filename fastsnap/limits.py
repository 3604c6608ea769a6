"""What this process may use of cores, memory and disk: what the machine has, and what a container leaves of it.

A quota of cores (Docker's --cpus, a Kubernetes limit) shows in neither the number of cores nor the affinity mask.
Without looking at it, a thread per core of the host would fight over a few of them. A limit of memory does not show in
the free memory, and the kernel kills a process that passes either without a word.
"""

import contextlib
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

MOST_THREADS = 1024
THREADS_HELP = "of the CPU (default: the cores that this process may use, a container's quota respected)"
NO_LIMIT = 2**60  # bytes; version 1 writes a number near 2**63 for none
# Limit, use and the line of memory.stat that counts what can be had back at once: the cache of files.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)


@dataclass(frozen=True)
class Threads:
    """A number of threads, and why, for the summary of a run."""

    count: int
    reason: str


def choose_threads(asked: int | None, root: Path = Path("/"), *, sharing: int = 1) -> Threads:
    """The threads that PyTorch and the kernels compute with: `asked`, or what this process may use.

    root     where /proc and /sys lie
    sharing  processes of this run on this host, each of which takes its part of the cores
    Raises ValueError for a number that cannot be meant.
    """
    if asked is not None:
        if not 1 <= asked <= MOST_THREADS:
            raise ValueError(f"threads must be from 1 to {MOST_THREADS}, got {asked}")
        return Threads(asked, "as asked for")
    given = os.environ.get("OMP_NUM_THREADS")
    # torchrun sets 1 where nothing is set, whatever the number of cores.
    if given and not (sharing > 1 and given == "1"):
        return Threads(torch.get_num_threads(), "OMP_NUM_THREADS")
    cores = torch.get_num_threads() if sharing == 1 else physical_cores(root)
    found = {cores: "cores of this machine"}
    if hasattr(os, "sched_getaffinity"):
        found.setdefault(len(os.sched_getaffinity(0)), "cores that this process may run on")
    quota = cpu_quota(root)
    if quota is not None:
        found.setdefault(max(1, math.floor(quota)), f"the container's quota of {quota:g} cores")
    count = min(found)
    if sharing > 1:
        return Threads(
            max(1, count // sharing), f"a part of {count}, {found[count]}, which {sharing} ranks share"
        )
    return Threads(count, found[count])


def physical_cores(root: Path = Path("/")) -> int:
    """Cores of this machine, each counted once however many threads it runs, as PyTorch counts them."""
    folder = root / "sys/devices/system/cpu"
    siblings = {path.read_text().strip() for path in folder.glob("cpu[0-9]*/topology/thread_siblings_list")}
    return len(siblings) or os.cpu_count() or 1


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


@dataclass(frozen=True)
class Room:
    """Bytes that can still be taken, and of what, for an error."""

    bytes: int
    reason: str


def free_memory(root: Path = Path("/")) -> Room | None:
    """Memory that this process can still take: what the machine has free and its control groups leave, the least.

    root  where /proc and /sys lie
    None where nothing says it.
    """
    rooms = [room for group in _groups(root, "memory") if (room := _left_of_limit(group))]
    with contextlib.suppress(OSError, ValueError, LookupError):
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
        free = 1024 * (kilobytes["MemAvailable"] + kilobytes.get("SwapFree", 0))
        rooms.append(Room(free, "free on this machine"))
    return min(rooms, key=lambda room: room.bytes, default=None)


def usual_budget(root: Path = Path("/")) -> int:
    """Bytes that decoded images may take unless asked for otherwise: a quarter of the machine's memory, or of what its
    control groups allow. Without either, 1 GB.
    """
    totals = []
    for group in _groups(root, "memory"):
        for limit_file, _, _ in MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError):
                totals.append(int((group / limit_file).read_text()))
    with contextlib.suppress(OSError, ValueError, LookupError):
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        totals.append(1024 * next(int(line[1]) for line in lines if line[0] == "MemTotal:"))
    return min(totals, default=4 * 10**9) // 4


def parse_bytes(text: str) -> int:
    """A size such as "8GB", "500 MB", "1.5e9" or "0". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]{1,2})?)\s*([kMGT]?)B?\s*", text, re.IGNORECASE)
    size = float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " ") if match else -1.0
    if not 0 <= size < NO_LIMIT:
        raise ValueError(f"a size must be a number of bytes such as 8GB, 500MB or 0, got {text!r}")
    return int(size)


def _left_of_limit(group: Path) -> Room | None:
    """What one control group leaves of its memory limit; None without one."""
    for limit_file, use_file, cache_line in MEMORY_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limit = int((group / limit_file).read_text())
            if limit >= NO_LIMIT:
                continue
            use = int((group / use_file).read_text())
            lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = sum(int(value) for name, value in lines if name == cache_line)
            return Room(
                max(0, limit - use + cache), f"left of the container's limit of {format_bytes(limit)}"
            )
    return None


def free_disk(folder: Path) -> Room | None:
    """What the file system holds on which `folder` lies, or will lie. None where it cannot be asked."""
    for place in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            return Room(shutil.disk_usage(place).free, f"free on the disk of {place}")
    return None


def format_bytes(count: int) -> str:
    """A size to three figures: "31 bytes", "4.20 MB", "5,880 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            value = count / size
            return f"{value:,.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{count} bytes"


def require_memory(what: str, needs: dict[str, int], room: Room | None, remedy: str) -> None:
    """Raise ValueError, with the figures and the remedy, if `what` takes more than `room`. None: nothing is known."""
    total = sum(needs.values())
    if room and total > room.bytes:
        parts = ", ".join(f"{part} {format_bytes(count)}" for part, count in needs.items())
        raise ValueError(
            f"{what} takes about {format_bytes(total)} of memory ({parts}), but {format_bytes(room.bytes)} are "
            f"{room.reason}: {remedy}"
        )
