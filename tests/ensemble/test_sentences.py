"""What a report says in sentences."""

import dataclasses

import pytest
import torch
from small_run import small_dataset, small_run

from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.lines import ranges, way_name
from fastsnap.ensemble.sentences import barrier_texts, combining_text, decision, decision_texts
from fastsnap.ensemble.weight_space import Line, LinePoint


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = small_run(tmp_path_factory.mktemp("runs") / "run", snapshots=3)
    options = {"dataset": small_dataset(), "device": torch.device("cpu"), "precision": "fp32"}
    return evaluate_run(folder, averages=True, **options)


def with_errors(report, alone, averaged):
    """The report with these errors of each snapshot, and of the averaged weights of the last 2 and 3."""
    members = tuple(
        dataclasses.replace(metrics, error=error)
        for metrics, error in zip(report.metrics.alone, alone, strict=True)
    )
    new = iter(averaged)
    rows = tuple(
        dataclasses.replace(row, metrics=dataclasses.replace(row.metrics, error=next(new)))
        if row.name == "mean weights"
        else row
        for row in report.worth.rows
        if row.name != "greedy weights"
    )
    return dataclasses.replace(
        report,
        metrics=dataclasses.replace(report.metrics, alone=members),
        worth=dataclasses.replace(report.worth, rows=rows),
    )


def test_averaged_weights_that_are_worse_than_a_member_come_with_the_reason(report):
    # Between the members' errors: no barrier. Above their mean: one.
    texts = barrier_texts(with_errors(report, [50.0, 40.0, 36.0], [37.0, 60.0]))
    assert len(texts) == 2
    barred, weak = texts
    assert "snapshots 1-3: 60.00 % are worse than the best of them alone (36.00 %)" in barred
    assert "a barrier of loss lies between these" in barred
    assert "snapshots 2-3: 37.00 % are worse than the best of them alone (36.00 %)" in weak
    assert "no barrier of loss, older snapshots are just weaker" in weak
    assert barrier_texts(with_errors(report, [50.0, 40.0, 36.0], [35.0, 34.0])) == []


def test_a_line_tells_how_high_it_rises(report):
    def point(part, error):
        return LinePoint(part, error, 1.0, error, 1.0)

    line = Line(2, 3, (point(1.0, 10.0), point(0.5, 45.0), point(0.0, 20.0)))
    assert line.barrier == pytest.approx(30.0)
    (text,) = barrier_texts(dataclasses.replace(report, line=line, worth=None))
    assert text.startswith("Between snapshots 2 and 3 the error rises 30.00 points above the straight line")
    low = Line(2, 3, (point(1.0, 10.0), point(0.5, 12.0), point(0.0, 20.0)))
    (text,) = barrier_texts(dataclasses.replace(report, line=low, worth=None))
    assert "rises 0.00 points" in text


def decided(report, **changes):
    """The report with another decision; weights go to the candidate that was taken."""
    choice = report.choice
    if "weights" in changes:
        changes["taken"] = dataclasses.replace(choice.taken, weights=changes.pop("weights"))
    return dataclasses.replace(report, choice=dataclasses.replace(choice, **changes))


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [
        ((0.0, 0.0, 1.0), 1.0, "Use snapshot 3 alone, temperature 1"),
        ((0.0, 0.5, 0.5), 1.25, "Use snapshots 2-3, equal weights, temperature 1.25"),
        ((1 / 3, 1 / 3, 1 / 3), 0.9, "Use all 3 snapshots, equal weights, temperature 0.9"),
        ((0.2, 0.0, 0.8), 1.0, "Use snapshots 1, 3, weights 0.20, 0.80, temperature 1"),
    ],
)
def test_the_decision_is_one_sentence(report, weights, temperature, expected):
    changed = decided(report, weights=weights, temperature=temperature)
    assert decision(changed, changed.choice) == expected
    assert decision_texts(changed)[0] == f"{expected}, as decided on 100 held-out images."


def test_what_users_should_know_of_the_decision_is_said(report):
    changed = decided(report, harmful=(0,), equal=(1,), missing=(2, 5))
    texts = " ".join(decision_texts(changed))
    assert (
        "Snapshot 1 only harms: on the held-out images no average with equal weights becomes better by it."
        in texts
    )
    assert "Snapshot 2 says exactly the same as an earlier one." in texts
    assert "No image is held out of 2 of the 10 classes" in texts
    several = " ".join(decision_texts(decided(report, harmful=(0, 1), equal=(), missing=())))
    assert "Snapshots 1-2 only harm: on the held-out images no average" in several
    assert "better by them." in several


def test_ways_to_combine_are_compared_with_the_mean(report):
    text = combining_text(report.worth)
    gain = report.worth.row("geometric").error_gain
    low, high = gain.interval
    assert f"geometric {gain.points:+.2f} ({low:+.2f} to {high:+.2f}) points of error" in text
    assert text.endswith("(--combine).")


def test_ways_are_called_by_what_they_take(report):
    names = [way_name(row) for row in report.worth.rows]
    assert names[:2] == ["newest alone", "all, equal"]
    assert {"weights, last 2", "weights, last 3"} < set(names)
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
