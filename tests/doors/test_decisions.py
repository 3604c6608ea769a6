"""What an evaluation decides on held-out images: from the command to predictions and exports."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image
from small_run import small_dataset, small_run

import fastsnap
from fastsnap.ensemble.cascade import answers, asked_in_turn
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.inputs import load_data
from fastsnap.ensemble_eval import main
from fastsnap.export import main as export
from fastsnap.predict import main as predict
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.train import main as train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose first snapshot is weak: its cycle has one epoch."""
    out = tmp_path_factory.mktemp("runs") / "run"
    command = "--epochs 4 --cycles 4 --validation 200 --net resnet8 --device cpu --precision fp32"
    assert train([*command.split(), "--out", str(out)]) == 0
    return out


def decision_in(run):
    return json.loads((run / "ensemble.json").read_text())["decision"]


def test_the_decision_is_printed_saved_and_used(trained, capsys):
    assert main([str(trained), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    decision = decision_in(trained)
    assert "as decided on 200 held-out images." in text
    assert decision["images"] == 200
    assert sum(decision["weights"]) == pytest.approx(1)
    assert [number for number, _ in decision["among"]] == [1, 2, 3, 4]
    ensemble = fastsnap.load_ensemble(trained, device="cpu")
    assert [entry.number for entry in ensemble.members] == decision["snapshots"]
    assert list(ensemble.weights) == pytest.approx(decision["weights"])
    assert ensemble.temperature == decision["temperature"]
    assert set(decision["snapshots"]) < {1, 2, 3, 4}  # the first, after one epoch, is no help
    everything = fastsnap.load_ensemble(trained, snapshots="all", device="cpu")
    assert [entry.number for entry in everything.members] == [1, 2, 3, 4]
    assert (everything.weights, everything.temperature) == ((0.25,) * 4, 1)


def test_what_is_decided_is_what_the_table_says_and_what_is_predicted(trained):
    report = evaluate_run(RunFolder(trained), device=CPU, precision="fp32")
    row = report.worth.row("decided")
    test = small_dataset().test
    predictions = fastsnap.load_ensemble(trained, device="cpu").predict(test.images)
    labels = torch.from_numpy(test.labels)
    error = 100 * (predictions.probabilities.argmax(1) != labels).double().mean().item()
    nll = -predictions.probabilities[torch.arange(len(labels)), labels].double().log().mean().item()
    assert row.metrics.error == pytest.approx(error)
    assert row.metrics.nll == pytest.approx(nll, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_of_the_test_split_decide_nothing(trained, seed):
    """A leak would show: with its labels permuted, every figure changes, but no decision."""
    folder = RunFolder(trained)
    dataset = load_data(folder.config(), None, folder)
    honest = evaluate_run(folder, dataset=dataset, device=CPU, precision="fp32")
    order = np.random.default_rng(seed).permutation(len(dataset.test.labels))
    permuted = dataclasses.replace(dataset.test, labels=dataset.test.labels[order])
    config = folder.config()
    del config["fingerprints"]["test"]
    (trained / "config.json").rename(trained / "config.kept")
    try:
        folder.write_json("config.json", config)
        blind = evaluate_run(
            folder, dataset=dataclasses.replace(dataset, test=permuted), device=CPU, precision="fp32"
        )
    finally:
        (trained / "config.kept").replace(trained / "config.json")
    assert blind.choice == honest.choice
    assert blind.worth.threshold == honest.worth.threshold
    for way, other in zip(blind.worth.rows, honest.worth.rows, strict=True):
        assert (way.members, way.weights, way.temperature) == (
            other.members,
            other.weights,
            other.temperature,
        )
        assert way.metrics.error > other.metrics.error + 50


def test_commands_take_the_decision_unless_told_otherwise(trained, tmp_path, capsys):
    assert main([str(trained), "--device", "cpu"]) == 0
    decision = decision_in(trained)
    for arguments, members in (
        ([], len(decision["snapshots"])),
        (["--last", "4"], 4),
        (["--snapshots", "all"], 4),
        (["--snapshots", "1"], 1),
    ):
        out = tmp_path / f"{members}-{len(arguments)}-{arguments[-1:]}.safetensors"
        assert export([str(trained), "--format", "safetensors", "--out", str(out), *arguments]) == 0
        text = capsys.readouterr().out
        assert f"{members} members" in text
        assert ("as decided on 200 held-out images" in text) == (not arguments)
    picture = tmp_path / "five.npy.png"
    write_picture(picture)
    rows = []
    for arguments in ([], ["--snapshots", "all"]):
        assert predict([str(trained), str(picture), "--jsonl", "--device", "cpu", *arguments]) == 0
        rows.append(json.loads(capsys.readouterr().out)["entropy"])
    assert rows[0] != rows[1]


def write_picture(path):
    Image.fromarray(small_dataset().test.images[5, ..., 0]).save(path)


def test_without_held_out_images_weights_are_equal_and_one_line_says_why(tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        train(["--epochs", "2", "--cycles", "2", "--net", "resnet8", "--device", "cpu", "--out", str(out)])
        == 0
    )
    line = "Nothing was chosen, weights are equal: the run held no images out: train with --validation N."
    assert capsys.readouterr().out.count(line) == 1
    assert decision_in(out) is None
    assert "held no images out" in json.loads((out / "ensemble.json").read_text())["no_decision"]
    ensemble = fastsnap.load_ensemble(out, device="cpu")
    assert ensemble.weights == (0.5, 0.5)


def test_fewer_held_out_images_than_can_be_chosen_on(tmp_path, capsys):
    out = tmp_path / "run"
    command = "--epochs 2 --cycles 2 --validation 12 --net resnet8 --device cpu"
    assert train([*command.split(), "--out", str(out)]) == 0
    assert (
        "weights are equal: 12 held-out images are too few to choose on: 20 would do"
        in capsys.readouterr().out
    )
    assert decision_in(out) is None


def test_a_decision_among_other_snapshots_is_not_taken(trained, tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    assert main([str(folder.path), "--device", "cpu"]) == 0
    assert decision_in(folder.path) is not None
    folder.forget_after(folder.snapshots()[1].step)
    with pytest.raises(RunError, match="decided among snapshots 1, 2, 3, but the run has others by now"):
        fastsnap.load_ensemble(folder.path, device="cpu")
    assert len(fastsnap.load_ensemble(folder.path, snapshots="all", device="cpu").members) == 2
    assert main([str(folder.path), "--device", "cpu"]) == 0
    assert fastsnap.load_ensemble(folder.path, device="cpu").members


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0.5]}, "weights for snapshots"),
        ({"weights": [-1.0]}, "decision.weights"),
        ({"temperature": 0}, "decision.temperature"),
        ({"snapshots": [9]}, "snapshots 9 of"),
        ({"snapshots": []}, "decision.snapshots"),
    ],
)
def test_a_damaged_decision_is_refused(tmp_path, change, message):
    folder = small_run(tmp_path / "run", snapshots=3)
    assert main([str(folder.path), "--device", "cpu"]) == 0
    content = json.loads((folder.path / "ensemble.json").read_text())
    whole = {"snapshots": [1, 2], "weights": [0.5, 0.5]}
    folder.write_json("ensemble.json", content | {"decision": content["decision"] | whole | change})
    with pytest.raises(RunError, match=message):
        fastsnap.load_ensemble(folder.path, device="cpu")


