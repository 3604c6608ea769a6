"""Pictures of an analysis: how members resemble each other, how far to trust them, what a cascade and a line give."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from fastsnap.ensemble.analysis import Bin
from fastsnap.ensemble.cascade import CascadePoint
from fastsnap.ensemble.drawing import BLUE, DOTS_PER_INCH, GREEN, GREY, ORANGE, name_figure, tidy
from fastsnap.ensemble.weight_space import Line

DIAGONAL = "#dddddd"
MOST_NUMBERED = 10  # members whose cells have room for their values


def members_figure(
    title: str,
    numbers: Sequence[int],
    correlation: Sequence[Sequence[float]],
    disagreement: Sequence[Sequence[float]],
) -> Figure:
    """Of each two snapshots: correlation of their softmax outputs (left), images called differently (right)."""
    figure = Figure(figsize=(9, 4.4), dpi=DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2)
    percent = [[100 * value for value in row] for row in disagreement]
    _matrix(figure, left, numbers, correlation, "correlation of softmax outputs", "{:.2f}", "Blues")
    _matrix(figure, right, numbers, percent, "images predicted differently (%)", "{:.1f}", "Oranges")
    name_figure(figure, title)
    return figure


def _matrix(
    figure: Figure,
    axes: Axes,
    numbers: Sequence[int],
    values: Sequence[Sequence[float]],
    title: str,
    form: str,
    colours: str,
) -> None:
    others = [value for i, row in enumerate(values) for j, value in enumerate(row) if i != j] or [0.0, 1.0]
    # The diagonal, 1 or 0 by definition, would hide the differences between the others.
    low, high = min(others), max(others)
    margin = 0.1 * (high - low) or 0.1
    image = axes.imshow(values, cmap=colours, vmin=low - margin, vmax=high + margin)
    places = range(len(numbers))
    every = 1 if len(numbers) <= 2 * MOST_NUMBERED else -(-len(numbers) // MOST_NUMBERED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(list(places)[::every]))
    axes.set_xticklabels([f"{number}" for number in numbers][::every])
    axes.set_yticklabels([f"{number}" for number in numbers][::every])
    axes.set(xlabel="snapshot", ylabel="snapshot")
    axes.set_title(title, fontsize=10)
    if len(numbers) > MOST_NUMBERED:
        figure.colorbar(image, ax=axes, shrink=0.8)
        return
    for i in places:
        for j in places:
            dark = values[i][j] > (low + high) / 2
            colour = "#ffffff" if dark else "#111111"
            shown = form.format(values[i][j]) if i != j else ""
            axes.text(j, i, shown, ha="center", va="center", color=colour, fontsize=8)
        axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, facecolor=DIAGONAL, edgecolor="none"))


def reliability_figure(
    title: str,
    untempered: Sequence[Bin],
    tempered: Sequence[Bin],
    temperature: float,
    eces: tuple[float, float],
) -> Figure:
    """Accuracy against confidence before (left) and after (right) the temperature; below: where the images are."""
    figure = Figure(figsize=(9, 4.6), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row", gridspec_kw={"height_ratios": [3, 1]})
    shown = ((untempered, "temperature 1"), (tempered, f"temperature {temperature:.3g}"))
    for column, (bins, name) in enumerate(shown):
        top, bottom = axes[0][column], axes[1][column]
        total = sum(cell.images for cell in bins)
        filled = [cell for cell in bins if cell.images]
        for cell in filled:
            assert cell.accuracy is not None
            top.bar(
                (cell.low + cell.high) / 2, cell.accuracy, cell.high - cell.low, color=BLUE, edgecolor="white"
            )
            share = 100 * cell.images / total
            bottom.bar((cell.low + cell.high) / 2, share, cell.high - cell.low, color=GREY, edgecolor="white")
        top.plot([0, 1], [0, 1], "--", color=ORANGE, linewidth=1.2)
        top.set_title(f"{name}, ECE {eces[column]:.4f}", fontsize=10)
        bottom.set(xlabel="confidence", xlim=(0, 1))
        for part in (top, bottom):
            tidy(part)
    axes[0][0].set(ylabel="accuracy", ylim=(0, 1))
    axes[1][0].set(ylabel="images (%)")
    name_figure(figure, title)
    return figure


def cascade_figure(
    title: str, points: Sequence[CascadePoint], threshold: float, newest: float, together: float
) -> Figure:
    """Error against mean forward passes per image; the thresholds were chosen on held-out images.

    newest, together  errors of the newest member alone and of all, percent
    """
    figure = Figure(figsize=(6.5, 4.2), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    forwards, errors = [point.forwards for point in points], [point.error for point in points]
    axes.plot(forwards, errors, "-", color=BLUE, label="cascade")
    chosen = next(point for point in points if point.threshold == threshold)
    axes.plot(
        [chosen.forwards],
        [chosen.error],
        "o",
        color=GREEN,
        label=f"chosen: asked below {chosen.threshold:.2f}",
    )
    axes.axhline(together, color=GREY, linestyle=":", linewidth=1, label="all that were decided on")
    axes.axhline(newest, color=ORANGE, linestyle="--", linewidth=1, label="the newest of them alone")
    axes.set(xlabel="forward passes per image", ylabel="top-1 error (%)")
    tidy(axes)
    axes.legend(frameon=False, fontsize=9)
    name_figure(figure, title)
    return figure


def line_figure(title: str, line: Line) -> Figure:
    """Error (left) and NLL (right) along the straight line between two snapshots."""
    figure = Figure(figsize=(9, 4.2), dpi=DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = [1 - point.part for point in line.points]
    shown = (
        (left, "error", "gathered_error", "top-1 error (%)"),
        (right, "nll", "gathered_nll", "NLL (nats)"),
    )
    for axes, plain, gathered, label in shown:
        values = [[getattr(point, name) for point in line.points] for name in (plain, gathered)]
        axes.plot(
            parts,
            values[0],
            "s--",
            color=ORANGE,
            label="BatchNorm's statistics mixed",
            markerfacecolor="white",
        )
        axes.plot(parts, values[1], "o-", color=BLUE, label="gathered anew")
        axes.set(xlabel=f"from snapshot {line.first} (0) to snapshot {line.second} (1)", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        tidy(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    name_figure(figure, title)
    return figure
