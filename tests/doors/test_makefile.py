"""Variables of make: each is a flag, and one that no target reads is an error with the right name."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would do, without doing it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "-C", str(ROOT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "BATCH_SIZE=9", "CYCLES=3"], "make train has no variable BATCH_SIZE: did you mean BATCH?"),
        (["train", "M=3", "CYCLES=3"], "make train has no variable CYCLES: did you mean M?"),
        (["train", "LEARNING_RATE=1"], "did you mean LR?"),
        (
            ["train", "MOMENTUM=0.5"],
            "has no variable MOMENTUM. Its variables are DATASET M .* ARGS='--flag value'",
        ),
        (["train", "epochs=3"], "has no variable epochs"),
        (["train", "GPUS=2"], "has no variable GPUS: did you mean NPROC?"),
        (["bench", "M=3"], "make bench has no variable M. Its variables are DATA OUT ARGS"),
        (["test", "DATASET=digits"], "make test has no variable DATASET. It takes none"),
        (["DATASET=digits"], "make help has no variable DATASET"),
    ],
)
def test_variables_that_would_be_ignored_are_errors_of_one_line(arguments: list[str], said: str) -> None:
    done = make(*arguments)
    assert done.returncode == 2
    assert done.stdout.count("--batch-size") == 0
    (line,) = [line for line in done.stderr.splitlines() if "***" in line]
    assert re.search(said, line), line


def test_processes_are_started_by_torchrun() -> None:
    done = make("train", "NPROC=3", "M=2")
    assert done.returncode == 0, done.stderr
    (command,) = [line for line in done.stdout.splitlines() if "fastsnap.train" in line]
    assert "torchrun --standalone --nproc-per-node '3' -m fastsnap.train" in command
    (command,) = [line for line in make("train", "NPROC=1").stdout.splitlines() if "fastsnap.train" in line]
    assert command.split() == [".venv/bin/python", "-m", "fastsnap.train"]


def test_every_variable_is_a_flag() -> None:
    variables = {
        "DATASET": "--dataset",
        "M": "--cycles",
        "EPOCHS": "--epochs",
        "NET": "--net",
        "BATCH": "--batch-size",
        "LR": "--lr",
        "SEED": "--seed",
        "DATA": "--data",
        "OUT": "--out",
    }
    done = make("train", "ARGS=--momentum 0.5", *(f"{name}=value of {name}" for name in variables))
    assert done.returncode == 0, done.stderr
    (command,) = [line for line in done.stdout.splitlines() if "-m fastsnap.train" in line]
    for name, flag in variables.items():
        assert f"{flag} 'value of {name}'" in command
    assert command.endswith("--momentum 0.5")


@pytest.mark.parametrize(
    "arguments", [["train", "CXX=g++"], ["train", "PYTHON=python3"], ["bench", "DATA=x"], ["help"]]
)
def test_what_is_read_is_taken(arguments: list[str]) -> None:
    assert make(*arguments).returncode == 0
