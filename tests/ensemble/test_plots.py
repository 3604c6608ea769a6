"""The pictures show the figures they are given, for runs of every size."""

import dataclasses
import json

import pytest
import torch
from matplotlib.image import imread
from small_run import small_dataset, small_run

from fastsnap.ensemble.drawing import save
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.plots import error_figure, figures_of, save_plots, training_figure
from fastsnap.kernels.schedule import Schedule
from fastsnap.printing import literal
from fastsnap.run_files import RunError
from fastsnap.run_schema import SnapshotEntry


def evaluated(path, **options):
    folder = small_run(path, **options)
    return folder, evaluate_run(folder, dataset=small_dataset(), device=torch.device("cpu"))


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


@pytest.mark.parametrize("snapshots", [1, 3])
def test_error_figure_shows_every_error(tmp_path, snapshots):
    _, report = evaluated(tmp_path / "run", snapshots=snapshots)
    alone, together = error_figure(report).axes
    metrics = report.metrics
    assert [error for _, error in lines(alone)["one snapshot"]] == [row.error for row in metrics.alone]
    assert lines(together)["last m averaged"] == [(m, row.error) for m, row in enumerate(metrics.last_m, 1)]
    assert lines(together)["first m averaged"] == [(m, row.error) for m, row in enumerate(metrics.first_m, 1)]
    assert "%" in alone.get_ylabel()


def test_error_figure_ticks_whole_snapshots(tmp_path):
    _, report = evaluated(tmp_path / "run", snapshots=1)
    figure = error_figure(report)
    save(figure, tmp_path / "figure.png")
    assert all(float(tick).is_integer() for axes in figure.axes for tick in axes.get_xticks())


def entries(schedule: Schedule) -> list[SnapshotEntry]:
    steps = [schedule.boundary(cycle + 1) for cycle in range(schedule.cycles)]
    return [SnapshotEntry(n, f"{n}", "", step, n, 1, 0.0, 1.0) for n, step in enumerate(steps, 1)]


@pytest.mark.parametrize(
    ("kind", "epochs", "cycles"), [("snapshot", 6, 3), ("step", 6, 2), ("snapshot", 1, 1)]
)
def test_training_figure_shows_rate_loss_and_snapshots_in_epochs(kind, epochs, cycles):
    updates = 10
    schedule = Schedule(kind, epochs * updates, cycles, 0.2)
    records = [{"step": (e + 1) * updates, "epoch": e + 1, "train_loss": 1.0 + e} for e in range(epochs)]
    snapshots = entries(schedule)
    rate, loss = training_figure("run", schedule, updates, records, snapshots).axes
    curve = rate.get_lines()[0]
    assert list(curve.get_xdata()) == pytest.approx([step / updates for step in range(schedule.steps + 1)])
    assert list(curve.get_ydata())[:-1] == [schedule.rate(step) for step in range(schedule.steps)]
    assert list(loss.get_lines()[0].get_xdata()) == list(range(1, epochs + 1))
    assert list(loss.get_lines()[0].get_ydata()) == [record["train_loss"] for record in records]
    marks = [line.get_xdata()[0] for line in rate.get_lines()[1:]]
    assert marks == [entry.step / updates for entry in snapshots]
    assert [text.get_text() for text in rate.texts] == [f"snapshot {entry.number}" for entry in snapshots]


@pytest.mark.parametrize(("last_loss", "scale"), [(0.01, "log"), (1.0, "linear"), (0.0, "linear")])
def test_loss_is_logarithmic_where_it_spans_much(last_loss, scale):
    schedule = Schedule("snapshot", 20, 1, 0.1)
    records = [{"step": 10, "train_loss": 2.0}, {"step": 20, "train_loss": last_loss}]
    _, loss = training_figure("run", schedule, 10, records, entries(schedule)).axes
    assert loss.get_yscale() == scale


def test_many_snapshots_are_numbered_sparsely_and_the_last_always():
    schedule = Schedule("snapshot", 400, 40, 0.1)
    rate, _ = training_figure("run", schedule, 10, [], entries(schedule)).axes
    numbers = [text.get_text() for text in rate.texts]
    assert len(numbers) <= 15
    assert numbers[-1] == "40"


@pytest.mark.parametrize(
    "name",
    ["$x_{1$ & \\frac", "a\x1b[31m\nb", "\u4e00\U0001f9ea", "W" * 250, "with spaces " * 20, "100 % [red]_^"],
)
def test_names_are_drawn_as_they_are(tmp_path, name):
    _, report = evaluated(tmp_path / "run", snapshots=1, planned=1)
    figure = error_figure(dataclasses.replace(report, run=name))
    save(figure, tmp_path / "figure.png")  # parses the text, and warns of characters that the font lacks
    shown = "".join(figure.get_suptitle().split())
    expected = literal(name).replace("\u4e00", r"\u4e00").replace("\U0001f9ea", r"\U0001f9ea")
    assert shown.startswith("".join(expected.split()) + ":")
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    ("snapshots", "planned"), [(1, 1), (3, 3), (1, 40)]
)  # the last: still in its first epoch
def test_pictures_of_any_run_are_readable_files(tmp_path, snapshots, planned):
    folder, report = evaluated(tmp_path / "run", snapshots=snapshots, planned=planned)
    save_plots(figures_of(folder, report), folder.path)
    for name in ("error-against-m.png", "training.png"):
        height, width = imread(folder.path / name).shape[:2]
        assert width > height > 500


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"step": 80, "train_loss": 1}, "epoch"),
        ({"step": 80, "train_loss": 1, "epoch": None}, "epoch"),
        ({"step": 79, "train_loss": 1, "epoch": 4}, "not of one length"),
        ({"step": 80, "train_loss": 1, "epoch": 81}, "not of one length"),
    ],
)
def test_metrics_that_make_no_sense_are_an_error_that_names_the_file(tmp_path, line, named):
    folder, report = evaluated(tmp_path / "run", snapshots=3)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    (folder.path / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(line)]) + "\n")
    with pytest.raises(RunError, match=f"metrics.jsonl.*{named}"):
        save_plots(figures_of(folder, report), tmp_path)


def test_a_run_of_version_0_1_0_is_drawn_also_without_its_metrics(tmp_path):
    folder, report = evaluated(tmp_path / "run", snapshots=3)
    config = folder.config()
    few = config["images"] | {
        "train": config["images"]["train"] - 100
    }  # as if a rest had been a batch of its own
    folder.write_json("config.json", config | {"images": few})
    (folder.path / "metrics.jsonl").unlink()
    assert save_plots(figures_of(folder, report), tmp_path)[:2] == ["error-against-m.png", "training.png"]
