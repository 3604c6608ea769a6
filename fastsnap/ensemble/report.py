"""Evaluating a run from end to end: the figures, the tables on a console, and the files in the run folder."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fastsnap.ensemble.evaluate import Report, evaluate_run
from fastsnap.ensemble.plots import save_plots
from fastsnap.ensemble.tables import print_line, print_report
from fastsnap.run_folder import RunFolder


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
    print_line(console, f"saved ensemble.json, error-against-m.png and training.png in {folder.path}")
    return report


def _write_json(report: Report, path: str) -> None:
    content = json.dumps(report.as_json(), indent=2) + "\n"
    if path == "-":
        sys.stdout.write(content)
        return
    try:
        Path(path).write_text(content)
    except OSError as error:
        raise ValueError(f"cannot write --json {path}: {error.strerror}") from error
