"""The two pictures of a run: error against the number of snapshots averaged; rate and loss over epochs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastsnap.data.plan import training_steps
from fastsnap.ensemble.drawing import (
    BLUE,
    DOTS_PER_INCH,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    YELLOW,
    name_figure,
    save,
    tidy,
)
from fastsnap.ensemble.figures import cascade_figure, line_figure, members_figure, reliability_figure
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.views import ONE
from fastsnap.ensemble.worth import DECIDED
from fastsnap.kernels.schedule import Schedule
from fastsnap.printing import literal
from fastsnap.run_files import RunError
from fastsnap.run_folder import RunFolder
from fastsnap.run_schema import SnapshotEntry, is_own_loop

RATE_POINTS = 2000  # finer than the picture's pixels
LOG_SCALE_FROM = 20.0  # ratio of the largest to the smallest loss
MOST_LABELS, MOST_WORDS = 15, 6  # snapshots that can be numbered, and called "snapshot 1", without crowding


def error_figure(report: Report) -> Figure:
    """Top-1 error, percent, of each snapshot alone (left) and of the first and last m averaged (right)."""
    figure = Figure(figsize=(9, 4.4), dpi=DOTS_PER_INCH, layout="constrained")
    alone, together = figure.subplots(1, 2, sharey=True)
    last_error = report.metrics.alone[-1].error
    numbers = [entry.number for entry in report.snapshots]
    errors = [metrics.error for metrics in report.metrics.alone]
    alone.plot(numbers, errors, "o", color=GREEN, label="one snapshot")
    sizes = range(1, len(numbers) + 1)
    first = [metrics.error for metrics in report.metrics.first_m]
    last = [metrics.error for metrics in report.metrics.last_m]
    together.plot(sizes, first, "s--", color=ORANGE, label="first m averaged", markerfacecolor="white")
    together.plot(sizes, last, "o-", color=BLUE, label="last m averaged")
    for axes, low, high in ((alone, numbers[0], numbers[-1]), (together, 1, len(numbers))):
        label = f"last snapshot alone ({last_error:.2f} %)" if axes is together else None
        axes.axhline(last_error, color=GREY, linewidth=1, linestyle=":", label=label, zorder=0)
        axes.set_xlim(low - 0.5, high + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        tidy(axes)
    alone.set(xlabel="snapshot", ylabel="top-1 error (%)", title="each alone")
    together.set(xlabel="m, number of snapshots averaged", title="averaged")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    name_figure(
        figure,
        f"{report.run}: error of {report.net} on {report.dataset} {report.split}, {report.images:,} images"
        + ("" if report.views == ONE else f", {report.views}"),
    )
    return figure


def comparison_figure(reports: Sequence[Report], names: Sequence[str]) -> Figure:
    """Top-1 error, percent, of the last m averaged, for several runs on the same images."""
    figure = Figure(figsize=(7.5, 4.6), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    colours = (BLUE, ORANGE, GREEN, PINK, YELLOW, GREY)
    for index, (report, name) in enumerate(zip(reports, names, strict=True)):
        errors = [metrics.error for metrics in report.metrics.last_m]
        style = ("o-", "s--", "^:")[index // len(colours) % 3]
        colour = colours[index % len(colours)]
        label = literal(name).replace("$", r"\$")
        axes.plot(range(1, len(errors) + 1), errors, style, color=colour, label=label, markersize=5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="m, number of last snapshots averaged", ylabel="top-1 error (%)")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=min(3, len(reports)), frameon=False, fontsize=9)
    first = reports[0]
    name_figure(figure, f"{first.dataset} {first.split}, {first.images:,} images")
    return figure


def training_figure(
    title: str,
    schedule: Schedule,
    updates_per_epoch: float,
    epochs: Sequence[dict[str, Any]],
    snapshots: Sequence[SnapshotEntry],
) -> Figure:
    """Learning rate (top) and training loss (bottom) over the epochs, with the snapshots marked.

    epochs     lines of metrics.jsonl: "step" (updates done), "train_loss", and of a cycle's end the losses of the
               held-out images; none in the first epoch
    snapshots  at least one
    """
    figure = Figure(figsize=(9, 5.2), dpi=DOTS_PER_INCH, layout="constrained")
    rate, loss = figure.subplots(2, 1, sharex=True)
    done = max([entry.step for entry in snapshots] + [record["step"] for record in epochs])
    steps = sorted({round(index * (done - 1) / RATE_POINTS) for index in range(RATE_POINTS + 1)})
    rates = [schedule.rate(step) for step in steps]
    times = [step / updates_per_epoch for step in [*steps, done]]
    rate.plot(
        times, [*rates, rates[-1]], color=BLUE, drawstyle="steps-post"
    )  # a rate holds for its whole update
    rate.set(ylabel="learning rate", ylim=(0, None))
    name_figure(figure, title)
    losses = [record["train_loss"] for record in epochs]
    positions = [record["step"] / updates_per_epoch for record in epochs]
    loss.plot(positions, losses, "o-" if len(losses) < 60 else "-", color=ORANGE, markersize=4)
    for name, text, style, colour in (
        ("validation_loss", "held-out images, fresh snapshot", "s", BLUE),
        ("ensemble_loss", "held-out images, all so far together", "D", GREEN),
    ):
        ends = [record for record in epochs if record.get(name) is not None]
        if ends:
            places = [record["step"] / updates_per_epoch for record in ends]
            loss.plot(
                places, [record[name] for record in ends], style, color=colour, label=text, markersize=5
            )
    if loss.get_legend_handles_labels()[1]:
        loss.legend(frameon=False, fontsize=8)
    if losses and 0 < LOG_SCALE_FROM * min(losses) < max(losses):
        loss.set_yscale("log")
    loss.set(xlabel="epochs", ylabel="training loss (nats)", xlim=(0, done / updates_per_epoch * 1.01))
    for axes in (rate, loss):
        _mark_snapshots(axes, snapshots, updates_per_epoch, numbered=axes is rate)
        tidy(axes)
    return figure


def _mark_snapshots(
    axes: Axes, snapshots: Sequence[SnapshotEntry], updates_per_epoch: float, *, numbered: bool
) -> None:
    every = math.ceil(len(snapshots) / MOST_LABELS) or 1
    for entry in snapshots:
        position = entry.step / updates_per_epoch
        axes.axvline(position, color=GREEN, linewidth=1, linestyle="--", zorder=0)
        if numbered and (snapshots[-1].number - entry.number) % every == 0:
            axes.annotate(
                f"snapshot {entry.number}" if len(snapshots) <= MOST_WORDS else f"{entry.number}",
                (position, 1.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                color=GREEN,
                fontsize=9,
            )


def _updates_per_epoch(config: dict[str, Any], metrics: Sequence[dict[str, Any]], run: Path) -> int:
    """As metrics.jsonl shows, since version 0.1.0 cut the epochs in another way; without it, as planned.

    Raises RunError for lines whose epochs are not of one length.
    """
    if is_own_loop(config):
        return config["steps_per_epoch"]
    if not metrics:
        return training_steps(config["images"]["train"], config["batch_size"])
    lengths = {divmod(record["step"], record["epoch"]) for record in metrics}
    if len(lengths) > 1 or min(lengths)[0] < 1 or min(lengths)[1]:
        raise RunError(
            f"{run / 'metrics.jsonl'} is damaged: its epochs are not of one length; put back a copy of it, or remove it"
        )
    return min(lengths)[0]


TRAINING = "training"


def save_plots(figures: Mapping[str, Figure], out: Path, suffix: str = "") -> list[str]:
    """Write each of `figures_of` a report into the folder `out`, as <name><suffix>.png, and return their names."""
    names = []
    for name, figure in figures.items():
        # What training did is the same for every split and choice of snapshots.
        names.append(f"{name}{'' if name == TRAINING else suffix}.png")
        save(figure, out / names[-1])
    return names


def figures_of(folder: RunFolder, report: Report) -> dict[str, Figure]:
    """All that there is something for, by name: the first two are error-against-m and training."""
    figures = {"error-against-m": error_figure(report), TRAINING: _training_figure_of(folder, report)}
    return figures | analysis_figures(report)


def _training_figure_of(folder: RunFolder, report: Report) -> Figure:
    config = folder.config()
    metrics, snapshots = folder.metrics(), folder.snapshots()
    updates_per_epoch = _updates_per_epoch(config, metrics, folder.path)
    # A run of version 0.1.0 without metrics has some steps more than are planned now.
    done = max([record["step"] for record in metrics] + [entry.step for entry in snapshots])
    planned = config["steps"] if is_own_loop(config) else config["epochs"] * updates_per_epoch
    steps = max(planned, done)
    try:
        schedule = Schedule(config["schedule"], steps, config["cycles"], config["learning_rate"])
    except ValueError as error:
        raise RunError(f"{folder.path / 'config.json'} is damaged: {error}; put back a copy of it") from error
    title = f"{report.run}: learning rate and training loss, {report.net} on {report.dataset}"
    return training_figure(title, schedule, updates_per_epoch, metrics, snapshots)


def analysis_figures(report: Report) -> dict[str, Figure]:
    """Those that the report has something for, by name."""
    figures: dict[str, Figure] = {}
    about = f"{report.net} on {report.dataset} {report.split}, {report.images:,} images"
    numbers = [entry.number for entry in report.snapshots]
    analysis, worth = report.analysis, report.worth
    if analysis and len(numbers) > 1:
        title = f"{report.run}: how snapshots differ, {about}"
        figures["members"] = members_figure(title, numbers, analysis.correlation, analysis.disagreement)
    if analysis and worth and report.choice:
        temperature = report.choice.temperature
        eces = (worth.row(report.choice.taken.method).metrics.ece, worth.row(DECIDED).metrics.ece)
        title = f"{report.run}: reliability of what was decided, {about}"
        figures["reliability"] = reliability_figure(
            title, analysis.untempered, analysis.tempered, temperature, eces
        )
    if worth and worth.threshold is not None:
        title = f"{report.run}: asking older snapshots only while unsure, {about}"
        newest, together = worth.cascade[0].error, worth.cascade[-1].error
        figures["cascade"] = cascade_figure(title, worth.cascade, worth.threshold, newest, together)
    if report.line is not None:
        title = f"{report.run}: between two snapshots, {about}"
        figures[f"line-{report.line.first}-{report.line.second}"] = line_figure(title, report.line)
    return figures
