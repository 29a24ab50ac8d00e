"""The adapter store: which adapters a folder holds, which are in memory, and who uses them."""

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from infuse.errors import InfuseError
from infuse.formats.bundle import CONFIG, WEIGHTS, write_folder
from infuse.heads import Head, check_finite
from infuse.serving import files, refusals
from infuse.serving.batcher import Batcher
from infuse.serving.files import Facts, File, Stamp
from infuse.serving.logs import event
from infuse.serving.look import HANGS, PATIENCE, Look, apart, look
from infuse.serving.model import Model
from infuse.texts import tokenize
from infuse.training.folders import adapter_folder

log = logging.getLogger("infuse.serving")


@dataclass(eq=False)
class Served:
    """One version of one adapter in memory; requests hold it until they are answered.

    Attributes:
        inner: its name in the model, which no other version shares.
        users: how many requests hold it.
        retired: another version, or none, has taken its place.
    """

    name: str
    inner: str
    facts: Facts
    head: Head
    users: int = 0
    retired: bool = False


@dataclass(eq=False)
class Entry:
    """What the store knows of an adapter of the folder."""

    name: str
    folder: Path
    stamp: Stamp = ()
    facts: Facts | None = None
    error: str | None = None
    served: Served | None = None
    withdrawn: bool = False
    waiting: int = 0
    loading: asyncio.Task | None = None

    @property
    def status(self) -> str:
        if self.withdrawn:
            return "withdrawn"
        if self.served is not None:
            return "resident"
        return "broken" if self.error else "ready"


