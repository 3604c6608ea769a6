"""SnapshotRecorder: what a loop of someone else leaves in a run folder, and going on with it."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from own_loop import (
    CLASSES,
    SCHEDULE,
    STEPS_PER_EPOCH,
    MakeOptimizer,
    adamw,
    make_network,
    record,
    sgd,
    snapshot_sgd,
)
from rich.console import Console

import fastsnap
from fastsnap import SnapshotRecorder, ensemble_eval
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.training.records import TrainingDiverged

OPTIMIZERS = [snapshot_sgd, sgd, adamw]


def recorder(path: Path, **overrides: object) -> SnapshotRecorder:
    network = make_network()
    given = {"classes": CLASSES, "steps_per_epoch": STEPS_PER_EPOCH, "optimizer": snapshot_sgd(network)}
    return SnapshotRecorder(path, network, SCHEDULE, **given | overrides)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_a_stopped_loop_goes_on_to_the_same_bits(make_optimizer: MakeOptimizer, tmp_path: Path) -> None:
    whole = record(tmp_path / "whole", make_optimizer)
    record(tmp_path / "stopped", make_optimizer, until=6)  # after an epoch, before the next
    record(tmp_path / "stopped", make_optimizer, until=14)
    record(tmp_path / "stopped", make_optimizer)
    stopped = RunFolder(tmp_path / "stopped")
    assert [entry.step for entry in stopped.snapshots()] == [11, 23]
    for one, other in zip(whole.folder.snapshots(), stopped.snapshots(), strict=True):
        assert one.sha256 == other.sha256
        assert one.train_loss == other.train_loss
    assert [line["step"] for line in stopped.metrics()] == [4, 8, 12, 16, 20, 23]
    for line, same in zip(whole.folder.metrics(), stopped.metrics(), strict=True):
        assert line["train_loss"] == same["train_loss"]
        assert line["lr"] == SCHEDULE.rate(line["step"] - 1)


def test_a_snapshot_is_the_networks_state_dict(tmp_path: Path) -> None:
    done = record(tmp_path / "run", snapshot_sgd)
    saved = safetensors.torch.load_file(tmp_path / "run" / done.folder.snapshots()[-1].file)
    expected = done.network.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())


def test_a_finished_run_gives_its_last_weights_and_takes_no_update(tmp_path: Path) -> None:
    done = record(tmp_path / "run", snapshot_sgd)
    again = recorder(tmp_path / "run")
    assert again.resume() == SCHEDULE.steps
    for one, other in zip(done.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="the schedule has 23 updates"):
        again.update(1.0)


def test_another_configuration_is_refused_by_the_names_of_the_fields(tmp_path: Path) -> None:
    record(tmp_path / "run", snapshot_sgd, until=5)
    with pytest.raises(RunError, match="steps_per_epoch: 7 asked for, 4 there"):
        recorder(tmp_path / "run", steps_per_epoch=7).resume()


def test_a_scheduler_made_too_early_is_refused(tmp_path: Path) -> None:
    network = make_network()
    optimizer = sgd(network)
    torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULE.rate_after)
    early = recorder(tmp_path / "run", optimizer=optimizer)
    with pytest.raises(ValueError, match=r"resume\(\) comes before the learning-rate scheduler"):
        early.resume()


def test_nan_ends_the_loop_and_keeps_what_was_saved(tmp_path: Path) -> None:
    record(tmp_path / "run", snapshot_sgd, until=12)
    broken = recorder(tmp_path / "run")
    assert broken.resume() == 12
    for _ in range(3):
        broken.update(torch.tensor(float("nan")))  # looked at with the epoch's last
    with pytest.raises(TrainingDiverged, match="between steps 13 and 16"):
        broken.update(1.0)
    assert [entry.number for entry in RunFolder(tmp_path / "run").snapshots()] == [1]


def test_a_loop_that_restores_itself_tells_the_step(tmp_path: Path) -> None:
    first = recorder(tmp_path / "run", optimizer=None)
    with pytest.raises(ValueError, match=r"resume\(\) needs the optimizer"):
        first.resume()
    with first:
        first.start()
        for _ in range(14):
            first.update(1.0)
    with pytest.raises(RunError, match="the loop begins at step 0"):
        recorder(tmp_path / "run", optimizer=None).start()
    again = recorder(tmp_path / "run", optimizer=None)
    with again:
        again.start(13)
        assert [line["step"] for line in again.folder.metrics()] == [4, 8, 12]
        for _ in range(10):
            again.update(1.0)
    assert [entry.step for entry in again.folder.snapshots()] == [11, 23]


def test_updates_before_the_beginning_and_losses_of_many_numbers_are_refused(tmp_path: Path) -> None:
    early = recorder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"update\(\) comes after resume"):
        early.update(1.0)
    with early:
        early.resume()
        with pytest.raises(ValueError, match=r"one number, the mean over the batch, got shape \(16,\)"):
            early.update(torch.ones(16))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"class_names": ["a", "b"]}, "class_names must be 5 different names"),
        ({"precision": "auto"}, "precision must be one of"),
        ({"mean": [1.0], "std": [1.0, 1.0]}, "mean and std must be of one value per channel"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
    ],
)
def test_values_that_cannot_be_meant_are_named(
    wrong: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        recorder(tmp_path / "run", **wrong)


def test_such_a_run_is_evaluated_with_its_own_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = record(tmp_path / "run", snapshot_sgd)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(50, 3, 8, 8, generator=generator)
    labels = torch.randint(CLASSES, (50,), generator=generator)
    network = make_network(seed=9).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batches = list(zip(images.split(20), labels.split(20), strict=True))
    report = fastsnap.evaluate(
        tmp_path / "run", network, batches, precision="fp32", console=Console(stderr=True)
    )
    probabilities = []
    with torch.no_grad():
        for entry in done.folder.snapshots():
            oracle = make_network().eval()
            oracle.load_state_dict(safetensors.torch.load_file(tmp_path / "run" / entry.file))
            probabilities.append(oracle(images).softmax(1))
    for metrics, expected in zip(report.metrics.alone, probabilities, strict=True):
        assert metrics.error == pytest.approx(
            100 * (expected.argmax(1) != labels).float().mean().item(), abs=1e-4
        )
    mean = torch.stack(probabilities).mean(0)
    expected_nll = torch.nn.functional.nll_loss(mean.log(), labels).item()
    assert report.metrics.last_m[-1].nll == pytest.approx(expected_nll, rel=1e-5)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for name in ("ensemble.json", "error-against-m.png", "training.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert ensemble_eval.main([str(tmp_path / "run")]) == 2
    assert "fastsnap.evaluate(" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches gave no images"),
        ([torch.zeros(2, 3, 8, 8)], "must give pairs of tensors"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 5]))], "labels must be from 0 to 4"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(2))], "labels must be integers, one per image"),
    ],
)
def test_batches_that_cannot_be_evaluated(batches: list[object], message: str, tmp_path: Path) -> None:
    record(tmp_path / "run", snapshot_sgd)
    with pytest.raises(ValueError, match=message):
        fastsnap.evaluate(tmp_path / "run", make_network(), batches)


def test_a_network_of_other_classes_is_refused_and_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    done = record(tmp_path / "run", snapshot_sgd)
    batches = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]
    other = torch.nn.Sequential(*list(make_network())[:-1], torch.nn.Linear(8 * 36, CLASSES + 1))
    with pytest.raises(RunError, match=r"snapshot 1 .* does not fit"):
        fastsnap.evaluate(tmp_path / "run", other, batches)
    (tmp_path / "run" / done.folder.snapshots()[1].file).write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"snapshot 2|snapshot-02"):
        fastsnap.evaluate(tmp_path / "run", make_network(), batches)
