"""The folder of a server: adapters that come, change, break and go while it answers."""

import asyncio
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from fuzzing import close
from running import TOKEN, Inside, until
from serving import HEADERS, broken_files, write
from test_files import CONFIG, WEIGHTS, rewrite

from infuse import InfuseError
from infuse.bases import load_base
from infuse.serving import files
from infuse.serving.engine import open_model
from infuse.serving.settings import ServeConfig
from infuse.testing import tiny

NAMES = ("ada", "bob", "cyd", "dan")


@pytest.fixture(scope="module")
def shelf(tiny_base, tmp_path_factory) -> Path:
    root, base, draw = tmp_path_factory.mktemp("shelf") / "adapters", load_base(str(tiny_base)), torch.Generator()
    for i, name in enumerate([*NAMES, "other ada", "other bob"]):
        write(base, root / name, "ia3" if i % 2 else "lora", draw.manual_seed(i), 3 + i)
    write(base, root / "mix", "fusion", draw, 3)
    return root


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(str(tiny_base))


@pytest.fixture
def folder(shelf, tmp_path):
    """A folder of four adapters."""
    for name in NAMES:
        shutil.copytree(shelf / name, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def server(folder, base):
    with Inside(folder, base, watch=0.02) as server:
        yield server


def put(content: bytes | Path, folder: Path) -> None:
    """Replace an adapter's file at once, as every careful writer does."""
    content = (content / WEIGHTS).read_bytes() if isinstance(content, Path) else content
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "new").write_bytes(content)
    os.replace(folder / "new", folder / WEIGHTS)


def state(server, name):
    got = server.ask("GET", f"/v1/adapters/{name}")
    return got.json if got.status == 200 else {"status": None}


def becomes(server, name, status):
    until(lambda: state(server, name)["status"] == status)
    return state(server, name)


def test_broken_files_are_listed_with_a_reason_and_hurt_nobody(server, folder):
    before = server.classify("ada", "hello").json
    for name, content in broken_files(folder / "ada").items():
        put(content, folder / f"bytes {name}")
    for name, changes in HEADERS.items():
        shutil.copytree(folder / "bob", folder / f".{name}")
        rewrite(folder / f".{name}", **changes)
        os.rename(folder / f".{name}", folder / f"header {name}")
    shutil.copytree(folder / "bob", folder / ".nan")
    save_nan(folder / ".nan")
    os.rename(folder / ".nan", folder / "not a number")
    (folder / "not a file" / WEIGHTS).mkdir(parents=True)
    (folder / "a file").write_bytes(b"")
    names = [f"bytes {name}" for name in broken_files(folder / "ada")] + [f"header {name}" for name in HEADERS]
    for name in names:
        if name in ("bytes cut", "bytes half"):  # its header is whole: this is seen when it is loaded
            continue
        told = becomes(server, name.replace(" ", "%20"), "broken")
        assert told["error"] and "\n" not in told["error"] and len(told["error"]) < 400, told
    for name in [*names, "not a number"]:
        got = server.classify(name, "hello")
        assert got.status == 409 and got.error.startswith(f"Adapter '{name}' can't be used: "), got
        assert becomes(server, name.replace(" ", "%20"), "broken")["error"] in got.error
    assert server.classify("not a file", "hello").status == 404 == server.classify("a file", "hello").status
    reasons = {name: state(server, f"header%20{name}")["error"] for name in ("hf", "full")}
    assert "(hf)" in reasons["hf"] and "full fine-tuning" in reasons["full"]
    assert "no classification head" in state(server, "header%20no%20head")["error"]
    assert server.classify("ada", "hello").json == before
    assert server.ask("GET", "/readyz").status == 200


def save_nan(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: value * float("nan") for name, value in tensors.items()})


def test_an_adapter_for_another_base_is_refused_with_both_names(server, folder, base, tmp_path):
    other = tmp_path / "the other base"
    shutil.copytree(base.name, other)
    tiny("bert", seed=5, vocab_size=base.model.config.vocab_size).save_pretrained(other)
    write(load_base(str(other)), folder / "stranger", "ia3", torch.Generator().manual_seed(0), 3)
    got = server.classify("stranger", "hello")
    assert got.status == 409 and repr(str(other)) in got.error and repr(base.name) in got.error
    assert becomes(server, "stranger", "broken")["error"] in got.error
    sent = server.ask("POST", "/v1/adapters/new", (folder / "stranger" / WEIGHTS).read_bytes(), TOKEN)
    assert sent.status == 422 and repr(str(other)) in sent.error and not (folder / "new").exists()