class Store:
    """Adapters by name, of which the ``resident`` most recently used stay in memory.

    All of its state belongs to the event loop; the model itself is changed in the batcher's thread alone.

    Args:
        root: the folder.
        model: the model.
        batcher: whose thread owns it.
        resident: how many adapters may stay in memory.
        forgotten: called with the name of an adapter that is gone for good.
    """

    def __init__(
        self,
        root: Path,
        model: Model,
        batcher: Batcher,
        resident: int = 1000,
        forgotten: Callable[[str], Any] = lambda name: None,
    ):
        self.root, self.model, self.base, self.batcher = root, model, model.about.base, batcher
        self.resident, self.forgotten = resident, forgotten
        self.entries: dict[str, Entry] = {}
        self.recent: OrderedDict[str, Entry] = OrderedDict()
        self.numbers = count()
        self.stuck: dict[str, Look] = {}
        self.trial = tokenize(model.tokenizer, ["A text that every adapter is tried on."], 16)

    async def lease(self, name: str) -> Served:
        """The adapter as it is now, loaded if need be; :meth:`release` gives it back.

        Raises:
            RefusedError: there is no such adapter (404), or its file can't be used (409).
        """
        stuck = self.stuck.get(name)
        if stuck and not stuck.over.is_set() and (name not in self.entries or self.entries[name].served is None):
            raise refusals.unusable(name, HANGS)
        entry = self.entries.get(name) or await self._discover(name)
        entry.waiting += 1  # and so it isn't unloaded for another before its turn comes
        try:
            while entry.served is None:
                if entry.withdrawn or self.entries.get(name) is not entry:
                    raise refusals.unknown(name)
                await self._loaded(entry)
        finally:
            entry.waiting -= 1
        served = entry.served
        served.users += 1
        self.recent.move_to_end(name)
        return served

    def release(self, served: Served) -> None:
        served.users -= 1
        if served.retired and not served.users:
            self._detach(served)
        self._make_room()

    async def refresh(self) -> None:
        """Look at the folder: new adapters, changed ones (swapped at once if in memory), and removed ones."""
        known = {entry.name: entry.stamp for entry in self.entries.values()}
        seen = await apart(look, self.root, known, self.stuck, self._facts)
        for name in known.keys() - seen.present - self.stuck.keys():
            if not await apart(self._gone, name):  # it has come since, or all are away
                continue
            entry = self.entries.pop(name)
            self._unload(entry)
            self.forgotten(name)
            log.info(event("gone", adapter=name))
        for name in self.stuck:
            entry = self.entries.setdefault(name, Entry(name, self.root / name))
            if entry.error != HANGS:
                log.warning(event("stuck", adapter=name, error=HANGS))
            entry.stamp, entry.error = (), HANGS
        for name, folder, stamp, found in seen.changed:
            entry = self.entries.setdefault(name, Entry(name, folder))
            if entry.served is not None:
                await self._try(entry)
                continue
            entry.folder, entry.stamp = folder, stamp
            entry.facts, entry.error = (None, found) if isinstance(found, str) else (found, None)
            facts = {"version": entry.facts.version} if entry.facts else {"error": entry.error}
            log.info(event("found", adapter=name, **facts))

    async def load(self, name: str) -> Entry:
        """Load or reload an adapter from the folder, and serve it again if it was withdrawn."""
        entry = self.entries.get(name) or await self._discover(name)
        entry.withdrawn = False
        while entry.loading is not None:  # it may have read the file before it was changed
            await asyncio.wait({entry.loading})
        entry.stamp = ()
        await self._loaded(entry)
        return entry

    async def install(self, name: str, content: bytes) -> Entry:
        """Check the content of an adapter's file, write it into the folder, and serve it.

        Raises:
            RefusedError: it is no sound adapter for this base (422), can't be written (507), or the folder is a run
                that still trains (409).
        """
        folder = await apart(self._place, name)
        try:
            file, found = await apart(self._sound, folder, content)
            inner = f"served {next(self.numbers)}"
            config = await self._in_model(lambda: self._tried(file, inner))
        except refusals.RefusedError:
            raise
        except Exception as error:
            raise refusals.RefusedError(422, f"The body can't be served as {name!r}: {_reason(name, error)}") from None
        config = json.dumps(config | {"base_model_name_or_path": found.base}, indent=1) + "\n"
        try:
            await apart(write_folder, folder, {CONFIG: config.encode(), WEIGHTS: content})
        except (OSError, InfuseError) as error:
            raise refusals.RefusedError(507, f"The adapter can't be written: {error}") from None
        return await self.load(name)

    def _place(self, name: str) -> Path:
        """The folder of an adapter's file, there or not."""
        try:
            return adapter_folder(self.root / name)
        except InfuseError:
            raise refusals.training(name) from None
        except OSError as error:
            raise refusals.RefusedError(507, f"The adapter can't be written: {error.strerror}.") from None

    def _sound(self, folder: Path, content: bytes) -> tuple[File, Facts]:
        file = File(folder / WEIGHTS, content, files.facts_of(content, Path("the body")))
        if file.facts.get("members"):
            raise InfuseError("a fusion has members in files of their own; copy its folder to the server.")
        return file, files.facts(file, self.base)

    def _tried(self, file: File, inner: str) -> dict[str, Any]:
        """The config of an adapter that can be attached."""
        self._attach(file, inner)
        try:
            return self.model.config(inner)
        finally:
            self.model.remove(inner)

    def _attach(self, file: File, inner: str) -> None:
        """Attach an adapter, and see it answer a text: what can't be computed is refused once, not at each request."""
        self.model.attach(file, inner)
        try:
            (row,) = self.model.forward(self.trial, [inner])
            if row.shape != (len(file.head.labels),):
                raise InfuseError(f"it gives {row.size} values for {len(file.head.labels)} labels.")
            check_finite(row)
        except BaseException:
            self.model.remove(inner)
            raise

    def known(self, name: str) -> Entry:
        """What the last look at the folder has found."""
        if name not in self.entries:
            raise refusals.unknown(name)
        return self.entries[name]

    def withdraw(self, name: str) -> Entry:
        """Stop serving an adapter until :meth:`load`; its files stay."""
        entry = self.known(name)
        entry.withdrawn = True
        self._unload(entry)
        return entry

    def _facts(self, name: str, folder: Path) -> Facts | str:
        """What a file says about itself, or why it can't be used."""
        try:
            return self._read(folder)[1]
        except Exception as error:
            return _reason(name, error)

    def _read(self, folder: Path) -> tuple[File, Facts]:
        file = files.read(folder)
        return file, files.facts(file, self.base)

    async def _discover(self, name: str) -> Entry:
        """An adapter that has come since the last look at the folder."""
        if not files.valid(name):
            raise refusals.unknown(name)
        for found, folder, _ in await apart(lambda: list(files.find(self.root, name))):
            return self.entries.setdefault(found, Entry(found, folder))
        raise refusals.unknown(name)

    def _gone(self, name: str) -> bool:
        return self.root.is_dir() and not any(files.find(self.root, name))

    async def _try(self, entry: Entry) -> None:
        try:
            async with asyncio.timeout(PATIENCE):  # it goes on loading: nobody else is kept waiting
                await self._loaded(entry)
        except refusals.RefusedError as refusal:
            log.warning(event("refused", adapter=entry.name, error=str(refusal)))
        except TimeoutError:
            log.warning(event("slow", adapter=entry.name))

    async def _loaded(self, entry: Entry) -> None:
        """Bring an adapter's file into memory, once for all who wait for it."""
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load(entry))
            entry.loading.add_done_callback(lambda _: setattr(entry, "loading", None))
        await asyncio.shield(entry.loading)

    async def _load(self, entry: Entry) -> None:
        now = await apart(files.stamp, entry.folder)
        if entry.error and now == entry.stamp:
            raise refusals.unusable(entry.name, entry.error)
        fresh: Served | None = None
        try:
            file, facts = await apart(self._read, entry.folder)
            if entry.served is None or entry.served.facts.version != facts.version:
                inner = f"served {next(self.numbers)}"
                await self._in_model(lambda: self._attach(file, inner))
                fresh = Served(entry.name, inner, facts, file.head)
        except refusals.RefusedError:  # not for its file, but because the server ends
            raise
        except Exception as error:
            if await apart(self._gone, entry.name):  # since the last look at the folder
                raise refusals.unknown(entry.name) from None
            # An older version that is in memory goes on answering.
            entry.stamp, entry.error = now, _reason(entry.name, error)
            raise refusals.unusable(entry.name, entry.error) from None
        if fresh is not None and await apart(files.stamp, entry.folder) != now:  # replaced meanwhile, and maybe told so
            self._retire(fresh)
            return await self._load(entry)
        entry.stamp, entry.facts, entry.error = now, facts, None
        if fresh is None:
            return
        if entry.withdrawn or self.entries.get(entry.name) is not entry:  # while it was being loaded
            self._retire(fresh)
            raise refusals.unknown(entry.name)
        self._swap(entry, fresh)

    def _swap(self, entry: Entry, served: Served) -> None:
        old, entry.served = entry.served, served
        if old is not None:
            self._retire(old)
        log.info(event("loaded", adapter=entry.name, version=served.facts.version))
        self.recent[entry.name] = entry
        self.recent.move_to_end(entry.name)
        self._make_room(entry)

    def _make_room(self, newest: Entry | None = None) -> None:
        """Unload the least recently used adapters beyond those that may stay, except what is in use."""
        if len(self.recent) > self.resident:
            idle = [e for e in self.recent.values() if e.served and not (e.served.users or e.waiting or e is newest)]
            for oldest in idle[: len(self.recent) - self.resident]:
                self._unload(oldest)

    def _unload(self, entry: Entry) -> None:
        self.recent.pop(entry.name, None)
        served, entry.served = entry.served, None
        if served is not None:
            self._retire(served)

    def _retire(self, served: Served) -> None:
        served.retired = True
        if not served.users:
            self._detach(served)

    def _detach(self, served: Served) -> None:
        self.batcher.call(lambda: self.model.remove(served.inner))

    async def _in_model(self, job: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self.batcher.call(job))


def _reason(name: str, error: Exception) -> str:
    """Why an adapter can't be used, in a sentence; what nobody foresaw is its error alone, with more in the log."""
    if isinstance(error, InfuseError):
        return str(error)
    log.error(event("unusable", adapter=name), exc_info=error)
    return f"reading it failed ({type(error).__name__}); the server's log says why."
