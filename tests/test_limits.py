"""How many threads a process gets, with made-up files of control groups."""

import os
from pathlib import Path

import pytest
import torch

from fastsnap.limits import choose_threads, cpu_quota


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


@pytest.mark.parametrize("asked", [0, -1, 100_000])
def test_numbers_that_cannot_be_meant_are_refused(asked):
    with pytest.raises(ValueError, match=f"threads must be from 1 to 1024, got {asked}"):
        choose_threads(asked)
