"""What training keeps and says besides: a running average of the weights, held-out figures, a teacher, TensorBoard."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_trainer import StoppingPipeline, run
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastsnap
from fastsnap.assembly import build_trainer, settle
from fastsnap.config import make_config
from fastsnap.data.datasets import load_dataset
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.run_folder import RunFolder
from fastsnap.train import main
from fastsnap.training.distillation import Distillation
from fastsnap.training.stopping import TrainingStopped

COMMON = [
    *("--net", "resnet8", "--epochs", "3", "--cycles", "2", "--train-images", "300", "--validation", "100"),
    *("--device", "cpu", "--threads", "1"),
]
TIMES = ("images_per_second", "seconds")


def make(path, **options):
    config = settle(
        make_config(
            **{"net": "resnet8", "epochs": 3, "cycles": 2, "batch_size": 43, "train_images": 130} | options,
            precision="fp32",
            threads=1,
            out=str(path),
        )
    )
    dataset = load_dataset("digits", train_images=130, validation=config.validation)
    path.mkdir(exist_ok=True)
    return build_trainer(config, dataset, RunFolder(path))


def metrics_of(folder):
    """Without what depends on time."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in folder.metrics()]


# -- a running average


def test_the_running_average_is_torchs(tmp_path):
    trainer = make(tmp_path / "run", ema=0.9)
    reference = AveragedModel(trainer.network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(trainer.network)  # torch begins with the weights of its first call
    step = trainer.train_step

    def counted(*arguments):
        step(*arguments)
        reference.update_parameters(trainer.network)

    trainer.train_step, counted.totals, counted.scaler = counted, step.totals, step.scaler  # type: ignore[assignment]
    counted.average, counted.device = step.average, step.device
    run(trainer)
    entry = trainer.folder.average()
    assert entry is not None
    saved = trainer.folder.load_snapshot(entry)
    for name, parameter in reference.module.named_parameters():
        torch.testing.assert_close(saved[name], parameter.data, msg=name)
    last = trainer.folder.load_snapshot(trainer.folder.snapshots()[-1])
    assert not torch.equal(saved[name], last[name])
    assert entry.number == 2
    # The one of the first cycle is gone.
    assert [file.name for file in (tmp_path / "run" / "snapshots").glob("average*")] == [
        Path(entry.file).name
    ]


def test_the_average_changes_nothing_else_and_goes_on_to_the_same_bits(tmp_path):
    plain, whole = make(tmp_path / "plain"), make(tmp_path / "whole", ema=0.9)
    for trainer in (plain, whole):
        run(trainer)
    assert [e.sha256 for e in plain.folder.snapshots()] == [e.sha256 for e in whole.folder.snapshots()]
    stopped = make(tmp_path / "stopped", ema=0.9)
    stopped.pipeline = StoppingPipeline(stopped.pipeline, 4)
    with pytest.raises(TrainingStopped):
        run(stopped)
    resumed = make(tmp_path / "stopped", ema=0.9)
    assert resumed.resume()
    run(resumed)
    mine, theirs = resumed.folder.average(), whole.folder.average()
    assert mine is not None
    assert theirs is not None
    assert mine.sha256 == theirs.sha256
    plain_average = plain.folder.average()
    assert plain_average is None


def test_a_damaged_average_is_refused_by_its_hash(tmp_path):
    assert main([*COMMON, "--ema", "0.9", "--out", str(tmp_path / "run")]) == 0
    folder = RunFolder(tmp_path / "run")
    entry = folder.average()
    assert entry is not None
    file = folder.path / entry.file
    state = safetensors.torch.load_file(file)
    name = next(iter(state))
    state[name] += 1
    safetensors.torch.save_file(state, file)
    with pytest.raises(ValueError, match="damaged or was swapped"):
        evaluate_run(folder, averages=True, device=torch.device("cpu"))


@pytest.mark.parametrize("decay", ["1", "-0.1", "nan"])
def test_decays_that_make_no_average_are_refused(tmp_path, capsys, decay):
    assert main([*COMMON, "--ema", decay, "--out", str(tmp_path / "run")]) == 2
    assert "ema must be at least 0 and below 1" in capsys.readouterr().err


# -- held-out images, once per cycle


def test_metrics_say_what_each_snapshot_and_the_ensemble_so_far_are_worth(tmp_path, capsys):
    assert main([*COMMON, "--out", str(tmp_path / "run"), "--precision", "fp32"]) == 0
    text = capsys.readouterr().out
    folder = RunFolder(tmp_path / "run")
    report = evaluate_run(folder, split="validation", device=torch.device("cpu"), precision="fp32")
    lines = folder.metrics()
    # Cycles end after 1.5 and 3 epochs.
    assert ["validation_error" in line for line in lines] == [False, True, True]
    for line, m in ((lines[1], 1), (lines[2], 2)):
        alone, together = report.metrics.alone[m - 1], report.metrics.first_m[m - 1]
        assert line["validation_error"] == pytest.approx(alone.error)
        assert line["validation_loss"] == pytest.approx(alone.nll, rel=1e-5)
        assert line["ensemble_error"] == pytest.approx(together.error)
        assert line["ensemble_loss"] == pytest.approx(together.nll, rel=1e-5)
    assert f"held-out images: snapshot 1 {lines[1]['validation_error']:.2f} % error\n" in text
    assert f"all 2 together {lines[2]['ensemble_error']:.2f} %" in text


@pytest.mark.parametrize("stop_step", [2, 4, 5, 7])
def test_held_out_figures_are_the_same_after_a_stop(tmp_path, stop_step):
    whole = make(tmp_path / "whole", validation=40)
    run(whole)
    stopped = make(tmp_path / "stopped", validation=40)
    stopped.pipeline = StoppingPipeline(stopped.pipeline, stop_step)
    with pytest.raises(TrainingStopped):
        run(stopped)
    resumed = make(tmp_path / "stopped", validation=40)
    assert resumed.resume()
    run(resumed)
    assert metrics_of(resumed.folder) == metrics_of(whole.folder)
    assert [e.sha256 for e in resumed.folder.snapshots()] == [e.sha256 for e in whole.folder.snapshots()]


def test_looking_at_held_out_images_changes_no_bit_of_the_training(tmp_path):
    looking, blind = make(tmp_path / "looking", validation=40), make(tmp_path / "blind", validation=40)
    blind.validate = None
    for trainer in (looking, blind):
        run(trainer)
    assert [e.sha256 for e in looking.folder.snapshots()] == [e.sha256 for e in blind.folder.snapshots()]


# -- a teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    assert main([*COMMON, "--out", str(out), "--seed", "5"]) == 0
    return out


def test_the_loss_is_hintons():
    generator = torch.Generator().manual_seed(0)
    logits, teaching = (torch.randn(6, 4, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    log_BC = teaching.log_softmax(1)
    soft = functional.softmax(teaching / 3, 1)  # p^(1/T), normalised, is the softmax of log p / T
    cross = -(soft * functional.log_softmax(logits / 3, 1)).sum(1) + (soft * soft.log()).sum(1)
    expected = 0.4 * functional.cross_entropy(logits, labels) + 0.6 * 9 * cross.mean()
    loss = Distillation(3.0, 0.6)
    torch.testing.assert_close(loss.loss(logits, labels, log_BC, "mean"), expected)
    torch.testing.assert_close(loss.loss(logits, labels, log_BC, "sum") / 6, expected)


def test_a_student_learns_what_its_teacher_says(teacher, tmp_path, capsys):
    out = tmp_path / "student"
    longer = [*COMMON, "--epochs", "12"]
    flags = [
        "--teacher",
        str(teacher),
        "--teacher-weight",
        "1",
        "--teacher-temperature",
        "3",
        "--out",
        str(out),
    ]
    assert main([*longer, *flags]) == 0
    text = capsys.readouterr().out
    assert "each batch passes through it" in text
    assert "weight 1.0, temperature 3.0" in text
    config = json.loads((out / "config.json").read_text())
    assert config["teacher"] == str(teacher)
    assert len(config["teacher_sha256"]) == 64
    images = load_dataset("digits").test.images
    said = fastsnap.load_ensemble(teacher, device="cpu").predict(images).probabilities.argmax(1)
    learnt = fastsnap.load_ensemble(out, last=1, device="cpu").predict(images).probabilities.argmax(1)
    alone = tmp_path / "alone"
    assert main([*longer, "--out", str(alone)]) == 0
    unlearnt = fastsnap.load_ensemble(alone, last=1, device="cpu").predict(images).probabilities.argmax(1)
    assert (learnt == said).double().mean() > (unlearnt == said).double().mean()
    # The same command again, without the teacher by now: a finished run needs none.
    moved = teacher.rename(teacher.with_name("moved"))
    try:
        assert main([*longer, *flags]) == 0
    finally:
        moved.rename(teacher)


def test_images_that_look_the_same_in_every_epoch_pass_through_the_teacher_once(teacher, tmp_path, capsys):
    flags = [*COMMON, "--teacher", str(teacher), "--augment", "none", "--precision", "fp32"]
    assert main([*flags, "--out", str(tmp_path / "kept")]) == 0
    assert "its probabilities are kept" in capsys.readouterr().out
    kept = make(tmp_path / "one", augment="none")
    dataset = load_dataset("digits", train_images=130, augment="none")
    trainer = build_trainer(
        settle(
            make_config(
                net="resnet8", augment="none", batch_size=43, train_images=130, threads=1, precision="fp32"
            )
        ),
        dataset,
        RunFolder(tmp_path / "two"),
        teacher=fastsnap.load_ensemble(teacher, device="cpu"),
    )
    assert trainer.teacher is not None
    batch = next(trainer.pipeline.epoch(1))[0]
    indices = kept.pipeline.plan.batch(1, 0).indices
    said = trainer.teacher(batch, indices)
    ensemble = fastsnap.load_ensemble(teacher, device="cpu")
    expected = ensemble.predict(dataset.train.images[indices]).probabilities
    torch.testing.assert_close(said.exp(), expected, atol=1e-5, rtol=1e-4)


def test_a_student_that_was_stopped_goes_on_to_the_same_bits(teacher, tmp_path):
    def student(path):
        config = settle(
            make_config(
                net="resnet8",
                epochs=2,
                cycles=1,
                batch_size=43,
                train_images=130,
                threads=1,
                precision="fp32",
                out=str(path),
            )
        )
        ensemble = fastsnap.load_ensemble(teacher, device="cpu")
        path.mkdir(exist_ok=True)
        return build_trainer(
            config, load_dataset("digits", train_images=130), RunFolder(path), teacher=ensemble
        )

    whole = student(tmp_path / "whole")
    run(whole)
    stopped = student(tmp_path / "stopped")
    stopped.pipeline = StoppingPipeline(stopped.pipeline, 2)
    with pytest.raises(TrainingStopped):
        run(stopped)
    resumed = student(tmp_path / "stopped")
    assert resumed.resume()
    run(resumed)
    assert whole.folder.snapshots()[0].sha256 == resumed.folder.snapshots()[0].sha256


def test_a_teacher_must_know_the_classes_and_the_images(teacher, tmp_path, capsys):
    folder = RunFolder(teacher)
    config = folder.config()
    for change, message in (
        ({"class_names": [*config["class_names"][:9], "X"]}, "has as class 10 'X', but this run '9'"),
        ({"mean": [1.0]}, "has means of the channels 1.0, but this run 77.87"),
        (
            {"image_shape": [16, 16, 1]},
            "has images of height, width and channels 16, 16, 1, but this run 8, 8, 1",
        ),
    ):
        folder.write_json("config.json", config | change)
        try:
            assert main([*COMMON, "--teacher", str(teacher), "--out", str(tmp_path / "x")]) == 2
        finally:
            folder.write_json("config.json", config)
        assert message in " ".join(capsys.readouterr().err.split())
    assert main([*COMMON, "--teacher", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "x" / "config.json").exists()


def test_a_teacher_that_has_seen_what_is_held_out_is_told(teacher, tmp_path, capsys):
    flags = [*COMMON, "--epochs", "1", "--cycles", "1", "--teacher", str(teacher)]
    assert main([*flags, "--seed", "5", "--out", str(tmp_path / "same")]) == 0
    assert "held out here" not in " ".join(capsys.readouterr().out.split())
    assert main([*flags, "--seed", "6", "--out", str(tmp_path / "other")]) == 0
    assert "it was trained on images that are held out here" in " ".join(capsys.readouterr().out.split())


def test_a_run_goes_on_only_with_the_teacher_that_it_began_with(teacher, tmp_path, capsys):
    out = tmp_path / "student"
    flags = [*COMMON, "--out", str(out)]
    assert main([*flags, "--teacher", str(teacher)]) == 0
    folder = RunFolder(out)
    folder.forget_after(folder.snapshots()[0].step)  # unfinished by now
    assert main(flags) == 2
    assert "teacher: None asked for" in capsys.readouterr().err
    config = folder.config()
    folder.write_json("config.json", config | {"teacher_sha256": "0" * 64})
    assert main([*flags, "--teacher", str(teacher)]) == 2
    assert "has other snapshots, weights or another temperature" in " ".join(capsys.readouterr().err.split())
    assert main([*flags, "--teacher", str(teacher), "--teacher-weight", "0.2"]) == 2
    assert "teacher_weight: 0.2 asked for, 0.7 there" in capsys.readouterr().err


# -- TensorBoard


def scalars_of(run_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_folder / "tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags["scalars"]
    }, tags


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own
def test_tensorboard_has_the_lines_of_the_metrics_and_the_pictures(tmp_path):
    out = tmp_path / "run"
    assert main([*COMMON, "--tensorboard", "--out", str(out)]) == 0
    scalars, tags = scalars_of(out)
    lines = RunFolder(out).metrics()
    assert scalars["loss/training"] == [
        (line["step"], pytest.approx(line["train_loss"], rel=1e-5)) for line in lines
    ]
    assert len(scalars["error %/validation of the fresh snapshot"]) == 2
    assert "error-against-m" in tags["images"]


def test_without_tensorboard_the_extra_is_named_before_anything_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main([*COMMON, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'fastsnap[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
