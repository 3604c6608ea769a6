"""The loops by hand compute in the precision that they are told."""

from dataclasses import replace
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.paced import Chunk, run_loop
from harness.task import Task
from opponents.loops import careful_loop, plain_loop

SMALL = Task("resnet8", "cpu", batch_size=4)


class ConvolutionTypes(TorchDispatchMode):
    """Notes the type of what is convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if "convolution" in str(function):
            self.found.add(arguments[0].dtype)
        return function(*arguments, **(options or {}))


def types_of(loop: Any, task: Task) -> set[torch.dtype]:
    """What one step convolves."""
    here, there = Pipe()
    for steps in (1, 0):
        here.send(steps)
    with ConvolutionTypes() as types:
        run_loop(there, loop, (task,))
    assert isinstance(here.recv(), Chunk)
    return types.found


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_careful_loop_computes_in_the_precision_of_the_task(precision: str, dtype: torch.dtype) -> None:
    assert types_of(careful_loop, replace(SMALL, precision=precision)) == {dtype}


def test_the_plain_loop_computes_in_fp32_whatever_is_asked_for() -> None:
    assert types_of(plain_loop, replace(SMALL, precision="bf16")) == {torch.float32}
