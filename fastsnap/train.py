"""Train a snapshot ensemble: `python -m fastsnap.train --help`.

One run trains, saves a snapshot at the end of each learning-rate cycle, and evaluates the ensemble. The same command
again goes on with an unfinished run, to the same bits, and evaluates a finished one.
"""

from fastsnap.waiting import spin_shortly

if __name__ == "__main__":
    spin_shortly()

import contextlib
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from fastsnap.agreement import as_first, require_agreement, require_same_data
from fastsnap.assembly import (
    as_begun,
    begin_with_initial,
    build_trainer,
    describe,
    load_data,
    load_teacher,
    network_options,
    planned_steps,
    reasons_of,
    require_room,
    settle,
    settle_loader,
)
from fastsnap.command_line import on_ranks, parsed_once
from fastsnap.config import TrainConfig, differences, parse_arguments
from fastsnap.data.fingerprint import image_sets, require_same_images
from fastsnap.data.sources import Dataset
from fastsnap.device import choose_device, take_gpu
from fastsnap.ensemble.evaluate import assist_evaluation
from fastsnap.ensemble.plots import figures_of
from fastsnap.ensemble.report import report_run
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.teaching import EnsembleTeacher, has_seen_held_out
from fastsnap.limits import format_bytes
from fastsnap.nets import names
from fastsnap.nets.build import SHORTENS
from fastsnap.nets.cost import cost_of
from fastsnap.nets.initial import require_outside, require_same_initial
from fastsnap.nets.weights import read_initial
from fastsnap.printing import is_lost, make_console, print_error, print_line
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_state import is_finished, require_config, set_aside
from fastsnap.training.allocator import keep_freed_memory
from fastsnap.training.exchange import running_statistics
from fastsnap.training.progress import ProgressDisplay
from fastsnap.training.ranks import Ranks
from fastsnap.training.stopping import TrainingStopped, stop_signals_raised
from fastsnap.training.tensorboard import TensorBoard, require_tensorboard
from fastsnap.training.trainer import Trainer

RESTARTED = "--restart is done"


def train(
    config: TrainConfig, console: Console, *, restart: bool = False, ranks: Ranks | None = None
) -> tuple[RunFolder, Dataset]:
    """Train, or go on training, what `config` describes; returns the run folder and the data set.

    restart  begin anew, whatever the run folder holds: that is moved to a folder in it
    ranks    that do it together, each with this call; the first one alone reads and writes the run folder
    Raises ValueError for anything that cannot be done as asked, TrainingStopped after SIGTERM or Ctrl-C, and RanksLost.
    """
    folder, ranks = RunFolder(config.out), ranks or Ranks()
    if config.tensorboard:
        require_tensorboard()
    take_gpu(choose_device(config.device), ranks.local_rank, ranks.local_count)
    require_agreement(config, folder, ranks, restart=restart)
    # What torchrun starts again is not to begin anew a second time.
    restart = ranks.from_first(lambda: restart and not ranks.remembers(RESTARTED))
    reasons = reasons_of(config, sharing=ranks.local_count)
    told = ranks.from_first(lambda: _begin(config, folder, ranks, restart=restart))
    reasons |= told["reasons"]
    config = as_first(settle(config, sharing=ranks.local_count), told["config"])
    ranks.open(torch.device(config.device), config.timeout)
    torch.set_num_threads(config.threads or 1)
    dataset = _load_data(config, told["saved"], console, ranks)
    config = as_first(config, ranks.from_first(lambda: asdict(settle_loader(config, dataset))))
    unfinished = ranks.from_first(lambda: restart or not is_finished(folder, planned_steps(config, dataset)))
    # A finished run needs its teacher no more, which may be gone.
    teacher = load_teacher(config, dataset, told["saved"]) if unfinished else None
    if unfinished:
        require_room(config, dataset, folder, ranks, teacher, restart=restart)
    # Of a run that has weights of its own, those that it began with may be gone.
    begins = ranks.is_first and (restart or not folder.bytes_of_tensors())
    initial = read_initial(config.initial) if config.initial is not None and begins else None
    lock = folder.locked(lambda text: print_line(console, text)) if ranks.is_first else nullcontext()
    with lock:
        # First: what cannot be begun must not move a run aside.
        trainer = build_trainer(config, dataset, folder, ranks, teacher)
        if ranks.is_first:
            began = begin_with_initial(config, dataset, trainer, initial) if initial else ""
            if restart:
                moved = set_aside(folder)
                ranks.remember(RESTARTED)
                if moved:
                    print_line(console, f"restart: what was there is now in {moved}")
            _require_same(config, folder)  # a process that held the lock until now may have made it
            if folder.exists():
                require_same_images(image_sets(dataset), folder.config(), str(folder.path))
            _print_summary(console, config, reasons, dataset, trainer)
            if began:
                print_line(console, f"initial   {began}")
            if not folder.exists():
                folder.write_json("config.json", describe(config, dataset, initial, ranks.count, teacher))
        resumed = trainer.resume()
        if trainer.step == trainer.schedule.steps:
            print_line(console, f"this run is finished: {folder.path}")
            return folder, dataset
        if resumed and ranks.is_first:
            epoch = trainer.step // trainer.pipeline.steps_per_epoch
            print_line(console, f"going on after step {trainer.step:,} (epoch {epoch:,} done): {folder.path}")
            _print_changes(console, folder.config(), trainer)
        board = TensorBoard(folder.path, trainer.step) if config.tensorboard and ranks.is_first else None
        with (
            contextlib.closing(board) if board else nullcontext(),
            ProgressDisplay(console, trainer.step, trainer.schedule.steps) as display,
        ):
            trainer.on_record = board.add if board else trainer.on_record
            trainer.run(display)
    return folder, dataset


