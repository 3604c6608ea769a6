"""The command lines on several ranks: what they have in common, how they fail, and how they stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from in_ranks import Ended, Ranks, error_of, in_ranks
from made_pictures import folder_of_pictures
from small_run import small_run

from fastsnap import agreement, ensemble_eval, train
from fastsnap.data.archives import DataError
from fastsnap.run_folder import RunFolder
from fastsnap.training.joining import join_ranks
from fastsnap.training.trainer import Trainer

SMALL = ["--net", "resnet8", "--epochs", "4", "--cycles", "2", "--loader", "torch", "--precision", "fp32"]


def run(arguments: Sequence[Sequence[str]], place: Path, main=train.main) -> list[Ended]:
    return Ranks(main, [list(of_rank) for of_rank in arguments], [place] * len(arguments)).wait()


def one_error(ended: Sequence[Ended]) -> str:
    """The only line on standard error of all ranks, none of which ended well."""
    assert all(rank.status for rank in ended)
    (line,) = [line for rank in ended for line in rank.errors.splitlines()]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, and in `ended-0.json` and `-1` what they wrote."""
    place = tmp_path_factory.mktemp("ranks")
    ended = run([[*SMALL, "--out", "run"]] * 2, place)
    for rank, of_rank in enumerate(ended):
        (place / f"ended-{rank}.json").write_text(json.dumps(vars(of_rank)))
    return place / "run"


def snapshot_bytes(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "snapshots").iterdir())]


def test_two_ranks_train_and_only_the_first_one_speaks(finished: Path) -> None:
    first, second = (json.loads((finished.parent / f"ended-{rank}.json").read_text()) for rank in range(2))
    assert (first["status"], first["errors"]) == (0, "")
    assert second == {"status": 0, "output": "", "errors": ""}
    line = "ranks     2, up to 32 of 64 images of a batch each; BatchNorm over each rank's own; "
    assert line in first["output"]
    assert first["output"].count("saved snapshot") == 2
    assert "The last m averaged" in first["output"]
    assert json.loads((finished / "config.json").read_text())["ranks"] == 2
    figures = [record["train_error"] for record in RunFolder(finished).metrics()]
    assert len(figures) == 4
    # Sums over all images: whole numbers of errors among 1,437.
    for figure in figures:
        assert figure * 14.37 == pytest.approx(round(figure * 14.37), abs=1e-6)


def test_the_evaluation_counts_each_image_once_whatever_the_number_of_ranks(
    finished: Path, tmp_path: Path
) -> None:
    of_ranks = untimed(finished)
    plain = [str(finished), "--out", str(tmp_path), "--precision", "fp32"]
    assert ensemble_eval.main(plain) == 0
    assert of_ranks == untimed(tmp_path)
    # Four batches on three ranks, and one batch, of which two ranks have nothing.
    for batch_size in ("100", "1000"):
        options = [*plain, "--batch-size", batch_size]
        assert [rank.errors for rank in run([options] * 3, tmp_path, ensemble_eval.main)] == [""] * 3
        again = untimed(tmp_path)
        assert ensemble_eval.main(options) == 0
        assert again == untimed(tmp_path)


def untimed(folder: Path) -> dict:
    """ensemble.json without what depends on time."""
    content = json.loads((folder / "ensemble.json").read_text())
    del content["seconds"]
    for way in content["worth"]["ways"]:
        del way["cost"]["milliseconds"]
    return content


def test_ranks_look_at_held_out_images_and_decide_together(tmp_path: Path) -> None:
    flags = [*SMALL, "--validation", "107", "--ema", "0.9", "--out", "run"]
    ended = run([flags] * 3, tmp_path)
    assert [rank.status for rank in ended] == [0] * 3
    folder = RunFolder(tmp_path / "run")
    assert ended[0].output.count("held-out images: snapshot") == 2
    decided = untimed(folder.path)
    assert decided["decision"]["images"] == 107
    alone = tmp_path / "alone"
    alone.mkdir()
    assert ensemble_eval.main([str(folder.path), "--out", str(alone), "--precision", "fp32"]) == 0
    assert untimed(alone) == decided
    last = folder.metrics()[-1]
    validation = tmp_path / "validation"
    validation.mkdir()
    options = [str(folder.path), "--out", str(validation), "--precision", "fp32", "--split", "validation"]
    assert ensemble_eval.main(options) == 0
    figures = json.loads((validation / "ensemble-validation.json").read_text())
    assert last["validation_error"] == pytest.approx(figures["members"][-1]["error"])
    assert last["ensemble_loss"] == pytest.approx(figures["last_m"][-1]["nll"], rel=1e-5)
    assert folder.average() is not None


