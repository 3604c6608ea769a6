"""What counts of all that was ever measured into a folder."""

import json
from pathlib import Path

import pytest
from made_up import record

from harness import results
from harness.measure import PROJECT


def test_the_newest_run_of_every_case_counts_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    records = [
        record(run="1", median=1.0),
        record(run="1", opponent="gone since"),
        record(run="1", case="another"),
        record(run="2", median=2.0),
        record(run="2", opponent="x"),
        record(run="2", median=3.0),  # again, after one more seed
        record(run="3", median=4.0, quick=True),
    ]
    lines = [json.dumps(line) for line in records]
    file = tmp_path / results.FILE
    file.write_text("\n".join([*lines, '{"benchmark": "thr']))
    found = [(line["case"], line["opponent"], line["median"]) for line in results.latest(tmp_path)]
    case = records[0]["case"]
    assert found == [(case, PROJECT, 3.0), (case, "x", 3.5), ("another", PROJECT, 3.5)]
    file.write_text("\n".join(["{", *lines]))
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        results.latest(tmp_path)
    with pytest.raises(ValueError, match="holds no result"):
        results.latest(tmp_path / "elsewhere")
