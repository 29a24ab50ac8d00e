"""The engine: from texts and adapter names to probabilities, with everything of the server but HTTP."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import get_args

import numpy as np

from infuse.bases import skeleton
from infuse.errors import InfuseError
from infuse.heads import check_finite
from infuse.precision import Precision
from infuse.serving import files, refusals
from infuse.serving.batcher import Batcher
from infuse.serving.files import Facts
from infuse.serving.logs import event
from infuse.serving.look import look
from infuse.serving.metrics import Metrics
from infuse.serving.model import Model, Several
from infuse.serving.settings import ServeConfig
from infuse.serving.store import Served, Store
from infuse.texts import Tokens, tokenize

log = logging.getLogger("infuse.serving")
SILENCE = 10.0
"""Seconds after which a model that owes an answer is not ready, or the deadline if that is shorter."""
AT_ONCE = 2000
"""Characters that are tokenised in the thread of the event loop: half a millisecond, some four times a hand-over."""


@dataclass(frozen=True)
class Labelled:
    """What one adapter says of some texts: probabilities, (texts, labels), and which version of it said so."""

    served: Served
    probabilities: list[np.ndarray]


class FailedError(Exception):
    """A row that can't be computed, under an adapter that goes by this name in the model."""


class Engine:
    """A model, its batcher and its store. Make it in the thread of the event loop that uses it.

    Args:
        config: the server's settings.
        model: what answers.
    """

    def __init__(self, config: ServeConfig, model: Model):
        self.config, self.model, self.metrics = config, model, Metrics()
        self.batcher = Batcher(
            self._forward, window=config.window / 1000, max_tokens=config.max_tokens, capacity=config.queue,
            mixed=config.mixed, threads=config.workers, observe=self.metrics.passed,
        )  # fmt: skip
        self.store = Store(config.folder, model, self.batcher, config.resident, self.metrics.forget)
        self.metrics.follow(self.batcher, self.store)
        self.tokenizer = Lock()  # fast tokenizers can't be shared by threads
        self.tokenizing = ThreadPoolExecutor(1, "infuse-tokens")
        self.loop: asyncio.AbstractEventLoop | None = None
        self.hurry = asyncio.Event()

    async def classify(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[Labelled]:
        """Probabilities of the texts of every item under its adapter, all of them in as few passes as fit.

        Args:
            items: adapter and texts, each.
        Raises:
            RefusedError: an unknown or unusable adapter, a full queue, a passed deadline; nothing is half answered.
        """
        held: list[Served] = []
        try:
            async with asyncio.timeout(self.config.deadline):
                with self.batcher.reserve(sum(len(texts) for _, texts in items)):
                    for name, _ in items:
                        held.append(await self.store.lease(name))
                    tokens = await self._tokens([texts for _, texts in items], held)
                    names = [s.inner for s, (_, texts) in zip(held, items, strict=True) for _ in texts]
                    rows = iter(await self.batcher.run(tokens, names))
        except TimeoutError:
            raise refusals.late(self.config.deadline) from None
        except FailedError as error:
            name = next(served.name for served in held if served.inner == error.args[0])
            log.error(event("failed", adapter=name), exc_info=error)
            raise refusals.failed(name) from None
        finally:
            for served in held:
                self.store.release(served)
        answered = [Labelled(s, [next(rows) for _ in texts]) for s, (_, texts) in zip(held, items, strict=True)]
        for each in answered:
            try:
                check_finite(np.stack(each.probabilities))
            except InfuseError as error:
                raise refusals.unusable(each.served.name, str(error)) from None
        for each in answered:
            if each.served.name in self.store.entries:  # or the series of one that has gone meanwhile would come back
                self.metrics.texts.labels(each.served.name).inc(len(each.probabilities))
        return answered

    async def watch(self) -> None:
        """Follow the changes in the folder, for ever; what goes wrong is told once, until it goes well again."""
        told, self.loop = "", asyncio.get_running_loop()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.config.watch or None):
                    await self.hurry.wait()
            self.hurry.clear()
            try:
                await self.store.refresh()
                told = ""
            except Exception as error:  # a folder that can't be read now may be there again later
                if told != (told := str(error)):
                    why = error.strerror if isinstance(error, OSError) else type(error).__name__
                    sentence = f"{self.config.folder} can't be read ({why}); what is in memory is served as it is"
                    log.warning(event("folder", error=sentence), exc_info=not isinstance(error, OSError))

    def look_soon(self) -> None:
        """Look at the folder at once; from any thread, and from a signal's handler."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.hurry.set)

    def silence(self) -> float:
        """Seconds for which the model has owed an answer, if that is longer than it may; else 0."""
        seconds = self.model.silence()
        return seconds if seconds > min(self.config.deadline, SILENCE) else 0.0

    def _forward(self, tokens: Tokens, names: list[str]) -> list[np.ndarray]:
        try:
            return self.model.forward(tokens, names)
        except refusals.RefusedError:
            raise
        except Exception as error:
            if len(names) > 1:  # the batcher goes on with the halves
                raise
            raise FailedError(names[0]) from error

    async def _tokens(self, groups: Sequence[Sequence[str]], held: Sequence[Served]) -> Tokens:
        """Token ids of all texts: here if that is done at once, else in a thread that lets other requests go on."""
        if sum(len(text) for texts in groups for text in texts) <= AT_ONCE and self.tokenizer.acquire(blocking=False):
            try:
                return self._tokenize(groups, held)
            finally:
                self.tokenizer.release()

        def wait() -> Tokens:
            with self.tokenizer:
                return self._tokenize(groups, held)

        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, wait)

    def _tokenize(self, groups: Sequence[Sequence[str]], held: Sequence[Served]) -> Tokens:
        tokens: Tokens = []
        for texts, served in zip(groups, held, strict=True):
            tokens += tokenize(self.model.tokenizer, texts, served.facts.max_length)
        return tokens


def open_model(config: ServeConfig) -> Several:
    """Load the base that the folder's adapters share, in processes of its own.

    Raises:
        InfuseError: settings that can't work; a folder that can't be read; no base is given and no adapter says
            which one.
    """
    try:
        config.check()
        seen = look(config.folder, {}, {}, _facts)
    except OSError as error:
        raise InfuseError(
            f"The folder {config.folder} can't be read ({error.strerror}); mend its permissions."
        ) from None
    sound = [found for *_, found in seen.changed if isinstance(found, Facts)]
    if config.base is not None:
        return _start(config, config.base, sound)
    votes = Counter(each.trained_on for each in sound)  # the most common first; of equals, the first one
    reasons: list[str] = []
    for base, _ in votes.most_common(_TRIED):
        try:
            skeleton(base)
            return _start(config, base, sound)
        except Exception as error:  # whatever its config makes of itself
            reasons.append(str(error) if isinstance(error, InfuseError) else type(error).__name__)
            log.warning(event("base", skipped=base, error=reasons[-1]))
    if reasons:
        raise InfuseError(f"No adapter in {config.folder} names a base that can be loaded; give --base. {reasons[0]}")
    raise InfuseError(
        f"{config.folder} holds no adapter that can be served; train one into it (infuse train --out "
        f"{Path(config.folder) / 'NAME'}), or name the --base to begin without any."
    )


_TRIED = 8
"""Bases of adapters that are tried before the start is given up."""


def _start(config: ServeConfig, base: str, sound: Sequence[Facts]) -> Several:
    precisions = {each.precision for each in sound if each.trained_on == base} or {each.precision for each in sound}
    trained = precisions.pop() if len(precisions) == 1 else "fp32"
    if trained not in get_args(Precision):
        trained = "fp32"
    return Several(config.workers, base, trained if config.precision == "trained" else config.precision, config.threads)


def _facts(name: str, folder: Path) -> Facts | str:
    """What a file says about itself, or why it can't be served: that is told once the server runs."""
    try:
        return files.facts(files.read(folder), None)
    except Exception as error:
        return str(error)
