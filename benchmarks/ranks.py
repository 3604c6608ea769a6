"""One run on two ranks of one thread each, on two cores, against one process with both or one of them.

And what travels between the ranks: how it is best sent, how long it takes, how many bytes it is. The last case is what
docs/scaling.md's model says of a step, from the time of half a batch on one core and that of the sum, beside what it
takes.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastsnap.nets.build import build_network
from fastsnap.training.exchange import Exchange, running_statistics
from fastsnap.training.flat import FlatParameters
from fastsnap.training.ranks import Ranks, Value
from harness.measure import PROJECT, Result, Settings, alternate, compare, spread
from harness.paced import Pace, PacedProcess
from harness.paced_ranks import PacedRanks
from harness.project import configure, train_loop
from harness.task import CLASSES, Task
from opponents.parallel import ddp_loop

NAME = "ranks"
COUNT = 2
NETS, QUICK_NETS = ("resnet20", "wrn-16-4"), ("resnet20",)
TWO_THREADS, ONE_THREAD = "one process, two threads", "one process, one thread"
DDP = "two ranks by DistributedDataParallel"
HALF, LOSSY = "half a batch, one process, one thread", "the sum in bf16"
ROUNDS, QUICK_ROUNDS = 9, 2
TURN_SECONDS, QUICK_TURN_SECONDS = 4.0, 0.5
WARM_UP_STEPS = 3
EXCHANGES = 20  # of a turn


def run(settings: Settings) -> Iterator[Result]:
    """Results of every net: images/s, the exchange, and the model."""
    for net in QUICK_NETS if settings.quick else NETS:
        yield from _of_net(Task(net, "cpu", settings.data), settings.quick)


def case_of(net: str) -> str:
    """For the report."""
    return f"{net}, batch 64, two cores"


def _of_net(task: Task, quick: bool) -> Iterator[Result]:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    half = replace(task, batch_size=task.batch_size // COUNT)
    with ExitStack() as stack:
        ours = stack.enter_context(PacedRanks(PROJECT, COUNT, rank_loop, task))
        processes: dict[str, PacedProcess | PacedRanks] = {
            PROJECT: ours,
            TWO_THREADS: stack.enter_context(PacedProcess(TWO_THREADS, threads_loop, task, COUNT)),
            ONE_THREAD: stack.enter_context(PacedProcess(ONE_THREAD, threads_loop, task, 1)),
            DDP: stack.enter_context(PacedRanks(DDP, COUNT, ddp_loop, task)),
            HALF: stack.enter_context(PacedProcess(HALF, threads_loop, half, 1)),
        }
        for process in processes.values():
            process.seconds_per_step(WARM_UP_STEPS)
        turn = QUICK_TURN_SECONDS if quick else TURN_SECONDS
        steps = max(2, round(turn / ours.seconds_per_step(WARM_UP_STEPS)))
        seconds = alternate(
            {name: partial(process.seconds_per_step, steps) for name, process in processes.items()}, rounds
        )
    half_a_batch = seconds.pop(HALF)
    rates = {name: [task.batch_size / value for value in own] for name, own in seconds.items()}
    details = {PROJECT: {"precision": configure(task).precision, "steps per turn": steps}}
    yield from compare(NAME, case_of(task.net), "images/s", rates, "higher", details)
    sums, sent = _exchange(task, rounds)
    milliseconds = {name: [1000 * value for value in own] for name, own in sums.items()}
    yield from compare(NAME, f"what {task.net} sends in a step", "ms", milliseconds, "lower", {PROJECT: sent})
    share = [100 * spread(sums[PROJECT]).median / value for value in seconds[PROJECT]]
    yield Result(NAME, f"{task.net}: sending, of a step", PROJECT, "%", "lower", tuple(share))
    predicted = [half + spread(sums[PROJECT]).median for half in half_a_batch]
    steps_ms = {"measured": seconds[PROJECT], "predicted": predicted}
    for name, values in steps_ms.items():
        case = f"{task.net}: a step of two ranks, {name}"
        yield Result(NAME, case, PROJECT, "ms", "lower", tuple(1000 * value for value in values))


def rank_loop(pace: Pace, ranks: Ranks, task: Task) -> None:
    """The project's training, as a rank."""
    train_loop(pace, task, threads=1, ranks=ranks)


def threads_loop(pace: Pace, task: Task, threads: int) -> None:
    """The project's training in one process."""
    train_loop(pace, task, threads=threads)


def _exchange(task: Task, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of the exchange alone, in fp32 and in bf16, and what is sent."""
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(PacedRanks(name, COUNT, exchange_loop, task.net, name == LOSSY))
            for name in (PROJECT, LOSSY)
        }
        for process in processes.values():
            process.seconds_per_step(EXCHANGES)
        turns = {name: partial(process.seconds_per_step, EXCHANGES) for name, process in processes.items()}
        seconds = alternate(turns, rounds)
        network = build_network(task.net, classes=CLASSES)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        statistics = sum(tensor.numel() for tensor in running_statistics(network))
        sent = {
            "bytes sent per parameter": processes[PROJECT].bytes_per_step(EXCHANGES) / parameters,
            "parameters": parameters,
            "running statistics": statistics,
        }
    return seconds, sent


def exchange_loop(pace: Pace, ranks: Ranks, net: str, lossy: bool) -> None:
    """What ranks do between the backward pass and the update, and nothing else.

    lossy  whether what is sent is rounded to bf16
    """
    network = build_network(net, classes=CLASSES).to(memory_format=torch.channels_last)
    flat = FlatParameters(network)
    exchange = Exchange(network, flat, InBf16(ranks) if lossy else ranks)
    gradients = [torch.randn_like(parameter) for parameter in flat.parameters]
    for _ in pace.batches(itertools.count()):
        for parameter, gradient in zip(flat.parameters, gradients, strict=True):
            parameter.grad = gradient
        exchange(1 / COUNT)


class InBf16(Ranks):
    """Ranks that send half the bytes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.rank, self.count = ranks.rank, ranks.count

    def from_first(self, make: Callable[[], Value]) -> Value:
        """See ranks.Ranks."""
        return self._ranks.from_first(make)

    def sum(self, tensor: Tensor) -> None:
        """Rounded before and after."""
        rounded = tensor.bfloat16()
        self._ranks.sum(rounded)
        tensor.copy_(rounded)