def _show_pictures(folder: RunFolder, report: Report) -> None:
    """The evaluation's, in TensorBoard."""
    step = report.snapshots[-1].step
    with contextlib.closing(TensorBoard(folder.path, step)) as board:
        for name, figure in figures_of(folder, report).items():
            board.add_picture(name, figure, step)


def _begin(config: TrainConfig, folder: RunFolder, ranks: Ranks, *, restart: bool) -> dict[str, Any]:
    """What rank 0 finds before the data are read: the settled configuration, why, and that of the run that is there."""
    require_outside(config.initial, config.out)
    reasons = {}
    if folder.exists() and not restart:
        begun = as_begun(config, folder.config())
        if begun.precision != config.precision:
            reasons = {"precision": "as this run began"}
        config = begun
    config = settle(config, sharing=ranks.local_count)
    if not restart:
        _require_same(config, folder)
    saved = folder.config() if folder.exists() and not restart else {}
    return {"config": asdict(config), "reasons": reasons, "saved": saved}


def _load_data(config: TrainConfig, saved: dict[str, Any], console: Console, ranks: Ranks) -> Dataset:
    """The data set, the same on all ranks: the first of each host gets it, and decodes pictures into the cache."""
    if ranks.local_rank:
        ranks.meet("the first rank of every host has the data")
    dataset = load_data(config, saved, console)
    if not ranks.local_rank:
        ranks.meet("the first rank of every host has the data")
    require_same_data(dataset, ranks)
    return dataset


def _require_same(config: TrainConfig, folder: RunFolder) -> None:
    """Raise RunError if `folder` holds another run, or one that has lost its configuration."""
    require_config(folder)
    different = differences(config, folder.config()) if folder.exists() else {}
    if different:
        fields = "; ".join(
            f"{name}: {asked} asked for, {saved} there" for name, (asked, saved) in different.items()
        )
        raise RunError(
            f"{folder.path} holds a run of another configuration ({fields}). Choose another --out (make: OUT=...), "
            "give the same values to go on with it, or add --restart to move it aside"
        )
    if folder.exists():
        require_same_initial(config.initial, folder.config(), str(folder.path))


def _print_changes(console: Console, began: dict[str, Any], trainer: Trainer) -> None:
    """Say what differs from where the run began, if that can change the last bits of its result."""
    before, ranks = trainer.began_with_ranks, trainer.ranks.count
    if before != ranks:
        apart = "; BatchNorm sees each rank's images apart" if running_statistics(trainer.network) else ""
        print_line(
            console,
            f"note: until here this run had {before} {'rank' if before == 1 else 'ranks'}, and goes on with {ranks}: "
            f"the same batches and updates, but sums in another order, so that last bits can differ{apart}",
        )
    then = (began.get("threads"), (began.get("versions") or {}).get("torch"))
    now = (torch.get_num_threads(), torch.__version__)
    if then != now:
        print_line(
            console,
            f"note: this run began with {then[0]} threads and torch {then[1]}, and goes on with {now[0]} and {now[1]}: "
            "the snapshots can differ in their last bits from those of an uninterrupted run",
        )


