"""One writer of a folder at a time, and folders that change all at once."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import LABELS, write_rows

from infuse import InfuseError, storage
from infuse.cli import main
from infuse.errors import WriteError

HOLD = """
import sys
from pathlib import Path
from infuse import storage
with getattr(storage, sys.argv[1])(*map(Path, sys.argv[2:])) as found:
    print(found, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other():
    """Starts processes that hold a folder until they are told to end."""
    started = []

    def start(*words):
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(child)
        return child, child.stdout.readline().strip()

    yield start
    for child in started:
        child.kill()
        child.communicate()


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def fill(folder, **files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        storage.write(folder / name, text)


# One writer


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path, other):
    child, _ = other("writing", tmp_path / "a" / "run")
    refused = rf"run is being written by another process \(pid {child.pid}\); wait for it"
    with pytest.raises(InfuseError, match=refused), storage.writing(tmp_path / "a" / "run"):
        pass
    child.communicate("")
    assert os.listdir(tmp_path) == []  # what was made for nothing has gone
    with storage.writing(tmp_path / "a" / "run") as left:
        assert left is False
        fill(tmp_path / "a" / "run", x="1")
    assert tree(tmp_path) == {"a/run/x": "1"}


def test_a_killed_writer_frees_the_folder(tmp_path, other):
    child, _ = other("writing", tmp_path / "run")
    child.send_signal(signal.SIGKILL)
    child.wait()
    with storage.writing(tmp_path / "run") as left:
        assert left is True
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == []


def test_a_link_and_its_folder_have_one_lock(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    refused = pytest.raises(InfuseError, match="being written")
    with storage.writing(tmp_path / "run"), refused, storage.writing(tmp_path / "link"):
        pass


def test_who_waits_has_it_next_and_never_two_at_once(tmp_path):
    inside, most, rounds = [], [], []
    (tmp_path / "run").mkdir()

    def work():
        for _ in range(20):
            with storage.writing(tmp_path / "run", wait=60):
                inside.append(1)
                most.append(len(inside))
                inside.pop()
            rounds.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(rounds) == 80 and max(most) == 1 and os.listdir(tmp_path / "run") == []


# All at once


def test_a_folder_changes_at_once_and_keeps_what_is_not_ours(tmp_path):
    folder = tmp_path / "run"
    fill(folder, **{"a.txt": "old", "sub/b.txt": "old", "sub/c.txt": "old", "gone.txt": "old", "mine.txt": "mine"})
    with storage.writing(folder), storage.replacing(folder, ("a.txt", "sub", "gone.txt", "never")) as new:
        fill(new, **{"a.txt": "new", "sub/b.txt": "new", "sub/d.txt": "new"})
        assert tree(folder)["a.txt"] == "old" and storage.current(folder) == folder
    assert tree(folder) == {"a.txt": "new", "sub/b.txt": "new", "sub/d.txt": "new", "mine.txt": "mine"}


@pytest.mark.parametrize("links", [True, False])
def test_what_a_killed_process_left_is_ended_or_undone(tmp_path, monkeypatch, links):
    folder = tmp_path / "run"
    fill(folder, **{"a": "old", "b": "old", "mine": "mine"})
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "no links")))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_settle", lambda folder: None)  # killed just after the change
        with storage.writing(folder), storage.replacing(folder, ("a", "b")) as new:
            fill(new, a="new")
    assert storage.current(folder / "a").read_text() == "new" and (folder / "a").read_text() == "old"
    assert storage.reading(folder, lambda at: sorted(os.listdir(at))) == ["a"]
    (folder / storage.OLD).mkdir()
    with storage.writing(folder) as left:
        assert left and tree(folder) == {"a": "new", "mine": "mine"} | {storage.LOCK: tree(folder)[storage.LOCK]}
        (folder / storage.PART / "files").mkdir(parents=True)  # killed before it
    with storage.writing(folder) as left:
        assert left
    assert tree(folder) == {"a": "new", "mine": "mine"} and sorted(os.listdir(folder)) == ["a", "mine"]


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_changes(tmp_path):
    fill(tmp_path / "run", **{"a/mine": "mine", "b": "old"})
    refused, folder = pytest.raises(InfuseError, match=r"run/a is in the way"), tmp_path / "run"
    with refused, storage.writing(folder), storage.replacing(folder, ("b",)) as new:
        fill(new, a="new")
    assert tree(tmp_path) == {"run/a/mine": "mine", "run/b": "old"}


def test_reading_begins_anew_where_the_folder_has_changed_meanwhile(tmp_path):
    folder, seen = tmp_path / "run", []
    fill(folder, a="old", b="old")

    def read(at):
        first = (at / "a").read_text()
        if not seen:
            with storage.writing(folder), storage.replacing(folder) as new:
                fill(new, a="new", b="new")
        seen.append(first)
        return first, (at / "b").read_text()

    assert storage.reading(folder, read) == ("new", "new") and seen == ["old", "new"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused = pytest.raises(WriteError, match=r"run/a can't be written \(No space left on device\); check the path")
    with refused, storage.writing(tmp_path / "run"), storage.replacing(tmp_path / "run") as new:
        storage.write(new / "a", "new")
    assert os.listdir(tmp_path) == []


def test_scratch_folders_of_the_dead_go_and_those_of_the_living_stay(tmp_path, monkeypatch, other):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (dead, first), (_, second) = other("scratch"), other("scratch")
    (Path(first) / "state").write_text("x")
    dead.kill()
    dead.wait()
    with storage.scratch() as folder:
        (folder / "state").write_text("x")
        assert {str(path) for path in tmp_path.iterdir()} == {second, str(folder)}
    assert [str(path) for path in tmp_path.iterdir()] == [second]


# Commands


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory):
    """Two runs, rows, and a folder that is being written."""
    place = tmp_path_factory.mktemp("commands")
    write_rows(place / "rows.csv", LABELS[:3], 20)
    for name in ("one", "two"):
        main(words("train", place, tiny_base, "--method", "pfeiffer", "--epochs", "1", "--out", place / name))
    return place


def words(command, place, base, *more):
    return [command, *map(str, ("--base", base, "--data", place / "rows.csv", *more))]


COMMANDS = {
    "train": lambda place, base, out: words("train", place, base, "--out", out),
    "train --overwrite": lambda place, base, out: words("train", place, base, "--overwrite", "--out", out),
    "fuse": lambda place, base, out: words("fuse", place, base, place / "one", place / "two", "--out", out),
    "average": lambda place, base, out: ["average", *map(str, (place / "one", place / "two", "--out", out))],
    "merge": lambda place, base, out: ["merge", str(place / "one"), str(out)],
    "compare": lambda place, base, out: words("compare", place, base, "--methods", "head", "--out", out),
    "recommend": lambda place, base, out: ["recommend", "--base", str(base), "--out", str(out)],
    "calibrate": lambda place, base, out: ["calibrate", str(out), "--data", str(place / "rows.csv")],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_a_folder_that_another_process_writes(
    command, place, tiny_base, tmp_path, capsys, no_pictures
):
    out = tmp_path / "out"
    if command in ("calibrate", "train --overwrite"):
        shutil.copytree(place / "one", out)
    out.mkdir(exist_ok=True)
    with storage.writing(out):
        before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")}
        with pytest.raises(SystemExit) as ended:
            main(COMMANDS[command](place, tiny_base, out))
        assert ended.value.code == 2
        assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")} == before
    told = capsys.readouterr().err
    assert f"{out} is being written by another process (pid {os.getpid()})" in told.replace("\n", "")
