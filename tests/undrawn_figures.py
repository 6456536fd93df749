"""Figures of matplotlib are saved as an empty picture once this is imported: drawing them takes a tenth of a tiny run.

The fixture `drawn_figures` is for tests of what they show. Scripts in a fresh interpreter draw them as ever.
"""

from matplotlib.figure import Figure
from PIL import Image

DRAW = Figure.savefig


def save_undrawn(figure: Figure, file, **how) -> None:
    Image.new("RGB", (8, 8)).save(file, "png")


Figure.savefig = save_undrawn
