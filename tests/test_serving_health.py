"""A server that is stopped, killed or led astray: what it says of itself, what it goes on doing, and that it ends."""

import os
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from running import TOKEN, Inside, Running, request, until
from serving import fill
from test_files import WEIGHTS, rewrite

from infuse import InfuseError, storage
from infuse.bases import load_base
from infuse.serving import files
from infuse.serving import look as look_module
from infuse.serving.engine import open_model
from infuse.serving.settings import ServeConfig


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(str(tiny_base))


@pytest.fixture(scope="module")
def shelf(tiny_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf") / "adapters"
    return root, fill(root, str(tiny_base), ["ia3", "lora", "pfeiffer", "fusion"])


@pytest.fixture
def folder(shelf, tmp_path):
    shutil.copytree(shelf[0], tmp_path / "adapters")
    return tmp_path / "adapters"


def test_what_killed_writers_left_goes_when_a_server_starts(folder, base, shelf):
    dead, alive = (folder / name for name in shelf[1][:2])
    (dead / storage.PART).mkdir()
    (dead / storage.PART / "half").write_text("of a file")
    with storage.writing(alive):
        (alive / storage.PART).mkdir()
        with Inside(folder, base) as server:
            until(lambda: not storage.in_use(dead))
            assert server.classify(dead.name, "a").status == 200
            assert (alive / storage.PART).is_dir()
        (alive / storage.PART).rmdir()


# Whether it answers


def test_readiness_is_that_of_the_model(shelf, tiny_base, tmp_path):
    """A stopped model is not ready, whether anybody asks it or not; when it goes on, so does the server."""
    with Running(shelf[0], "--base", str(tiny_base), "--deadline", "1", "--watch", "0", log=tmp_path / "log") as server:
        os.kill(server.model, signal.SIGSTOP)
        until(lambda: server.ask("GET", "/readyz").status == 503, 60)
        got = server.ask("GET", "/readyz")
        assert "model has not answered for" in got.error and got.headers["retry-after"]
        assert server.ask("GET", "/healthz").status == 200
        assert server.classify(shelf[1][0], "a").status == 504
        os.kill(server.model, signal.SIGCONT)
        until(lambda: server.ask("GET", "/readyz").status == 200, 60)
        assert until(lambda: server.classify(shelf[1][0], "a").status == 200, 60)
        assert server.stop() == 0


def test_sighup_looks_at_the_folder_and_loses_nothing(folder, tiny_base, shelf):
    name = shelf[1][0]
    with Running(folder, "--base", str(tiny_base), "--watch", "0") as server:
        stop, statuses = threading.Event(), []

        def ask():
            while not stop.is_set():
                statuses.append(server.classify(name, "a").status)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for i in range(3):
            shutil.copytree(folder / name, folder / f"new {i}")
            before = len(statuses)
            until(lambda before=before: len(statuses) > before + 8)
            server.process.send_signal(signal.SIGHUP)
            os.kill(server.model, signal.SIGHUP)  # a terminal that closes tells all of its processes
            until(lambda i=i: server.ask("GET", f"/v1/adapters/new%20{i}").status == 200)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert set(statuses) == {200}
        assert server.stop() == 0


# Which base it runs


def test_the_base_is_what_most_adapters_name_and_a_wrong_one_stops_nobody(folder, shelf, base, caplog):
    for name, changes in {
        "0": {"name": "/etc"}, "1": {"name": "/no/where"}, "2": {"name": str(folder)}, "3": {"name": ""},
        "4": {"name": "../" * 9}, "5": {"name": "/etc\n/passwd"},
    }.items():  # fmt: skip
        shutil.copytree(folder / shelf[1][0], folder / name)
        rewrite(folder / name, base={**read_base(folder / name), **changes}, info={"run": {"base": changes["name"]}})
    model = open_model(ServeConfig(folder))
    assert model.about.name == base.name and model.close()
    for name in shelf[1]:
        shutil.rmtree(folder / name)
    with pytest.raises(InfuseError, match=r"No adapter in .* names a base that can be loaded; give --base"):
        open_model(ServeConfig(folder))
    assert "skipped=" in caplog.text


def read_base(folder: Path) -> dict:
    return files.read(folder).facts["base"]


# Adapters that can't be computed


def test_an_adapter_whose_computation_fails_is_refused_alone(folder, base, shelf, monkeypatch):
    """Seen when it is loaded: by an error, by values that are not finite, and by values for other labels."""
    first, second, third, _ = shelf[1]
    with Inside(folder, base, watch=0) as server:
        right = server.classify(first, "hello").json
        forward, bad = server.engine.model.forward, {}

        def fail(tokens, names):
            for name in names:
                if name in bad:
                    return bad[name](forward(tokens, names))
            return forward(tokens, names)

        attach = server.engine.model.attach

        def attached(file, name):
            attach(file, name)
            if file.path.parent.name in kinds:
                bad[name] = kinds[file.path.parent.name]

        def error(rows):
            raise ZeroDivisionError("of this adapter alone")

        kinds = {
            "raises": error, "overflows": lambda rows: [row * np.inf for row in rows],
            "shortens": lambda rows: [row[:-1] for row in rows],
        }  # fmt: skip
        monkeypatch.setattr(server.engine.model, "forward", fail)
        monkeypatch.setattr(server.engine.model, "attach", attached)
        for kind, part in (("raises", "ZeroDivisionError"), ("overflows", "too large"), ("shortens", "values for")):
            shutil.copytree(folder / second, folder / kind)
            got = server.classify(kind, "hello")
            assert got.status == 409 and got.error.startswith(f"Adapter '{kind}' can't be used: ") and part in got.error
            sent = server.ask("POST", f"/v1/adapters/{kind}", (folder / third / WEIGHTS).read_bytes(), TOKEN)
            assert sent.status == 422 and part in sent.error
            both = server.ask("POST", "/v1/classify", [{"adapter": n, "texts": ["hello"]} for n in (first, kind)])
            assert both.status == 409
        assert server.classify(first, "hello").json == right and server.classify(third, "hello").status == 200
        assert len(base.model.infuse.adapters) == 2


def test_one_that_fails_on_a_text_only_is_named(folder, base, shelf, monkeypatch):
    first, second, *_ = shelf[1]
    with Inside(folder, base, watch=0) as server:
        for name in (first, second):
            assert server.classify(name, "hello").status == 200
        inner = server.engine.store.entries[second].served.inner
        forward = server.engine.model.forward

        def fail(tokens, names):
            if inner in names:
                raise ZeroDivisionError
            return forward(tokens, names)

        monkeypatch.setattr(server.engine.model, "forward", fail)
        got = server.classify(second, "hello")
        assert (
            got.status == 500 and got.error == f"Adapter {second!r} failed on this request; the server's log says why."
        )
        assert server.classify(first, "hello").status == 200


# Files that hang


@contextmanager
def hanging(monkeypatch, *names):
    """Files of these adapters do not answer, as those of a broken network folder don't."""
    go, real = threading.Event(), files.stamp

    def stamp(folder):
        if folder.name in names:
            go.wait(60)
        return real(folder)

    monkeypatch.setattr(files, "stamp", stamp)
    monkeypatch.setattr(look_module, "PATIENCE", 0.5)
    try:
        yield go
    finally:
        go.set()


def test_a_folder_that_hangs_holds_up_no_other(folder, base, shelf, monkeypatch):
    first, second, third, _ = shelf[1]
    with Inside(folder, base, watch=0.02) as server, hanging(monkeypatch, second, "new") as go:
        assert server.classify(first, "a").status == 200
        shutil.copytree(folder / first, folder / "new")
        listed = lambda: {a["name"]: a for a in server.ask("GET", "/v1/adapters").json["adapters"]}  # noqa: E731
        until(lambda: {"new", second} <= set(server.engine.store.stuck))
        shutil.copytree(folder / first, folder / "zed")
        until(lambda: "zed" in listed())
        told = listed()
        assert "did not answer" in told["new"]["error"] and "did not answer" in told[second]["error"]
        assert server.classify("new", "a").status == 409
        for name in (third, "zed"):  # on a slow machine, they too may have been taken for stuck for a moment
            until(lambda name=name: server.classify(name, "a").status == 200)
        until(lambda: sum(thread.name == "infuse-look" for thread in threading.enumerate()) <= 4)
        go.set()
        until(lambda: not server.engine.store.stuck)
        until(lambda: listed()["new"]["error"] is None and listed()[second]["error"] is None)
        assert server.classify("new", "a").status == server.classify(second, "a").status == 200


def test_a_start_over_a_folder_that_hangs(folder, base, shelf, monkeypatch):
    with hanging(monkeypatch, shelf[1][0]):
        model = open_model(ServeConfig(folder))
        assert model.about.name == base.name and model.close()
        with Inside(folder, base, watch=0) as server:
            until(lambda: server.classify(shelf[1][1], "a").status == 200)


def test_sigterm_ends_a_server_whatever_its_folder_does(folder, tiny_base, shelf, tmp_path):
    """Pipes where files should be, which nobody writes to."""
    with Running(folder, "--base", str(tiny_base), "--watch", "0.05", "--drain", "1", log=tmp_path / "log") as server:
        mixed = folder / shelf[1][3] / "members" / "one" / WEIGHTS
        (folder / "a pipe").mkdir()
        mixed.unlink()
        for path in (mixed, folder / "a pipe" / WEIGHTS):
            os.mkfifo(path)
        shutil.copytree(folder / shelf[1][0], folder / "zed")
        until(lambda: server.ask("GET", "/v1/adapters/zed").status == 200, 90)
        assert server.classify(shelf[1][0], "a").status == 200
        assert server.stop(timeout=60) == 0


def test_a_server_whose_files_hang_ends(folder, base, shelf, monkeypatch):
    """Requests that wait for a file that hangs, too, are refused at the end, and no thread is waited for."""
    second = shelf[1][1]
    with Inside(folder, base, watch=0, drain=1.0) as server, hanging(monkeypatch, second):
        connection = server.connect()
        connection.sendall(request("POST", "/v1/classify", {"adapter": second, "texts": ["a"]}))
        until(lambda: server.engine.store.entries[second].loading)
        server.stop()
        connection.close()


# What a killed server leaves


def test_a_server_that_is_killed_leaves_no_temporary_files(shelf, tiny_base, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with Running(shelf[0], "--base", str(tiny_base), "--watch", "0", log=tmp_path / "log") as server:
        assert server.classify(shelf[1][0], "a").status == 200
        server.stop(signal.SIGKILL)
    assert [path for path in (tmp_path / "tmp").rglob("*") if not path.is_dir()] == []
    assert all("torch" in path.name for path in (tmp_path / "tmp").iterdir())  # its empty cache
