"""The race: successive halving over the candidates that fit, on ever more rows, within a deadline.

Every candidate trains from the bare base with the recipe that is recommended in the end, but on a share of the rows;
the better half goes on to twice the share. All candidates of a round have the same rows and the same seed, so that they
can be compared row by row.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infuse.bases import BaseModel
from infuse.comparing.cell import LOGISTIC
from infuse.comparing.clock import Clock
from infuse.data import Rows, Splits, stratified
from infuse.errors import InfuseError, WriteError
from infuse.model import detach
from infuse.recommending.candidates import Candidate
from infuse.texts import probabilities
from infuse.training.baseline import logistic_predictions
from infuse.training.batches import encode
from infuse.training.fit import fit
from infuse.training.folders import ADAPTER
from infuse.training.metrics import decide, overall
from infuse.training.settings import Settings

FINALISTS = 3
"""So many or fewer are not halved any more."""
SEEDS = 3
"""Most runs of each finalist, if time is left."""
VALIDATED = 2000
"""Most rows that are validated on."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """Macro-F1 and accuracy on the validation rows, and which of them were right."""

    macro_f1: float
    accuracy: float
    right: np.ndarray
    seconds: float

    @staticmethod
    def of(targets: np.ndarray, predicted: np.ndarray, began: float) -> "Score":
        right = (targets == predicted).reshape(len(targets), -1).all(1).astype(float)
        return Score(**overall(targets, predicted), right=right, seconds=time.perf_counter() - began)


@dataclass
class Round:
    """One round: the share of the training rows, how many they are, and the scores."""

    share: float
    rows: int
    entered: list[Candidate]
    scores: dict[Candidate, Score] = field(default_factory=dict)
    logistic: Score | None = None
    complete: bool = False

    @property
    def ranked(self) -> list[Candidate]:
        return sorted(self.scores, key=lambda c: -self.scores[c].macro_f1)


@dataclass
class Race:
    """All rounds, who did not run for want of time, and who failed."""

    validated: int
    rounds: list[Round] = field(default_factory=list)
    left_out: list[Candidate] = field(default_factory=list)
    failed: dict[Candidate, str] = field(default_factory=dict)

    @property
    def decisive(self) -> list[Round]:
        """The rounds that decide: the last complete one and, on as many rows, those of the same finalists before it."""
        done = [each for each in self.rounds if each.complete]
        if not done:
            return [each for each in self.rounds[:1] if each.scores]
        last = done[-1]
        return [each for each in done if each.rows == last.rows and set(last.scores) <= set(each.scores)]


def race(
    base: BaseModel,
    splits: Splits,
    entered: Sequence[Candidate],
    settings: Callable[[Candidate], Settings],
    deadline: float,
    say: Say = lambda _: None,
) -> Race:
    """Halve the candidates until few are left, then repeat these with other seeds while time is left.

    Args:
        base: the loaded base, bare before and after.
        splits: the rows; of many validation rows, some.
        entered: the candidates, the ones to drop first last, where time is too short for all.
        settings: how a candidate is trained.
        deadline: when to end, by ``time.perf_counter``; a run that would pass it ends with its step, and counts not.
        say: gets a line per round.
    """
    validation = splits.validation
    if len(validation) > VALIDATED:
        validation = stratified(validation, VALIDATED / len(validation))[1]
    track = _Track(base, splits.train, validation, settings, deadline)
    result = Race(len(validation))
    if not entered or not track.measure(entered[0]):
        result.left_out = list(entered)
        return result
    going, seed = list(entered), 0
    while True:
        count, share = track.plan(len(going))
        if not count:
            break
        if not result.rounds:
            result.left_out = going[count:]
        going = going[:count]
        now = track.round(going, share, seed, result.failed)
        result.rounds.append(now)
        best = now.ranked[0].name if now.scores else "none"
        say(
            f"round {len(result.rounds)}: {len(now.scores)} of {len(going)} candidates on {now.rows:,} rows, "
            f"best {best}, {max(0.0, deadline - time.perf_counter()):.0f} s left"
        )
        going = now.ranked
        if not now.complete or len(going) < 2:
            break
        if len(now.entered) <= FINALISTS:
            same = sum(each.rows == now.rows and len(each.entered) <= FINALISTS for each in result.rounds)
            if same >= SEEDS:
                break
        else:
            going = going[: -(-len(going) // 2)]
        seed += 1
    return result


class _Track:
    """Runs candidates and knows how long they take."""

    def __init__(
        self, base: BaseModel, train: Rows, validation: Rows, settings: Callable[[Candidate], Settings], deadline: float
    ):
        self.base, self.train, self.validation, self.settings = base, train, validation, settings
        self.deadline = deadline
        self.fixed = self.whole = 0.0
        """Seconds of a run that do not depend on its rows, and those of training on all rows."""
        self.logistic = 0.0
        """Seconds of the last logistic regression."""

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def measure(self, candidate: Candidate) -> bool:
        """Time a few steps, twice, since the first run warms up; false if that took all the time there is."""
        settings = replace(self.settings(candidate), epochs=1)
        rows = self.share(8 * settings.batch_size / len(self.train), settings.seed)
        clock, spent = Clock(), 0.0
        for _ in range(2):
            began, clock = time.perf_counter(), Clock()
            if self.left <= 0 or self.train_on(rows, settings, [clock, _Stop(self.deadline)]) is None:
                return False
            spent = time.perf_counter() - began
        step = float(np.median(clock.steps[1:] or clock.steps))
        self.whole = step * self.settings(candidate).epochs * -(-len(self.train) // settings.batch_size)
        self.fixed = max(0.05, spent - sum(clock.steps))
        return True

    def plan(self, count: int) -> tuple[int, float]:
        """How many of ``count`` candidates have time, and on which share of the rows their next round is."""
        least = min(1.0, max(2 * len(self.train.label_set), 64) / len(self.train))
        first = count
        while count:
            if self.cost(count, least) <= self.left:
                break
            # finalists run together or not at all
            count = 0 if first <= FINALISTS else count - 1
        low, high = least, 1.0
        if not count or self.cost(count, high) <= self.left:
            return count, high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(count, middle) <= self.left else (low, middle)
        return count, low

    def cost(self, count: int, share: float) -> float:
        """Seconds of all rounds from here on."""
        seconds = self.logistic
        while True:
            seconds += count * (self.fixed + min(1.0, share) * self.whole)
            if count <= FINALISTS:
                return 1.1 * seconds
            count, share = -(-count // 2), 2 * share

    def round(self, going: Sequence[Candidate], share: float, seed: int, failed: dict[Candidate, str]) -> Round:
        first = self.settings(going[0]).seed + seed
        rows = self.share(share, first)
        found = Round(share, len(rows), list(going))
        self.base.remembered.clear()  # rows of the last round
        spent = 0.0
        for candidate in going:
            began, stop = time.perf_counter(), _Stop(self.deadline - self.fixed)  # it is still to be measured
            try:
                if self.left < (spent / len(found.scores) if found.scores else self.fixed):
                    return found
                settings = replace(self.settings(candidate), seed=first)
                score = self.train_on(rows, settings, [stop])
            except WriteError:  # no fault of the candidate's
                raise
            except (InfuseError, torch.OutOfMemoryError) as error:
                failed[candidate] = " ".join(str(error).split())
                continue
            if score is None:
                return found
            found.scores[candidate] = score
            spent += time.perf_counter() - began
        found.complete = bool(found.scores)
        if found.scores:  # how long runs really take, for the plan of the next round
            mean = spent / len(found.scores)
            scale = mean / (self.fixed + len(rows) / len(self.train) * self.whole)
            self.fixed, self.whole = scale * self.fixed, scale * self.whole
        if self.left > max(3.0, 16 * self.logistic):  # it is the number to beat, but must not eat the race's time
            found.logistic = self.regress(rows, self.settings(going[0]).max_length)
        return found

    def share(self, share: float, seed: int) -> Rows:
        """A part of the training rows with every label in it."""
        return self.train if share >= 1 else stratified(self.train, 1 - share, seed)[0]

    def train_on(self, rows: Rows, settings: Settings, callbacks: Sequence[TrainerCallback]) -> Score | None:
        """The score of one run; ``None`` if the deadline came first."""
        began, base = time.perf_counter(), self.base
        try:
            fit(base, rows, None, settings, name=ADAPTER, callbacks=callbacks)
            if any(isinstance(each, _Stop) and each.stopped for each in callbacks):
                return None
            held_out = encode(base, self.validation, rows.label_set, settings.max_length)
            given = probabilities(base.model, held_out.tokens, base.pad_id, ADAPTER)
            return Score.of(held_out.targets.numpy(), decide(given, rows.multi), began)
        finally:
            base.model.eval()
            if hasattr(base.model, "infuse"):
                detach(base.model)

    def regress(self, rows: Rows, max_length: int) -> Score:
        began = time.perf_counter()
        found = logistic_predictions(self.base, rows, {LOGISTIC: self.validation}, max_length)[LOGISTIC]
        self.logistic = time.perf_counter() - began
        return Score.of(*found, began)


class _Stop(TrainerCallback):
    """Ends a run with the step in which the deadline passes."""

    def __init__(self, deadline: float):
        self.deadline, self.stopped = deadline, False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if time.perf_counter() > self.deadline:
            control.should_training_stop = self.stopped = True
