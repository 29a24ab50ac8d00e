"""The engine: from texts and adapter names to probabilities, with everything of the server but HTTP."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from infuse.bases import BaseModel, load_base
from infuse.errors import InfuseError
from infuse.heads import grouped
from infuse.model import Base, arch_of
from infuse.precision import name_of
from infuse.serving import files, refusals
from infuse.serving.batcher import Batcher
from infuse.serving.files import Facts
from infuse.serving.metrics import Metrics
from infuse.serving.settings import ServeConfig
from infuse.serving.store import Served, Store
from infuse.texts import Tokens, pad, tokenize


@dataclass(frozen=True)
class Labelled:
    """What one adapter says of some texts: probabilities, (texts, labels), and which version of it said so."""

    served: Served
    probabilities: list[np.ndarray]


class Engine:
    """A base model, its batcher and its store. Make it in the thread of the event loop that uses it.

    Args:
        config: the server's settings.
        base: the loaded base model.
    """

    def __init__(self, config: ServeConfig, base: BaseModel):
        self.config, self.base, self.metrics = config, base, Metrics()
        self.batcher = Batcher(
            self._forward, window=config.window / 1000, max_tokens=config.max_tokens, capacity=config.queue,
            mixed=config.mixed, observe=self.metrics.passed,
        )  # fmt: skip
        fingerprint = Base.of(base.model, arch_of(base.model))
        self.store = Store(config.folder, base.model, fingerprint, self.batcher, config.resident, self.metrics.forget)
        self.metrics.follow(self.batcher, self.store)
        self.tokenizing = ThreadPoolExecutor(1, "infuse-tokens")  # fast tokenizers can't be shared by threads

    @property
    def precision(self) -> str:
        return name_of(next(self.base.model.parameters()).dtype)

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
                    tokens: Tokens = await asyncio.get_running_loop().run_in_executor(
                        self.tokenizing, self._tokenize, [texts for _, texts in items], held
                    )
                    names = [s.inner for s, (_, texts) in zip(held, items, strict=True) for _ in texts]
                    rows = iter(await self.batcher.run(tokens, names))
        except TimeoutError:
            raise refusals.late(self.config.deadline) from None
        finally:
            for served in held:
                self.store.release(served)
        answered = [Labelled(s, [next(rows) for _ in texts]) for s, (_, texts) in zip(held, items, strict=True)]
        for each in answered:
            if each.served.name in self.store.entries:  # or the series of one that has gone meanwhile would come back
                self.metrics.texts.labels(each.served.name).inc(len(each.probabilities))
        return answered

    async def watch(self) -> None:
        """Follow the changes in the folder, for ever."""
        while True:
            await asyncio.sleep(self.config.watch)
            try:
                await self.store.refresh()
            except Exception:  # a folder that can't be read now may be there again later
                self.metrics.log.exception("the folder %s can't be read", self.config.folder)

    def _tokenize(self, groups: Sequence[Sequence[str]], held: Sequence[Served]) -> Tokens:
        tokens: Tokens = []
        for texts, served in zip(groups, held, strict=True):
            tokens += tokenize(self.base.tokenizer, texts, served.facts.max_length)
        return tokens

    @torch.inference_mode()
    def _forward(self, tokens: Tokens, names: list[str]) -> list[np.ndarray]:
        model: nn.Module = self.base.model
        batch = pad(tokens, self.base.pad_id, next(model.parameters()).device)
        rows: list[np.ndarray] = [np.empty(0)] * len(names)
        for head, own, logits in grouped(model, batch, names):
            for row, values in zip(own, head.probabilities(logits).numpy(), strict=True):
                rows[row] = values
        return rows


def open_engine(config: ServeConfig) -> Engine:
    """Load the base that the folder's adapters share, and make an engine over it.

    Raises:
        InfuseError: settings that can't work; no base is given and no adapter says which one.
    """
    config.check()
    sound: list[Facts] = []
    for _, folder, _ in files.find(config.folder):
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
    if config.threads:
        torch.set_num_threads(config.threads)
    return Engine(config, load_base(config.base or sound[0].trained_on, precision=precision))
