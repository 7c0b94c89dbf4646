"""What the Buffer service says to a cache, also to one that an earlier release has started."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.services.buffer.doors import CONTROL_SOCKET, Streams


async def test_a_group_is_named_only_where_there_is_one(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(json.loads(await reader.readline()))
        writer.write(CacheStatus(state="READY", address="h:1").model_dump_json().encode() + b"\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / CONTROL_SOCKET):
        control = CacheControl(tmp_path)
        assert (await control.seal("DONE")).state == "READY"
        await control.seal("EXPIRED", "late", "again")
    # The words of the release before: its caches refuse others.
    assert heard[0] == {"op": "seal", "cause": "DONE", "detail": ""}
    assert heard[1] == {"op": "seal", "cause": "EXPIRED", "detail": "late", "group": "again"}


async def test_a_host_that_is_away_is_not_waited_for_longer_than_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        async def open(self) -> Streams:
            """As for a host that was switched off: the system tries for two minutes."""
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr("beamwire.services.buffer.control._ANSWER_TIMEOUT", 0.1)
    async with asyncio.timeout(5):
        with pytest.raises(BeamwireError, match=r"says nothing for 0\.1 s") as failed:
            await CacheControl(Away()).status()
    assert failed.value.reason is Reason.CACHE_FAILED
