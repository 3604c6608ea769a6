"""Results that a slip must not destroy: files of a run that are missing, other images, beginning anew when told to."""

import errno
import fcntl
import json
import shutil
import signal
from pathlib import Path

import pytest

from fastsnap import assembly, ensemble_eval, train
from fastsnap.run_folder import RunFolder

SMALL = ["--net", "resnet8", "--epochs", "3", "--cycles", "3", "--loader", "torch", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main([*SMALL, "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def unfinished(run: Path) -> Path:
    """The same after two of three epochs, its checkpoint deleted."""
    RunFolder(run).forget_after(json.loads((run / "manifest.json").read_text())["snapshots"][1]["step"])
    (run / "checkpoint.safetensors").unlink()
    return run


def contents(run: Path) -> dict[str, bytes]:
    """Of everything that training wrote."""
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in run.rglob("*")
        if file.suffix in (".safetensors", ".jsonl") or file.name in ("config.json", "manifest.json")
    }


def weights(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "snapshots").iterdir()}


def test_a_finished_run_needs_no_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoint.safetensors").unlink()
    (run / "ensemble.json").unlink()
    before = contents(run)
    assert train.main([*SMALL, "--out", str(run)]) == 0
    assert f"this run is finished: {run}" in capsys.readouterr().out
    assert contents(run) == before
    assert json.loads((run / "ensemble.json").read_text())["planned"] == 3


def test_an_unfinished_run_without_checkpoint_begins_anew_only_when_told_to(
    unfinished: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(unfinished)
    assert train.main([*SMALL, "--out", str(unfinished)]) == 2
    message = capsys.readouterr().err
    assert (
        "holds 2 snapshots and 2 epochs of an unfinished run, but its checkpoint.safetensors is missing"
        in message
    )
    assert "--restart" in message
    assert contents(unfinished) == before
    assert train.main([*SMALL, "--out", str(unfinished), "--restart"]) == 0
    (aside,) = unfinished.glob("replaced-*")
    assert f"restart: what was there is now in {aside}" in capsys.readouterr().out
    assert contents(aside) == before
    assert weights(unfinished) == weights(finished)


def test_epochs_before_the_first_snapshot_are_not_trained_over_either(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(run).forget_after(1)
    first = '{"step": 1, "epoch": 1, "train_loss": 2.0}\n'
    (run / "metrics.jsonl").write_text(first)
    (run / "checkpoint.safetensors").unlink()
    assert train.main([*SMALL, "--out", str(run)]) == 2
    assert "holds 0 snapshots and 1 epochs of an unfinished run" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == first


@pytest.mark.parametrize("flags", [["--cycles", "100000"], ["--update", "apex"]])
def test_a_restart_that_cannot_begin_moves_nothing(run: Path, flags: list[str]) -> None:
    before = contents(run)
    assert train.main([*SMALL, "--out", str(run), "--restart", *flags]) == 2
    assert contents(run) == before
    assert not list(run.glob("replaced-*"))


def test_a_restart_may_have_another_configuration(run: Path) -> None:
    before = contents(run)
    assert train.main([*SMALL, "--out", str(run), "--seed", "1"]) == 2
    assert train.main([*SMALL, "--out", str(run), "--seed", "1", "--restart"]) == 0
    (aside,) = run.glob("replaced-*")
    assert contents(aside) == before
    assert RunFolder(run).config()["seed"] == 1


def test_training_and_evaluation_agree_that_a_manifest_is_missing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "manifest.json").unlink()
    assert train.main([*SMALL, "--out", str(run)]) == 2
    told = capsys.readouterr().err
    assert ensemble_eval.main([str(run), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == told
    assert f"error: {run / 'manifest.json'} is missing, though snapshots/ holds 3 files: put a copy" in told


def test_a_manifest_without_the_snapshots_of_cycles_that_are_done_is_an_error(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["snapshots"][1]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert train.main([*SMALL, "--out", str(run)]) == 2
    assert "its manifest.json lacks snapshot 2" in capsys.readouterr().err


def test_results_without_their_configuration_are_not_trained_over(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.json").unlink()
    before = contents(run)
    assert train.main([*SMALL, "--out", str(run)]) == 2
    assert "config.json is missing, though manifest.json, checkpoint.safetensors" in capsys.readouterr().err
    assert contents(run) == before


def test_other_images_or_labels_are_refused_on_resume(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["fingerprints"].keys() == {"train", "test"}
    config["fingerprints"]["train"] = "0" * 64
    (run / "config.json").write_text(json.dumps(config))
    assert train.main([*SMALL, "--out", str(run)]) == 2
    assert "the training images or labels are not those that" in capsys.readouterr().err
    del config["fingerprints"]  # as version 0.1.0 wrote it
    (run / "config.json").write_text(json.dumps(config))
    assert train.main([*SMALL, "--out", str(run)]) == 0


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("hello")
    assert train.main([*SMALL, "--out", str(tmp_path / "file")]) == 2
    assert "cannot write to the run folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "hello"


def test_a_run_on_a_file_system_without_locks_trains_and_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert train.main([*SMALL, "--out", str(tmp_path / "run")]) == 0
    assert "has no locks (No locks available)" in capsys.readouterr().out
    assert weights(tmp_path / "run") == weights(finished)
    assert not (tmp_path / "run" / ".writer").exists()


def test_a_restart_that_is_stopped_says_not_to_restart_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "load_dataset", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert train.main([*SMALL, "--out", str(tmp_path / "run"), "--restart"]) == 128 + signal.SIGTERM
    assert "Run the same command again, without --restart, to go on" in capsys.readouterr().out
