"""Loops in processes of their own."""

from pathlib import Path

import pytest
from counting_loop import counting_loop

from harness.paced import ContenderFailed, PacedProcess


def test_a_process_runs_in_its_turn_only_and_its_failure_is_told(tmp_path: Path) -> None:
    file = tmp_path / "count"
    with PacedProcess("the counter", counting_loop, file) as process:
        chunk = process.run(2)
        assert file.read_text() == "1"  # the second step, and no third
        assert chunk.seconds > 0
        assert chunk.peak_memory_mb > 10
        with pytest.raises(ContenderFailed, match="the counter failed: RuntimeError: nothing left to do"):
            process.run(5)
        assert file.read_text() == "2"
