"""A PostgreSQL server of the test's own, from Debian's package: made, started, stopped and removed by the test."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

REASON = "needs PostgreSQL's server: apt-get install postgresql"


def _programs() -> Path | None:
    """The newest folder that holds initdb and pg_ctl; Debian does not put it on the PATH."""
    found = [Path(path).parent for path in (shutil.which("initdb"),) if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True)
    return next((folder for folder in found if all((folder / n).exists() for n in ("initdb", "pg_ctl"))), None)


@pytest.fixture
def postgres():
    """The URL of an empty database."""
    programs = _programs()
    if programs is None:
        pytest.skip(REASON)
    # It refuses to run as root. The folder of pytest is closed to other users, hence one of its own.
    folder = Path(tempfile.mkdtemp(prefix="infuse-postgres-"))
    as_user: list[str] = []
    if os.getuid() == 0:
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            shutil.rmtree(folder)
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres to run it as")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = ["runuser", "-u", "postgres", "--"]

    def call(name, *arguments):
        command = [*as_user, str(programs / name), *arguments]
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = str(folder / "data")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        call("initdb", "-D", data, "-U", "tuner", "-A", "trust", "-E", "UTF8", "--no-sync")
        call("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
