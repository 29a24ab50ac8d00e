"""The result of a study: its trials and plots, as a report."""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from matplotlib import pyplot
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

import infuse.drawing  # noqa: F401  # before any window could be opened
from infuse.report import Cell, Column, Drawn, Report, Table, put
from infuse.training.folders import write_csv
from infuse.training.settings import Settings
from infuse.tuning.run import Tuned
from infuse.tuning.study import quiet

_SCORE = "validation macro-F1"
_LONGEST = 14
"""Letters of a value in a plot."""


def summarise(study: optuna.Study, best: FrozenTrial) -> tuple[dict[str, Any], dict[str, float], dict[str, int]]:
    """The best trial, the scores of the defaults, and how many trials ended how."""
    trials = study.get_trials(deepcopy=False)
    defaults = {
        f"{t.user_attrs['settings']['method']} on {t.user_attrs['base']}": float(t.value or 0.0)
        for t in trials
        if t.user_attrs.get("defaults") and t.state == TrialState.COMPLETE
    }
    plain = Settings()
    changed = {
        f.name: best.user_attrs["settings"][f.name]
        for f in fields(Settings)
        if best.user_attrs["settings"][f.name] != getattr(plain, f.name)
    }
    chosen = {"trial": best.number, "macro_f1": best.value, "base": best.user_attrs["base"], "settings": changed}
    return chosen, defaults, dict(Counter(t.state.name.lower() for t in trials))


def write(study: optuna.Study, tuned: Tuned, folder: Path) -> None:
    """``trials.csv``, every setting of every trial; and ``report.html``, ``.md``, ``.json`` and plots as PNG.

    Into a folder that is there.
    """
    trials = study.get_trials(deepcopy=False)
    write_csv(folder / "trials.csv", [_row(trial) for trial in trials])
    best, metrics = tuned.best, tuned.run.metrics
    states = ", ".join(f"{count} {state}" for state, count in sorted(tuned.states.items()))
    defaults = "; ".join(f"{name} {100 * score:.2f}" for name, score in tuned.defaults.items()) or "none completed"
    ranked = sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -(t.value or 0.0)))
    columns = (
        Column("trial"), Column("how it ended"), Column("macro-F1 %", ".2f"), Column("method"), Column("base"),
        Column("seconds", ".1f"),
    )  # fmt: skip
    settings = Table(
        "Settings of the best trial", (Column("setting"), Column("value")),
        [(name, str(value)) for name, value in best["settings"].items()], "Those off their defaults.",
    )  # fmt: skip
    report = Report(
        f"Study {study.study_name}",
        f"{len(trials)} trials ({states}), measured by macro-F1 on the validation rows; test rows played no part",
        tables=[Table("Trials", columns, [_cells(trial) for trial in ranked]), settings],
        figures=_figures(study),
        commands=["infuse train --config best.yaml"],
        answer=[
            f"Best: trial {best['trial']} with {100 * best['macro_f1']:.2f} on {best['base']}. Trained again for the "
            f"run folder {tuned.run.folder.name}/, it has {100 * metrics['validation']['macro_f1']:.2f}.",
            f"The defaults: {defaults}. The best of many trials is a little lucky: compare it with the defaults on "
            "several fresh seeds before you rely on a small gain.",
        ],
    )
    put(report, folder)


def _row(trial: FrozenTrial) -> dict[str, Any]:
    facts = trial.user_attrs
    epochs = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    settings = {f.name: facts.get("settings", {}).get(f.name, "") for f in fields(Settings)}
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "macro_f1": max(epochs, default=""),
        "epochs_run": len(epochs),
        "seconds": facts.get("seconds", ""),
        "base": facts.get("base", ""),
        **settings,
        "defaults": bool(facts.get("defaults")),
        "repeats": trial.system_attrs.get("failed_trial", ""),
        "reason": facts.get("reason", ""),
        "worker": facts.get("worker", ""),
    }


def _cells(trial: FrozenTrial) -> tuple[Cell, ...]:
    facts = trial.user_attrs
    how = trial.state.name.lower() + (" (the defaults)" if facts.get("defaults") else "")
    if (first := trial.system_attrs.get("failed_trial")) is not None:
        how += f" (repeats {first})"
    if reason := facts.get("reason"):
        how += f": {reason}"
    score = None if trial.value is None else 100 * trial.value
    method = facts.get("settings", {}).get("method")
    return str(trial.number), how, score, method, facts.get("base"), facts.get("seconds")


def _figures(study: optuna.Study) -> list[Drawn]:
    """The plots that these trials allow. Importances need trials that differ."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    shared = sorted(set.intersection(*(set(trial.params) for trial in complete)))
    varied = [name for name in shared if len({trial.params[name] for trial in complete}) > 1]
    wanted: dict[str, Callable[[], Any]] = {
        "History": lambda: plots.plot_optimization_history(study, target_name=_SCORE),
    }
    if len(complete) > 3 and varied and len({trial.value for trial in complete}) > 1:
        wanted["Importance"] = lambda: plots.plot_param_importances(study, params=varied, target_name=_SCORE)
    if len(complete) > 1 and len(varied) > 1:
        wanted["Parallel"] = lambda: plots.plot_parallel_coordinate(study, params=varied, target_name=_SCORE)
    return [
        Drawn(title, partial(_drawn, plot, 13 if title == "Parallel" else 9), formulas=True)
        for title, plot in wanted.items()
    ]


def _drawn(plot: Callable[[], Any], width: float) -> Any:
    with quiet(), pyplot.rc_context():
        figure = plot().figure
        for axes in figure.axes:
            names = [label.get_text() for label in axes.get_yticklabels()]
            if any(len(name) > _LONGEST and "$" not in name for name in names):
                # lists of roles would hide the axis beside them
                axes.set_yticks(axes.get_yticks(), [_short(name) for name in names])
        figure.set_size_inches(width, 5)
        pyplot.close(figure)
    return figure


def _short(name: str) -> str:
    """A list of roles by its first one and the number of the others; any other long name, cut."""
    first, *others = name.split("+")
    name = f"{first} + {len(others)}" if others and len(name) > _LONGEST else name
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
