"""Training throughput, end to end: batches, forward, backward, update and schedule of the same task.

Every contender trains in a process of its own and runs in turns with the others. The first steps (compilation, first
allocations, workers starting) are not counted, nor is saving, which the benchmark `schedules` measures.

By default each contender is at its best: the project as its command line sets it up, the opponents with the number of
workers and, where a loop offers it, the precision that were the fastest of all tried on the first net. In a case whose
precision is `asked of all`, those who offer one are held to it, as by a user who needs it: fp32 against fp32. The plain
loop and torchensemble compute in fp32 in any case.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from harness.measure import PROJECT, Result, Settings, alternate, compare, not_installed
from harness.paced import PacedProcess
from harness.precisions import compared, text_of, tried_by_hand
from harness.project import configure, train_loop
from harness.task import Task, describe_data
from opponents.ensemble_pytorch import fit_loop
from opponents.loops import careful_loop, plain_loop, timm_loop

NAME = "throughput"
UNIT = "images/s"
NETS = ("resnet20", "resnet110", "resnet32x4")
QUICK_NETS = ("resnet20",)
PLAIN, CAREFUL = "plain PyTorch loop", "careful PyTorch loop"
TORCHENSEMBLE, TIMM = "torchensemble", "careful loop with timm's optimizer and scheduler"
LOOPS: dict[str, Callable[..., None]] = {
    PLAIN: plain_loop,
    CAREFUL: careful_loop,
    TORCHENSEMBLE: fit_loop,
    TIMM: timm_loop,
}
NEEDS = {TORCHENSEMBLE: "torchensemble", TIMM: "timm"}
OFFER_PRECISION = (CAREFUL, TIMM)
WORKERS, QUICK_WORKERS = (0, 2), (0,)  # of the opponents' DataLoader: the best counts
ROUNDS_TO_CHOOSE = 2  # the better turn counts
WARM_UP_STEPS, QUICK_WARM_UP_STEPS = 4, 2  # CUDA graphs are captured within them
TURN_SECONDS, QUICK_TURN_SECONDS = 1.0, 0.4  # of the project; the others take longer for the same steps
LEAST_STEPS, MOST_STEPS = 2, 2000
ROUNDS, QUICK_ROUNDS = 5, 2


@dataclass(frozen=True)
class Setting:
    """What an opponent's user tries, to keep what is fastest. workers: of the DataLoader"""

    workers: int
    precision: str


def run(settings: Settings) -> Iterator[Result]:
    """Images/s of the project and its opponents, for each net."""
    missing = {name: reason for name, package in NEEDS.items() if (reason := not_installed(package))}
    best: dict[str, Setting] = {}
    for task in tasks(settings):
        # What serves best is found on the first net, the fastest, where loading weighs most.
        tried = {
            name: to_try(name, task, best.get(name), settings.quick) for name in LOOPS if name not in missing
        }
        results, found = measure_net(task, tried, settings.quick)
        best = best or found
        yield from results
        for name, reason in missing.items():
            yield Result(NAME, results[0].case, name, UNIT, "higher", missing=reason)


def tasks(settings: Settings) -> list[Task]:
    """Every net in the precision asked for; or else by default, the first in fp32 as well where that is another."""
    precisions = compared(settings.precision, settings.device)
    task = Task(NETS[0], settings.device, settings.data)
    first = [replace(task, precision=precision) for precision in precisions]
    nets = QUICK_NETS if settings.quick else NETS
    return [*first, *(replace(first[0], net=net) for net in nets[1:])]


def to_try(opponent: str, task: Task, best: Setting | None, quick: bool) -> list[Setting]:
    """The settings of an opponent that are worth a try. best: the fastest on the first net, if that is done

    Another net keeps the workers, but not the precision: more channels suit bf16 better.
    """
    offers = opponent in OFFER_PRECISION
    workers = [best.workers] if best else QUICK_WORKERS if quick else WORKERS
    precisions = tried_by_hand(task.precision, task.device) if offers else ("fp32",)
    return [Setting(count, precision) for count, precision in product(workers, precisions)]


def case_of(net: str, precision: str, batch_size: int = Task.batch_size) -> str:
    """For the report. precision: a text of harness.precisions"""
    return f"{net}, {precision}, batch {batch_size}"


def measure_net(
    task: Task, tried: Mapping[str, Sequence[Setting]], quick: bool
) -> tuple[list[Result], dict[str, Setting]]:
    """Images/s of the project and of the opponents in `tried`; and the setting that served each of them best."""
    best: dict[str, Setting] = {}
    with ExitStack() as stack:
        processes = {PROJECT: stack.enter_context(PacedProcess(PROJECT, train_loop, task))}
        steps = _steps_of_a_turn(processes[PROJECT], quick)
        for name, choice in tried.items():
            started = {
                setting: stack.enter_context(PacedProcess(name, LOOPS[name], _task_with(task, setting)))
                for setting in choice
            }
            best[name] = keep_fastest(started, steps, _warm_up_steps(quick))
            processes[name] = started[best[name]]
        turns = {name: partial(process.seconds_per_step, steps) for name, process in processes.items()}
        seconds = alternate(turns, QUICK_ROUNDS if quick else ROUNDS)
    values = {name: [task.batch_size / value for value in own] for name, own in seconds.items()}
    case = case_of(task.net, text_of(task.precision, task.device), task.batch_size)
    return compare(NAME, case, UNIT, values, "higher", _details(task, steps, best)), best


def _task_with(task: Task, setting: Setting) -> Task:
    return replace(task, workers=setting.workers, precision=setting.precision)


def _warm_up_steps(quick: bool) -> int:
    return QUICK_WARM_UP_STEPS if quick else WARM_UP_STEPS


def _steps_of_a_turn(project: PacedProcess, quick: bool) -> int:
    """The steps that the project makes in a turn's time, warm."""
    warm_up = _warm_up_steps(quick)
    project.run(warm_up)
    turn = QUICK_TURN_SECONDS if quick else TURN_SECONDS
    steps = round(turn / project.seconds_per_step(warm_up))
    return min(max(steps, LEAST_STEPS), MOST_STEPS)


def keep_fastest(processes: Mapping[Setting, PacedProcess], steps: int, warm_up: int) -> Setting:
    """Warm the processes up and return the setting of the fastest in turns of `steps`; the others are closed."""
    for process in processes.values():
        process.run(warm_up)
    if len(processes) == 1:
        return next(iter(processes))
    turns = {setting: partial(process.seconds_per_step, steps) for setting, process in processes.items()}
    seconds = alternate(turns, ROUNDS_TO_CHOOSE)
    best = min(seconds, key=lambda setting: min(seconds[setting]))
    for setting, process in processes.items():
        if setting != best:
            process.close()
    return best


def _details(task: Task, steps: int, best: Mapping[str, Setting]) -> dict[str, dict[str, Any]]:
    config = configure(task)
    own = {"precision": config.precision, "threads": config.threads}
    own |= {"steps per turn": steps, "data": describe_data(task.data)}
    chosen = {
        name: {"precision": setting.precision, "DataLoader workers": setting.workers}
        for name, setting in best.items()
    }
    return {PROJECT: own} | chosen
