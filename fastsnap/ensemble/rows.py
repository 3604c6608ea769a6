"""Predictions as rows: a table to read, comma-separated values and JSON lines for programs, batch after batch."""

import csv
import io
import json
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from fastsnap.ensemble.predictions import Predictions
from fastsnap.printing import literal, print_line

UNCERTAINTIES = ("entropy", "mutual_information", "disagreement")
DIGITS = 8  # significant ones: what fp32 has
LEAST_NAME = 12  # characters of a file's name in a row of a narrow terminal
LONGEST_CLASS = 28
NUMBER = 9  # characters of a column of numbers
GAP = 2
HEADED = "headed"  # in `widths`, once the header was written


def write_table(
    console: Console, names: Sequence[str], predictions: Predictions, top: int, widths: dict[str, int]
) -> None:
    """Rows under one header; on a terminal they fit its width, and of a name that does not, the end is shown.

    widths  what the columns had before: the same dict for every batch
    """
    count = min(top, len(predictions.classes))
    names = [literal(name, console.encoding) for name in names]
    titles = [literal(name, console.encoding) for name in ("class", *predictions.classes)]
    class_width = min(LONGEST_CLASS, max(map(cell_len, titles)))
    numbers = [class_width, NUMBER] * count + [NUMBER] * len(UNCERTAINTIES)
    longest = max(widths.get("image", LEAST_NAME), *map(cell_len, names))
    if console.is_terminal:
        longest = min(longest, max(LEAST_NAME, console.width - sum(numbers) - GAP * len(numbers)))
    widths["image"] = longest

    def write(name: str, best: Sequence[tuple[str, str]], values: Sequence[str]) -> None:
        cells = [set_cell_size(name, longest)]
        for title, value in best:
            cells += [set_cell_size(literal(title, console.encoding), class_width), value.rjust(NUMBER)]
        print_line(console, (" " * GAP).join([*cells, *(value.rjust(NUMBER) for value in values)]))

    if HEADED not in widths:
        widths[HEADED] = 1
        write("image", [("class", "prob.")] * count, ("entropy", "mut. inf.", "disagree"))
    cut = literal("\N{HORIZONTAL ELLIPSIS}", console.encoding)
    cut = cut if len(cut) == 1 else "~"
    uncertain = zip(*(getattr(predictions, name).tolist() for name in UNCERTAINTIES), strict=True)
    for name, best, (entropy, information, disagreement) in zip(
        names, predictions.top(count), uncertain, strict=True
    ):
        while cell_len(name) > longest:
            name = cut + name[2 if name.startswith(cut) else 1 :]
        values = (f"{entropy:.4f}", f"{information:.4f}", f"{100 * disagreement:.0f} %")
        write(name, [(title, f"{value:.4f}") for title, value in best], values)


def write_csv(
    console: Console, names: Sequence[str], predictions: Predictions, top: int, widths: dict[str, int]
) -> None:
    """A header, once, and a line per image: class and probability of the best, class_2, probability_2 of the next."""
    count = min(top, len(predictions.classes))
    if HEADED not in widths:
        widths[HEADED] = 1
        places = ["" if place == 1 else f"_{place}" for place in range(1, count + 1)]
        pairs = [f"{title}{place}" for place in places for title in ("class", "probability")]
        print_line(console, _csv_line(["image", *pairs, *UNCERTAINTIES]))
    uncertain = zip(*(getattr(predictions, name).tolist() for name in UNCERTAINTIES), strict=True)
    for name, best, values in zip(names, predictions.top(count), uncertain, strict=True):
        cells = [cell for title, value in best for cell in (title, _number(value))]
        print_line(console, _csv_line([name, *cells, *map(_number, values)]))


def _csv_line(cells: Sequence[object]) -> str:
    """One row without its end. Line breaks within a name stay in it; printing escapes them."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def write_jsonl(
    console: Console, names: Sequence[str], predictions: Predictions, top: int, widths: dict[str, int]
) -> None:
    """A JSON object per image, in ASCII: image, top (class and probability of each), and how unsure the ensemble is."""
    uncertain = zip(*(getattr(predictions, name).tolist() for name in UNCERTAINTIES), strict=True)
    for name, best, values in zip(names, predictions.top(top), uncertain, strict=True):
        row = {
            "image": name,
            "top": [{"class": title, "probability": _number(value)} for title, value in best],
            **dict(zip(UNCERTAINTIES, map(_number, values), strict=True)),
        }
        print_line(console, json.dumps(row))


def _number(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
