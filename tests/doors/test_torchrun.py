"""Under the real torchrun: it starts ranks, restarts them, and joins hosts; the run folder carries a run through it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastsnap.run_folder import RunFolder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
EPOCHS = 10
SMALL = ["--net", "resnet8", "--epochs", str(EPOCHS), "--cycles", "2", "--precision", "fp32", "--out", "run"]
TRAIN = ["-m", "fastsnap.train", *SMALL]
MOST_SECONDS = 150


class Agent:
    """A torchrun, as on one host: in a folder of its own, with its output in a file of it."""

    def __init__(self, place: Path, *options: str) -> None:
        place.mkdir(exist_ok=True)
        self.log = place / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*TORCHRUN, *options, *TRAIN],
                cwd=place,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, text: str) -> None:
        """Until `text` is in the log."""
        until = time.monotonic() + MOST_SECONDS
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)

    def wait(self) -> str:
        """Until it has ended well; returns what it wrote."""
        status = self.process.wait(MOST_SECONDS)
        assert status == 0, self.log.read_text()
        return self.log.read_text()

    def worker(self, rank: int) -> int:
        """The process that is a rank of this agent."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
        raise AssertionError(f"no rank {rank} among {children}")


def errors(log: str) -> list[str]:
    """Those of ours: torchrun says more."""
    return [line for line in log.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks."""
    place = tmp_path_factory.mktemp("uninterrupted")
    said = Agent(place, "--standalone", "--nproc-per-node", "2").wait()
    assert errors(said) == []
    assert re.search(r"^threads +\d+ \(a part of \d+, .*, which 2 ranks share\)$", said, re.MULTILINE)
    return place / "run"


def test_a_killed_rank_is_started_again_and_the_run_ends_with_the_same_bits(
    uninterrupted: Path, tmp_path: Path
) -> None:
    agent = Agent(tmp_path, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    agent.wait_for("saved snapshot 1")
    os.kill(agent.worker(1), signal.SIGKILL)
    said = agent.wait()
    (error,) = errors(said)
    assert "lost rank 1 after step " in error
    assert "going on after step" in said
    for file in sorted((uninterrupted / "snapshots").iterdir()):
        assert (tmp_path / "run" / "snapshots" / file.name).read_bytes() == file.read_bytes()
    assert [record["epoch"] for record in RunFolder(tmp_path / "run").metrics()] == list(range(1, EPOCHS + 1))


def test_of_two_hosts_one_leaves_and_the_other_ends_the_run(tmp_path: Path) -> None:
    """Hosts that share no disk: two agents in two folders."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--max-restarts", "2"]
    options += ["--rdzv-endpoint", endpoint, "--rdzv-id", "a-run", "--rdzv-conf"]
    first = Agent(tmp_path / "first-host", *options, "last_call_timeout=8,is_host=1")
    second = Agent(tmp_path / "second-host", *options, "last_call_timeout=8,is_host=0")
    # Rank 0 is on the host of the smaller process number, so that it is the first but for once in some ten thousand.
    first.wait_for("saved snapshot 1")
    assert "ranks     2, up to 32 of 64" in first.log.read_text()
    second.process.send_signal(signal.SIGTERM)
    second.process.wait(MOST_SECONDS)
    said = first.wait()
    assert "goes on with 1: the same batches and updates, but sums in another order" in said
    finished = first.log.parent / "run"
    assert {file.name for file in second.log.parent.iterdir()} == {"log"}
    assert [record["epoch"] for record in RunFolder(finished).metrics()] == list(range(1, EPOCHS + 1))
    assert json.loads((finished / "config.json").read_text())["ranks"] == 2
    assert (finished / "ensemble.json").exists()
