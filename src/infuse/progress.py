"""What the terminal shows while work goes on: bars there, lines elsewhere."""

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infuse.console import err
from infuse.errors import printable
from infuse.tuning.run import Standing
from infuse.units import duration


class ShowProgress(TrainerCallback):
    """A bar with loss and validation macro-F1 on a terminal; a line per epoch elsewhere."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=err,
        )  # fmt: skip
        self.task: Any = None
        self.loss = float("nan")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if err.is_terminal:
            self.progress.start()
            self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        note = f"loss {self.loss:.3f}  validation macro-F1 {100 * metrics['eval_macro_f1']:.1f}"
        if self.task is not None:
            self.progress.update(self.task, note=note)
        else:
            err.tell(f"epoch {state.epoch:.0f}/{args.num_train_epochs:.0f}  step {state.global_step}  {note}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.task is not None:
            self.progress.stop()


class ShowTuning:
    """A bar with the best trial, the time left and the running trial on a terminal; a line per trial elsewhere."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False), console=err,
        )  # fmt: skip
        self.task: Any = None

    def __enter__(self) -> "ShowTuning":
        if err.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *args: Any) -> None:
        if err.is_terminal:  # elsewhere it would print an empty line
            self.progress.stop()

    def __call__(self, standing: Standing) -> None:
        best = f"best {100 * standing.best:.2f} (trial {standing.best_trial})" if standing.best is not None else ""
        left = f"{duration(standing.seconds_left)} left" if standing.seconds_left else ""
        done = min(standing.done, standing.wanted)
        if err.is_terminal:
            if self.task is None:
                self.task = self.progress.add_task("tuning", total=standing.wanted, note="")
            note = printable("  ".join(filter(None, (best, left, standing.now))))
            self.progress.update(self.task, completed=done, note=note)
        elif standing.event:
            parts = (standing.event, best, f"{done} of {standing.wanted} trials", left)
            err.tell("; ".join(filter(None, parts)))