@pytest.mark.parametrize("flags", [["--averages"], ["--interpolate"], ["--against", "svhn"]])
def test_what_needs_a_single_process_says_so(finished: Path, tmp_path: Path, flags: list[str]) -> None:
    ended = run([[str(finished), "--out", str(tmp_path), *flags]] * 2, tmp_path, ensemble_eval.main)
    assert "single process" in one_error(ended)


def test_a_stop_is_answered_by_all_and_the_run_goes_on_to_the_same_bits(
    finished: Path, tmp_path: Path
) -> None:
    ranks = Ranks(train.main, [[*SMALL, "--out", "run"]] * 2, [tmp_path] * 2)
    while "estimated time" not in ranks.output(0):
        assert ranks.processes[0].is_alive()
        time.sleep(0.01)
    os.kill(ranks.processes[1].pid, signal.SIGUSR1)  # a batch system's word to one of them
    ended = ranks.wait()
    assert [rank.status for rank in ended] == [128 + signal.SIGUSR1] * 2
    assert [rank.errors for rank in ended] == ["", ""]
    assert "stopped by SIGUSR1; a checkpoint is saved" in ended[0].output
    again = run([[*SMALL, "--out", "run"]] * 2, tmp_path)
    assert [rank.status for rank in again] == [0, 0]
    assert "going on after step" in again[0].output
    assert "note:" not in again[0].output
    assert snapshot_bytes(tmp_path / "run") == snapshot_bytes(finished)


def test_a_run_goes_on_with_another_number_of_ranks_and_says_so(tmp_path: Path) -> None:
    ranks = Ranks(train.main, [[*SMALL, "--out", "run"]] * 2, [tmp_path] * 2)
    while "estimated time" not in ranks.output(0):
        assert ranks.processes[0].is_alive()
        time.sleep(0.01)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert [rank.status for rank in ranks.wait()] == [128 + signal.SIGTERM] * 2
    (of_three, *_) = run([[*SMALL, "--out", "run"]] * 3, tmp_path)
    assert of_three.status == 0
    note = (
        "note: until here this run had 2 ranks, and goes on with 3: the same batches and updates, but sums in"
    )
    assert note in of_three.output


class Halting(Trainer):
    """Rank 1 does something after ten steps."""

    def _after_step(self, *arguments) -> None:
        super()._after_step(*arguments)
        if self.step == 10 and self.ranks.rank == 1:
            self.do()


class Dying(Halting):
    def do(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Hanging(Halting):
    def do(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class Greedy(Halting):
    def do(self) -> None:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )


class Faulty(Halting):
    def do(self) -> None:
        raise RuntimeError("nobody expected this")


class Unreadable(Halting):
    def do(self) -> None:
        raise DataError("cat.jpg cannot be read any more")


class Drifting(Halting):
    def do(self) -> None:
        with torch.no_grad():
            self.optimizer.flat.data[3] += 1e-6


def train_with(trainer: type[Trainer], arguments: list[str]) -> int:
    from fastsnap import assembly

    assembly.Trainer = trainer
    return train.main(arguments)


def test_a_rank_that_is_killed_is_named_by_one_of_the_others(tmp_path: Path) -> None:
    first, killed, third = run([[*SMALL, "--out", "run"]] * 3, tmp_path, partial(train_with, Dying))
    assert killed.status == -signal.SIGKILL
    said = one_error([first, third])
    assert "lost rank 1 after step 10 of 92 (" in said
    assert "on from the last checkpoint" in said


def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path: Path) -> None:
    arguments = [*SMALL, "--out", "run", "--timeout", "2"]
    ranks = Ranks(partial(train_with, Hanging), [arguments] * 3, [tmp_path] * 3)
    for rank in (0, 2):
        ranks.processes[rank].join(60)
    ranks.processes[1].kill()  # as torchrun does with what does not listen
    first, _, third = ranks.wait()
    said = one_error([first, third])
    assert "lost rank 1 after step 10 of 92 (" in said
    assert (
        "or it does not answer within 2 seconds (--timeout). The same command goes on from the last" in said
    )


