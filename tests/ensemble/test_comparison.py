"""Runs side by side, against SciPy."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats
from small_run import small_dataset, small_run, snapshot_weights

from fastsnap.ensemble.comparison import compare, difference_of_groups, require_comparable, spread
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble_eval import main
from fastsnap.run_folder import RunError, RunFolder

CPU = torch.device("cpu")


def other_run(path, seed, **overrides):
    """Like small_run, with weights of other seeds."""
    folder = small_run(path, snapshots=0, seed=seed, **overrides)
    for number in (1, 2, 3):
        folder.save_snapshot(
            snapshot_weights(10 * (seed + 1) + number),
            step=number * 80 // 3,
            cycle=number,
            epoch=number,
            learning_rate=1e-4,
            train_loss=1.0,
        )
    return folder


def evaluated(folder):
    return evaluate_run(folder, dataset=small_dataset(), device=CPU, precision="fp32")


def test_differences_between_runs_are_paired_image_by_image(tmp_path):
    folders = [other_run(tmp_path / "a", 0), other_run(tmp_path / "b", 1)]
    reports = [evaluated(folder) for folder in folders]
    found = compare(reports, [folder.config() for folder in folders], ["a", "b"])
    labels = torch.from_numpy(small_dataset().test.labels)
    wrong = [
        100.0 * (report.outputs.logits.softmax(2).mean(0).argmax(1) != labels).numpy() for report in reports
    ]
    row = next(row for row in found.rows if (row.run, row.way) == ("b", "all"))
    assert row.error == pytest.approx(wrong[1].mean())
    interval = stats.ttest_rel(wrong[1], wrong[0]).confidence_interval(0.95)
    assert row.error_difference.points == pytest.approx((wrong[1] - wrong[0]).mean())
    assert row.error_difference.interval == pytest.approx((interval.low, interval.high), rel=0.02, abs=0.02)
    decided = next(row for row in found.rows if (row.run, row.way) == ("b", "decided"))
    assert decided.nll == pytest.approx(reports[1].worth.row("decided").metrics.nll, abs=1e-5)
    # Two seeds of one experiment: one group.
    (group,) = found.groups
    assert (group.name, group.runs, group.seeds) == ("all runs", ("a", "b"), (0, 1))
    means = [values.mean() for values in wrong]
    expected = stats.t.interval(0.95, 1, loc=np.mean(means), scale=stats.sem(means))
    assert group.errors["all"].interval == pytest.approx(expected)


def test_groups_are_named_by_what_differs(tmp_path):
    pairs = [(kind, seed) for kind in ("snapshot", "step") for seed in (0, 1)]
    folders = [other_run(tmp_path / f"{kind}{seed}", seed, schedule=kind) for kind, seed in pairs]
    reports = [evaluated(folder) for folder in folders]
    names = [folder.path.name for folder in folders]
    found = compare(reports, [folder.config() for folder in folders], names)
    assert [group.name for group in found.groups] == ["schedule snapshot", "schedule step"]
    assert found.groups[0].against_first == {}
    # The same weights: no difference, with any seed.
    assert found.groups[1].against_first["all"].mean == 0
    assert json.dumps(found.as_json(), allow_nan=False)
    single = compare(reports[1:3], [folder.config() for folder in folders[1:3]], names[1:3])
    assert single.groups == ()  # nothing differs in its seed alone


def test_intervals_over_seeds_are_scipys():
    values, base = {0: 5.0, 1: 6.5, 2: 5.8}, {0: 4.9, 1: 6.0, 2: 5.5}
    listed = list(values.values())
    expected = stats.t.interval(0.95, 2, loc=np.mean(listed), scale=stats.sem(listed))
    assert spread(listed).interval == pytest.approx(expected)
    paired = stats.ttest_rel(listed, list(base.values())).confidence_interval(0.95)
    assert difference_of_groups(values, base).interval == pytest.approx((paired.low, paired.high))
    others = {7: 4.9, 8: 6.0}
    welch = stats.ttest_ind(listed, list(others.values()), equal_var=False).confidence_interval(0.95)
    assert difference_of_groups(values, others).interval == pytest.approx((welch.low, welch.high))
    assert difference_of_groups({0: 5.0}, base).interval is None
    assert spread([3.0]).interval is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "cifar10"}, "a and b have different data sets .digits; cifar10."),
        ({"class_names": ["x", "y"]}, "a and b have different classes"),
        ({"classes": 11}, "a and b have different numbers of classes .10; 11."),
        ({"fingerprints": {"test": "0" * 64}}, "a and b were tested on different images of digits"),
    ],
)
def test_runs_of_different_data_are_not_compared(change, message):
    config = {
        "dataset": "digits",
        "classes": 10,
        "class_names": [str(index) for index in range(10)],
        "fingerprints": {"test": "1" * 64},
    }
    with pytest.raises(RunError, match=message):
        require_comparable([config, config | change], ["a", "b"])
    require_comparable([config, config | {"seed": 4}], ["a", "b"])


def test_images_that_differ_are_found_without_fingerprints_too(tmp_path):
    folder = other_run(tmp_path / "a", 0)
    report = evaluated(folder)
    outputs = dataclasses.replace(report.outputs, labels=report.outputs.labels.flip(0))
    other = dataclasses.replace(report, outputs=outputs)
    with pytest.raises(RunError, match="a and b were tested on different images"):
        compare([report, other], [folder.config()] * 2, ["a", "b"])


def test_the_command_compares_and_keeps_what_it_found(tmp_path, capsys):
    runs = [str(other_run(tmp_path / name, seed).path) for seed, name in enumerate(("one", "two"))]
    out = tmp_path / "kept"
    assert main([*runs, "--device", "cpu", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Differences from the same way in one, image by image" in text
    assert {file.name for file in out.iterdir()} == {"comparison.json", "comparison.png"}
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["one"] * 3 + ["two"] * 3
    assert not (RunFolder(runs[0]).path / "ensemble.json").exists()
    assert main([*runs, "--device", "cpu", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 360


@pytest.mark.parametrize(
    "flags",
    [
        ["--split", "validation"],
        ["--snapshots", "1"],
        ["--averages"],
        ["--interpolate"],
        ["--combine", "vote"],
    ],
)
def test_what_is_of_one_run_is_refused_for_several(tmp_path, capsys, flags):
    runs = [str(other_run(tmp_path / name, 0).path) for name in ("one", "two")]
    assert main([*runs, "--device", "cpu", *flags]) == 2
    assert f"{flags[0]} is for one run, got 2" in capsys.readouterr().err


def test_a_run_is_not_compared_with_itself(tmp_path, capsys):
    run = str(other_run(tmp_path / "one", 0).path)
    assert main([run, f"{run}/.", "--device", "cpu"]) == 2
    assert "more than once" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_by_their_places(tmp_path, capsys):
    runs = [str(other_run(tmp_path / place / "run", seed).path) for seed, place in enumerate("ab")]
    assert main([*runs, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert all(run in text for run in runs)
