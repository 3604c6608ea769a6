"""Training from given weights, from the command line: where it begins, going on, and what is refused."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_run import small_run

from fastsnap import save_snapshot, train
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunFolder
from fastsnap.training.trainer import Trainer

TENSORS = len(build_network("resnet8", classes=10, in_channels=1).state_dict())
SMALL = ["--net", "resnet8", "--epochs", "2", "--cycles", "1", "--train-images", "120", "--loader", "torch"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return small_run(tmp_path_factory.mktemp("runs") / "pretrained", snapshots=2)


def main(out: Path, initial: object, *others: str) -> int:
    return train.main([*SMALL, "--threads", "1", "--out", str(out), "--initial", str(initial), *others])


def snapshot(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "snapshots" / "snapshot-01.safetensors")


def test_a_run_begins_with_the_last_snapshot_of_another_and_says_so(pretrained, tmp_path, capsys) -> None:
    # So small a rate that what it began with can still be seen; zeros become something next to nothing.
    assert main(tmp_path / "run", pretrained.path, "--lr", "1e-30", "--weight-decay", "0") == 0
    file = pretrained.path / "snapshots" / "snapshot-02.safetensors"
    assert f"initial   {file}, {TENSORS} of {TENSORS} tensors\n" in capsys.readouterr().out
    config = RunFolder(tmp_path / "run").config()
    assert config["initial"] == str(pretrained.path)
    assert config["initial_sha256"] == pretrained.snapshots()[1].sha256
    began, ended = safetensors.torch.load_file(file), snapshot(tmp_path / "run")
    parameters = [name for name in began if not name.endswith(("running_mean", "running_var", "tracked"))]
    assert all(torch.allclose(began[name], ended[name], rtol=0, atol=1e-20) for name in parameters)


def test_a_classifier_of_other_classes_begins_from_the_seed(tmp_path, capsys) -> None:
    network = build_network("resnet8", classes=3, in_channels=1, seed=9)
    torch.save({"model": torch.nn.DataParallel(network.half()).state_dict()}, tmp_path / "three.pth")
    options = ("--lr", "1e-30", "--weight-decay", "0", "--seed", "4")
    assert main(tmp_path / "run", tmp_path / "three.pth", *options) == 0
    out = capsys.readouterr().out
    assert (
        f"three.pth, {TENSORS - 2} of {TENSORS} tensors; the classifier anew: 3 classes there, 10 here; "
        in out
    )
    assert "; converted from float16; without the prefix module." in out
    ended, fresh = snapshot(tmp_path / "run"), build_network("resnet8", classes=10, in_channels=1, seed=4)
    assert torch.equal(ended["linear.weight"], fresh.linear.weight)
    assert torch.equal(ended["conv1.weight"], network.conv1.weight.float())


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Every run from here on is stopped after this many steps, with a checkpoint."""
    after_step = Trainer._after_step

    def stopping(self: Trainer, display, stop_signal) -> None:
        after_step(self, display, 15 if self.step == step else stop_signal)

    monkeypatch.setattr(Trainer, "_after_step", stopping)


def test_a_stopped_run_goes_on_to_the_same_bits_also_without_the_file(tmp_path, capsys, monkeypatch) -> None:
    file = tmp_path / "initial.safetensors"
    save_snapshot(build_network("resnet8", classes=10, in_channels=1, seed=3), file)
    assert main(tmp_path / "whole", file) == 0
    assert main(tmp_path / "other", file, "--seed", "1") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main(tmp_path / "run", file) == 128 + 15
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    assert main(tmp_path / "run", file) == 0
    assert "going on after step 3" in capsys.readouterr().out
    content = file.read_bytes()
    file.unlink()
    assert main(tmp_path / "kept", file) == 0
    assert "going on after step 3" in capsys.readouterr().out
    whole = (tmp_path / "whole" / "snapshots" / "snapshot-01.safetensors").read_bytes()
    for name in ("run", "kept"):
        assert (tmp_path / name / "snapshots" / "snapshot-01.safetensors").read_bytes() == whole
    assert main(tmp_path / "whole", file) == 0  # finished: it is only evaluated
    assert "this run is finished" in capsys.readouterr().out
    # The same contents elsewhere are the same weights.
    (tmp_path / "moved.safetensors").write_bytes(content)
    assert main(tmp_path / "whole", tmp_path / "moved.safetensors") == 0


def test_other_weights_are_another_run(pretrained, tmp_path, capsys) -> None:
    file = tmp_path / "initial.safetensors"
    for seed in (3, 4):
        save_snapshot(build_network("resnet8", classes=10, in_channels=1, seed=seed), file)
        status = main(tmp_path / "run", file)
        assert status == (0 if seed == 3 else 2)
    err = " ".join(capsys.readouterr().err.split())
    assert f"(initial: {file} has other weights than the run began with)" in err
    assert train.main([*SMALL, "--threads", "1", "--out", str(tmp_path / "run")]) == 2
    assert f"(initial: None asked for, {file} there)" in " ".join(capsys.readouterr().err.split())
    assert train.main([*SMALL, "--threads", "1", "--out", str(tmp_path / "random")]) == 0
    assert main(tmp_path / "random", file) == 2
    assert "asked for, None there)" in " ".join(capsys.readouterr().err.split())
    assert main(tmp_path / "run", tmp_path / "nothing.pt") == 2  # what it is cannot be told
    assert "cannot be read" in capsys.readouterr().err


def test_what_cannot_be_begun_with_leaves_nothing(pretrained, tmp_path, capsys) -> None:
    save_snapshot(build_network("resnet20", classes=10, in_channels=1), tmp_path / "other.safetensors")
    for initial, named in [
        (tmp_path / "other.safetensors", "does not fit the net: stages.0.1.bn1.bias is left over"),
        (tmp_path / "nothing", "cannot be read: No such file"),
        (tmp_path, "is not a run folder"),
        (tmp_path / "run" / "a.pt", "lies in the run folder"),
        ("", "is not a run folder"),
    ]:
        assert main(tmp_path / "run", initial) == 2
        assert named in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_does_not_begin_with_itself(pretrained, capsys) -> None:
    assert main(pretrained.path, pretrained.path, "--restart") == 2
    assert "lies in the run folder" in " ".join(capsys.readouterr().err.split())
    assert len(pretrained.snapshots()) == 2
