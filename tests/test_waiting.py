"""The command lines tell OpenMP how long to spin, as OpenMP itself says, and leave it to the user to say otherwise."""

import os
import re
import subprocess
import sys

import pytest

from fastsnap.waiting import ROUNDS


def spins(*command: str, **settings: str) -> str | None:
    """What GNU's OpenMP says that it took; None for another OpenMP."""
    environment = {n: v for n, v in os.environ.items() if n not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment | {"OMP_DISPLAY_ENV": "verbose"} | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    return found and found[1]


@pytest.mark.parametrize("door", ["fastsnap.train", "fastsnap.ensemble_eval"])
def test_threads_of_a_command_line_spin_shortly_unless_the_user_says_otherwise(door):
    default = spins("-c", "import torch")
    if default is None:
        pytest.skip("this PyTorch has another OpenMP than GNU's")
    assert default != ROUNDS
    assert spins("-m", door, "--version") == ROUNDS
    assert spins("-m", door, "--version", GOMP_SPINCOUNT="77") == "77"
    assert spins("-m", door, "--version", OMP_WAIT_POLICY="passive") != ROUNDS


def test_importing_a_door_sets_nothing():
    code = "import os, fastsnap.train, fastsnap.ensemble_eval; assert 'GOMP_SPINCOUNT' not in os.environ"
    assert spins("-c", code) != ROUNDS
