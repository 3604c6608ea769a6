"""What a process may use of cores, memory and disk, with made-up files of control groups."""

import os
from pathlib import Path

import pytest
import torch

from fastsnap.limits import (
    choose_threads,
    cpu_quota,
    format_bytes,
    free_disk,
    free_memory,
    parse_bytes,
    usual_budget,
)


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu,cpuacct"
CASES = {
    "no files": ({}, None),
    "version 2, no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    "version 2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, the parent limits": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
        },
        0.5,
    ),
    "version 2, the host's path in a container": (
        {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"},
        4.0,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n",
            f"{V1}/x/cpu.cfs_quota_us": "300000\n",
            f"{V1}/x/cpu.cfs_period_us": "100000\n",
        },
        3.0,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/x\n",
            f"{V1}/x/cpu.cfs_quota_us": "-1\n",
            f"{V1}/x/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "damaged": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "lots\n"}, None),
}


@pytest.mark.parametrize(("files", "quota"), CASES.values(), ids=CASES.keys())
def test_quotas_are_read(tmp_path, files, quota):
    assert cpu_quota(make(tmp_path, files)) == quota


def test_the_least_of_cores_mask_and_quota_counts(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert choose_threads(None, tmp_path).count == 8
    limited = choose_threads(None, make(tmp_path, CASES["version 2"][0]))
    assert (limited.count, limited.reason) == (1, "the container's quota of 1.5 cores")
    half = choose_threads(None, make(tmp_path / "half", CASES["version 2, the parent limits"][0]))
    assert half.count == 1
    assert choose_threads(3, tmp_path).count == 3


def test_the_environment_variable_of_openmp_is_respected(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    chosen = choose_threads(None, make(tmp_path, CASES["version 2"][0]))
    assert (chosen.count, chosen.reason) == (5, "OMP_NUM_THREADS")


def test_ranks_of_a_host_share_its_cores_whatever_torchrun_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    cpus = "sys/devices/system/cpu"
    # Eight cores of two threads each.
    make(
        tmp_path,
        {f"{cpus}/cpu{n}/topology/thread_siblings_list": f"{n % 8},{n % 8 + 8}\n" for n in range(16)},
    )
    for given in ("1", None):
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        else:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        chosen = choose_threads(None, tmp_path, sharing=3)
        assert (chosen.count, chosen.reason) == (2, "a part of 8, cores of this machine, which 3 ranks share")
        assert choose_threads(None, tmp_path, sharing=20).count == 1
    make(tmp_path, CASES["version 1"][0])
    quota = choose_threads(None, tmp_path, sharing=3)
    assert (quota.count, quota.reason) == (
        1,
        "a part of 3, the container's quota of 3 cores, which 3 ranks share",
    )


@pytest.mark.parametrize("asked", [0, -1, 100_000])
def test_numbers_that_cannot_be_meant_are_refused(asked):
    with pytest.raises(ValueError, match=f"threads must be from 1 to 1024, got {asked}"):
        choose_threads(asked)


MEMINFO = {
    "proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:    8000 kB\nHugePages_Total:  0\n"
}
V1_MEMORY = "sys/fs/cgroup/memory"
MEMORY_CASES = {
    "no files": ({}, None, ""),
    "no limit": (
        MEMINFO | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
        8_192_000,
        "free on this machine",
    ),
    "swap counts": (
        {"proc/meminfo": "MemAvailable: 8000 kB\nSwapFree: 1000 kB\n"},
        9_216_000,
        "free on this machine",
    ),
    "version 2: what is used is gone, files that are kept for speed are not": (
        MEMINFO
        | {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": "5000000\n",
            "sys/fs/cgroup/a/memory.current": "3000000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 2000000\nfile 900000\ninactive_file 500000\n",
        },
        2_500_000,
        "left of the container's limit of 5.00 MB",
    ),
    "version 2, the parent limits": (
        MEMINFO
        | {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": "2000000\n",
            "sys/fs/cgroup/a/memory.current": "1500000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 1500000\n",
        },
        500_000,
        "left of the container's limit of 2.00 MB",
    ),
    "the machine has less than the limit": (
        MEMINFO
        | {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "50000000\n",
            "sys/fs/cgroup/memory.current": "0\n",
            "sys/fs/cgroup/memory.stat": "anon 0\n",
        },
        8_192_000,
        "free on this machine",
    ),
    "version 1, the host's path in a container": (
        MEMINFO
        | {
            "proc/self/cgroup": "4:memory:/docker/0123\n3:cpu:/x\n",
            f"{V1_MEMORY}/memory.limit_in_bytes": "4000000\n",
            f"{V1_MEMORY}/memory.usage_in_bytes": "4500000\n",
            f"{V1_MEMORY}/memory.stat": "cache 1\ninactive_file 7\ntotal_inactive_file 600000\n",
        },
        100_000,
        "left of the container's limit of 4.00 MB",
    ),
    "version 1, no limit": (
        MEMINFO
        | {
            "proc/self/cgroup": "4:memory:/\n",
            f"{V1_MEMORY}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{V1_MEMORY}/memory.usage_in_bytes": "4500000\n",
            f"{V1_MEMORY}/memory.stat": "cache 1\n",
        },
        8_192_000,
        "free on this machine",
    ),
    "damaged": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "lots\n",
            "proc/meminfo": "MemAvailable\n",
        },
        None,
        "",
    ),
}


@pytest.mark.parametrize(("files", "count", "reason"), MEMORY_CASES.values(), ids=MEMORY_CASES.keys())
def test_memory_is_what_the_machine_and_the_container_leave(tmp_path, files, count, reason):
    room = free_memory(make(tmp_path, files))
    assert (room and room.bytes) == count
    assert (room.reason if room else "") == reason


def test_the_disk_of_a_folder_is_known_before_there_is_one(tmp_path):
    room = free_disk(tmp_path / "runs" / "one")
    assert room is not None
    assert room.bytes > 0
    assert room.reason == f"free on the disk of {tmp_path}"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (4_200_000, "4.20 MB"),
        (22 * 10**9, "22.0 GB"),
        (5_880 * 10**9, "5,880 GB"),
    ],
)
def test_sizes_have_three_figures(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("8GB", 8 * 10**9),
        ("500 mb", 5 * 10**8),
        ("1.5e9", 1_500_000_000),
        ("2k", 2000),
        ("1.5T", 15 * 10**11),
    ],
)
def test_sizes_are_read_with_their_units(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-1", "1 PB", "GB", "1e999", "1GB 2"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="a size must be a number of bytes such as 8GB"):
        parse_bytes(text)


def test_the_usual_budget_is_a_quarter_of_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       8000000 kB\nMemFree:  1 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    assert usual_budget(tmp_path) == 2_048_000_000
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000000000\n")
    assert usual_budget(tmp_path) == 250_000_000
    (group / "memory.max").write_text("max\n")
    assert usual_budget(tmp_path) == 2_048_000_000
