"""A loop to run in another process, in a file of its own: that process imports it and little else."""

import time
from itertools import repeat
from typing import Any


def pausing_loop(pace: Any, seconds: float) -> None:
    """Steps that do nothing but take `seconds`, without end. pace: harness.paced.Pace."""
    for _ in pace.batches(repeat(None)):
        time.sleep(seconds)
