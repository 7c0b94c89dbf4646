"""Checks a request against its dataset by asking the streamer itself, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.services.request.ports import Fitness

COMMAND = (sys.executable, "-m", "beamwire.services.streamer", "check", "--config", "-", "--json")


class StreamerCheck:
    """Runs the streamer's `check` and translates its answer.

    A process of its own, because reading a dataset loads libraries (psana, h5py) that must not be able to harm the
    service, and because it is what the job will run.
    """

    def __init__(self, *, timeout: float = 30.0, command: tuple[str, ...] = COMMAND) -> None:
        self._timeout = timeout
        self._room = asyncio.Semaphore(os.cpu_count() or 1)
        self._command = command

    async def check(self, config: Mapping[str, JsonValue]) -> Fitness:
        """Return what the dataset holds; see Preflight.check. Only a few run at a time; the others wait."""
        async with self._room:
            return await self._run(config)

    async def _run(self, config: Mapping[str, JsonValue]) -> Fitness:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=Path("/"),
        )
        try:
            async with asyncio.timeout(self._timeout):
                out, err = await process.communicate(json.dumps(config).encode())
        except TimeoutError:
            raise BeamwireError(
                Reason.TIMED_OUT, f"the dataset could not be opened within {self._timeout:g} s; is its storage there?"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return _answer(out, err, process.returncode)


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