def test_a_broken_new_version_leaves_the_old_one_answering_until_it_is_mended(server, folder, shelf):
    before = server.classify("ada", "hello", top_k=3).json
    for content in broken_files(folder / "bob").values():
        put(content, folder / "ada")
        until(lambda: state(server, "ada")["error"])
        assert server.classify("ada", "hello", top_k=3).json == before
        put(shelf / "ada", folder / "ada")
        until(lambda: state(server, "ada")["error"] is None)
    put(shelf / "other ada", folder / "ada")
    until(lambda: server.classify("ada", "hello").json["version"] != before["version"])
    assert server.classify("ada", "hello", top_k=9).json["answers"][0]["top"][0]["label"].startswith("other ada")


def test_what_nobody_foresaw_is_one_adapters_error(server, folder, shelf, monkeypatch, caplog):
    """Others are taken up all the same, and it is itself when it has been mended."""
    before = {name: server.classify(name, "hello").json for name in ("ada", "bob")}
    attach = files.attach

    def fail(model, file, name):
        if file.content == bad:
            raise ZeroDivisionError("nobody foresaw this")
        return attach(model, file, name)

    bad = (shelf / "other ada" / WEIGHTS).read_bytes()
    monkeypatch.setattr(files, "attach", fail)
    put(bad, folder / "ada")
    put(shelf / "other bob", folder / "bob")
    until(lambda: server.classify("bob", "hello").json["version"] != before["bob"]["version"])
    told = until(lambda: state(server, "ada")["error"])
    assert "ZeroDivisionError" in told and "nobody foresaw this" in caplog.text
    assert server.classify("ada", "hello").json == before["ada"]
    shutil.copytree(folder / "ada", folder / "eve")
    got = server.classify("eve", "hello"), server.ask("POST", "/v1/adapters/new", bad, TOKEN)
    assert [each.status for each in got] == [409, 422] and all("ZeroDivisionError" in each.error for each in got)
    monkeypatch.setattr(files, "facts", fail)  # whose arguments are not even what it takes
    put(shelf / "ada", folder / "fay")
    assert "TypeError" in until(lambda: state(server, "fay").get("error"))
    monkeypatch.undo()
    put(shelf / "ada", folder / "ada")
    until(lambda: state(server, "ada")["error"] is None)


def test_values_that_overflow_are_a_refusal_and_touch_no_other_row(server, folder):
    """They are finite, and so are the settings; what they make of a text is not."""
    before = server.classify("ada", "hello").json
    shutil.copytree(folder / "bob", folder / ".vast")
    rewrite(folder / ".vast", lambda tensors: {name: torch.full_like(value, 3e38) for name, value in tensors.items()})
    os.rename(folder / ".vast", folder / "vast")
    gate, got = threading.Event(), {}
    server.engine.batcher.call(lambda: gate.wait(10))
    threads = [
        threading.Thread(target=lambda n=n: got.update({n: server.classify(n, "hello")})) for n in ("ada", "vast")
    ]
    for thread in threads:
        thread.start()
    until(lambda: server.engine.batcher.reserved == 2)
    gate.set()
    for thread in threads:
        thread.join()
    assert got["vast"].status == 409 and "'vast' can't be used: its values are too large" in got["vast"].error
    assert got["ada"].status == 200 and close(got["ada"].json, before)
    items = [{"adapter": name, "texts": ["hello"]} for name in ("ada", "vast")]
    assert server.ask("POST", "/v1/classify", items).status == 409


def test_a_file_that_is_cut_short_in_place_while_it_is_loaded(server, folder):
    """As a memory map, it would end the process (SIGBUS)."""
    before = server.classify("ada", "hello").json
    os.truncate(folder / "ada" / WEIGHTS, 0)
    until(lambda: state(server, "ada")["error"])
    assert server.classify("ada", "hello").json == before
    assert [server.classify(name, "hello").status for name in NAMES] == [200] * 4


