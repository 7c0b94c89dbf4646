"""Checks a request against its dataset by asking the streamer itself, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from pydantic import JsonValue

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.mesh.spares import PipedSpare, Spares
from beamwire.mesh.warm import order_of
from beamwire.services.request.datasets import Dataset
from beamwire.services.request.ports import Fitness, SentArray

COMMAND = (sys.executable, "-m", "beamwire.services.streamer", "check", "--config", "-", "--json", "--ask")
_Allow = Callable[[Sequence[Dataset]], None]
_Told = Callable[[bytes, Sequence[Dataset]], None]
# Some ten thousand files.
MOST_LINE_BYTES = 8 * 1024**2


class StreamerCheck:
    """Runs the streamer's `check` and translates its answer.

    A process of its own, because reading a dataset loads libraries (psana, h5py) that must not be able to harm the
    service, and because it is what the job will run.
    """

    def __init__(
        self,
        *,
        timeout: float = 30.0,
        command: tuple[str, ...] = COMMAND,
        spares: Spares[PipedSpare] | None = None,
    ) -> None:
        self._spares = spares
        self._timeout = timeout
        self._room = asyncio.Semaphore(os.cpu_count() or 1)
        self._command = command

    async def check(
        self,
        config: Mapping[str, JsonValue],
        allow: Callable[[Sequence[Dataset]], None],
        *,
        measure: bool = False,
    ) -> Fitness:
        """Return what the dataset holds; see Preflight.check. Only a few run at a time; the others wait."""
        more = ("--measure",) if measure else ()
        async with self._room:
            out, err, code = await self._run(config, lambda _, datasets: allow(datasets), allow, more)
        return _answer(out, err, code)

    async def name(
        self, config: Mapping[str, JsonValue], allow: Callable[[Sequence[Dataset]], None]
    ) -> Mapping[str, JsonValue]:
        """Tell `allow` what would be read; see Preflight.name."""
        content: Mapping[str, JsonValue] = {}

        def listen(line: bytes, datasets: Sequence[Dataset]) -> None:
            nonlocal content
            allow(datasets)
            content = json.loads(line)["content"]
            raise _ToldError

        try:
            async with self._room:
                _answer(*await self._run(config, listen))
        except _ToldError:
            return content
        raise BeamwireError(Reason.INTERNAL, "the check of the dataset went on although nobody had agreed")

    def conclude(self, printed: bytes, allow: Callable[[Sequence[Dataset]], None]) -> Fitness:
        """Return what a check found that ran elsewhere; see Preflight.conclude."""
        # What libraries in C have printed besides is between and around its lines.
        lines = printed.splitlines()
        told = next((found for line in lines if (found := _datasets(line)) is not None), None)
        answer = next((line for line in reversed(lines) if b'"ok"' in line), printed)
        if told is not None:
            allow(told)
            _check_opened(answer, told, allow)
        elif b'"ok": true' in answer:
            raise BeamwireError(Reason.INTERNAL, "the check of the dataset does not say what it has read")
        return _answer(answer, printed, None)

    async def _run(
        self, config: Mapping[str, JsonValue], told: _Told, allow: _Allow | None = None, more: Sequence[str] = ()
    ) -> tuple[bytes, bytes, int | None]:
        process = await self._start([*self._command, *more])
        try:
            async with asyncio.timeout(self._timeout):
                out, err = await _converse(process, config, told, allow)
        except TimeoutError:
            raise BeamwireError(
                Reason.TIMED_OUT, f"the dataset could not be opened within {self._timeout:g} s; is its storage there?"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return out, err, process.returncode

    async def _start(self, command: Sequence[str]) -> Process:
        spare = self._spares.take(command, os.environ) if self._spares is not None else None
        if spare is not None:
            assert spare.process.stdin is not None
            spare.process.stdin.write(order_of(command, os.environ, "/"))
            return spare.process
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd="/",
            limit=MOST_LINE_BYTES,
        )


class _ToldError(Exception):
    """What would be read is known, and nothing more was wanted."""


async def _converse(
    process: Process, config: Mapping[str, JsonValue], told: _Told, allow: _Allow | None
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
            told(first, datasets)
            process.stdin.write(b"\n")
        process.stdin.close()
        rest = await process.stdout.read()
        await process.wait()
        if datasets is not None and allow is not None:
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


def _array(field: Mapping[str, Any]) -> SentArray:
    return SentArray(field["name"], np.dtype(field["dtype"]).name, tuple(field["shape"]), field.get("unit", ""))


def _answer(out: bytes, err: bytes, returncode: int | None) -> Fitness:
    try:
        answer = json.loads(out)
    except ValueError:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        how = "" if returncode is None else f" with exit code {returncode}"
        raise BeamwireError(Reason.INTERNAL, f"the check of the dataset broke{how}: {last[0]}") from None
    if answer["ok"]:
        return Fitness(
            expected_event_count=answer.get("expected_event_count") or 0,
            event_bytes=answer.get("sent_event_bytes") or answer.get("event_bytes") or 0,
            events_per_second=answer.get("events_per_second") or 0.0,
            arrays=tuple(_array(field) for field in answer.get("fields", ())),
            batch_size=answer.get("batch_size") or 0,
            content=answer.get("content") or {},
        )
    violations = [FieldViolation(v["field"], v["description"]) for v in answer.get("violations", ())]
    raise BeamwireError(Reason[answer["reason"]], answer["message"], violations=violations)
