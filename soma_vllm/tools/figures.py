"""The look of every figure: its colours, its frame, its file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#22262b"
PALE_INK = "#66707c"
BLUE = "#3b6ea8"
YELLOW = "#f2b84b"
GREEN = "#4fa36c"
PURPLE = "#8a5fb5"
RED = "#cf3a3a"


@contextmanager
def figure_file(path: Path, size: tuple[float, float], title: str) -> Iterator[Any]:
    """A matplotlib figure of `size` inches, written to `path` as a PNG when the block ends without an error."""
    import matplotlib as mpl  # takes a second to load
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        figure.savefig(path, dpi=130, format="png")


def draw_frame(axes: Any, grid: str) -> None:
    """Two spines, no ticks, and a pale grid across one axis: "x" or "y"."""
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6eaef", linewidth=0.8)
    axes.set_axisbelow(True)