def test_adapters_come_and_go(server, folder, shelf):
    assert server.classify("mix", "hello").status == 404
    shutil.copytree(shelf / "mix", folder / "mix")
    assert server.classify("mix", "hello").status == 200  # on demand, before the next look
    assert server.classify("ada", "hello").status == 200
    shutil.rmtree(folder / "ada")
    until(lambda: server.classify("ada", "hello").status == 404)
    assert server.ask("GET", "/v1/adapters/ada").status == 404
    assert server.metric('infuse_texts_total{adapter="ada"}') == 0
    shutil.copytree(shelf / "ada", folder / "ada")
    until(lambda: server.classify("ada", "hello").status == 200)
    os.rename(folder, folder.with_name("away"))
    assert server.classify("ada", "hello").status == 200  # a share that is gone for a moment
    os.rename(folder.with_name("away"), folder)
    becomes(server, "bob", "ready")


def test_runs_that_still_train_are_left_out(server, folder, shelf):
    run = folder / "run"
    shutil.copytree(shelf / "ada", run / "adapter")
    (run / "checkpoints").mkdir()
    becomes(server, "ada", "ready")
    assert server.classify("run", "hello").status == 404
    content, before = (shelf / "other bob" / WEIGHTS).read_bytes(), (run / "adapter" / WEIGHTS).read_bytes()
    sent = server.ask("POST", "/v1/adapters/run", content, TOKEN)
    assert sent.status == 409 and "has not ended" in sent.error
    assert sorted(os.listdir(run)) == ["adapter", "checkpoints"]
    assert (run / "adapter" / WEIGHTS).read_bytes() == before
    (run / "checkpoints").rmdir()
    until(lambda: server.classify("run", "hello").status == 200)


def test_a_change_in_a_member_is_a_new_version(folder, base, shelf):
    shutil.copytree(shelf / "mix", folder / "mix")
    with Inside(folder, base, watch=0.02) as server:
        before = server.classify("mix", "hello").json["version"]
        member = folder / "mix" / "members" / "one"
        save = member.parent.parent.parent / ".one"
        shutil.copytree(member, save)
        rewrite(save, lambda tensors: {name: value * 2 for name, value in tensors.items()})
        put(save, member)
        until(lambda: server.classify("mix", "hello").json["version"] != before)
        shutil.rmtree(member)
        until(lambda: state(server, "mix")["error"])
        assert server.classify("mix", "hello").status == 200


def test_more_adapters_than_stay_in_memory(folder, base):
    with Inside(folder, base, watch=0, resident=2) as server:
        before = {name: server.classify(name, "hello").json for name in NAMES}
        for name in [*NAMES, *reversed(NAMES)] * 3:
            assert server.classify(name, "hello").json == before[name]
            status = {each: state(server, each)["status"] for each in NAMES}
            assert status[name] == "resident" and sum(s == "resident" for s in status.values()) == 2
        until(lambda: len(server.base.model.infuse.adapters) == 2)
        items = [{"adapter": name, "texts": ["hello"]} for name in NAMES]
        got = server.ask("POST", "/v1/classify", items).json  # more than fit, in one request
        assert all(close(each, before[each["adapter"]]) for each in got)
        server.classify("ada", "hello")
        until(lambda: len(server.base.model.infuse.adapters) == 2)


def test_swapping_under_load_mixes_no_versions(server, folder, shelf):
    """Every answer is one whole version's; none is lost, and the old ones leave memory."""
    versions = {}
    for source in ("ada", "other ada"):
        put(shelf / source, folder / "ada")
        server.ask("POST", "/v1/adapters/ada", token=TOKEN)
        got = server.classify("ada", "hello", "card", top_k=9).json
        versions[got["version"]] = got
    wrong, seen, done = [], [], threading.Event()

    def ask():
        while not done.is_set():
            got = server.classify("ada", "hello", "card", top_k=9)
            seen.append(got.json.get("version"))
            if got.status != 200 or not close(got.json, versions.get(seen[-1])):
                wrong.append(got)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(30):
        put(shelf / ("ada", "other ada")[i % 2], folder / "ada")
        assert server.ask("POST", "/v1/adapters/ada", token=TOKEN).json["version"] == list(versions)[i % 2]
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong and set(seen) == set(versions) and len(seen) > 30
    until(lambda: len(server.base.model.infuse.adapters) == 1)


