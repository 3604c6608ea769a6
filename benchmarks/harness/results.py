"""results.jsonl: every result ever measured into a folder, a line each; what is shown is the newest of each case."""

import json
from pathlib import Path
from typing import Any

from harness.measure import Result, Settings

FILE = "results.jsonl"
Record = dict[str, Any]  # a line: see harness.measure.Result.as_json


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
    """The records of the newest run of every (benchmark, case, GPU), in the order in which these were first measured.

    So the rows of a case were measured in turns with each other. Quick runs do not replace others, and a last line that
    a crash cut short is left out. Raises ValueError if there is no result or a line is damaged.
    """
    cases: dict[tuple[str, str, str | None], dict[str, Record]] = {}
    for record in _read(folder / FILE):
        place = record["benchmark"], record["case"], record["machine"]["gpu"]
        held = next(iter(cases.get(place, {}).values()), None)
        if held and record["quick"] and not held["quick"]:
            continue
        if held is None or held["run"] != record["run"]:
            cases[place] = {}
        cases[place][record["opponent"]] = record
    return [record for rows in cases.values() for record in rows.values()]


def _read(file: Path) -> list[Record]:
    lines = file.read_text().splitlines() if file.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is not JSON: {error}; remove the line") from error
    if not records:
        raise ValueError(f"{file} holds no result: measure some with python benchmarks/run.py")
    return records
