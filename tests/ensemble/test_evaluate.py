"""Evaluating a run folder: the figures of a plain loop, once over the data, and clear errors for bad runs."""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch
from small_run import NET, small_dataset, small_run

from fastsnap.data.pipeline import make_pipeline
from fastsnap.data.sources import ImageSet
from fastsnap.device import choose_precision
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.forwards import fill_member_logits
from fastsnap.ensemble.metrics import measure_members
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunError, RunFolder

CPU = torch.device("cpu")


def evaluate(folder: RunFolder, **options):
    return evaluate_run(folder, dataset=small_dataset(), device=CPU, **{"precision": "fp32"} | options)


def plain_logits(folder: RunFolder, image_set) -> torch.Tensor:
    """Logits [M, N, C] from the snapshot files, as a user would compute them in a loop of their own."""
    dataset = small_dataset()
    images = (torch.from_numpy(image_set.images).float() - dataset.mean[0]) / dataset.std[0]
    rows = []
    for entry in folder.snapshots():
        network = build_network(NET, classes=10, in_channels=1).eval()
        network.load_state_dict(safetensors.torch.load_file(folder.path / entry.file))
        with torch.inference_mode():
            rows.append(network(images.permute(0, 3, 1, 2)))
    return torch.stack(rows)


def assert_same_metrics(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        assert dataclasses.asdict(one) == pytest.approx(
            dataclasses.asdict(other), abs=tolerance, rel=tolerance
        )


@pytest.mark.parametrize("split", ["test", "validation"])
def test_agrees_with_a_plain_loop_over_the_files(tmp_path, split):
    folder = small_run(tmp_path / "run", snapshots=3)
    image_set = getattr(small_dataset(), split)
    expected = measure_members(plain_logits(folder, image_set), torch.from_numpy(image_set.labels))
    report = evaluate(folder, split=split)
    assert (report.split, report.images) == (split, len(image_set.labels))
    for part in ("alone", "last_m", "first_m"):
        assert_same_metrics(getattr(report.metrics, part), getattr(expected, part))
    assert report.metrics.all_against_last.points == pytest.approx(expected.all_against_last.points)


def test_each_member_is_forwarded_once(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    dataset = small_dataset()
    network = build_network(NET, classes=10, in_channels=1)
    seen: list[int] = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    pipeline = make_pipeline(
        dataset.test,
        batch_size=100,
        mean=dataset.mean,
        std=dataset.std,
        device=CPU,
        loader="torch",
    )
    logits = torch.full((3, 360, 10), torch.nan)
    fill_member_logits(logits, network, folder, folder.snapshots(), pipeline)
    assert seen == [100, 100, 100, 60] * 3
    torch.testing.assert_close(logits, plain_logits(folder, dataset.test), rtol=1e-4, atol=1e-4)


def test_the_batch_size_does_not_change_the_figures(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=2)
    one, other = evaluate(folder, batch_size=7), evaluate(folder, batch_size=1000)
    assert_same_metrics(one.metrics.last_m, other.metrics.last_m)


def test_chosen_snapshots_keep_the_order_of_the_run(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    whole, chosen = evaluate(folder), evaluate(folder, snapshots=[3, 1])
    assert [entry.number for entry in chosen.snapshots] == [1, 3]
    assert_same_metrics(chosen.metrics.alone, (whole.metrics.alone[0], whole.metrics.alone[2]), 1e-9)
    assert_same_metrics(chosen.metrics.last_m[:1], whole.metrics.alone[2:], 1e-9)


def test_loads_the_data_set_that_the_run_names(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=1)
    assert evaluate_run(folder, device=CPU, split="validation").images == 100


def test_the_json_has_what_readers_rely_on(tmp_path):
    content = evaluate(small_run(tmp_path / "run", snapshots=2, planned=2)).as_json()
    assert (content["dataset"], content["split"], content["images"]) == ("digits", "test", 360)
    assert content["seconds"] > 0
    assert [member["snapshot"] for member in content["members"]] == [1, 2]
    for member in content["members"]:
        assert {"error", "top5_error", "nll", "ece"} <= member.keys()
    for order in ("last_m", "first_m"):
        assert [row["m"] for row in content[order]] == [1, 2]
        assert all({"error", "top5_error", "nll", "ece", "brier"} <= row.keys() for row in content[order])
    assert content["last_m"][0]["error"] == content["members"][1]["error"]
    assert content["first_m"][0]["error"] == content["members"][0]["error"]


def test_precision_is_what_is_asked_for_but_a_cpu_does_not_compute_in_fp16(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=2, precision="bf16")
    exact, rounded, half = (evaluate(folder, precision=precision) for precision in ("fp32", "bf16", "fp16"))
    assert (exact.precision, rounded.precision, half.precision) == ("fp32", "bf16", "fp32")
    assert half.metrics.alone == exact.metrics.alone
    assert rounded.metrics.alone != exact.metrics.alone
    # Closer than the two members are to each other: the second's weights are cast anew.
    assert [member.nll for member in rounded.metrics.alone] == pytest.approx(
        [member.nll for member in exact.metrics.alone], rel=0.002
    )


def test_auto_takes_what_is_better_here_whatever_the_run_was_trained_in(tmp_path):
    better = choose_precision("auto", CPU)
    for trained in ("fp32", "bf16", "fp16"):
        report = evaluate(small_run(tmp_path / trained, snapshots=1, precision=trained), precision="auto")
        assert (report.precision, report.precision_reason) == (better.name, better.reason)
        assert report.trained_precision == report.as_json()["trained_precision"] == trained


def test_an_unfinished_run_says_how_much_of_it_there_is(tmp_path):
    report = evaluate(small_run(tmp_path / "run", snapshots=2, planned=5))
    assert (report.saved, report.planned, len(report.metrics.last_m)) == (2, 5, 2)


def test_a_run_without_snapshots_is_an_error(tmp_path):
    with pytest.raises(RunError, match=r"no snapshot yet.*training command"):
        evaluate(small_run(tmp_path / "run", snapshots=0))


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        evaluate(RunFolder(tmp_path))


@pytest.mark.parametrize("numbers", [[1, 7], [0], []])
def test_snapshots_that_do_not_exist_are_an_error(tmp_path, numbers):
    with pytest.raises(RunError, match="among the 1, 2 "):
        evaluate(small_run(tmp_path / "run", snapshots=2), snapshots=numbers)


def test_validation_needs_images_held_out(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=1, validation=0)
    with pytest.raises(RunError, match=r"held no images out.*--validation N"):
        evaluate_run(folder, device=CPU, split="validation")
    with pytest.raises(ValueError, match="split must be one of test, validation, got 'train'"):
        evaluate(folder, split="train")


def truncate(folder: RunFolder) -> None:
    file = folder.path / folder.snapshots()[1].file
    file.write_bytes(file.read_bytes()[:-100])


def swap(folder: RunFolder) -> None:
    _, second, third = (folder.path / entry.file for entry in folder.snapshots())
    second.write_bytes(third.read_bytes())


def remove(folder: RunFolder) -> None:
    (folder.path / folder.snapshots()[1].file).unlink()


@pytest.mark.parametrize("damage", [truncate, swap, remove])
def test_a_damaged_snapshot_is_named_and_the_others_stay_usable(tmp_path, damage):
    folder = small_run(tmp_path / "run", snapshots=3)
    whole = evaluate(folder)
    damage(folder)
    with pytest.raises(RunError, match=r"snapshot 2 .*--snapshots 1,3"):
        evaluate(folder)
    rest = evaluate(folder, snapshots=[1, 3])
    assert_same_metrics(rest.metrics.alone, (whole.metrics.alone[0], whole.metrics.alone[2]), 1e-9)


def test_a_damaged_snapshot_is_found_before_any_forward_pass(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    truncate(folder)
    evaluated: list[int] = []
    with pytest.raises(RunError, match="snapshot 2 "):
        evaluate(folder, on_member=lambda entry: evaluated.append(entry.number))
    assert evaluated == []


def test_a_snapshot_of_another_net_is_an_error(tmp_path):
    with pytest.raises(RunError, match=r"snapshot 1 .*does not fit the net"):
        evaluate(small_run(tmp_path / "run", snapshots=1, net="resnet14"))


def test_a_snapshot_that_gives_nan_is_named(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=1)
    state = folder.load_snapshot(folder.snapshots()[0])
    state["linear.bias"][3] = torch.nan
    folder.save_snapshot(state, step=50, cycle=2, epoch=2, learning_rate=0.1, train_loss=1.0)
    with pytest.raises(RunError, match=r"snapshot 2 .*NaN"):
        evaluate(folder)
    assert evaluate(folder, snapshots=[1]).images == 360


@pytest.mark.parametrize("place", [".", "runs"])
def test_relative_data_of_an_old_run_are_found_from_where_it_lies(tmp_path, monkeypatch, place):
    """The files are there, though incomplete: the error names the folder that was looked into."""
    folder = small_run(tmp_path / "runs" / "one", snapshots=1, dataset="cifar100", data="sets")
    found = tmp_path / place / "sets" / "cifar-100-python"
    found.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{found} is incomplete"):
        evaluate_run(folder, device=CPU)


def test_evaluating_without_the_data_downloads_nothing_and_makes_no_folder(tmp_path, monkeypatch):
    folder = small_run(tmp_path / "runs" / "one", snapshots=1, dataset="cifar100", data="data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"CIFAR-100 was not found in .*downloading is switched off"):
        evaluate_run(folder, device=CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_data_for_a_run_on_digits_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data \(--data\) has no effect: .* digits; got my_images"):
        evaluate_run(small_run(tmp_path / "run", snapshots=1), data="my_images", device=CPU)


def test_logits_that_memory_cannot_hold_are_refused_with_figures(tmp_path):
    """A million million images, all of them one in memory."""
    images = np.broadcast_to(np.zeros(1, np.uint8), (10**12, 8, 8, 1))
    many = ImageSet(images, np.broadcast_to(np.zeros(1, np.int64), 10**12))
    folder = small_run(tmp_path / "run", snapshots=1)
    message = (
        r"the evaluation takes about [\d,]+ GB of memory .*logits of 1 snapshots for 1,000,000,000,000 images"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_run(folder, dataset=dataclasses.replace(small_dataset(), test=many), device=CPU)