def test_installing(server, folder, shelf):
    content = (shelf / "other bob" / WEIGHTS).read_bytes()
    got = server.ask("POST", "/v1/adapters/new", content, TOKEN).json
    assert got["status"] == "resident" and server.classify("new", "hello").json["version"] == got["version"]
    assert (folder / "new" / WEIGHTS).read_bytes() == content
    old = server.classify("bob", "hello").json["version"]
    assert server.ask("POST", "/v1/adapters/bob", content, TOKEN).json["version"] == got["version"] != old
    assert server.classify("bob", "hello").json["version"] == got["version"]
    for name, bad in broken_files(shelf / "ada").items():
        sent = server.ask("POST", "/v1/adapters/bob", bad, TOKEN)
        assert sent.status == (200 if name == "empty" else 422), (name, sent)  # an empty body loads the folder's
    assert server.ask("POST", "/v1/adapters/x", (shelf / "mix" / WEIGHTS).read_bytes(), TOKEN).status == 422
    assert server.ask("POST", "/v1/adapters/x", token=TOKEN).status == 404
    assert server.classify("bob", "hello").json["version"] == got["version"]
    assert sorted(os.listdir(folder)) == sorted([*NAMES, "new"])
    until(lambda: len(server.base.model.infuse.adapters) == 2)


@pytest.mark.parametrize("method", ["lora", "ia3", "houlsby"])
def test_an_adapter_that_is_sent_is_written_as_it_was_saved(server, folder, base, tmp_path, method):
    """With the config by which PEFT knows it, where PEFT has the method."""
    write(base, tmp_path / "own", method, torch.Generator().manual_seed(0), 3)
    saved = {name: (tmp_path / "own" / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    for name in ("new", "new", "ada"):
        assert server.ask("POST", f"/v1/adapters/{name}", saved[WEIGHTS], TOKEN).status == 200
        assert {path.name: path.read_bytes() for path in (folder / name).iterdir()} == saved


def test_installing_into_a_run_that_no_look_has_found_yet(folder, base, shelf):
    with Inside(folder, base, watch=0) as server:
        shutil.copytree(shelf / "ada", folder / "run" / "adapter")
        content = (shelf / "other bob" / WEIGHTS).read_bytes()
        told = server.ask("POST", "/v1/adapters/run", content, TOKEN).json
        assert told["labels"][0].startswith("other bob") and os.listdir(folder / "run") == ["adapter"]


def test_a_file_beyond_the_limit_is_not_installed(folder, base, shelf):
    with Inside(folder, base, watch=0, max_file=1000) as server:
        sent = server.ask("POST", "/v1/adapters/x", (shelf / "ada" / WEIGHTS).read_bytes(), TOKEN)
        assert sent.status == 413 and "1,000 bytes" in sent.error


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB."""
    (tmp_path / "disk").mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=64k tmpfs '{tmp_path}/disk' 2>/dev/null"):
        pytest.skip("mounting a small disk needs root")
    yield tmp_path / "disk"
    os.system(f"umount '{tmp_path}/disk'")


def test_a_full_disk(small_disk, base, shelf):
    shutil.copytree(shelf / "bob", small_disk / "bob")
    (small_disk / "filler").write_bytes(b"x" * 2**12)
    with Inside(small_disk, base, watch=0.02) as server:
        old = server.classify("bob", "hello").json
        with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096) == 4096:
                pass
            file.write(b"x")
        check_no_space(server, small_disk, shelf, old)


def test_a_disk_that_takes_no_more(folder, base, shelf, monkeypatch):
    """As above, for those who can't mount: the write of the second file fails."""
    with Inside(folder, base, watch=0.02) as server:
        old = server.classify("bob", "hello").json

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("infuse.storage.os.fsync", full)
            check_no_space(server, folder, shelf, old)


def check_no_space(server, folder, shelf, old):
    content, before = (shelf / "other ada" / WEIGHTS).read_bytes(), sorted(os.listdir(folder))
    for name in ("bob", "new"):
        got = server.ask("POST", f"/v1/adapters/{name}", content, TOKEN)
        assert got.status == 507 and "No space" in got.error
    assert server.classify("bob", "hello").json == old and server.classify("new", "hello").status == 404
    assert sorted(os.listdir(folder)) == before


def test_a_file_that_cannot_be_read(server, folder, monkeypatch):
    """Rights, or a disk that fails under the file."""
    before, real = server.classify("ada", "hello").json, Path.read_bytes

    def read(path):
        if path.parent.name in ("ada", "cyd") and path.name == WEIGHTS:
            raise OSError(5, "Input/output error")
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read)
        os.utime(folder / "ada" / WEIGHTS)
        assert server.classify("cyd", "hello").status == 409
        assert "can't be read: Input/output error" in until(lambda: state(server, "ada")["error"])
        assert server.classify("ada", "hello").json == before
    os.utime(folder / "cyd" / WEIGHTS)
    until(lambda: server.classify("cyd", "hello").status == 200)


@pytest.fixture
def closed(monkeypatch):
    """Folders that can't be entered; simulated, because root may enter all."""
    folders, real = set(), os.stat

    def stat(path, **more):
        if not isinstance(path, int) and folders & set(Path(os.fsdecode(path)).parents):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **more)

    monkeypatch.setattr(os, "stat", stat)
    return folders


