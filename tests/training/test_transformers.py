"""The callback for transformers' Trainer: the run folder of its training, from the start, resumed, accumulated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from fastsnap import Schedule, SnapshotRecorder, SnapshotSGD, load_ensemble
from fastsnap.run_folder import RunError, RunFolder

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from fastsnap.training.transformers import SnapshotCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's, of itself and of what it uses
SCHEDULE = Schedule("snapshot", steps=12, cycles=2, learning_rate=0.05)
NAMES = ("ant", "bee", "cat")


class Images(Dataset):
    """Random ones; the same index gives the same."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 3}


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=3,
    )
    return transformers.ResNetForImageClassification(config)


def train(folder: Path, steps: int, *, resume: bool = False, accumulate: int = 1, fused: bool = True) -> Any:
    model = make_model()
    recorder = SnapshotRecorder(
        folder,
        model,
        SCHEDULE,
        classes=3,
        steps_per_epoch=4,
        class_names=NAMES,
        mean=[127.5] * 3,
        std=[127.5] * 3,
        image_shape=(32, 32, 3),
    )
    optimizer: torch.optim.Optimizer
    scheduler: Any
    if fused:
        optimizer = SnapshotSGD(model.named_parameters(), SCHEDULE)
        scheduler = optimizer.scheduler()
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: SCHEDULE.rate_after(step) / 50)
    arguments = transformers.TrainingArguments(
        folder.parent / "trainer",
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulate,
        save_strategy="steps",
        save_steps=7,
        save_only_model=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        remove_unused_columns=False,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Images(),
        optimizers=(optimizer, scheduler),
        callbacks=[SnapshotCallback(recorder)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_a_training_leaves_a_run_folder_with_the_losses_that_the_trainer_logs(
    tmp_path: Path, accumulate: int, fused: bool
) -> None:
    trainer = train(tmp_path / "run", SCHEDULE.steps, accumulate=accumulate, fused=fused)
    folder = RunFolder(tmp_path / "run")
    assert [entry.step for entry in folder.snapshots()] == [6, 12]
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(logged) == SCHEDULE.steps
    # The Trainer rounds what it logs.
    assert folder.metrics()[0]["train_loss"] == pytest.approx(sum(logged[:4]) / 4, abs=1e-4)
    saved = folder.load_snapshot(folder.snapshots()[-1])
    assert all(
        torch.equal(value.float(), saved[name].float()) for name, value in trainer.model.state_dict().items()
    )


def test_a_run_goes_on_from_the_trainers_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "run", 8)
    train(tmp_path / "run", SCHEDULE.steps, resume=True)
    assert [entry.step for entry in RunFolder(tmp_path / "run").snapshots()] == [6, 12]


def test_what_would_be_trained_twice_or_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"13 updates, the recorder's schedule 12"):
        train(tmp_path / "other", 13)
    train(tmp_path / "run", 8)
    with pytest.raises(RunError, match="holds a run of"):
        train(tmp_path / "run", SCHEDULE.steps)


def test_the_snapshots_of_such_a_model_are_an_ensemble(tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", SCHEDULE.steps)
    ensemble = load_ensemble(tmp_path / "run", network=make_model(), device="cpu")
    assert ensemble.classes == NAMES
    image = torch.randint(
        0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    inputs = (image.permute(0, 3, 1, 2) - 127.5) / 127.5
    members = [RunFolder(tmp_path / "run").load_snapshot(entry) for entry in ensemble.members]
    expected = []
    for state in members:
        trainer.model.load_state_dict(state)
        expected.append(trainer.model.eval()(pixel_values=inputs).logits.softmax(1))
    torch.testing.assert_close(ensemble(image), torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)
