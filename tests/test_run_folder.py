"""The run folder: what is written, what survives damage, a full disk and a second writer."""

import json
import math
import multiprocessing
import resource
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_run import small_run

from fastsnap.nets.build import build_network
from fastsnap.run_files import RunError, write_atomically
from fastsnap.run_folder import DamagedSnapshot, RunFolder, newest_run
from fastsnap.run_state import is_finished, require_snapshots, set_aside


def save(
    folder: RunFolder, cycle: int, state: dict[str, torch.Tensor] | None = None, *, step: int | None = None
) -> None:
    state = {"weight": torch.full((4,), float(cycle))} if state is None else state
    folder.save_snapshot(
        state, step=step or 10 * cycle, cycle=cycle, epoch=cycle, learning_rate=0.01, train_loss=1.0 / cycle
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "run")
    run.write_json("config.json", {"dataset": "digits"})
    return run


def test_a_snapshot_loads_into_the_plain_network_whatever_the_memory_layout(folder: RunFolder) -> None:
    trained = build_network("resnet8", classes=10, seed=1).to(memory_format=torch.channels_last)
    save(folder, 1, trained.state_dict())
    plain = build_network("resnet8", classes=10, seed=2)
    plain.load_state_dict(safetensors.torch.load_file(folder.path / "snapshots/snapshot-01.safetensors"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), trained.state_dict().values(), strict=True)
    )


def test_the_manifest_describes_each_snapshot(folder: RunFolder) -> None:
    save(folder, 1)
    save(folder, 2)
    entries = folder.snapshots()
    assert [(entry.number, entry.step, entry.train_loss) for entry in entries] == [(1, 10, 1.0), (2, 20, 0.5)]
    assert torch.equal(folder.load_snapshot(entries[1])["weight"], torch.full((4,), 2.0))


def test_saving_a_cycle_again_replaces_it_and_what_came_after(folder: RunFolder) -> None:
    for cycle in (1, 2, 3, 2):
        save(folder, cycle)
    assert [entry.number for entry in folder.snapshots()] == [1, 2]


def damaged(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage", [damaged, lambda content: content[: len(content) // 2], lambda content: b""]
)
def test_a_damaged_snapshot_is_named_and_the_others_stay_usable(folder: RunFolder, damage) -> None:
    for cycle in (1, 2, 3):
        save(folder, cycle)
    file = folder.path / "snapshots/snapshot-02.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    first, second, third = folder.snapshots()
    with pytest.raises(DamagedSnapshot, match=r"snapshot 2 .*snapshot-02.*--snapshots 1,3"):
        folder.load_snapshot(second)
    assert folder.load_snapshot(first)
    assert folder.load_snapshot(third)


def test_swapped_and_missing_snapshots_are_named(folder: RunFolder) -> None:
    for cycle in (1, 2, 3):
        save(folder, cycle)
    one, two = (folder.path / f"snapshots/snapshot-0{number}.safetensors" for number in (1, 2))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    (folder.path / "snapshots/snapshot-03.safetensors").unlink()
    for entry in folder.snapshots():
        with pytest.raises(DamagedSnapshot, match=f"snapshot {entry.number} "):
            folder.load_snapshot(entry)


@pytest.mark.parametrize("content", ["", "[]", '{"snapshots": [{}]}', "{", "\x00"])
def test_a_damaged_manifest_is_named(folder: RunFolder, content: str) -> None:
    (folder.path / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=r"manifest\.json"):
        folder.snapshots()


def test_a_checkpoint_comes_back_to_the_bit(folder: RunFolder) -> None:
    tensors = {"parameters": torch.randn(100), "totals": torch.tensor([1.5, math.pi], dtype=torch.float64)}
    state = {"step": 7, "steps": 9, "seconds": 0.1 + 0.2, "epoch_seconds": 0.1, "scaler": {"scale": 65536.0}}
    assert folder.load_checkpoint() is None
    folder.save_checkpoint(tensors, state)
    loaded = folder.load_checkpoint()
    assert loaded is not None
    assert loaded[1] == state
    assert all(torch.equal(tensors[name], loaded[0][name]) for name in tensors)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_checkpoint_is_named(folder: RunFolder, content: bytes) -> None:
    (folder.path / "checkpoint.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged"):
        folder.load_checkpoint()


