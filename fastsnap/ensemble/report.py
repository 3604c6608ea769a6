"""Evaluating a run from end to end: the figures, the files that keep them, and the tables on a console.

`ensemble.json` is of all snapshots, on the test images, in the precision that suits the device. Whatever else is asked
for goes to files whose names say what it is: `ensemble-validation-snapshots-1-3.json`. None replaces another's result.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastsnap.ensemble.against import Against, measure_against
from fastsnap.ensemble.combination import combine
from fastsnap.ensemble.combining import MEAN
from fastsnap.ensemble.comparison import RunComparison, compare, require_comparable
from fastsnap.ensemble.drawing import save
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.forwards import BATCH_SIZE
from fastsnap.ensemble.lines import ranges
from fastsnap.ensemble.loading import load_ensemble
from fastsnap.ensemble.page import page
from fastsnap.ensemble.plots import comparison_figure, figures_of, save_plots
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.tables import print_comparison, print_report
from fastsnap.ensemble.views import ONE
from fastsnap.printing import OutputLost, print_line, write_output
from fastsnap.run_files import RunError, require_writable, write_atomically
from fastsnap.run_folder import RunFolder

LONGEST_SUFFIX = 100  # characters; a file's name has room for 255


def report_run(
    folder: RunFolder,
    *,
    console: Console,
    json_path: str | None = None,
    out: Path | None = None,
    precision: str = "auto",
    against: tuple[str, Path] | None = None,
    **options: Any,
) -> Report:
    """Evaluate the run in `folder`, save its JSON and plots, and print the tables on `console`.

    json_path  write the JSON there as well, "-" for standard output
    out        folder for JSON and plots; default: the run's
    against    name and folder of another data set, to tell apart from the test images: see against.measure_against
    precision  and options: those of evaluate_run
    Raises ValueError for what evaluate_run cannot do, for a folder that cannot be written to, before evaluating, and
    for files that cannot be saved after all: the tables are printed then, too.
    Raises OutputLost if nobody reads the JSON.
    """
    out = out or folder.path
    folder.config()  # no run at all is a worse fault than a folder that cannot be written to
    require_writable(out)
    with console.status("reading the data", spinner="line") as status:
        report = evaluate_run(
            folder,
            on_member=lambda entry: status.update(f"evaluating snapshot {entry.number}"),
            say=status.update,
            precision=precision,
            **options,
        )
        if against:
            status.update(f"looking at {against[0]}")
            report = replace(report, against=_against(folder, report, *against, options))
    publish(report, folder, console, out, asked_precision=precision, json_path=json_path)
    return report


def _against(folder: RunFolder, report: Report, name: str, place: Path, options: dict[str, Any]) -> Against:
    """With the members, weights and temperature of the report."""
    choice, outputs = report.choice, report.outputs
    assert outputs is not None
    members = choice.taken.members if choice else list(range(len(report.snapshots)))
    weights = [choice.taken.weights[member] if choice else 1.0 for member in members]
    temperature = choice.temperature if choice else 1.0
    ensemble = load_ensemble(
        folder.path,
        snapshots=[report.snapshots[member].number for member in members],
        weights=weights,
        temperature=temperature,
        device=options.get("device"),
        precision=report.precision,
        data=options.get("data"),
    )
    test = combine(outputs.logits[members], weights, temperature)
    size = options.get("batch_size") or BATCH_SIZE
    return measure_against(ensemble, test, name, place, size, torch.get_num_threads())


def compare_runs(
    folders: Sequence[RunFolder],
    *,
    console: Console,
    json_path: str | None = None,
    out: Path | None = None,
    **options: Any,
) -> RunComparison:
    """Evaluate the runs in `folders` on the same test images, and print how they compare with the first one.

    json_path  write the JSON there, "-" for standard output
    out        folder for comparison.json and comparison.png; default: they are not kept
    options    those of evaluate_run
    Raises ValueError for runs that cannot be compared, as report_run does else.
    """
    names = names_of(folders)
    configs = [folder.config() for folder in folders]
    require_comparable(configs, names)
    if out is not None:
        require_writable(out)
    reports = []
    with console.status("reading the data", spinner="line") as status:
        for name, folder in zip(names, folders, strict=True):
            status.update(f"evaluating {name}")
            reports.append(evaluate_run(folder, **options))
    comparison = compare(reports, configs, names)
    text = json.dumps(comparison.as_json(), indent=2, allow_nan=False) + "\n"
    if out is not None:
        write_atomically(out / "comparison.json", text.encode())
        save(comparison_figure(reports, names), out / "comparison.png")
    if json_path and json_path != "-":
        _write_json(Path(json_path), text)
    arrived = write_output(text) if json_path == "-" else True
    print_comparison(comparison, console)
    if not arrived:
        raise OutputLost
    if out is not None:
        print_line(console, f"saved comparison.json and comparison.png in {out}")
    return comparison


def names_of(folders: Sequence[RunFolder]) -> list[str]:
    """Of the folders alone where these differ, else with all that is before them.

    Raises RunError for a run that is named twice.
    """
    places = [folder.path.resolve() for folder in folders]
    twice = sorted({str(place) for place in places if places.count(place) > 1})
    if twice:
        raise RunError(f"runs to compare must be different ones, got {', '.join(twice)} more than once")
    short = [place.name for place in places]
    return short if len(set(short)) == len(short) else [str(folder.path) for folder in folders]


def publish(
    report: Report,
    folder: RunFolder,
    console: Console,
    out: Path,
    *,
    asked_precision: str,
    json_path: str | None = None,
) -> None:
    """Save JSON and plots in `out`, and print the tables. Raises as report_run does."""
    # Saved first: whatever happens to a terminal or a pipe, the result of minutes is there.
    failure = None
    try:
        saved = _save(report, folder, out, file_suffix(report, asked_precision))
        if json_path and json_path != "-":
            _write_json(Path(json_path), _as_text(report))
    except RunError as error:
        failure = error
    arrived = write_output(_as_text(report)) if json_path == "-" else True
    print_report(report, console)
    if failure:
        raise failure
    if not arrived:
        raise OutputLost
    print_line(console, f"saved {', '.join(saved[:-1])} and {saved[-1]} in {out}")


def file_suffix(report: Report, asked_precision: str) -> str:
    """What the names of an evaluation's files have before their end: nothing for all snapshots on the test images.

    asked_precision  "auto", or what was asked for: that of training is nothing special, another is
    """
    suffix = "" if report.split == "test" else f"-{report.split}"
    numbers = [entry.number for entry in report.snapshots]
    if len(numbers) < report.saved:
        suffix += f"-snapshots-{ranges(numbers).replace(' ', '')}"
    if report.metrics.combine != MEAN:
        suffix += f"-{report.metrics.combine}"
    if report.views != ONE:
        suffix += f"-{report.views}"
    if asked_precision not in ("auto", report.trained_precision):
        suffix += f"-{asked_precision}"
    if len(suffix) > LONGEST_SUFFIX:
        digest = hashlib.blake2b(suffix.encode(), digest_size=6).hexdigest()
        suffix = f"{suffix[: LONGEST_SUFFIX - len(digest) - 1]}-{digest}"
    return suffix


def _save(report: Report, folder: RunFolder, out: Path, suffix: str) -> Sequence[str]:
    name = f"ensemble{suffix}.json"
    write_atomically(out / name, _as_text(report).encode())
    figures = figures_of(folder, report)
    of_page = f"report{suffix}.html"
    write_atomically(out / of_page, page(report, folder.config(), figures, folder.path).encode())
    return [name, of_page, *save_plots(figures, out, suffix)]


def _write_json(path: Path, text: str) -> None:
    """Write `text` at `path`. Raises RunError if that fails."""
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            path.write_text(text)  # a pipe or a device, which nothing can take the place of
            return
    except OSError as error:
        raise RunError(f"cannot write --json {path}: {error.strerror}") from error
    # Where a link leads to, so that the link stays.
    write_atomically(Path(os.path.realpath(path)), text.encode())


def _as_text(report: Report) -> str:
    return json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n"
