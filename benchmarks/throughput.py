"""Training throughput, end to end: batches, forward, backward, update and schedule of the same task.

Every contender trains in a process of its own and runs in turns with the others. The first steps (compilation, first
allocations, workers starting) are not counted, nor is saving, which the benchmark `schedules` measures.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from harness.measure import PROJECT, Result, Settings, alternate, compare, not_installed
from harness.paced import PacedProcess
from harness.project import train_loop
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
WORKERS, QUICK_WORKERS = (0, 2), (0,)  # of the opponents' DataLoader: the best counts
WARM_UP_STEPS, QUICK_WARM_UP_STEPS = 4, 2  # CUDA graphs are captured within them
TURN_SECONDS, QUICK_TURN_SECONDS = 1.0, 0.4  # of the project; the others take longer for the same steps
LEAST_STEPS, MOST_STEPS = 2, 2000
ROUNDS, QUICK_ROUNDS = 5, 2

Workers = dict[str, tuple[int, ...]]  # per opponent, the numbers of workers to try


def run(settings: Settings) -> Iterator[Result]:
    """Images/s of the project and its opponents, for each net."""
    missing = {name: reason for name, package in NEEDS.items() if (reason := not_installed(package))}
    tried = QUICK_WORKERS if settings.quick else WORKERS
    workers: Workers = {name: tried for name in LOOPS if name not in missing}
    for net in QUICK_NETS if settings.quick else NETS:
        task = Task(net, settings.device, settings.data)
        # What serves best is found on the first net, the fastest, where loading weighs most.
        results, workers = measure_net(task, workers, settings.quick)
        yield from results
        for name, reason in missing.items():
            yield Result(NAME, results[0].case, name, UNIT, "higher", missing=reason)


def case_of(net: str, batch_size: int = Task.batch_size) -> str:
    """The net and its batch, for the report."""
    return f"{net}, batch {batch_size}"


def measure_net(task: Task, workers: Workers, quick: bool) -> tuple[list[Result], Workers]:
    """Images/s of the project and of the opponents in `workers`; and the number of workers that served each best."""
    with ExitStack() as stack:
        project = stack.enter_context(PacedProcess(PROJECT, train_loop, task))
        opponents = {
            name: {
                count: stack.enter_context(PacedProcess(name, LOOPS[name], replace(task, workers=count)))
                for count in counts
            }
            for name, counts in workers.items()
        }
        steps = _steps_of_a_turn(project, opponents, quick)
        best = {name: _keep_fastest(processes, steps) for name, processes in opponents.items()}
        processes = {PROJECT: project} | {name: opponents[name][count] for name, count in best.items()}
        turns = {name: partial(process.seconds_per_step, steps) for name, process in processes.items()}
        seconds = alternate(turns, QUICK_ROUNDS if quick else ROUNDS)
    values = {name: [task.batch_size / value for value in own] for name, own in seconds.items()}
    common = {"steps per turn": steps, "data": describe_data(task.data)}
    details = {name: {"DataLoader workers": count} for name, count in best.items()}
    results = compare(
        NAME, case_of(task.net, task.batch_size), UNIT, values, "higher", {PROJECT: common} | details
    )
    return results, {name: (count,) for name, count in best.items()}


def _steps_of_a_turn(
    project: PacedProcess, opponents: dict[str, dict[int, PacedProcess]], quick: bool
) -> int:
    """The steps that the project makes in a turn's time, with all processes warm."""
    warm_up = QUICK_WARM_UP_STEPS if quick else WARM_UP_STEPS
    for process in [project, *(process for loops in opponents.values() for process in loops.values())]:
        process.run(warm_up)
    turn = QUICK_TURN_SECONDS if quick else TURN_SECONDS
    steps = round(turn / project.seconds_per_step(warm_up))
    return min(max(steps, LEAST_STEPS), MOST_STEPS)


def _keep_fastest(processes: dict[int, PacedProcess], steps: int) -> int:
    """The number of workers of the fastest process; the others are closed."""
    if len(processes) == 1:
        return next(iter(processes))
    seconds = {count: process.seconds_per_step(steps) for count, process in processes.items()}
    best = min(seconds, key=lambda count: seconds[count])
    for count, process in processes.items():
        if count != best:
            process.close()
    return best
