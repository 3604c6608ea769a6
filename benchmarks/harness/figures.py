"""The report's pictures, in the look of fastsnap.ensemble.plots."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from fastsnap.ensemble.drawing import BLUE, DOTS_PER_INCH, GREEN, GREY, ORANGE, save
from harness.measure import PROJECT
from harness.results import Record
from harness.tables import figure as figure_text

WIDTH = 9.0  # inches
TITLE_LETTERS = 48  # of a panel of half that width
BAR, MARGIN = 0.34, 0.95  # inches of height: of a contender, and of a panel's title and axis


def bars(records: Sequence[Record], path: Path) -> None:
    """A panel per case, a bar per contender: medians, with the quartiles as whiskers."""
    cases: dict[str, list[Record]] = {}
    for record in records:
        if record["n"]:
            cases.setdefault(record["case"], []).append(record)
    heights = [MARGIN + BAR * len(rows) for rows in cases.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (case, rows) in zip(panels, cases.items(), strict=True):
        _bars_of_case(axes, case, rows)
    save(figure, path)


def _bars_of_case(axes: Axes, case: str, rows: list[Record]) -> None:
    medians = [row["median"] for row in rows]
    whiskers = [
        [row["median"] - row["low"] for row in rows],
        [row["high"] - row["median"] for row in rows],
    ]
    colors = [BLUE if row["opponent"] == PROJECT else GREY for row in rows]
    axes.barh([row["opponent"] for row in rows], medians, xerr=whiskers, color=colors, ecolor=ORANGE)
    axes.invert_yaxis()
    axes.set_title(case, loc="left", fontsize=10)
    axes.set_xlabel(f"{rows[0]['unit']} ({rows[0]['better']} is better)")
    _tidy(axes, "x")


def series(records: Sequence[Record], path: Path) -> None:
    """A panel per series of the scaling benchmark, both axes logarithmic, with the fitted power."""
    fits = [record for record in records if record["unit"] == "exponent"]
    rows = -(-len(fits) // 2)
    figure = Figure(figsize=(WIDTH, 3.3 * rows), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes in panels[len(fits) :]:
        axes.remove()
    for axes, fit in zip(panels, fits, strict=False):
        name = fit["details"]["series"]
        points = [r for r in records if r["details"]["series"] == name and "x" in r["details"]]
        _series(axes, points, fit)
    save(figure, path)


def _series(axes: Axes, points: list[Record], fit: Record) -> None:
    sizes = [point["details"]["x"] for point in points]
    medians = [point["median"] for point in points]
    whiskers = [
        [point["median"] - point["low"] for point in points],
        [point["high"] - point["median"] for point in points],
    ]
    axes.errorbar(sizes, medians, yerr=whiskers, fmt="o", color=BLUE, ecolor=ORANGE)
    axes.plot(sizes, _power(sizes, medians, fit["median"]), "--", color=GREY, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(min(medians) / 2, max(medians) * 2)  # a flat series should look flat
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: figure_text(value)))
    axes.minorticks_off()
    title = textwrap.fill(f"{fit['details']['series']}: exponent {fit['median']:.2f}", TITLE_LETTERS)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlabel=points[0]["details"]["axis"], ylabel=points[0]["unit"])
    _tidy(axes, "both")


def _power(sizes: list[float], values: list[float], exponent: float) -> list[float]:
    """The fitted power at these sizes; the line goes through the mean of the logarithms."""
    logarithms = [
        math.log(value) - exponent * math.log(size) for size, value in zip(sizes, values, strict=True)
    ]
    factor = math.exp(sum(logarithms) / len(logarithms))
    return [factor * size**exponent for size in sizes]


def errors(records: Sequence[Record], path: Path) -> None:
    """A panel per regime: the error of every method by seed, and its mean with the confidence interval."""
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(record["case"], []).append(record)
    heights = [MARGIN + BAR * len(rows) for rows in cases.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (case, rows) in zip(panels, cases.items(), strict=True):
        for place, row in enumerate(rows):
            error = row["details"]["error"]
            axes.plot(row["values"], [place] * row["n"], "o", color=GREY, markerfacecolor="white")
            if error["low"] is not None:
                axes.plot([error["low"], error["high"]], [place, place], color=BLUE, linewidth=1.5)
            axes.plot([error["mean"]], [place], "D", color=GREEN)
        axes.set_yticks(range(len(rows)), [row["opponent"] for row in rows])
        axes.invert_yaxis()
        axes.set_title(case, loc="left", fontsize=10)
        axes.set_xlabel("test error (%): seeds, mean and 95 % interval of the mean")
        _tidy(axes, "x")
    save(figure, path)


def _tidy(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, alpha=0.25)  # type: ignore[arg-type]
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
