"""Say what the snapshots of a run are worth together: `python -m fastsnap.ensemble_eval --help`.

Writes ensemble.json, error-against-m.png and training.png into the run folder.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastsnap import __version__
from fastsnap.config import DEVICES
from fastsnap.ensemble.evaluate import BATCH_SIZE, SPLITS, Report, evaluate_run
from fastsnap.ensemble.metrics import Metrics
from fastsnap.ensemble.plots import save_plots
from fastsnap.run_folder import RUNS, RunFolder, newest_run
from fastsnap.training.allocator import keep_freed_memory
from fastsnap.training.step import choose_device
from fastsnap.training.stopping import TrainingStopped, stop_signals_raised

WIDEST_TABLE = (
    200  # characters; terminals and files that are narrower than a table get whole lines, no cut cells
)
METRIC_COLUMNS = ("error %", "top-5 %", "NLL", "ECE", "Brier")


def report_run(
    folder: RunFolder, *, console: Console, json_path: str | None = None, **options: Any
) -> Report:
    """Evaluate the run in `folder`, print the tables on `console`, and save ensemble.json and the plots.

    json_path  write ensemble.json's content there as well, "-" for standard output
    options    those of evaluate_run
    Raises ValueError for what evaluate_run cannot do and for a folder that cannot be written to.
    """
    with console.status("reading the data") as status:
        report = evaluate_run(
            folder, on_member=lambda entry: status.update(f"evaluating snapshot {entry.number}"), **options
        )
    print_report(report, console)
    if json_path:  # first: the run folder may be read-only
        _write_json(report, json_path)
    folder.write_json("ensemble.json", report.as_json())
    save_plots(folder, report)
    _print_line(console, f"saved ensemble.json, error-against-m.png and training.png in {folder.path}")
    return report


def print_report(report: Report, console: Console) -> None:
    """What was evaluated, the tables, and a sentence that sums them up."""
    _print_line(
        console,
        f"\n{report.run}: {report.net} on {report.dataset} {report.split}, {report.images:,} images "
        f"({report.device}, {report.precision}, {report.seconds:.1f} s)\n",
    )
    if report.saved < report.planned:
        _print_line(
            console, f"The run is not finished: {report.saved} of its {report.planned} snapshots are saved.\n"
        )
    for table in (_members_table(report), _last_m_table(report)):
        table.width = console.measure(table, options=console.options.update(width=WIDEST_TABLE)).maximum
        console.print(table, crop=False)
        console.print()
    _print_line(console, summary(report))
    advice = _advice(report)
    if advice:
        _print_line(console, advice)


def _print_line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _members_table(report: Report) -> Table:
    table = _table("Each snapshot alone", "snapshot", "epoch", "end lr", "train loss")
    for entry, metrics in zip(report.snapshots, report.metrics.alone, strict=True):
        place = (f"{entry.number}", f"{entry.epoch}", f"{entry.learning_rate:.2g}", f"{entry.train_loss:.4f}")
        table.add_row(*place, *_cells(metrics))
    return table


def _last_m_table(report: Report) -> Table:
    table = _table("The last m averaged", "m", "snapshots")
    numbers = [entry.number for entry in report.snapshots]
    for m, metrics in enumerate(report.metrics.last_m, start=1):
        table.add_row(f"{m}", _ranges(numbers[-m:]), *_cells(metrics))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    for name in columns + METRIC_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(metrics: Metrics) -> tuple[str, ...]:
    percents = (f"{metrics.error:.2f}", f"{metrics.top5_error:.2f}")
    return (*percents, f"{metrics.nll:.4f}", f"{metrics.ece:.4f}", f"{metrics.brier:.4f}")


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 5] -> "1-3, 5"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{start}" if start == end else f"{start}-{end}" for start, end in pairs)


def summary(report: Report) -> str:
    """One sentence: what all members together gain or lose against the last one alone."""
    together, last = report.metrics.last_m[-1].error, report.metrics.alone[-1].error
    count = len(report.snapshots)
    if count == 1:
        return f"1 snapshot: {last:.2f} % error; an ensemble needs at least 2."
    difference = report.metrics.all_against_last
    points, spread = difference.points, difference.standard_error
    if points == 0:
        return f"{count} snapshots together: {together:.2f} % error, the same as the last one alone."
    relation = "below" if points < 0 else "above"
    text = (
        f"{count} snapshots together: {together:.2f} % error, {abs(points):.2f} ± {spread:.2f} points "
        f"{relation} the last one alone ({last:.2f} %)"
    )
    if abs(points) < 2 * spread:
        return text + f"; with {report.images:,} images that is within the noise (±: standard error)."
    return text + " (±: standard error over the images)."


def _advice(report: Report) -> str | None:
    """How many to average: which m validates best, or why the test images must not choose it."""
    if len(report.snapshots) == 1:
        return None
    nlls = [metrics.nll for metrics in report.metrics.last_m]
    if report.split == "validation":
        return f"Lowest NLL on the validation images: the last {nlls.index(min(nlls)) + 1}."
    return "To choose m, use --split validation (of a run trained with --validation N), not the test images."


def _snapshot_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers separated by commas, such as 3,5; got {text!r}"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastsnap.ensemble_eval",
        description="Evaluate the snapshots of a run: each alone, and the last m averaged for every m. "
        "Prints tables and writes ensemble.json, error-against-m.png and training.png into the run folder.",
        epilog="Columns: top-1 and top-5 error in percent, negative log-likelihood (NLL) in nats, expected "
        "calibration error (ECE, 15 bins) 0 to 1, Brier score 0 to 2; lower is better in every column.",
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help=f"run folder (default: the newest under {RUNS}/)"
    )
    parser.add_argument(
        "--snapshots",
        metavar="N,N,...",
        type=_snapshot_numbers,
        help="numbers of the snapshots to evaluate, from 1 (default: all that are saved)",
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="test",
        help="images to evaluate on; validation: those held out of training (default: test)",
    )
    parser.add_argument(
        "--json",
        metavar="PATH",
        help="also write ensemble.json's content there; -: to standard output, the tables to standard error",
    )
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, help=f"images per forward pass (default: {BATCH_SIZE})"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto: CUDA if there is one (default: auto)"
    )
    parser.add_argument("--data", metavar="DIR", help="folder that holds the data sets (default: the run's)")
    parser.add_argument("--version", action="version", version=f"fastsnap {__version__}")
    return parser


def _write_json(report: Report, path: str) -> None:
    content = json.dumps(report.as_json(), indent=2) + "\n"
    if path == "-":
        sys.stdout.write(content)
        return
    try:
        Path(path).write_text(content)
    except OSError as error:
        raise ValueError(f"cannot write --json {path}: {error.strerror}") from error


def _check_json_path(path: str | None) -> None:
    """Raise ValueError before the evaluation, not after it."""
    folder = Path(path or "-").parent
    if not folder.is_dir():
        raise ValueError(f"cannot write --json {path}: there is no folder {folder}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for an error of use, 128 + signal if stopped by one."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    try:
        with stop_signals_raised():
            _evaluate(options)
    except TrainingStopped as stopped:
        print(f"stopped by {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    _check_json_path(options.json)
    report_run(
        RunFolder(options.run) if options.run else newest_run(),
        console=Console(stderr=options.json == "-"),
        json_path=options.json,
        data=options.data,
        snapshots=options.snapshots,
        split=options.split,
        batch_size=options.batch_size,
        device=choose_device(options.device),
    )


if __name__ == "__main__":
    sys.exit(main())
