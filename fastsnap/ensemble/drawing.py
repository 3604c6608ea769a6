"""What all pictures share: colours, titles, grids, and how they are saved."""

import io
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from fastsnap.printing import escaped, literal
from fastsnap.run_files import write_atomically

DOTS_PER_INCH = 160
# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
PINK, YELLOW = "#CC79A7", "#E69F00"
TITLE_WIDTH = 80  # characters that fit above a figure
LONG_TITLE_SIZE = 8  # points, of a title of several lines: the widest letters fit, too


def name_figure(figure: Figure, title: str) -> None:
    """Put `title`, which holds names of the user's, above the figure: as it is, in as many lines as it needs."""
    font = get_font(findfont(FontProperties()))
    shown = "".join(
        character if font.get_char_index(ord(character)) else escaped(character)
        for character in literal(title)
    )
    lines = textwrap.wrap(shown, TITLE_WIDTH)
    # $x$ is a formula to matplotlib otherwise, and to TeX, where the user's settings ask for that, far more is.
    size = LONG_TITLE_SIZE if len(lines) > 1 else None
    figure.suptitle("\n".join(lines), parse_math=False, usetex=False, fontsize=size)


def tidy(axes: Axes) -> None:
    """A light grid, no box."""
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG, replacing an older one only when complete."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
