"""Several processes at once, as torchrun would start them, without the seconds that it takes."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from fastsnap.training.joining import join_ranks

MOST_SECONDS = 120  # then a process hangs
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["fastsnap.training.process_group", "fastsnap.train", "fastsnap.ensemble_eval"]
)


def in_ranks(work: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """What `work(ranks, *arguments)` returns in each of `count` processes. `work` is a module's function.

    Raises AssertionError, with its traceback, where one raises.
    """
    results, store = CONTEXT.Queue(), open_store()
    processes = [
        CONTEXT.Process(target=_call, args=(results, rank, count, store.port, work, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=MOST_SECONDS) for _ in processes)
    for process in processes:
        process.join(MOST_SECONDS)
    failed = [value for ended, value in found.values() if not ended]
    assert not failed, "\n".join(failed)
    return [found[rank][1] for rank in range(count)]


@dataclass
class Ended:
    """A command line that has ended: its exit status and what it wrote."""

    status: int
    output: str
    errors: str


class Ranks:
    """A command line on several ranks: `main` called with each of `arguments`, in the folders of `places`."""

    def __init__(
        self, main: Callable[[list[str]], int], arguments: Sequence[list[str]], places: Sequence[Path]
    ) -> None:
        self._store = open_store()
        self._places = [place / f"said-by-{rank}" for rank, place in enumerate(places)]
        self.processes: list[BaseProcess] = [
            CONTEXT.Process(
                target=_command,
                args=(rank, len(arguments), self._store.port, main, arguments[rank], place, said),
            )
            for rank, (place, said) in enumerate(zip(places, self._places, strict=True))
        ]
        for process in self.processes:
            process.start()

    def output(self, rank: int) -> str:
        """What a rank has written so far."""
        file = self._places[rank].with_suffix(".out")
        return file.read_text() if file.exists() else ""

    def wait(self) -> list[Ended]:
        """Until all have ended."""
        ended = []
        for process, said in zip(self.processes, self._places, strict=True):
            process.join(MOST_SECONDS)
            assert process.exitcode is not None, "a rank hangs"
            texts = [said.with_suffix(suffix).read_text() for suffix in (".out", ".err")]
            ended.append(Ended(process.exitcode, *texts))
        return ended


def error_of(work: Callable[[], Any]) -> str:
    """What the ValueError of `work` says; nothing without one. For functions that run in ranks."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def open_store() -> distributed.TCPStore:
    """As torchrun has one, on a free port."""
    return distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _become(rank: int, count: int, port: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)


def _call(results: Any, rank: int, count: int, port: int, work: Callable[..., Any], arguments: Any) -> None:
    _become(rank, count, port)
    try:
        ranks = join_ranks()
        ranks.open(torch.device("cpu"), 60)
        value = work(ranks, *arguments)
        ranks.close()
        results.put((rank, (True, value)))
    except BaseException:
        results.put((rank, (False, f"rank {rank}: {traceback.format_exc()}")))


def _command(
    rank: int, count: int, port: int, main: Callable[..., int], arguments: list[str], place: Path, said: Path
) -> None:
    _become(rank, count, port)
    os.chdir(place)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(said.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), number)
    raise SystemExit(main(arguments))
