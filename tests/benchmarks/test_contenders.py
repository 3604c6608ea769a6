"""Every loop that is measured in turns, ours and the opponents'."""

from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

import pytest

from harness.paced import Chunk, run_loop
from harness.project import batches_loop, train_loop
from harness.task import Task
from opponents.ensemble_pytorch import fit_loop
from opponents.loops import careful_loop, plain_loop, timm_loop
from pipelines import dataloader_loop, step_loop

SMALL = Task("resnet8", "cpu", batch_size=4)


LOOPS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "fastsnap": (train_loop, (SMALL,)),
    "fastsnap, standard schedule": (train_loop, (SMALL, "step")),
    "plain": (plain_loop, (SMALL,)),
    "careful": (careful_loop, (SMALL,)),
    "torchensemble": (fit_loop, (SMALL,)),
    "timm": (timm_loop, (SMALL,)),
    "batches": (batches_loop, (SMALL, "torch")),
    "DataLoader": (dataloader_loop, (SMALL,)),
    "step": (step_loop, (SMALL,)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_every_contender_runs_the_steps_it_is_told(name: str) -> None:
    if name in ("torchensemble", "timm"):
        pytest.importorskip(name)
    loop, arguments = LOOPS[name]
    here, there = Pipe()
    for steps in (2, 1, 0):
        here.send(steps)
    run_loop(there, loop, arguments)
    for _ in range(2):
        answer = here.recv()
        assert isinstance(answer, Chunk), answer
    assert not here.poll()
