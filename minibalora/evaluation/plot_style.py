"""The look of all pictures: colours, markers, legend, and short names for long paths."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minibalora.base.errors import InputError
from minibalora.base.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which colour-blind people can tell apart; brown replaces their pale yellow.
# After eight lines or classes, the next line style or marker follows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
LINES = [{"linestyle": style, "color": colour} for style in ("-", "--", ":", "-.") for colour in COLOURS]
POINTS = [{"marker": marker, "color": colour} for marker in ("o", "^", "s", "X") for colour in COLOURS]
MOST = len(LINES)
GREY = "#555555"
SMALL = {"fontsize": 8, "color": GREY}
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.edgecolor": "#999999"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E8E8E8"}
STYLE |= {"axes.axisbelow": True, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
FIGURE = {"dpi": 200, "layout": "constrained"}
WIDTH = 9  # inches: 1800 pixels; the font sizes suit a picture shown 900 pixels wide


def save_picture(path: Path, draw: Callable[[], "Figure"]) -> None:
    """Draw a figure in our style, not that of the user's matplotlibrc, and save it in the format of the path's end."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]), replacing(path) as temporary:
        draw().savefig(temporary, format=path.suffix[1:].lower())


def short_names(paths: list[Path]) -> list[str]:
    """Return the shortest unique end of each path. Raises InputError if a path is given twice."""
    names, wholes = [], [Path(os.path.abspath(path)).parts for path in paths]
    for path, parts in zip(paths, wholes, strict=True):
        if wholes.count(parts) > 1:
            raise InputError(f"{path} is given twice: give it once")
        length = next(n for n in range(1, len(parts) + 1) if sum(other[-n:] == parts[-n:] for other in wholes) == 1)
        names.append(str(Path(*parts[-length:])))
    return names


def add_legend(figure: "Figure", names: list[str], looks: list[dict]) -> None:
    """Put the names above all panels, with the first of `looks` beside them."""
    from matplotlib.lines import Line2D

    columns = max(1, min(len(names), 110 // (8 + max(map(len, names)))))  # about 110 characters fit into the width
    handles = [Line2D([], [], label="?", **look) for look in looks[: len(names)]]
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)  # set here, because matplotlib leaves out labels that begin with _
