"""Checks a request against its dataset by asking the streamer itself, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import JsonValue

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.services.request.datasets import Dataset
from beamwire.services.request.ports import Fitness

COMMAND = (sys.executable, "-m", "beamwire.services.streamer", "check", "--config", "-", "--json", "--ask")
# Some ten thousand files.
MOST_LINE_BYTES = 8 * 1024**2


class StreamerCheck:
    """Runs the streamer's `check` and translates its answer.

    A process of its own, because reading a dataset loads libraries (psana, h5py) that must not be able to harm the
    service, and because it is what the job will run.
    """

    def __init__(self, *, timeout: float = 30.0, command: tuple[str, ...] = COMMAND) -> None:
        self._timeout = timeout
        self._room = asyncio.Semaphore(os.cpu_count() or 1)
        self._command = command

    async def check(self, config: Mapping[str, JsonValue], allow: Callable[[Sequence[Dataset]], None]) -> Fitness:
        """Return what the dataset holds; see Preflight.check. Only a few run at a time; the others wait."""
        async with self._room:
            return await self._run(config, allow)

    async def _run(self, config: Mapping[str, JsonValue], allow: Callable[[Sequence[Dataset]], None]) -> Fitness:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=Path("/"),
            limit=MOST_LINE_BYTES,
        )
        try:
            async with asyncio.timeout(self._timeout):
                out, err = await _converse(process, config, allow)
        except TimeoutError:
            raise BeamwireError(
                Reason.TIMED_OUT, f"the dataset could not be opened within {self._timeout:g} s; is its storage there?"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return _answer(out, err, process.returncode)


async def _converse(
    process: Process, config: Mapping[str, JsonValue], allow: Callable[[Sequence[Dataset]], None]
) -> tuple[bytes, bytes]:
    """Ask, agree to what would be read or refuse it, and return the answer and what was printed besides."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        first = await _said(process, config)
        datasets = _datasets(first)
        if datasets is not None:
            allow(datasets)
            process.stdin.write(b"\n")
        process.stdin.close()
        rest = await process.stdout.read()
        await process.wait()
        if datasets is not None:
            _check_opened(rest, datasets, allow)
        return rest if datasets is not None else first, await errors
    finally:
        errors.cancel()


async def _said(process: Process, config: Mapping[str, JsonValue]) -> bytes:
    """Return the first line that the streamer prints; none if it broke."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(config).encode() + b"\n")
    with suppress(ConnectionError):  # its exit code and what it printed say more
        await process.stdin.drain()
    try:
        return await process.stdout.readline()
    except ValueError:
        raise invalid_field("transfer.config.source_identifier", "names too many files; name fewer at a time") from None


def _datasets(line: bytes) -> list[Dataset] | None:
    """Return what would be read; None if the line says something else."""
    try:
        found = json.loads(line)["datasets"]
    except (ValueError, KeyError, TypeError):
        return None
    return [Dataset(each["field"], each["named"], tuple(each["found"])) for each in found]


def _check_opened(answer: bytes, told: Sequence[Dataset], allow: Callable[[Sequence[Dataset]], None]) -> None:
    """Have it agreed to what the files that were named led to: HDF5 has links to datasets in other files.

    Not where an experiment was named, whose files are the facility's own affair, nor a component that opens what it
    likes.
    """
    names = {name for dataset in told for name in dataset.found}
    if not told or not all(name.startswith("path:") for name in names):
        return
    try:
        opened = json.loads(answer).get("opened", ())
    except ValueError:
        return  # which the caller finds too, and says
    more = [f"path:{path}" for path in opened if f"path:{path}" not in names]
    allow([Dataset(told[0].field, told[0].named, (told[0].named, *more))])


def _answer(out: bytes, err: bytes, returncode: int | None) -> Fitness:
    try:
        answer = json.loads(out)
    except ValueError:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise BeamwireError(
            Reason.INTERNAL, f"the check of the dataset broke with exit code {returncode}: {last[0]}"
        ) from None
    if answer["ok"]:
        return Fitness(answer.get("expected_event_count") or 0, answer.get("event_bytes") or 0)
    violations = [FieldViolation(v["field"], v["description"]) for v in answer.get("violations", ())]
    raise BeamwireError(Reason[answer["reason"]], answer["message"], violations=violations)
