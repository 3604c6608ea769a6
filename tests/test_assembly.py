"""A run put together: what its configuration means here, and why."""

import os

import torch

from fastsnap import assembly, limits
from fastsnap.config import make_config
from fastsnap.data.datasets import load_dataset


def test_the_reasons_are_those_of_what_is_settled(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(limits, "cpu_quota", lambda root: 2.5)
    config = make_config("digits", device="cpu", precision="fp32")
    assert assembly.settle(config).threads == 2
    assert assembly.reasons_of(config) == {
        "threads": "the container's quota of 2.5 cores",
        "precision": "as asked for",
    }


def test_nothing_is_left_to_the_machine_once_it_is_settled():
    settled = assembly.settle_loader(assembly.settle(make_config("digits")), load_dataset("digits"))
    assert "auto" not in (settled.device, settled.precision, settled.compile, settled.loader)
    assert settled.threads >= 1
    assert os.path.isabs(settled.data)
    assert assembly.settle(settled) == settled