def test_a_folder_that_cannot_be_entered_hurts_nobody_else(server, folder, shelf, closed):
    before = server.classify("ada", "hello").json
    closed |= {folder / "lost+found", folder / "ada"}
    (folder / "lost+found").mkdir()
    shutil.copytree(shelf / "other ada", folder / "new")
    becomes(server, "new", "ready")
    assert "can't be read" in becomes(server, "lost+found", "broken")["error"]
    assert server.classify("lost+found", "hello").status == 409
    assert server.classify("ada", "hello").json == before
    closed.clear()
    until(lambda: state(server, "lost+found")["status"] is None)
    assert server.classify("lost+found", "hello").status == 404


def test_a_root_that_cannot_be_read_for_a_while_is_told_once(server, folder, shelf, closed, caplog):
    before = server.classify("ada", "hello").json
    closed.add(folder.parent)
    told = until(lambda: [r for r in caplog.records if "can't be read (Permission denied)" in r.getMessage()])
    time.sleep(5 * server.config.watch)
    again = [r for r in caplog.records if "can't be read" in r.getMessage()]
    assert len(again) == 1 and again == told and not again[0].exc_info
    assert server.classify("ada", "hello").json == before
    closed.clear()
    shutil.copytree(shelf / "other ada", folder / "new")
    becomes(server, "new", "ready")


def test_a_start_over_folders_that_cannot_be_entered(folder, base, closed):
    closed.add(folder / NAMES[0])
    model = open_model(ServeConfig(folder))
    assert model.about.name == base.name and model.close()
    for each in (folder, folder.parent):
        closed.add(each)
        with pytest.raises(InfuseError, match=r"adapters can't be read \(Permission denied\)"):
            open_model(ServeConfig(folder))


def test_reloading_while_the_old_file_is_being_loaded(folder, base, shelf):
    """The answer to POST is the file as it was then, not as an earlier load has read it."""
    with Inside(folder, base, watch=0) as server:
        gate, held = threading.Event(), threading.Event()
        server.engine.batcher.call(lambda: (held.set(), gate.wait(10)))
        held.wait(10)
        thread = threading.Thread(target=lambda: server.classify("ada", "hello"))
        thread.start()
        until(lambda: server.engine.batcher.jobs)
        put(shelf / "other ada", folder / "ada")
        got, arrived, load = [], threading.Event(), server.engine.store.load

        async def loads(name):
            arrived.set()
            return await load(name)

        server.engine.store.load = loads
        loading = threading.Thread(target=lambda: got.append(server.ask("POST", "/v1/adapters/ada", token=TOKEN).json))
        loading.start()
        assert arrived.wait(10)
        gate.set()
        thread.join()
        loading.join()
        assert got[0]["labels"][0].startswith("other ada")


def test_a_folder_that_says_no_base(tmp_path, base, shelf):
    with pytest.raises(InfuseError, match=r"no adapter that can be served.*--base"):
        open_model(ServeConfig(tmp_path))
    put(b"rubbish", tmp_path / "broken")
    with pytest.raises(InfuseError, match="no adapter that can be served"):
        open_model(ServeConfig(tmp_path))
    shutil.copytree(shelf / "ada", tmp_path / "zed")
    model = open_model(ServeConfig(tmp_path))
    assert (model.about.name, model.about.precision) == (base.name, "fp32")
    assert model.close()


def test_a_thousand_adapters_are_found_quickly(tmp_path, base, shelf):
    for i in range(1000):
        (tmp_path / f"{i:04}").mkdir()
        os.link(shelf / "bob" / WEIGHTS, tmp_path / f"{i:04}" / WEIGHTS)
    with Inside(tmp_path, base, watch=0, resident=8) as server:
        assert len(server.ask("GET", "/v1/adapters").json["adapters"]) == 1000
        asyncio.run(asyncio.wait_for(asyncio.to_thread(ask_some, server), 20))
        until(lambda: len(base.model.infuse.adapters) == 8)


def ask_some(server):
    for i in range(0, 1000, 50):
        assert server.classify(f"{i:04}", "hello").status == 200
