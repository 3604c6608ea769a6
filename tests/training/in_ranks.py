"""Functions called by several processes at once, as torchrun would start them, without its seconds."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from fastsnap.training.joining import join_ranks
from fastsnap.training.ranks import Ranks

MOST_SECONDS = 120  # then a process hangs


def in_ranks(work: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """What `work(ranks, *arguments)` returns in each of `ranks` processes. `work` is a module's function.

    Raises AssertionError, with its traceback, where one raises.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastsnap.training.process_group", "fastsnap.assembly"])
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_one, args=(results, rank, ranks, port, work, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=MOST_SECONDS) for _ in processes)
    for process in processes:
        process.join(MOST_SECONDS)
    failed = [value for ended, value in found.values() if not ended]
    assert not failed, "\n".join(failed)
    return [found[rank][1] for rank in range(ranks)]


def _one(results: Any, rank: int, count: int, port: int, work: Callable[..., Any], arguments: Any) -> None:
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        ranks: Ranks = join_ranks()
        ranks.open(torch.device("cpu"), 60)
        value = work(ranks, *arguments)
        ranks.close()
        results.put((rank, (True, value)))
    except BaseException:
        results.put((rank, (False, f"rank {rank}: {traceback.format_exc()}")))
