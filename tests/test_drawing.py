"""Pictures whose names are any text: letters that the font lacks, formulas that are none, and pages of words."""

import warnings

import numpy as np
import pytest
from matplotlib import image, pyplot

from infuse.report import Drawn, Lines, Point, Scatter, Series
from infuse.report.figures import png, svg
from infuse.training.plots import confusion_plot, curves_plot, heat_map

ODD = ("😀 joy", "日本語", "हिन्दी", "$\\foo$", "$x_{$ and $", "a\nb " + 900 * "word ", "عربي")


def pictures(names):
    """A figure of each kind."""
    points = [Point(name, i, i) for i, name in enumerate(names)]
    series = [Series(name, [0, 1], [i, i + 1]) for i, name in enumerate(names)]
    return {
        "confusion": Drawn("title", lambda: confusion_plot(np.eye(len(names), dtype=int), names)),
        "heat map": Drawn("title", lambda: heat_map(np.eye(len(names)), names, names)),
        "curves": Drawn("title", lambda: curves_plot([{"epoch": 1, "loss": 1, "eval_macro_f1": 1}], None)),
        "scatter": Scatter("title", "x", "y", points),
        "lines": Lines("title", "x", "y", series),
    }


@pytest.mark.parametrize("kind", pictures(ODD))
def test_any_name_can_be_drawn_without_a_warning(kind, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png(pictures(ODD)[kind], tmp_path / "odd.png")
        svg(pictures(ODD)[kind], "f")
    drawn = image.imread(tmp_path / "odd.png")
    assert drawn.std() > 0.01 and max(drawn.shape) < 4000


def test_other_warnings_and_the_formulas_of_others_stay():
    def draw():
        warnings.warn("about something else", UserWarning, stacklevel=1)
        figure = pyplot.figure()
        figure.text(0.5, 0.5, "$10^{-3}$")
        pyplot.close(figure)
        return figure

    with pytest.warns(UserWarning, match="something else"):
        drawn = svg(Drawn("title", draw, formulas=True), "f")
    assert "10^{" not in drawn.split("</metadata>")[-1].replace("<!-- $10^{-3}$ -->", "")
