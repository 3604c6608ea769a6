"""Say what the snapshots of a run are worth together: `python -m fastsnap.ensemble_eval --help`.

Writes ensemble.json, report.html and pictures into the run folder, or another.
"""

from fastsnap.waiting import spin_shortly

if __name__ == "__main__":
    spin_shortly()

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fastsnap import __version__
from fastsnap.command_line import add_computing, on_ranks, parsed_once, snapshot_numbers, until_stopped
from fastsnap.data.datasets import check_name
from fastsnap.data.folder import FOLDERS
from fastsnap.device import choose_device, take_gpu
from fastsnap.ensemble.against import FOLDER
from fastsnap.ensemble.combining import COMBINATIONS, MEAN
from fastsnap.ensemble.evaluate import assist_evaluation
from fastsnap.ensemble.forwards import BATCH_SIZE
from fastsnap.ensemble.inputs import SPLITS
from fastsnap.ensemble.report import compare_runs, report_run
from fastsnap.ensemble.views import MIRROR, ONE, TEN_CROP
from fastsnap.limits import choose_threads
from fastsnap.printing import ArgumentParser, is_lost, make_console
from fastsnap.run_folder import RUNS, RunFolder, newest_run
from fastsnap.training.allocator import keep_freed_memory
from fastsnap.training.ranks import TIMEOUT, Ranks


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastsnap.ensemble_eval",
        description="Evaluate the snapshots of a run: each alone, the last m averaged for every m, and all that can be "
        "made of them. Of a run that was trained with --validation N, what to use of it is decided on those images, "
        "before the test images are read: which snapshots, with which weights, at which temperature; predict and "
        "export then take that. Prints tables and writes ensemble.json, report.html and pictures into the run folder. "
        "What is not of all snapshots on the test images has names that say so, such as "
        "ensemble-validation-snapshots-2.json, and replaces nothing else.",
        epilog="Columns: top-1 and top-5 error in percent, negative log-likelihood (NLL) in nats, expected "
        "calibration error (ECE, 15 bins) 0 to 1, Brier score 0 to 2; lower is better in every column. Intervals "
        "are of 95 % and paired image by image.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help=f"run folder (default: the newest under {RUNS}/); several: how they compare with the first one on the "
        "same test images, and over seeds where they differ in nothing else",
    )
    parser.add_argument(
        "--snapshots",
        metavar="N,N,...",
        type=snapshot_numbers,
        help="numbers of the snapshots to evaluate, from 1 (default: all that are saved)",
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="test",
        help="images to evaluate on; validation: those held out of training (default: test)",
    )
    views = parser.add_mutually_exclusive_group()
    for view, text in (
        (MIRROR, "each image and its mirror image"),
        (TEN_CROP, "the four corners and the centre, mirrored too"),
    ):
        views.add_argument(
            f"--{view}",
            dest="views",
            action="store_const",
            const=view,
            default=ONE,
            help=f"average probabilities over {text}",
        )
    parser.add_argument(
        "--combine",
        choices=COMBINATIONS,
        default=MEAN,
        help="what the members say: the mean of their probabilities, the geometric one, or the class that most vote "
        "for; of another than mean nothing is decided (default: mean)",
    )
    parser.add_argument(
        "--averages",
        action="store_true",
        help="also evaluate single networks whose weights are averages: of the last m snapshots, of those chosen on "
        "held-out images, and training's running average (--ema); BatchNorm's statistics are gathered anew",
    )
    parser.add_argument(
        "--interpolate",
        metavar="N,N",
        nargs="?",
        const="",
        help="also evaluate networks on the line between two snapshots (default: the last two)",
    )
    parser.add_argument(
        "--against",
        metavar=("NAME", "DIR"),
        nargs="+",
        help="also tell another data set from the test images by how unsure the ensemble is (AUROC): its name, such as "
        "svhn, from --data; or folder and a folder of pictures",
    )
    parser.add_argument(
        "--json",
        metavar="PATH",
        help="also write ensemble.json's content there; -: to standard output, the tables to standard error",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write JSON and plots there, for a run folder that cannot be written to (default: the run folder)",
    )
    add_computing(
        parser,
        BATCH_SIZE,
        "auto",
        note=", whatever the run was trained in; another than that of training is part of the files' names",
    )
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data sets (default: the run's)")
    parser.add_argument("--version", action="version", version=f"fastsnap {__version__}")
    return parser


def _check_json_path(path: str | None) -> None:
    """Raise ValueError before the evaluation, not after it."""
    if path == "":
        raise ValueError("--json needs a file's name, or - for standard output, got nothing")
    folder = Path(path or "-").parent
    if not folder.is_dir():
        raise ValueError(f"cannot write --json {path}: there is no folder {folder}")
    if path and Path(path).is_dir():
        raise ValueError(f"cannot write --json {path}: it is a folder; name a file")


def _require_for_one(options: argparse.Namespace) -> None:
    """Raise ValueError for what is asked of several runs, but is of one only."""
    given = {
        "--snapshots": options.snapshots,
        "--split": options.split != "test",
        "--combine": options.combine != MEAN,
        "--averages": options.averages,
        "--interpolate": options.interpolate is not None,
        "--against": options.against,
    }
    for flag, value in given.items():
        if value:
            raise ValueError(
                f"{flag} is for one run, got {len(options.runs)}: {', '.join(options.runs)}; runs are compared on all "
                "test images with all that each has"
            )


def _against(options: argparse.Namespace, folder: RunFolder, ranks: Ranks) -> tuple[str, Path] | None:
    """The data set to tell apart, and where it is: a data set by name lies where the run's own did, unless told."""
    if not options.against:
        return None
    if ranks.count > 1 or options.split != "test":
        raise ValueError("--against needs a single process and --split test")
    name, place = options.against
    if name != FOLDER:
        check_name(name)
        if name in FOLDERS:
            raise ValueError(f"--against {name} must be a folder of pictures: --against folder DIR")
    return name, Path(place or folder.config().get("data") or "data")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for an error of use, 128 + signal if stopped by one.

    An output that closes counts as SIGPIPE; what was evaluated is saved before it is shown.
    """
    return on_ranks(lambda ranks: until_stopped(lambda: _evaluate(arguments, ranks)))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """With --against as a pair, or None, and --interpolate as numbers: what follows their own words are runs."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.interpolate and Path(options.interpolate).is_dir():
        options.runs, options.interpolate = [options.interpolate, *options.runs], ""
    if options.interpolate is not None:
        try:
            options.interpolate = snapshot_numbers(options.interpolate) if options.interpolate else []
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --interpolate: {error}")
    if options.against:
        name, *rest = options.against
        if name == FOLDER and not rest:
            raise ValueError("--against folder needs the folder of the pictures: --against folder DIR")
        own = rest[:1] if name == FOLDER else [options.data or ""]
        options.runs += rest[1:] if name == FOLDER else rest
        options.against = (name, own[0])
    return options


def _evaluate(arguments: list[str] | None, ranks: Ranks) -> int:
    options = parsed_once(lambda: _parse(arguments), ranks)
    keep_freed_memory()
    device = choose_device(options.device)
    take_gpu(device, ranks.local_rank, ranks.local_count)
    torch.set_num_threads(choose_threads(options.threads, sharing=ranks.local_count).count)
    ranks.open(device, TIMEOUT)
    if not ranks.is_first:
        for run in options.runs or [RUNS]:
            assist_evaluation(ranks, RunFolder(run), data=options.data, device=device)
        return 0
    _check_json_path(options.json)
    console = make_console(stderr=options.json == "-")
    common: dict[str, Any] = {
        "console": console,
        "json_path": options.json,
        "out": Path(options.out) if options.out else None,
        "data": options.data,
        "batch_size": options.batch_size,
        "device": device,
        "precision": options.precision,
        "views": options.views,
        "ranks": ranks,
    }
    if len(options.runs) > 1:
        _require_for_one(options)
        compare_runs([RunFolder(run) for run in options.runs], **common)
        return 128 + signal.SIGPIPE if is_lost(console) else 0
    folder = RunFolder(options.runs[0]) if options.runs else newest_run()
    report_run(
        folder,
        snapshots=options.snapshots,
        split=options.split,
        combine=options.combine,
        averages=options.averages,
        interpolate=options.interpolate,
        against=_against(options, folder, ranks),
        **common,
    )
    return 128 + signal.SIGPIPE if is_lost(console) else 0


if __name__ == "__main__":
    sys.exit(main())
