"""results.jsonl: every result ever measured into a folder, a line each; what is shown is the latest of each."""

import json
from pathlib import Path
from typing import Any

from measure import Result, Settings

FILE = "results.jsonl"
Record = dict[str, Any]  # a line: see measure.Result.as_json


def append(result: Result, settings: Settings) -> Record:
    """Add a line to the results in settings.out, and return it. Raises ValueError if it cannot be written."""
    record = result.as_json(settings)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        with (settings.out / FILE).open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write to {settings.out}: {error.strerror}; choose another --out") from error
    return record


def latest(folder: Path) -> list[Record]:
    """The newest record of every (benchmark, case, opponent), in the order in which these were first measured.

    A last line that a crash cut short is left out. Raises ValueError if there is no result or a line is damaged.
    """
    file = folder / FILE
    lines = file.read_text().splitlines() if file.exists() else []
    records: dict[tuple[str, str, str], Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is not JSON: {error}; remove the line") from error
            break
        records[record["benchmark"], record["case"], record["opponent"]] = record
    if not records:
        raise ValueError(f"{file} holds no result: measure some with python benchmarks/run.py")
    return list(records.values())
