"""Pictures whose names are any text: letters that the font lacks, formulas that are none, and pages of words."""

import io
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager, image, pyplot

from infuse.drawing import plain_names
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
def test_any_name_can_be_drawn_without_a_warning(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = png(pictures(ODD)[kind])
        svg(pictures(ODD)[kind], "f")
    drawn = image.imread(io.BytesIO(picture))
    assert drawn.std() > 0.01 and max(drawn.shape) < 4000


@pytest.mark.parametrize(
    "draw", [confusion_plot, lambda m, names: heat_map(m, names, names)], ids=["confusion", "heat"]
)
def test_long_names_leave_the_data_its_room(draw):
    def width(names):
        figure = draw(np.eye(len(names)), names)
        figure.draw_without_rendering()
        return figure.axes[0].get_window_extent().width

    assert width([letter * 60 for letter in "abcxyz"]) > 0.8 * width(list("abcxyz"))


def test_letters_that_matplotlib_lacks_come_from_fonts_of_the_system(monkeypatch):
    fonts = [SimpleNamespace(name=name) for name in ("Malgun Gothic", "Of A Stranger")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    before = list(matplotlib.rcParams["font.family"])
    with plain_names():
        assert matplotlib.rcParams["font.family"] == [*before, "Malgun Gothic"]
    assert matplotlib.rcParams["font.family"] == before


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
