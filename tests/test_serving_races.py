"""What happens to an adapter while its file is being read: a reload, a withdrawal, a removal, a return."""

import asyncio
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from running import TOKEN, Inside, until
from serving import write

import infuse.serving.store as store_module
from infuse.bases import load_base
from infuse.model import store_of
from infuse.serving import files
from infuse.serving.engine import Engine
from infuse.serving.model import Here
from infuse.serving.refusals import RefusedError
from infuse.serving.settings import ServeConfig


@pytest.fixture
def slow(monkeypatch):
    """Reading a file now waits: ``begun`` is set when it has the content, and it goes on with ``go``."""

    class Slow:
        begun, go = threading.Event(), threading.Event()

    def read(folder):
        file = inner(folder)
        Slow.begun.set()
        assert Slow.go.wait(30)
        return file

    inner = files.read
    monkeypatch.setattr(store_module.files, "read", read)
    return Slow


@pytest.fixture
def made(tmp_path, tiny_base):
    """A folder with version A of one adapter, the folder of version B, and a function that makes an engine."""
    base, generator = load_base(str(tiny_base)), torch.Generator().manual_seed(0)
    for path in ("served/x", "B"):
        write(base, tmp_path / path, "ia3", generator, 3)
    return tmp_path / "served", tmp_path / "B", lambda: Engine(ServeConfig(tmp_path / "served"), Here(base))


def test_a_reload_never_joins_a_load_that_read_the_old_file(made, slow):
    root, new, engine = made

    async def work() -> None:
        store = engine().store
        leasing = asyncio.create_task(store.lease("x"))
        await asyncio.to_thread(slow.begun.wait)
        shutil.copytree(new, root / "x", dirs_exist_ok=True)
        loading = asyncio.create_task(store.load("x"))
        await asyncio.sleep(0.05)
        slow.go.set()
        store.release(await leasing)
        entry = await loading
        assert entry.served is not None and entry.served.facts.version == files.read(new).version

    asyncio.run(work())


def test_a_file_that_was_replaced_during_a_load_is_loaded_again(made, slow):
    root, new, engine = made

    async def work() -> None:
        store = engine().store
        slow.go.set()
        await store.refresh()
        slow.go.clear()
        slow.begun.clear()
        leasing = asyncio.create_task(store.lease("x"))
        await asyncio.to_thread(slow.begun.wait)
        shutil.copytree(new, root / "x", dirs_exist_ok=True)
        looking = asyncio.create_task(store.refresh())
        await asyncio.sleep(0.1)
        slow.go.set()
        await looking
        leased = await leasing
        assert leased.facts.version == files.read(new).version
        await store.refresh()
        assert store.known("x").served is leased

    asyncio.run(work())


@pytest.mark.parametrize("change", ["withdraw", "remove"])
def test_what_goes_away_while_it_is_loaded_is_not_served(made, slow, change):
    root, _, engine = made

    async def work() -> None:
        own = engine()
        store = own.store
        leasing = asyncio.create_task(store.lease("x"))
        await asyncio.to_thread(slow.begun.wait)
        if change == "withdraw":
            store.withdraw("x")
        else:
            shutil.rmtree(root / "x")
            await store.refresh()
        slow.go.set()
        with pytest.raises(RefusedError, match="no adapter"):
            await leasing
        with pytest.raises(RefusedError, match="no adapter"):
            await store.lease("x")
        assert not store.recent
        await asyncio.to_thread(own.batcher.drain, 30)
        assert not hasattr(own.model.base.model, "infuse") or not store_of(own.model.base.model).adapters

    asyncio.run(work())


def test_a_folder_that_is_gone_is_unknown(made):
    root, _, engine = made

    async def work() -> None:
        store = engine().store
        await store.refresh()
        shutil.rmtree(root / "x")
        with pytest.raises(RefusedError) as refused:
            await store.lease("x")
        assert refused.value.status == 404

    asyncio.run(work())


def test_an_adapter_that_returns_during_a_look_stays(made, monkeypatch):
    *_, engine = made

    async def work() -> None:
        store = engine().store
        await store.refresh()
        entry = await store.load("x")
        away = SimpleNamespace(present=set(), changed=[])
        monkeypatch.setattr(store_module, "look", lambda *_: away)  # as if it had been away for a moment
        await store.refresh()
        assert store.known("x") is entry and entry.status == "resident"

    asyncio.run(work())


def test_withdrawing_while_it_is_loaded(made, tiny_base):
    """A load that ends after the withdrawal brings nothing back."""
    (folder, other, _), base = made, load_base(str(tiny_base))
    shutil.copytree(other, folder / "y")
    with Inside(folder, base, watch=0) as server:
        gate, held = threading.Event(), threading.Event()
        server.engine.batcher.call(lambda: (held.set(), gate.wait(10)))
        held.wait(10)
        asked = []
        thread = threading.Thread(target=lambda: asked.append(server.classify("x", "hello")))
        thread.start()
        until(lambda: server.engine.store.entries["x"].loading and server.engine.batcher.jobs)
        assert server.ask("DELETE", "/v1/adapters/x", token=TOKEN).json["status"] == "withdrawn"
        gate.set()
        thread.join()
        assert asked[0].status == 404 == server.classify("x", "hello").status
        server.classify("y", "hello")
        until(lambda: len(base.model.infuse.adapters) == 1)
        assert server.ask("POST", "/v1/adapters/x", token=TOKEN).json["status"] == "resident"
