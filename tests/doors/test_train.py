"""Training end to end: the run folder, resuming to the bit, stopping, and what a run refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from rich.console import Console

from fastsnap import __version__, assembly, ensemble_eval, limits, train
from fastsnap.config import make_config
from fastsnap.data.datasets import load_dataset
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunFolder
from fastsnap.training.progress import ProgressDisplay
from fastsnap.training.records import TrainingDiverged

EPOCHS, CYCLES = 6, 3
STEPS_PER_EPOCH = 23  # 1,437 images in batches of 64
SMALL = ["--net", "resnet8", "--epochs", str(EPOCHS), "--cycles", str(CYCLES), "--loader", "torch"]


def snapshot_bytes(run: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((run / "snapshots").iterdir())]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, in a process of its own; beside it lies `log`, what the process wrote."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    process = start(run)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    (run.parent / "log").write_text(output)
    return run


def test_a_run_leaves_everything_in_its_folder(finished: Path) -> None:
    names = {str(file.relative_to(finished)) for file in finished.rglob("*") if file.is_file()}
    snapshots = {f"snapshots/snapshot-0{number}.safetensors" for number in range(1, CYCLES + 1)}
    files = {"config.json", "metrics.jsonl", "manifest.json", "checkpoint.safetensors", "ensemble.json"}
    assert names >= snapshots | files
    config = json.loads((finished / "config.json").read_text())
    assert (config["dataset"], config["net"], config["seed"], config["learning_rate"]) == (
        "digits",
        "resnet8",
        0,
        0.1,
    )
    assert config["versions"]["torch"] == torch.__version__
    # What its networks need of the data set.
    assert config["class_names"] == [str(number) for number in range(10)]
    assert (config["mean"], config["std"]) == ([77.87], [95.87])
    assert (config["image_shape"], config["resize"]) == ([8, 8, 1], None)


def test_metrics_have_a_line_per_epoch(finished: Path) -> None:
    records = RunFolder(finished).metrics()
    assert [record["epoch"] for record in records] == list(range(1, EPOCHS + 1))
    assert [record["cycle"] for record in records] == [1, 1, 2, 2, 3, 3]
    assert [record["step"] for record in records] == [
        STEPS_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)
    ]
    assert records[-1]["train_error"] < records[0]["train_error"]
    assert records[-1]["lr"] < 0.01 * 0.1
    assert all(record["images_per_second"] > 0 for record in records)
    assert [record["seconds"] for record in records] == sorted(record["seconds"] for record in records)


def test_each_snapshot_is_taken_at_the_annealed_end_of_its_cycle(finished: Path) -> None:
    entries = RunFolder(finished).snapshots()
    assert [entry.step for entry in entries] == [STEPS_PER_EPOCH * epoch for epoch in (2, 4, 6)]
    assert all(entry.learning_rate < 0.01 * 0.1 for entry in entries)
    files = snapshot_bytes(finished)
    assert len(set(files)) == CYCLES


def test_snapshots_are_plain_state_dicts_that_classify(finished: Path) -> None:
    state = safetensors.torch.load_file(finished / "snapshots/snapshot-03.safetensors")
    network = build_network("resnet8", classes=10, in_channels=1)
    network.load_state_dict(state)
    data = load_dataset("digits")
    images = (torch.from_numpy(data.test.images).float() - data.mean[0]) / data.std[0]
    with torch.inference_mode():
        predicted = network.eval()(images.permute(0, 3, 1, 2)).argmax(dim=1)
    assert (predicted == torch.from_numpy(data.test.labels)).float().mean() > 0.9


def test_a_finished_run_says_so_and_evaluates(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "ensemble.json").unlink()
    before = snapshot_bytes(finished)
    assert train.main([*SMALL, "--out", str(finished)]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert (finished / "ensemble.json").exists()
    assert snapshot_bytes(finished) == before


def test_a_run_goes_on_in_the_precision_that_it_began_with(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = RunFolder(run).config()
    other = "fp32" if config["precision"] == "bf16" else "bf16"  # as on another processor
    RunFolder(run).write_json("config.json", config | {"precision": other, "out": str(run)})
    assert train.main([*SMALL, "--out", str(run)]) == 0
    output = capsys.readouterr().out
    assert f"{other} (as this run began)" in output
    assert "this run is finished" in output
    assert train.main([*SMALL, "--out", str(run), "--precision", config["precision"]]) == 2
    assert f"precision: {config['precision']} asked for, {other} there" in capsys.readouterr().err


def test_the_summary_says_why_it_takes_so_many_threads(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(limits, "cpu_quota", lambda root: 1.0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert train.main([*SMALL, "--out", str(finished)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "threads   1 (the container's quota of 1 cores)" in capsys.readouterr().out


def test_a_run_from_before_a_field_was_added_goes_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = RunFolder(run).config()
    old = {name: value for name, value in config.items() if name not in ("augment", "stem_stride")}
    RunFolder(run).write_json("config.json", old | {"out": str(run)})
    assert train.main([*SMALL, "--out", str(run)]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert train.main([*SMALL, "--out", str(run), "--augment", "none"]) == 2
    assert "augment: none asked for, crop there" in capsys.readouterr().err


def test_another_configuration_is_refused_by_field(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*SMALL, "--out", str(finished), "--lr", "0.3", "--seed", "4"]) == 2
    message = capsys.readouterr().err
    assert "seed: 4 asked for, 0 there" in message
    assert "learning_rate: 0.3 asked for, 0.1 there" in message
    assert "cycles" not in message


def start(run: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastsnap.train", *SMALL, "--out", str(run), *flags]
    coloured = os.environ | {
        "FORCE_COLOR": "1"
    }  # which must not fill files with the codes that move a cursor
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=coloured
    )


def lines_of(file: Path, at_least: int, process: subprocess.Popen[str]) -> None:
    """Wait until `file` has that many lines."""
    while not file.exists() or len(file.read_text().splitlines()) < at_least:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.01)


def test_killed_runs_end_with_the_bits_of_an_uninterrupted_one(finished: Path, tmp_path: Path) -> None:
    for epochs_seen in (1, 3):
        process = start(tmp_path)
        lines_of(tmp_path / "metrics.jsonl", epochs_seen, process)
        time.sleep(0.02 * epochs_seen)  # somewhere in the next epoch, or in the middle of a save
        process.kill()
        process.communicate()
        assert not (tmp_path / "ensemble.json").exists()
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert snapshot_bytes(tmp_path) == snapshot_bytes(finished)
    steps = [record["step"] for record in RunFolder(tmp_path).metrics()]
    assert steps == [STEPS_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_a_checkpoint_within_the_epoch_and_says_how_to_go_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    process = start(tmp_path)
    lines_of(tmp_path / "metrics.jsonl", 2, process)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; a checkpoint is saved. Run the same command again to go on" in output
    checkpoint = RunFolder(tmp_path).load_checkpoint()
    assert checkpoint is not None
    assert checkpoint[1]["step"] >= 2 * STEPS_PER_EPOCH
    config = RunFolder(tmp_path).config()
    RunFolder(tmp_path).write_json("config.json", config | {"threads": 77})
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert "note: this run began with 77 threads" in capsys.readouterr().out
    assert snapshot_bytes(tmp_path) == snapshot_bytes(finished)


def test_a_pipe_that_closes_saves_a_checkpoint_and_is_told_on_standard_error(
    finished: Path, tmp_path: Path
) -> None:
    """`python -m fastsnap.train | head -n 3`: the shell sees the status of SIGPIPE."""
    train_command = [sys.executable, "-m", "fastsnap.train", *SMALL, "--out", str(tmp_path)]
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -n 3; exit ${PIPESTATUS[0]}', "bash", *train_command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGPIPE
    assert len(done.stdout.splitlines()) == 3
    said = "stopped by SIGPIPE; a checkpoint is saved. Run the same command again to go on\n"
    assert done.stderr == said
    assert RunFolder(tmp_path).load_checkpoint() is not None
    assert not (tmp_path / "ensemble.json").exists()
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert snapshot_bytes(tmp_path) == snapshot_bytes(finished)


def test_the_log_of_a_run_reads_well_in_a_file(finished: Path) -> None:
    output = (finished.parent / "log").read_text()
    lines = output.splitlines()
    assert "\x1b" not in output
    for name in ("data", "source", "net", "device", "step", "update", "schedule", "run"):
        assert any(line.startswith(f"{name} ") for line in lines), output
    assert any(line.startswith("estimated time: ") for line in lines)
    assert any(line.startswith("100 %  epoch 6/6  cycle 3/3  lr 0.0001  loss ") for line in lines)
    assert sum(line.startswith("saved snapshot ") for line in lines) == CYCLES


def test_a_disk_that_is_full_loses_nothing_that_was_saved(finished: Path, tmp_path: Path) -> None:
    limit = (
        finished / "snapshots/snapshot-01.safetensors"
    ).stat().st_size // 1024 + 1  # KiB; a checkpoint is larger
    command = [sys.executable, "-m", "fastsnap.train", *SMALL, "--out", str(tmp_path)]
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: cannot save" in done.stderr
    assert "checkpoint.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert snapshot_bytes(tmp_path) == snapshot_bytes(finished)


class PoisonedPipeline:
    """The batches of a pipeline, NaN from one step on: as a network that diverges there."""

    def __init__(self, pipeline, from_step: int) -> None:
        self.pipeline, self.from_step = pipeline, from_step
        self.steps_per_epoch, self.batch_size = pipeline.steps_per_epoch, pipeline.batch_size
        self.plan = pipeline.plan

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step, (images, labels) in enumerate(self.pipeline.epoch(epoch, first_step), start=first_step):
            poisoned = epoch * self.steps_per_epoch + step >= self.from_step
            yield (images * torch.nan if poisoned else images), labels


def test_a_diverged_run_names_the_steps_and_keeps_what_it_had(tmp_path: Path) -> None:
    config = assembly.settle(
        make_config(net="resnet8", epochs=EPOCHS, cycles=CYCLES, loader="torch", out=str(tmp_path))
    )
    trainer = assembly.build_trainer(config, load_dataset("digits"), RunFolder(tmp_path))
    poisoned_from = 3 * STEPS_PER_EPOCH + 5
    trainer.pipeline = PoisonedPipeline(trainer.pipeline, poisoned_from)
    with (
        ProgressDisplay(Console(quiet=True), 0, trainer.schedule.steps) as display,
        pytest.raises(
            TrainingDiverged, match=r"between steps (\d+) and (\d+) \(epoch 4, cycle 2\); the 1 snapshots"
        ) as caught,
    ):
        trainer.run(display)
    words = str(caught.value).replace("(", " ").split()
    first, last = int(words[words.index("steps") + 1]), int(words[words.index("and") + 1])
    assert first <= poisoned_from + 1 <= last
    assert [entry.number for entry in RunFolder(tmp_path).snapshots()] == [1]
    checkpoint = RunFolder(tmp_path).load_checkpoint()
    assert checkpoint is not None
    assert all(tensor.isfinite().all() for tensor in checkpoint[0].values())


def test_weights_broken_by_the_last_update_are_not_saved(tmp_path: Path) -> None:
    config = assembly.settle(
        make_config(net="resnet8", epochs=1, cycles=1, loader="torch", out=str(tmp_path))
    )
    trainer = assembly.build_trainer(config, load_dataset("digits"), RunFolder(tmp_path))

    def overflow(optimizer, *_) -> None:
        if optimizer.updates() == STEPS_PER_EPOCH - 1:
            optimizer.flat.parameters[-1].grad.fill_(torch.inf)

    trainer.optimizer.register_step_pre_hook(overflow)
    with ProgressDisplay(Console(quiet=True), 0, STEPS_PER_EPOCH) as display, pytest.raises(TrainingDiverged):
        trainer.run(display)
    assert RunFolder(tmp_path).snapshots() == []
    assert RunFolder(tmp_path).load_checkpoint() is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--dataset", "cifar11"], "cifar10"),
        (["--net", "resnet21"], "resnet20"),
        (["--cycles", "0"], "cycles"),
        (["--cycles", "100000"], "cycles"),
        (["--lr", "-1"], "learning_rate"),
        (["--lr", "nan"], "learning_rate"),
        (["--lr", "1e39"], "--lr"),
        (["--data", "my_images"], "--data"),
        (["--net", "resnet8x999"], "use a smaller --net"),
        (["--batch-size", "1438"], "1,437 training images"),
        (["--epochs", "0"], "epochs"),
        (["--batch-size", "0"], "batch_size"),
        (["--momentum", "1"], "momentum"),
        (["--weight-decay", "inf"], "weight_decay"),
        (["--seed", "-1"], "seed"),
        (["--schedule", "cosine"], "snapshot, step"),
        (["--precision", "fp8"], "bf16"),
        (["--validation", "5000"], "validation"),
        (["--dataset", "cifar100", "--data", "does-not-exist"], "does-not-exist"),
        (["--update", "apex"], "make apex"),
    ],
)
def test_bad_input_is_one_clear_line(
    flags: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there: no download, no network
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert named in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_where_there_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--precision", "fp32"], ["--precision", "fp16"], ["--schedule", "step"]])
def test_the_other_precisions_and_the_standard_schedule_train(flags: list[str], tmp_path: Path) -> None:
    arguments = [
        "--net",
        "resnet8",
        "--epochs",
        "2",
        "--cycles",
        "2",
        "--validation",
        "100",
        "--out",
        str(tmp_path),
    ]
    assert train.main([*arguments, *flags]) == 0
    first, second = RunFolder(tmp_path).metrics()
    assert second["train_error"] < first["train_error"] < 80
    assert json.loads((tmp_path / "config.json").read_text())["images"]["validation"] == 100


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(tmp_path).locked():
        assert train.main([*SMALL, "--out", str(tmp_path)]) == 2
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_outside_the_loop_is_answered_with_one_line(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(30)  # whichever thread the signal reaches, it ends this

    monkeypatch.setattr(assembly, "load_dataset", stop)
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 128 + number
    name = signal.Signals(number).name
    assert capsys.readouterr().out == f"stopped by {name}. Run the same command again to go on\n"


def test_a_run_that_another_process_began_meanwhile_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_another_run(*arguments, **options):
        config = assembly.settle(make_config(net="resnet8", epochs=EPOCHS, cycles=CYCLES, learning_rate=0.3))
        dataset = load_dataset(*arguments, **options)
        RunFolder(tmp_path).write_json("config.json", assembly.describe(config, dataset))
        return dataset

    monkeypatch.setattr(assembly, "load_dataset", begin_another_run)
    assert train.main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "learning_rate: 0.1 asked for, 0.3 there" in capsys.readouterr().err


@pytest.mark.parametrize("main", [train.main, ensemble_eval.main])
def test_help_explains_every_flag_and_the_version_is_told(main, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as exit_status:
            main([flag])
        assert exit_status.value.code == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == f"fastsnap {__version__}"
    options = text[text.index("options:") :].split("\n  -")[1:]
    assert len(options) >= 7
    for option in options:
        assert len(option.split()) >= 5, option
