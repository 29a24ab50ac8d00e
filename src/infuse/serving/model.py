"""The model that answers: a base and its adapters, in this process or in others."""

import gc
import signal
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from infuse.bases import BaseModel, load_base, tokenizer_of
from infuse.checkpoint import config_of
from infuse.errors import InfuseError
from infuse.fingerprint import Base
from infuse.heads import grouped
from infuse.precision import name_of
from infuse.processes import safe_start
from infuse.serving import files, refusals
from infuse.serving.files import File
from infuse.sites import arch_of
from infuse.texts import Tokens, pad

_PULSE = 1.0  # seconds


@dataclass(frozen=True)
class About:
    """The base that a model runs: its name, the number format of its trunk, and its fingerprint."""

    name: str
    precision: str
    base: Base


class Model(Protocol):
    """What the batcher's threads call, and nobody else."""

    about: About
    tokenizer: PreTrainedTokenizerBase

    def attach(self, file: File, name: str) -> None:
        """Attach an adapter, its members and its head; all of them or none (an InfuseError)."""
        ...

    def remove(self, name: str) -> None:
        """Detach it again; what is not there is no error."""
        ...

    def config(self, name: str) -> dict[str, Any]:
        """What an attached adapter's adapter_config.json says."""
        ...

    def forward(self, tokens: Tokens, names: list[str]) -> list[np.ndarray]:
        """Probabilities of the labels of its adapter for every row."""
        ...

    def silence(self) -> float:
        """Seconds for which it has owed an answer; 0 if it owes none. Called from any thread."""
        ...


class Here:
    """A model in this process."""

    def __init__(self, base: BaseModel):
        self.base, self.tokenizer = base, base.tokenizer
        precision = name_of(next(base.model.parameters()).dtype)
        self.about = About(base.name, precision, Base.of(base.model, arch_of(base.model)))

    @torch.inference_mode()  # what nobody can write to need not be looked at before every pass
    def attach(self, file: File, name: str) -> None:
        files.attach(self.base.model, file, name)

    def remove(self, name: str) -> None:
        files.remove(self.base.model, name)

    def config(self, name: str) -> dict[str, Any]:
        return config_of(self.base.model, name)

    @torch.inference_mode()
    def forward(self, tokens: Tokens, names: list[str]) -> list[np.ndarray]:
        model = self.base.model
        batch = pad(tokens, self.base.pad_id, next(model.parameters()).device)
        rows: list[np.ndarray] = [np.empty(0)] * len(names)
        for head, own, logits in grouped(model, batch, names):
            for row, values in zip(own, head.probabilities(logits).numpy(), strict=True):
                rows[row] = values
        return rows

    def silence(self) -> float:
        return 0.0

    def ping(self) -> None:
        """Answered between two calls, which shows that the next one will be."""