def _print_summary(
    console: Console, config: TrainConfig, reasons: dict[str, str], dataset: Dataset, trainer: Trainer
) -> None:
    """config: settled; reasons: see assembly.reasons_of."""
    cost = cost_of(config.net, **network_options(config, dataset))
    size = "x".join(str(length) for length in dataset.train.shape)
    device, several = torch.device(config.device), trainer.ranks.count > 1
    rows = {
        "data": f"{config.dataset}: {len(dataset.train.labels):,} training images {size}, {config.validation:,} held "
        f"out, {len(dataset.test.labels):,} test images, {len(dataset.classes)} classes",
        "source": dataset.source,
        "net": f"{config.net}, {cost.parameters:,} parameters, {cost.gflop:.3g} GFLOP per image "
        f"({cost.training_gflop:.3g} in training)" + _options_text(config),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": f"{config.threads} ({reasons['threads']})",
        "precision": f"{config.precision} ({reasons['precision']})",
        "step": f"channels-last, torch.compile {config.compile}, batches from {trainer.pipeline.name}"
        + (
            ", no CUDA graph, as the ranks' sum is none of its parts"
            if several and device.type == "cuda"
            else ""
        ),
        "update": f"{config.update}, momentum {config.momentum}, weight decay {config.weight_decay}",
        "schedule": f"{config.schedule}: {trainer.schedule.steps:,} steps of {config.batch_size} images, "
        f"{config.epochs} epochs, {config.cycles} cycles, lr {config.learning_rate}",
        "run": f"{trainer.folder.path}, seed {config.seed}",
    }
    if trainer.train_step.exchange:
        share = trainer.pipeline.plan.share(0)
        norm = "; BatchNorm over each rank's own" if running_statistics(trainer.network) else ""
        rows["ranks"] = (
            f"{trainer.ranks.count}, up to {share.own} of {share.whole} images of a batch each{norm}; "
            f"{format_bytes(trainer.train_step.exchange.bytes)} summed per step"
        )
    remark = names.note(config.net, dataset.train.shape[:2])
    if remark:
        rows["net"] += f"; {remark}"
    if isinstance(trainer.teacher, EnsembleTeacher):
        said = "its probabilities are kept" if trainer.teacher.kept else "each batch passes through it"
        rows["teacher"] = (
            f"{config.teacher}: {trainer.teacher}; {said}; weight {config.teacher_weight}, temperature "
            f"{config.teacher_temperature}"
        )
        if config.teacher and has_seen_held_out(RunFolder(config.teacher).config(), dataset):
            rows["teacher"] += (
                "; note: it was trained on images that are held out here, which will flatter this run: give both runs "
                "the same --validation and --seed"
            )
    if trainer.validate is not None:
        rows["data"] += "; each snapshot is evaluated on those held out"
    for name, text in rows.items():
        print_line(console, f"{name:9s} {text}")


def _options_text(config: TrainConfig) -> str:
    """Of the network, those that have an effect on it."""
    family = names.parse_name(config.net).family
    texts = [f", shortcut {config.shortcut}"] if family in SHORTENS else []
    texts += [f", stride {config.stem_stride} in the first convolution"] if config.stem_stride != 1 else []
    return "".join(texts + ([f", dropout {config.dropout}"] if config.dropout else []))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for an error of use, 128 + signal if stopped by one.

    An output that closes counts as SIGPIPE.
    """
    return on_ranks(lambda ranks: _main(arguments, ranks))


def _main(arguments: list[str] | None, ranks: Ranks) -> int:
    console = make_console(silent=not ranks.is_first)
    restart = False
    keep_freed_memory()
    try:
        with stop_signals_raised():
            config, restart = parsed_once(lambda: parse_arguments(arguments), ranks)
            folder, dataset = train(config, console, restart=restart, ranks=ranks)
            options: dict[str, Any] = {"dataset": dataset, "device": choose_device(config.device)}
            if ranks.is_first:
                report = report_run(
                    folder,
                    precision=config.precision,
                    console=console,
                    check_memory=False,
                    ranks=ranks,
                    **options,
                )
                if config.tensorboard:
                    _show_pictures(folder, report)
            else:
                assist_evaluation(ranks, folder, check_memory=False, **options)
    except TrainingStopped as stopped:
        # Where another rank failed, its error is what there is to say: torchrun then stops all others.
        if ranks.is_first and ranks.speaks_of_failure():
            command = "same command again, without --restart," if restart else "same command again"
            text = f"stopped by {stopped}. Run the {command} to go on"
            print_line(console, text)
            if is_lost(console):
                print_error(text)
        return 128 + stopped.signal_number
    return 128 + signal.SIGPIPE if is_lost(console) else 0


if __name__ == "__main__":
    sys.exit(main())