def test_lack_of_memory_on_one_rank_is_one_error(tmp_path: Path) -> None:
    said = one_error(run([[*SMALL, "--out", "run"]] * 3, tmp_path, partial(train_with, Greedy)))
    assert said.startswith("error: out of memory (rank 1 of 3, on ")
    assert said.endswith("use a smaller --batch-size, or a smaller network")


def test_pictures_that_one_rank_cannot_read_are_one_error(tmp_path: Path) -> None:
    ended = run([[*SMALL, "--out", "run"]] * 3, tmp_path, partial(train_with, Unreadable))
    assert one_error(ended).startswith("error: cat.jpg cannot be read any more (rank 1 of 3, on ")
    assert ended[1].status == 2


def test_a_fault_of_the_program_is_traced_once(tmp_path: Path) -> None:
    ended = run([[*SMALL, "--out", "run"]] * 3, tmp_path, partial(train_with, Faulty))
    assert [rank.status for rank in ended] == [1] * 3
    assert ended[0].errors == ended[2].errors == ""
    assert ended[1].errors.startswith("error: a fault of the program (rank 1 of 3, on ")
    assert ended[1].errors.count("Traceback") == 1
    assert ended[1].errors.endswith("RuntimeError: nobody expected this\n")


def test_ranks_that_drift_apart_are_named_and_nothing_is_saved(tmp_path: Path) -> None:
    said = one_error(run([[*SMALL, "--out", "run"]] * 3, tmp_path, partial(train_with, Drifting)))
    assert "after step 23 rank 1 on " in said
    assert "has other parameters than rank 0 on " in said
    assert RunFolder(tmp_path / "run").load_checkpoint()[1]["step"] == 0


def test_a_network_that_diverges_is_one_error(tmp_path: Path) -> None:
    ended = run([[*SMALL, "--out", "run", "--lr", "1e30"]] * 2, tmp_path)
    assert "the loss became NaN or infinite between steps 1 and " in one_error(ended)
    assert {rank.status for rank in ended} == {1, 2}


def test_other_flags_are_named(tmp_path: Path) -> None:
    arguments = [SMALL, SMALL, [*SMALL, "--lr", "0.2", "--threads", "1"]]
    said = one_error(run(arguments, tmp_path))
    assert "ranks must be started with the same flags. Rank 2 on " in said
    assert "learning_rate: 0.2 there, 0.1 on rank 0" in said
    assert "threads" not in said
    assert not (tmp_path / "runs").exists()


def test_a_flag_that_is_wrong_on_one_rank_is_one_error(tmp_path: Path) -> None:
    ended = run([SMALL, [*SMALL, "--epoch", "many"]], tmp_path)
    assert [rank.status for rank in ended] == [1, 2]
    assert ended[0].errors == ""
    assert "argument --epochs: invalid int value: 'many'" in ended[1].errors


def test_help_comes_once(tmp_path: Path) -> None:
    ended = run([["--help"]] * 2, tmp_path)
    assert sorted(rank.output[:6] for rank in ended) == ["", "usage:"]


def test_a_batch_of_fewer_images_than_ranks_is_refused(tmp_path: Path) -> None:
    said = one_error(run([[*SMALL, "--batch-size", "2"]] * 3, tmp_path))
    assert "batch_size must be at least the number of ranks" in said
    assert "got 2 for 3 ranks" in said


def test_sync_batch_norm_needs_gpus(tmp_path: Path) -> None:
    said = one_error(run([[*SMALL, "--sync-batch-norm"]] * 2, tmp_path))
    assert "sync_batch_norm (--sync-batch-norm) needs GPUs, got device cpu" in said