def test_what_is_not_the_whole_run_has_its_own_file_and_decides_nothing_for_others(tmp_path, capsys):
    folder = small_run(tmp_path / "run", snapshots=3)
    assert main([str(folder.path), "--device", "cpu", "--snapshots", "1,2"]) == 0
    assert not (folder.path / "ensemble.json").exists()
    assert len(fastsnap.load_ensemble(folder.path, device="cpu").members) == 3


@pytest.mark.parametrize("combine", ["geometric", "vote"])
def test_members_combined_otherwise(tmp_path, capsys, combine):
    folder = small_run(tmp_path / "run", snapshots=3)
    assert main([str(folder.path), "--device", "cpu", "--combine", combine]) == 0
    text = capsys.readouterr().out
    assert f"combined by {combine}, but predictions average" in text
    assert "Against the mean of the probabilities of all: geometric" in text
    written = json.loads((folder.path / f"ensemble-{combine}.json").read_text())
    assert written["combine"] == combine
    assert (written["last_m"][-1]["nll"] is None) == (combine == "vote")
    assert not (folder.path / "ensemble.json").exists()
    ways = {way["name"]: way for way in written["worth"]["ways"]}
    assert ways[combine]["metrics"]["error"] == written["last_m"][-1]["error"]


def test_the_order_of_the_members_is_that_of_the_weights(tmp_path):
    """Weights of a decision go to the snapshots that they were found for."""
    folder = small_run(tmp_path / "run", snapshots=3)
    assert main([str(folder.path), "--device", "cpu"]) == 0
    content = json.loads((folder.path / "ensemble.json").read_text())
    chosen = {"snapshots": [1, 3], "weights": [0.9, 0.1], "temperature": 1.5}
    folder.write_json("ensemble.json", content | {"decision": content["decision"] | chosen})
    images = small_dataset().test.images[:5]
    found = fastsnap.load_ensemble(folder.path, device="cpu").predict(images).probabilities
    weighted = fastsnap.load_ensemble(
        folder.path, snapshots=[1, 3], weights=[0.9, 0.1], temperature=1.5, device="cpu"
    )
    assert_array_equal(found.numpy(), weighted.predict(images).probabilities.numpy())


