"""The result of a study as files: the table of trials, the plots, and a page that brings them together."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import optuna
from filelock import FileLock
from matplotlib import pyplot
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

from infuse.training.members import write_csv
from infuse.training.settings import Settings
from infuse.tuning.run import REPORT, Tuned
from infuse.tuning.study import quiet

_SCORE = "validation macro-F1"
_LONGEST = 14
"""Letters of a value in a plot."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one worker on this machine writes the folder at a time."""
    with FileLock(folder / ".lock"):
        yield


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
    """``trials.csv``, ``history.png``, ``importance.png``, ``parallel.png``, and ``report.md``."""
    trials = study.get_trials(deepcopy=False)
    write_csv(folder / "trials.csv", [_row(trial) for trial in trials])
    drawn = _draw(study, folder)
    best, metrics = tuned.best, tuned.run.metrics
    states = ", ".join(f"{count} {state}" for state, count in sorted(tuned.states.items()))
    lines = [
        f"# Study {study.study_name}", "",
        f"{len(trials)} trials ({states}), measured by macro-F1 on the validation rows; test rows played no part.", "",
        f"Best: trial {best['trial']} with {100 * best['macro_f1']:.2f} on {best['base']}. Trained again for the run "
        f"folder `{tuned.run.folder.name}/`, it has {100 * metrics['validation']['macro_f1']:.2f}.", "",
        "| setting | best |", "|---|---|", *(f"| {key} | {value} |" for key, value in best["settings"].items()), "",
        "The defaults: "
        + ("; ".join(f"{name} {100 * score:.2f}" for name, score in tuned.defaults.items()) or "none completed")
        + ". The best of many trials is a little lucky: compare it with the defaults on several fresh seeds before you "
        "rely on a small gain.", "",
        "`infuse train --config best.yaml` repeats the best trial.", "",
        *(f"![{title}]({name}.png)\n" for name, title in drawn.items()),
        "| trial | how it ended | macro-F1 | method | base |", "|---:|---|---:|---|---|",
        *(_line(trial) for trial in sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -(t.value or 0.0)))),
    ]  # fmt: skip
    (folder / REPORT).write_text("\n".join(lines) + "\n", encoding="utf-8")


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


def _line(trial: FrozenTrial) -> str:
    facts = trial.user_attrs
    score = f"{100 * trial.value:.2f}" if trial.value is not None else ""
    how = trial.state.name.lower() + (" (the defaults)" if facts.get("defaults") else "")
    if (first := trial.system_attrs.get("failed_trial")) is not None:
        how += f" (repeats {first})"
    if reason := facts.get("reason"):
        how += f": {reason}".replace("|", "\\|")
    method = facts.get("settings", {}).get("method", "")
    return f"| {trial.number} | {how} | {score} | {method} | {facts.get('base', '')} |"


def _draw(study: optuna.Study, folder: Path) -> dict[str, str]:
    """The plots that these trials allow: file name → title. Importances need trials that differ."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    shared = sorted(set.intersection(*(set(trial.params) for trial in complete)))
    varied = [name for name in shared if len({trial.params[name] for trial in complete}) > 1]
    wanted: dict[str, tuple[str, Callable[[], Any]]] = {
        "history": ("The course of the study", lambda: plots.plot_optimization_history(study, target_name=_SCORE)),
    }
    if len(complete) > 3 and varied and len({trial.value for trial in complete}) > 1:
        wanted["importance"] = (
            "How much the score depends on each setting",
            lambda: plots.plot_param_importances(study, params=varied, target_name=_SCORE),
        )
    if len(complete) > 1 and len(varied) > 1:
        wanted["parallel"] = (
            "Settings and score of every trial",
            lambda: plots.plot_parallel_coordinate(study, params=varied, target_name=_SCORE),
        )
    for name in ("history", "importance", "parallel"):
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, (_, plot) in wanted.items():
        with quiet(), pyplot.rc_context():
            figure = plot().figure
            for axes in figure.axes:
                names = [label.get_text() for label in axes.get_yticklabels()]
                if any(
                    len(name) > _LONGEST and "$" not in name for name in names
                ):  # lists of roles would hide the axis beside them
                    axes.set_yticks(axes.get_yticks(), [_short(name) for name in names])
            figure.set_size_inches(9 if name != "parallel" else 13, 5)
            figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
            pyplot.close("all")
    return {name: title for name, (title, _) in wanted.items()}


def _short(name: str) -> str:
    """A list of roles by its first one and the number of the others; any other long name, cut."""
    first, *others = name.split("+")
    name = f"{first} + {len(others)}" if others and len(name) > _LONGEST else name
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
