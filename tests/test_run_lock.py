"""File systems without locks: another guard holds the folder, and what it says about itself."""

import errno
import fcntl
import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from fastsnap.run_files import RunError
from fastsnap.run_folder import RunFolder
from fastsnap.run_lock import GUARD, STALE_SECONDS


def refuse_locks(number: int = errno.ENOLCK) -> None:
    """As a mount without locks does; in this process only."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    fcntl.flock = flock


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # put back afterwards
    refuse_locks()
    return RunFolder(tmp_path / "run")


def hold(path: Path, held, release) -> None:
    refuse_locks()
    with RunFolder(path).locked():
        held.set()
        release.wait(60)


def held_by_another_process(path: Path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(path, held, release))
    process.start()
    assert held.wait(60)
    return process, release


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL", "EIO", "EPERM"])
def test_a_folder_without_locks_is_held_all_the_same_and_that_is_said(folder: RunFolder, name: str) -> None:
    refuse_locks(getattr(errno, name))
    said: list[str] = []
    with folder.locked(said.append):
        guard = json.loads((folder.path / GUARD).read_text())
        folder.write_json("ensemble.json", {})
    assert guard["pid"] == os.getpid()
    assert guard["host"]
    assert not (folder.path / GUARD).exists()
    assert len(said) == 1
    assert f"has no locks ({os.strerror(getattr(errno, name))})" in said[0]


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN])
def test_only_a_lock_that_is_held_means_another_writer(folder: RunFolder, number: int) -> None:
    refuse_locks(number)
    with pytest.raises(RunError, match="is being written by process unknown"), folder.locked():
        pass
    assert not (folder.path / GUARD).exists()


def test_a_second_process_is_refused_until_the_first_ends(folder: RunFolder) -> None:
    process, release = held_by_another_process(folder.path)
    with (
        pytest.raises(
            RunError, match=rf"by process {process.pid} on .*wait for it, stop it, or choose another"
        ),
        folder.locked(),
    ):
        pass
    release.set()
    process.join()
    assert process.exitcode == 0
    said: list[str] = []
    with folder.locked(said.append):
        pass
    assert len(said) == 1  # of the file system; nobody's place was taken


def test_the_place_of_a_killed_process_is_taken_at_once(folder: RunFolder) -> None:
    process, _ = held_by_another_process(folder.path)
    process.kill()
    process.join()
    said: list[str] = []
    with folder.locked(said.append):
        assert json.loads((folder.path / GUARD).read_text())["pid"] == os.getpid()
    assert f"process {process.pid} on " in said[1]
    assert "is gone: going on in its place" in said[1]
    assert {file.name for file in folder.path.iterdir()} == {".lock"}


def on_another_host(folder: RunFolder, seconds_ago: float) -> None:
    folder.path.mkdir()
    guard = folder.path / GUARD
    writer = {"host": "elsewhere", "machine": "elsewhere/1", "pid": os.getpid(), "started": "7", "token": "t"}
    guard.write_text(json.dumps(writer))
    written = guard.stat().st_mtime - seconds_ago
    os.utime(guard, (written, written))


def test_a_writer_on_another_host_is_believed_until_its_heartbeat_is_old(folder: RunFolder) -> None:
    on_another_host(folder, STALE_SECONDS / 2)
    with (
        pytest.raises(RunError, match=rf"process {os.getpid()} on elsewhere; .*try again in \d+ s"),
        folder.locked(),
    ):
        pass
    assert json.loads((folder.path / GUARD).read_text())["host"] == "elsewhere"


def test_a_writer_on_another_host_whose_heartbeat_is_old_is_replaced(folder: RunFolder) -> None:
    on_another_host(folder, STALE_SECONDS + 10)
    said: list[str] = []
    with folder.locked(said.append):
        pass
    assert "on elsewhere" in said[1]
    assert "has not been heard of for 130 s" in said[1]


@pytest.mark.parametrize("content", ["", "{", '{"pid": -1}', '{"host": 3}', "[]", "\x00"])
def test_a_guard_that_cannot_be_read_is_believed_until_it_is_old(folder: RunFolder, content: str) -> None:
    folder.path.mkdir()
    guard = folder.path / GUARD
    guard.write_text(content)
    with pytest.raises(RunError, match="written by a process unknown"), folder.locked():
        pass
    written = guard.stat().st_mtime - STALE_SECONDS - 10
    os.utime(guard, (written, written))
    with folder.locked():
        pass


def test_a_writer_whose_place_was_taken_saves_nothing_more(folder: RunFolder) -> None:
    with folder.locked():
        folder.write_json("config.json", {"writer": 1})
        (folder.path / GUARD).unlink()
        with (
            RunFolder(folder.path).locked(),
            pytest.raises(RunError, match="was taken over by another process"),
        ):
            folder.write_json("config.json", {"writer": 1.5})
    assert json.loads((folder.path / "config.json").read_text()) == {"writer": 1}


def test_of_many_that_find_a_dead_writer_one_takes_its_place(folder: RunFolder) -> None:
    on_another_host(folder, STALE_SECONDS + 10)
    together, ended = threading.Barrier(8), threading.Barrier(8)
    outcomes: list[str] = []

    def take() -> None:
        together.wait()
        try:
            with RunFolder(folder.path).locked(lambda text: None):
                outcomes.append("held")
                ended.wait()
        except RunError as error:
            outcomes.append(str(error))
            ended.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcome == "held" for outcome in outcomes) == 1, outcomes
