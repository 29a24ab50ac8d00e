"""The time that training takes: per step, up to every evaluation, and against a budget."""

import time
from collections.abc import Callable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Point = dict[str, float]


class Clock(TrainerCallback):
    """Measures training without evaluations and checkpoints, and ends it when a budget of seconds is used up.

    Attributes:
        seconds: time spent in training so far.
        steps: seconds of every optimizer step.
        curve: epoch, seconds, accuracy and macro-F1 before training and after every epoch.
    """

    def __init__(self, start: Callable[[], dict[str, float]] | None = None, limit: float | None = None):
        self.start, self.limit = start, limit
        self.seconds = self.began = self.step = 0.0
        self.steps: list[float] = []
        self.curve: list[Point] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.start is not None:
            self.curve.append({"epoch": 0.0, "seconds": 0.0, **self.start()})

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.began = now()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.step = now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        at = now()
        self.steps.append(at - self.step)
        if self.limit is not None and self.seconds + at - self.began >= self.limit:
            control.should_training_stop = True  # the epoch ends here, with its evaluation

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.seconds += now() - self.began

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        found = kwargs["metrics"]
        assert isinstance(found, dict) and state.epoch is not None
        measures = {name: found[f"eval_{name}"] for name in ("accuracy", "macro_f1")}
        self.curve.append({"epoch": state.epoch, "seconds": self.seconds, **measures})


def now() -> float:
    """Seconds of a clock, once the accelerator (if there is one) has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