def test_a_cascade_predicts_what_the_table_says(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    report = evaluate_run(folder, dataset=small_dataset(), device=CPU, precision="fp32")
    weights = [0.5, 0.3, 0.2]
    logits, labels = report.outputs.logits, report.outputs.labels
    ensemble = fastsnap.load_ensemble(folder.path, weights=weights, temperature=1.3, device="cpu")
    confidence = logits[-1].softmax(1).amax(1)
    threshold = confidence.median().item() + 1e-4
    expected = answers(asked_in_turn(logits, labels, weights), threshold)
    found = ensemble.predict(small_dataset().test.images, threshold=threshold, batch_size=100)
    assert found.asked.tolist() == expected.forwards.tolist()
    assert len(set(found.asked.tolist())) > 1
    assert found.probabilities.argmax(1).tolist() == expected.prediction.tolist()
    # All members' say of those that all were asked of, temperature included.
    whole = ensemble.predict(small_dataset().test.images)
    everyone = found.asked == 3
    for name in ("probabilities", "entropy", "mutual_information", "disagreement"):
        torch.testing.assert_close(getattr(found, name)[everyone], getattr(whole, name)[everyone])
    assert ensemble.predict(small_dataset().test.images, threshold=0.0).asked.unique().tolist() == [1]
    assert ensemble.predict(small_dataset().test.images, threshold=1.1).asked.unique().tolist() == [3]
    assert len(ensemble.predict(small_dataset().test.images[:0], threshold=0.5)) == 0
    with pytest.raises(ValueError, match="members and threshold exclude each other"):
        ensemble.predict(small_dataset().test.images, threshold=0.5, members=True)


def test_the_command_line_asks_in_turn(tmp_path, capsys):
    folder = small_run(tmp_path / "run", snapshots=3)
    picture = tmp_path / "five.png"
    write_picture(picture)
    common = [str(folder.path), str(picture), "--device", "cpu", "--cascade"]
    assert predict(common) == 2
    assert "no threshold was decided" in capsys.readouterr().err
    assert predict([*common, "0"]) == 0
    assert "1.00 forward passes per image" in capsys.readouterr().err
    assert predict([*common, "1.5"]) == 2
    assert "--cascade must be from 0 to 1, got 1.5" in capsys.readouterr().err
    assert main([str(folder.path), "--device", "cpu"]) == 0
    content = json.loads((folder.path / "ensemble.json").read_text())
    changed = {"snapshots": [2, 3], "weights": [0.5, 0.5], "threshold": 1.0}
    folder.write_json("ensemble.json", content | {"decision": content["decision"] | changed})
    capsys.readouterr()
    assert predict(common) == 0
    assert "2.00 forward passes per image" in capsys.readouterr().err
    assert predict([*common, "--last", "2"]) == 2  # the threshold is of what was decided
