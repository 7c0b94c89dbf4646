"""Starts what stands between the ends: our cache, the relays in C, and the relays in Python."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import Credentials
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.control import CacheControl
from beamwire.testing.facility import Facility
from bench.ends import Target
from bench.match import FailedError, Middle
from bench.ours import MOST_PRODUCERS

CAPACITY: Final = 256 << 20
_SOURCES: Final = Path(__file__).parent
_NOTES: Final = "stderr"
_BEGINNING: Final = 10.0


@dataclass(frozen=True)
class Members:
    """Who the middle is, and who its ends are."""

    cache: Credentials
    end: Credentials

    @classmethod
    def create(cls, directory: Path) -> Members:
        """Both of a facility of their own."""
        facility = Facility(directory)
        return cls(facility.member("cache/bench"), facility.member("user/bench"))


@contextmanager
def cache(members: Members | None, delivery: str, capacity: int = CAPACITY) -> Iterator[Middle]:
    """Our cache for one run; over mutual TLS if there are members."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        (directory / "cache.json").write_text(json.dumps(_config(members, delivery, capacity)))
        command = [sys.executable, "-m", "beamwire.services.buffer.cache", place]
        with (
            (directory / _NOTES).open("w") as notes,
            subprocess.Popen(command, stderr=notes) as process,
        ):
            try:
                port = _port(directory)
                yield Middle(process.pid, Target(port, port, members.end.directory if members else None))
            except FailedError as error:
                said = (directory / _NOTES).read_text().strip()[-500:]
                raise FailedError(f"{error}; the cache says: {said or 'nothing'}") from error
            finally:
                process.kill()


def _config(members: Members | None, delivery: str, capacity: int) -> dict[str, Any]:
    peers = [str(members.end.identity)] if members else []
    config: dict[str, Any] = {
        "buffer": "bench",
        "transport": "tls+tcp" if members else "tcp",
        "capacity_bytes": capacity,
        "producer_count": MOST_PRODUCERS,
        "producers": peers,
        "consumers": peers,
        "credentials": str(members.cache.directory) if members else None,
    }
    if "delivery" in CacheConfig.model_fields:
        config["delivery"] = delivery.upper()
    return config


def _port(directory: Path) -> int:
    try:
        return asyncio.run(_ask_port(directory))
    except (OSError, BeamwireError) as error:
        raise FailedError(f"the cache did not begin: {error}") from error


async def _ask_port(directory: Path) -> int:
    control = await CacheControl.connect(directory, _BEGINNING)
    return int((await control.status()).address.rpartition(":")[2])


def is_acked() -> bool:
    """Whether the cache can acknowledge."""
    return "delivery" in CacheConfig.model_fields


@dataclass(frozen=True)
class Compiler:
    """Builds the baselines that are written in C into a directory."""

    directory: Path

    def build(self, name: str, *options: str) -> Path | None:
        """The program of bench/<name>.c; None if this machine lacks a compiler or a library for it."""
        compiler = shutil.which("gcc") or shutil.which("cc")
        program = self.directory / name
        if compiler is None:
            return None
        command = [compiler, "-O2", "-Wall", "-o", str(program), str(_SOURCES / f"{name}.c"), *options, "-lpthread"]
        built = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if built.returncode:
            print(f"{name}.c cannot be built here: {built.stderr.strip()[:300]}", file=sys.stderr)
            return None
        return program


@contextmanager
def program(
    command: list[str], members: Members | None, environment: Mapping[str, str] | None = None
) -> Iterator[Middle]:
    """A program that prints its two ports. With members, its last argument is the directory of its credentials."""
    arguments = [*command, str(members.cache.directory)] if members else command
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env=os.environ | dict(environment or {})
    ) as process:
        try:
            assert process.stdout is not None
            ports = process.stdout.readline().split()
            if len(ports) != 2:
                raise FailedError(f"{command[0]} does not listen")
            yield Middle(process.pid, Target(int(ports[0]), int(ports[1]), members.end.directory if members else None))
        finally:
            process.kill()
