"""The engine: from texts and adapter names to probabilities, with everything of the server but HTTP."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from infuse.errors import InfuseError
from infuse.heads import check_finite
from infuse.serving import files, refusals
from infuse.serving.batcher import Batcher
from infuse.serving.files import Facts
from infuse.serving.metrics import Metrics
from infuse.serving.model import Model, Several
from infuse.serving.settings import ServeConfig
from infuse.serving.store import Served, Store
from infuse.texts import Tokens, tokenize

AT_ONCE = 2000
"""Characters that are tokenised in the thread of the event loop: half a millisecond, some four times a hand-over."""


@dataclass(frozen=True)
class Labelled:
    """What one adapter says of some texts: probabilities, (texts, labels), and which version of it said so."""

    served: Served
    probabilities: list[np.ndarray]


class Engine:
    """A model, its batcher and its store. Make it in the thread of the event loop that uses it.

    Args:
        config: the server's settings.
        model: what answers.
    """

    def __init__(self, config: ServeConfig, model: Model):
        self.config, self.model, self.metrics = config, model, Metrics()
        self.batcher = Batcher(
            model.forward, window=config.window / 1000, max_tokens=config.max_tokens, capacity=config.queue,
            mixed=config.mixed, threads=config.workers, observe=self.metrics.passed,
        )  # fmt: skip
        self.store = Store(config.folder, model, self.batcher, config.resident, self.metrics.forget)
        self.metrics.follow(self.batcher, self.store)
        self.tokenizer = Lock()  # fast tokenizers can't be shared by threads
        self.tokenizing = ThreadPoolExecutor(1, "infuse-tokens")

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
        told = ""
        while True:
            await asyncio.sleep(self.config.watch)
            try:
                await self.store.refresh()
                told = ""
            except Exception as error:  # a folder that can't be read now may be there again later
                if told != (told := str(error)):
                    why = error.strerror if isinstance(error, OSError) else type(error).__name__
                    self.metrics.log.warning(
                        "the folder %s can't be read (%s); what is in memory is served as it is", self.config.folder,
                        why, exc_info=not isinstance(error, OSError),
                    )  # fmt: skip

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
        present = list(files.find(config.folder))
    except OSError as error:
        raise InfuseError(
            f"The folder {config.folder} can't be read ({error.strerror}); mend its permissions."
        ) from None
    sound: list[Facts] = []
    for _, folder, _ in present:
        try:
            sound.append(files.facts(files.read(folder), None))
        except InfuseError:
            continue
    if config.base is None and not sound:
        raise InfuseError(
            f"{config.folder} holds no adapter that can be served; train one into it (infuse train --out "
            f"{Path(config.folder) / 'NAME'}), or name the --base to begin without any."
        )
    precisions = {each.precision for each in sound}
    trained = precisions.pop() if len(precisions) == 1 else "fp32"
    precision = trained if config.precision == "trained" else config.precision
    return Several(config.workers, config.base or sound[0].trained_on, precision, config.threads)
