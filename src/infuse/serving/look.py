"""Looks at the folder, in threads of their own: one that hangs, as a broken network folder can, is left behind."""

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from infuse.serving import files
from infuse.serving.files import Facts, Stamp

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds in which the files of one adapter must answer."""

HANGS = f"its files did not answer within {PATIENCE:g} s; mend its folder, or move it away."


async def apart(function: Callable[..., T], *args: Any) -> T:
    """What ``function`` gives in a thread that nobody waits for when the server ends."""
    loop, result = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def tell(done: Callable[[Any], None], value: Any) -> None:
        if not result.done():
            done(value)

    def run() -> None:
        try:
            found, done = function(*args), result.set_result
        except BaseException as error:
            found, done = error, result.set_exception
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, done, found)

    threading.Thread(target=run, name="infuse-files", daemon=True).start()
    return await result


class Look:
    """One look at every adapter of a folder.

    Args:
        root: the folder.
        known: the stamps of adapters as they were found before.
        skip: names to leave out.
        read: what a file says about itself, or why it can't be used.
    Attributes:
        present: the names that were found.
        changed: what is new of them, each with its folder, its stamp and what ``read`` gave.
        error: why the folder itself can't be read.
    """

    def __init__(
        self, root: Path, known: Mapping[str, Stamp], skip: Collection[str], read: Callable[[str, Path], Facts | str]
    ):
        self.root, self.known, self.skip, self.read = root, known, skip, read
        self.present: set[str] = set()
        self.changed: list[tuple[str, Path, Stamp, Facts | str]] = []
        self.error: OSError | None = None
        self.at: Path = root
        self.steps = 0
        self.left = False
        self.over = threading.Event()
        threading.Thread(target=self._run, name="infuse-look", daemon=True).start()

    def wait(self) -> bool:
        """Whether it comes to its end; False once it hangs, at ``at``."""
        steps = -1
        while not self.over.wait(PATIENCE):
            if self.steps == steps:
                self.left = True
                return False
            steps = self.steps
        return True

    def _run(self) -> None:
        try:
            for child in sorted(self.root.iterdir()):
                if self.left:
                    return
                if child.name not in self.skip:
                    self.at, self.steps = child, self.steps + 1
                    self._see(child.name)
        except OSError as error:
            self.error = error
        finally:
            self.over.set()

    def _see(self, child: str) -> None:
        for name, folder, stamp in files.find(self.root, child):
            self.present.add(name)
            if self.known.get(name) != stamp:
                self.changed.append((name, folder, stamp, self.read(name, folder)))


def look(
    root: Path, known: Mapping[str, Stamp], stuck: dict[str, Look], read: Callable[[str, Path], Facts | str]
) -> Look:
    """A look that has come to its end; adapters at which one hangs are put into ``stuck``, until they answer.

    Raises:
        OSError: the folder itself can't be read, or hangs.
    """
    answered = [stuck.pop(name) for name, look in [*stuck.items()] if look.over.is_set()]
    late = [change for look in answered for change in look.changed if change[0] == look.at.name]
    known = {**known, **{name: stamp for name, _, stamp, _ in late}}
    while True:
        look = Look(root, known, set(stuck), read)
        if look.wait():
            if look.error is not None:
                raise look.error
            look.changed = late + look.changed
            return look
        if look.at == root:
            raise TimeoutError(110, f"no answer within {PATIENCE:g} s", str(root))
        stuck[look.at.name] = look