def test_a_gpu_for_every_rank_is_asked_for(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("of machines without a GPU")
    said = one_error(run([[*SMALL, "--device", "cuda"]] * 2, tmp_path))
    assert "device cuda was asked for, but torch finds no CUDA device" in said


def test_a_host_that_cannot_see_the_run_gets_it_from_the_first_rank(finished: Path, tmp_path: Path) -> None:
    """And writes nothing: hosts need no common disk."""
    other = tmp_path / "other-host"
    other.mkdir()
    ranks = Ranks(train.main, [[*SMALL, "--out", "run"]] * 2, [tmp_path, other])
    while "estimated time" not in ranks.output(0):
        assert ranks.processes[0].is_alive()
        time.sleep(0.01)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    ranks.wait()
    ended = Ranks(train.main, [[*SMALL, "--out", "run"]] * 2, [tmp_path, other]).wait()
    assert [(rank.status, rank.errors) for rank in ended] == [(0, "")] * 2
    assert snapshot_bytes(tmp_path / "run") == snapshot_bytes(finished)
    assert {file.name for file in other.iterdir()} == {"said-by-1.out", "said-by-1.err"}


def test_a_run_that_the_first_rank_does_not_see_is_not_begun_anew(tmp_path: Path) -> None:
    first, other = tmp_path / "first-host", tmp_path / "other-host"
    first.mkdir()
    small_run(other / "run", snapshots=1)
    said = one_error(Ranks(train.main, [[*SMALL, "--out", "run"]] * 2, [first, other]).wait())
    assert "run holds a run for rank 1 on " in said
    assert "which reads and writes it, does not see it: put --out on a disk that all hosts share" in said
    assert not (first / "run").exists()


def remembered(ranks) -> tuple[bool, bool]:
    before = ranks.remembers("it")
    ranks.meet("all have looked")
    if ranks.is_first:
        ranks.remember("it")
    ranks.meet("it is remembered")
    again = join_ranks()  # as the process that torchrun starts in this one's place
    again.meet("they are here")
    return before, again.remembers("it")


def test_what_is_remembered_outlives_the_ranks() -> None:
    assert in_ranks(remembered, 2) == [(False, True)] * 2


def test_a_process_that_is_started_again_does_not_begin_anew(
    finished: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    arguments = [*SMALL, "--out", str(tmp_path / "run"), "--restart"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main(arguments) == 0
    assert snapshot_bytes(tmp_path / "run") == snapshot_bytes(finished)
    assert not list((tmp_path / "run").glob("replaced-*"))


@pytest.mark.parametrize("memory", ["1GB", "1kB"])
def test_ranks_train_on_pictures_that_one_of_them_has_decoded(tmp_path: Path, memory: str) -> None:
    """In memory, and decoded while training."""
    folder_of_pictures(tmp_path / "pictures")
    options = [
        "--dataset",
        "folder",
        "--data",
        "pictures",
        "--net",
        "resnet8",
        "--epochs",
        "2",
        "--cycles",
        "1",
    ]
    options += ["--image-size", "16", "--batch-size", "8", "--precision", "fp32", "--memory", memory]
    ended = run([[*options, "--cache", "cache", "--out", "run"]] * 2, tmp_path)
    assert [(rank.status, rank.errors) for rank in ended] == [(0, "")] * 2
    assert ended[0].output.count("decoded ") == 1
    assert len(RunFolder(tmp_path / "run").metrics()) == 2


def test_plain_training_imports_nothing_of_it() -> None:
    program = "import sys, fastsnap.train; sys.exit('fastsnap.training.process_group' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def versions_differ(ranks) -> str:
    agreement.__version__ = f"9.0.{ranks.rank}"
    config = train.parse_arguments(SMALL)[0]
    return error_of(lambda: agreement.require_agreement(config, RunFolder("run"), ranks, restart=False))


def test_other_versions_are_named() -> None:
    for said in in_ranks(versions_differ, 2):
        assert "ranks must run the same versions" in said
        assert "fastsnap: 9.0.1 there, 9.0.0 on rank 0" in said


def devices_differ(ranks) -> str:
    agreement.choose_device = lambda name: torch.device("cuda" if ranks.rank else "cpu")
    config = train.parse_arguments(SMALL)[0]
    return error_of(lambda: agreement.require_agreement(config, RunFolder("run"), ranks, restart=False))


def test_hosts_with_and_without_gpus_are_named() -> None:
    for said in in_ranks(devices_differ, 2):
        assert "device: cuda there, cpu on rank 0" in said


def images_differ(ranks) -> str:
    from small_run import small_dataset

    dataset = small_dataset()
    dataset.test.labels[0] += ranks.rank
    return error_of(lambda: agreement.require_same_data(dataset, ranks))


def test_other_images_are_named() -> None:
    for said in in_ranks(images_differ, 2):
        assert "ranks must train on the same images and labels. Rank 1 on " in said
        assert "test: " in said
        assert "train: " not in said
