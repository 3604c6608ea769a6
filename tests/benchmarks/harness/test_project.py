"""The project as a contender: set up as its command line sets it up."""

from dataclasses import replace

import pytest
import torch

from fastsnap.limits import choose_threads
from harness.project import configure, threads_of
from harness.task import Task

SMALL = Task("resnet8", "cpu", batch_size=4)


def test_the_task_s_precision_is_asked_of_the_project() -> None:
    assert configure(replace(SMALL, precision="fp32")).precision == "fp32"
    assert configure(replace(SMALL, precision="bf16")).precision == "bf16"


def test_the_project_has_its_own_threads_and_opponents_in_the_process_have_pytorch_s() -> None:
    config, before = configure(SMALL), torch.get_num_threads()
    assert config.threads == choose_threads(None).count
    with threads_of(replace(config, threads=before + 1)):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), threads_of(replace(config, threads=before + 1)):  # as a loop that is ended
        raise KeyError
    assert torch.get_num_threads() == before