class Several:
    """Models in processes of their own, alike, each of which runs a pass at a time.

    Args:
        count: how many.
        name, precision: see :class:`Apart`.
        threads: of each one's forward passes; 0: one a core less one, shared out.
    Raises:
        InfuseError: the base can't be loaded. (From the other functions: 503, because a process has ended.)
    """

    def __init__(self, count: int, name: str, precision: str, threads: int = 0):
        each = threads or max(1, (torch.get_num_threads() - 1) // count)
        with ThreadPoolExecutor(count) as starting:
            started = [starting.submit(Apart, name, precision, each) for _ in range(count)]
        failed = [error for each in started if (error := each.exception()) is not None]
        self.models = [each.result() for each in started if each.exception() is None]
        if failed:
            self.close()
            raise failed[0]
        self.about, self.tokenizer = self.models[0].about, self.models[0].tokenizer
        self.free: SimpleQueue[Apart] = SimpleQueue()
        for model in self.models:
            self.free.put(model)
            Thread(target=model.watch, name="infuse-pulse", daemon=True).start()

    def attach(self, file: File, name: str) -> None:
        for done, model in enumerate(self.models):
            try:
                model.attach(file, name)
            except BaseException:
                for other in self.models[:done]:
                    other.remove(name)
                raise

    def remove(self, name: str) -> None:
        for model in self.models:
            model.remove(name)

    def config(self, name: str) -> dict[str, Any]:
        return self.models[0].config(name)

    def forward(self, tokens: Tokens, names: list[str]) -> list[np.ndarray]:
        model = self.free.get()
        try:
            return model.forward(tokens, names)
        finally:
            self.free.put(model)

    def silence(self) -> float:
        return max(model.silence() for model in self.models)

    def wait(self) -> None:
        """Return when one of the processes has ended."""
        wait([model.process.sentinel for model in self.models])

    def close(self) -> bool:
        """End the processes, which have nothing left to answer; False if one had ended by itself."""
        lived = [model.close() for model in self.models]
        return all(lived)


class Apart:
    """A model in a process of its own, whose forward passes never wait for Python that parses requests.

    Args:
        name: the base.
        precision: of its trunk.
        threads: of a forward pass.
    Raises:
        InfuseError: the base can't be loaded. (From the other functions: 503, because the process has ended.)
    """

    def __init__(self, name: str, precision: str, threads: int = 1):
        context = get_context("spawn")  # a fork would copy the locks of torch's threads as they happen to be
        self.pipe, theirs = context.Pipe()
        self.lock = Lock()  # a question and its answer belong together
        self.asked: float | None = None
        self.process = context.Process(target=_work, args=(theirs, name, precision, threads), daemon=True)
        with safe_start():
            resource_tracker.ensure_running()  # or its own start, a part of the next one, would undo the mask
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _THE_SERVERS)  # inherited: Ctrl-C is for the server
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        try:
            self.tokenizer = tokenizer_of(name)
            self.about: About = self._answer()
        except BaseException:
            self.close()
            raise

    def attach(self, file: File, name: str) -> None:
        self._call("attach", file, name)

    def remove(self, name: str) -> None:
        self._call("remove", name)

    def config(self, name: str) -> dict[str, Any]:
        return self._call("config", name)

    def forward(self, tokens: Tokens, names: list[str]) -> list[np.ndarray]:
        return self._call("forward", tokens, names)

    def silence(self) -> float:
        asked = self.asked
        return 0.0 if asked is None else time.monotonic() - asked

    def watch(self) -> None:
        """Ask for an answer now and then, where nothing else does, until the process has ended."""
        try:
            while True:
                time.sleep(_PULSE)
                if self.asked is None:
                    self._call("ping")
        except InfuseError:
            return

    def close(self) -> bool:
        """End the process, which has nothing left to answer; False if it had ended by itself."""
        lived = self.process.is_alive()
        self.pipe.close()
        self.process.join(1)
        self.process.kill()
        self.process.join()
        return lived

    def _call(self, function: str, *given: Any) -> Any:
        with self.lock:
            self.asked = time.monotonic()
            try:
                self.pipe.send((function, given))
                return self._answer()
            except OSError:
                raise refusals.gone(self.process.exitcode) from None
            finally:
                self.asked = None

    def _answer(self) -> Any:
        try:
            done, found = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            raise refusals.gone(self.process.exitcode) from None
        if done:
            return found
        raise found


_THE_SERVERS = {signal.SIGINT, signal.SIGTERM} | ({signal.SIGHUP} if hasattr(signal, "SIGHUP") else set())


def spare_what_stays() -> None:
    """Take what is there for good, a million objects of libraries, out of what Python's collector looks through.

    Each of its full collections would hold all requests up for a tenth of a second.
    """
    gc.collect()
    gc.freeze()


def _work(pipe: Connection, name: str, precision: str, threads: int) -> None:
    """Answer calls until the other end is closed, be it because the server's process was killed."""
    for each in _THE_SERVERS:  # to end is its decision: there are requests to answer
        signal.signal(each, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        model = Here(load_base(name, precision=precision))
    except InfuseError as error:
        pipe.send((False, error))
        return
    spare_what_stays()
    answer: tuple[bool, Any] = True, model.about
    while True:
        try:
            pipe.send(answer)
            function, given = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, getattr(model, function)(*given)
        except InfuseError as error:
            answer = False, error
        except Exception:  # with its traceback, as text: not every exception can be sent
            answer = False, RuntimeError(traceback.format_exc())