def test_a_checkpoint_with_one_bit_flipped_is_not_trained_on(folder: RunFolder) -> None:
    folder.save_checkpoint({"parameters": torch.randn(100)}, {"step": 7})
    file = folder.path / "checkpoint.safetensors"
    file.write_bytes(damaged(file.read_bytes()))
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged \(its SHA-256"):
        folder.load_checkpoint()


def test_metrics_come_back_and_a_line_cut_short_is_left_out(folder: RunFolder) -> None:
    for step in (10, 20, 30):
        folder.append_metrics({"step": step, "epoch": step, "train_loss": 1 / step})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "tra')
    assert [record["step"] for record in folder.metrics()] == [10, 20, 30]


def test_resuming_forgets_what_came_after(folder: RunFolder) -> None:
    for cycle in (1, 2, 3):
        save(folder, cycle)
        folder.append_metrics({"step": 10 * cycle, "epoch": cycle, "train_loss": 0.1})
    folder.forget_after(20)
    assert [entry.step for entry in folder.snapshots()] == [10, 20]
    assert [record["step"] for record in folder.metrics()] == [10, 20]


def write_beyond_the_limit(path: Path, outcome) -> None:
    """As on a full disk: the write is cut off. In a process of its own, since the limit cannot be raised again."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_atomically(path, b"new" * 1000)
        outcome.put("written")
    except RunError as error:
        outcome.put(str(error))


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_atomically(path, b"old")
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    process = context.Process(target=write_beyond_the_limit, args=(path, outcome))
    process.start()
    message = outcome.get(timeout=60)
    process.join()
    assert "cannot save" in message
    assert str(path) in message
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["n" * 255, "\u4e00" * 85])
def test_names_as_long_as_a_file_system_has_are_written(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, b"content")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def write_often(path: Path, letter: str, outcome) -> None:
    try:
        for _ in range(200):
            write_atomically(path, letter.encode() * 100_000)
        outcome.put("")
    except RunError as error:
        outcome.put(str(error))


def test_three_processes_write_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ensemble.json"
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    processes = [context.Process(target=write_often, args=(path, letter, outcome)) for letter in "abc"]
    for process in processes:
        process.start()
    assert [outcome.get(timeout=300) for _ in processes] == [""] * 3
    for process in processes:
        process.join()
    content = path.read_bytes()
    assert content == content[:1] * 100_000
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_half_written_is_removed_by_the_next(folder: RunFolder) -> None:
    save(folder, 1)
    names = (".checkpoint.safetensors.7-aa.tmp", "snapshots/.snapshot-02.safetensors.7-bb.tmp", ".notes.tmp")
    for name in names:
        (folder.path / name).write_bytes(b"half")
    with folder.locked():
        left = [name for name in names if (folder.path / name).exists()]
    assert left == [".notes.tmp"]
    assert len(folder.snapshots()) == 1


def test_a_manifest_that_was_removed_is_told_from_one_never_written(folder: RunFolder) -> None:
    assert folder.snapshots() == []
    save(folder, 1)
    (folder.path / "manifest.json").unlink()
    for ask in (folder.snapshots, lambda: is_finished(folder, 10), lambda: save(folder, 2)):
        with pytest.raises(
            RunError, match=r"manifest\.json is missing, though snapshots/ holds 1 files.*--restart"
        ):
            ask()


def test_setting_aside_moves_what_a_run_left_and_nothing_else(folder: RunFolder) -> None:
    save(folder, 1)
    for name in ("ensemble-validation.json", "training.png", "notes.txt"):
        (folder.path / name).write_text("x")
    moved = [set_aside(folder)]
    assert {file.name for file in folder.path.iterdir()} == {"notes.txt", moved[0].name}
    assert len(RunFolder(moved[0]).snapshots()) == 1
    assert set_aside(folder) is None
    save(folder, 2)
    moved.append(set_aside(folder))
    assert RunFolder(moved[1]).snapshots()[0].number == 2
    assert RunFolder(moved[0]).snapshots()[0].number == 1


def hold(path: Path, held, release) -> None:
    with RunFolder(path).locked():
        held.set()
        release.wait(60)


def test_a_second_writer_is_refused_until_the_first_is_gone(folder: RunFolder) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder.path, held, release))
    process.start()
    assert held.wait(60)
    with pytest.raises(RunError, match=rf"process {process.pid}"), folder.locked():
        pass
    process.kill()
    process.join()
    with folder.locked():
        pass


def test_the_newest_run_is_the_one_written_last(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"python -m fastsnap\.train"):
        newest_run(tmp_path)
    for name in ("a", "b"):
        RunFolder(tmp_path / name).write_json("config.json", {})
    save(RunFolder(tmp_path / "a"), 1)
    assert newest_run(tmp_path).path == tmp_path / "a"


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        RunFolder(tmp_path).config()


@pytest.mark.parametrize("content", ["{}", "[]", "3", "{"])
def test_a_damaged_configuration_is_named(folder: RunFolder, content: str) -> None:
    (folder.path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        folder.config()


def test_json_files_hold_no_nan(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("ensemble.json", {"nll": math.nan})
    assert json.loads((folder.path / "config.json").read_text()) == {"dataset": "digits"}


def test_a_run_of_version_0_1_0_that_took_a_few_steps_more_is_finished_too(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run", snapshots=3)
    last = folder.snapshots()[-1].step
    assert [is_finished(folder, steps) for steps in (last - 4, last, last + 1)] == [True, True, False]
    require_snapshots(folder, [last // 3 - 1, 2 * last // 3 - 2, last - 4], last - 4)
    require_snapshots(folder, [last // 3, 2 * last // 3], last)
    with pytest.raises(RunError, match="lacks snapshot 4"):
        require_snapshots(folder, [1, 2, 3, 4], last)
