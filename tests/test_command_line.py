"""Errors as exit statuses."""

import pytest
import torch

from fastsnap.command_line import exit_status


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        torch.OutOfMemoryError("no more\nwith many details"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: no more"),
    ],
)
def test_lack_of_memory_is_one_line(error, capsys):
    def work() -> int:
        raise error

    assert exit_status(work) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (")
    assert line.endswith("no more): use a smaller --batch-size, or a smaller network")


def test_faults_of_the_program_are_not_hidden():
    def work() -> int:
        raise RuntimeError("nobody expected this")

    with pytest.raises(RuntimeError, match="nobody expected this"):
        exit_status(work)
