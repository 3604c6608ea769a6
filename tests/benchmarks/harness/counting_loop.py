"""A loop to run in another process, in a file of its own: that process imports it and little else."""

from pathlib import Path
from typing import Any


def counting_loop(pace: Any, path: Path) -> None:
    """Write the number of each of three batches into `path`, then fail. pace: harness.paced.Pace."""
    for count in pace.batches(range(3)):
        path.write_text(f"{count}")
    raise RuntimeError("nothing left to do")
