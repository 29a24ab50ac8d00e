"""What the terminal shows of results."""

import pytest

from infuse import console
from infuse.training.run import Run


@pytest.mark.parametrize("plot", [True, False])
def test_a_run_names_the_files_that_it_wrote(plot, tmp_path, capsys):
    """Runs of several labels a row have no confusion plot."""
    (tmp_path / "adapter").mkdir()
    for name in ("metrics.json", *(["confusion.png"] if plot else [])):
        (tmp_path / name).touch()
    score = {"accuracy": 0.5, "macro_f1": 0.5}
    counts = {"transformer": 1, "percent_of_base": 1, "head": 1}
    about = {"method": "ia3", "base": "tiny", "baseline": None, "rows": {"validation": 2}, "seconds": 1}
    console.show_run(Run(tmp_path, about | {"validation": score, "parameters": counts}))
    shown = capsys.readouterr().out
    assert ("confusion.png" in shown) == plot and "adapter/, metrics.json" in shown and "curves.png" not in shown
