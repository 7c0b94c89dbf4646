"""A throw-away PostgreSQL server with a directory of its own, that tests may stop, kill and start again."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from beamwire.testing.ports import free_port

SUPERUSER = "postgres"
TIMEOUT = 30
"""Seconds that the server may take to start or to stop."""
_INSTALLED = Path("/usr/lib/postgresql")


def find_postgres() -> Path | None:
    """The directory of the newest PostgreSQL that is installed here; None if there is none."""
    found = sorted(_INSTALLED.glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return Path(on_path).resolve().parent if on_path else None


class Postgres:
    """One server, started and stopped at will; what it has committed it keeps, since it syncs as in production.

    Args:
        binaries: where `initdb` and `postgres` are.
        settings: more settings of the server, by name.
    """

    def __init__(self, binaries: Path, **settings: str) -> None:
        self._binaries = binaries
        # The server refuses to run as root; the path of a socket must be short.
        self._directory = Path(tempfile.mkdtemp(prefix="pg-"))
        self._data = self._directory / "data"
        self._running = False
        self.port = free_port()
        all_settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self._directory),
            "fsync": "on",
            "max_connections": "200",
            "autovacuum_naptime": "5s",
            **settings,
        }
        if os.geteuid() == 0:
            shutil.chown(self._directory, SUPERUSER, SUPERUSER)
        initdb = ["initdb", "-D", str(self._data), "-U", SUPERUSER, "--auth", "trust", "-E", "UTF8", "--locale", "C"]
        self._run(*initdb, "--no-sync")
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in all_settings.items())

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, as `facility.toml` has it."""
        return f"postgresql+asyncpg://{SUPERUSER}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Make an empty database and return its URL."""
        self.sql(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Forget a database, whoever is connected to it."""
        self.sql(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement as a person would, with psql; returns what it printed, without headings."""
        host = ["-h", str(self._directory), "-p", str(self.port), "-U", SUPERUSER, "-d", database]
        return self._run("psql", *host, "-qAtX", "-v", "ON_ERROR_STOP=1", "-c", statement)

    def start(self) -> None:
        """Start the server and wait until it accepts connections. It is no child of ours, as in production."""
        self._control("start", "-l", str(self._directory / "server.log"))
        self._running = True

    def stop(self) -> None:
        """End the server as an operator does in a hurry: connections are cut, nothing that was committed is lost."""
        self._end("fast")

    def kill(self) -> None:
        """End the server and all its processes at once, without a checkpoint; the next start recovers."""
        self._end("immediate")

    def remove(self) -> None:
        """End the server if it runs, and remove its directory."""
        if self._running:
            # Not at once: processes of the server would write into the directory while it is removed.
            self._end("fast")
        shutil.rmtree(self._directory, ignore_errors=True)

    def _end(self, mode: str) -> None:
        self._running = False
        self._control("stop", "-m", mode)

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self._data), "-w", "-t", str(TIMEOUT), *arguments)

    def _run(self, name: str, *arguments: str) -> str:
        # Into a file: the server inherits it, and a pipe would be read until the server ends.
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(self._command(name, *arguments), stdout=said, stderr=said, check=False)
            said.seek(0)
            if done.returncode:
                raise RuntimeError(f"{name} ended with {done.returncode}: {said.read()}")
            return said.read().strip()

    def _command(self, name: str, *arguments: str) -> list[str]:
        command = [str(self._binaries / name), *arguments]
        user = ["setpriv", f"--reuid={SUPERUSER}", f"--regid={SUPERUSER}", "--init-groups"]
        return [*user, *command] if os.geteuid() == 0 else command
