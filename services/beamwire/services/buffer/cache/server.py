"""The life of a cache process: its listener, its control socket, signals, and when it may end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.stream.local import listen_local
from beamwire.services.buffer.cache.admission import Admission
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.control_port import ControlPort
from beamwire.services.buffer.cache.listener import Listener
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.services.buffer.cache.relay import Relay
from beamwire.services.buffer.cache.renewals import keep_renewed
from beamwire.services.buffer.cache.vault import open_vault
from beamwire.services.buffer.doors import CONTROL_SOCKET, LINE_LIMIT

_log = logging.getLogger(__name__)

_WATCH_PERIOD: Final = 0.1
_SEAL_GRACE: Final = 10.0
_STOP_GRACE: Final = 7.0
# How often leases, tickets and certificates are looked at, in seconds.
_REAP_PERIOD: Final = 0.25
_WORDS: Final = {"trust": "believe", "group": "keep"}


class _Question(BaseModel):
    """One line on the control socket."""

    model_config = ConfigDict(extra="forbid")

    op: Literal["status", "watch", "seal", "stop", "revoke", "trust", "group", "release", "discard"]
    identity: str = ""
    group: str = ""
    consumers: frozenset[str] = frozenset()
    cause: Literal["DONE", "FAILED", "CANCELLED", "EXPIRED", "TRUNCATED"] = "DONE"
    detail: str = ""
    domains: tuple[str, ...] = ()


class CacheServer:
    """Runs one cache until it is told to stop. Data flows in threads; this is the loop that everything else is in."""

    def __init__(self, config: CacheConfig, directory: Path, credentials: Credentials | None) -> None:
        self._directory = directory
        self._vault = open_vault(config, directory)
        self._loop = asyncio.get_running_loop()
        self._watchers: set[_Watcher] = set()
        self._told = False
        self._stopping = False
        self._discards = False
        self._distant = config.distant
        self._relay = Relay(config, self._vault, self._changed_in_thread)
        self._credentials = credentials
        self._admission = Admission(config, credentials)
        for identity in self._vault.facts.revoked:
            self._admission.revoke(identity)
        self._listener = Listener(self._relay, credentials, self._admission, directory)
        self._relay.address = self._listener.address
        self._done = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the process may end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop)
        self._listener.start()
        self._reap()
        renewal = asyncio.create_task(keep_renewed(self._credentials)) if self._credentials is not None else None
        server = await self._listen_for_service()
        reporting = asyncio.create_task(self._report(server)) if self._distant else None
        try:
            await self._done.wait()
        finally:
            if renewal is not None:
                renewal.cancel()
                await asyncio.wait([renewal])
            self._listener.close()
            server.close()
            if reporting is not None:
                reporting.cancel()
                await asyncio.wait([reporting])
            for watcher in self._watchers:
                watcher.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await asyncio.gather(*self._tasks)
            (self._directory / CONTROL_SOCKET).unlink(missing_ok=True)
            if self._discards and self._vault.path is not None:
                self._vault.path.unlink(missing_ok=True)

    async def _listen_for_service(self) -> asyncio.Server | ControlPort:
        if self._distant:
            assert self._credentials is not None, "another host is reached by TLS alone"
            return ControlPort(self._relay.config.host, self._credentials, self._answer, self._relay.refuse)
        control = listen_local(self._directory / CONTROL_SOCKET)
        return await asyncio.start_unix_server(self._answer, sock=control, limit=LINE_LIMIT)

    async def _report(self, server: asyncio.Server | ControlPort) -> None:
        """Tell the Job service where the cache listens, until it knows."""
        assert isinstance(server, ControlPort)
        assert self._credentials is not None
        # Brings gRPC with it, which no other cache needs.
        from beamwire.mesh.reporting import report

        control = f"{self._relay.config.advertise}:{server.port}"
        await report(self._credentials, {"control": control, "data": self._listener.address})

    def _reap(self) -> None:
        # Whatever fails here must not be the last time.
        self._loop.call_later(_REAP_PERIOD, self._reap)
        self._admission.reap()
        self._relay.reap()

    def _changed_in_thread(self, urgent: bool) -> None:
        # Threads move thousands of frames per second: they wake the loop only if it does not know yet.
        if self._loop.is_closed():
            return
        if urgent or (self._watchers and not self._told):
            self._told = True
            self._loop.call_soon_threadsafe(self._changed, urgent)

    def _changed(self, urgent: bool) -> None:
        for watcher in self._watchers:
            watcher.change(urgent)
        if self._stopping and self._relay.state == "ENDED":
            self._done.set()

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._listener.close()
        self._relay.stop()
        self._loop.call_later(_STOP_GRACE, self._relay.give_up)
        self._changed(True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while line := await _read_line(reader):
                await self._carry_out(line, reader, writer)
        except OSError:
            # The other side left.
            return
        except Exception:
            _log.exception("a question on the control socket could not be answered")
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _carry_out(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = _Question.model_validate_json(line)
        except ValidationError as error:
            _write(writer, json.dumps({"error": f"the cache cannot do that: {error}"}))
            return
        if question.op == "watch":
            await self._watch(reader, writer)
            return
        try:
            self._do(question)
        except (BeamwireError, RefusedError, OSError, ValueError) as error:
            _write(writer, json.dumps({"error": f"the cache cannot {_WORDS.get(question.op, 'do')} that: {error}"}))
            return
        _write(writer, self._relay.status().model_dump_json())
        await writer.drain()
        if question.op in ("stop", "discard"):
            self._discards = question.op == "discard"
            self._stop()

    def _do(self, question: _Question) -> None:
        match question.op:
            case "seal" if question.group:
                self._seal_group(question)
            case "seal":
                self._seal(question)
            case "trust":
                self._believe(question.domains)
            case "revoke":
                self._admission.revoke(question.identity)
                self._vault.journal.note(fact="revoked", identity=question.identity)
            case "group":
                self._relay.add_group(question.group, question.consumers)
                self._admission.admit_consumers(question.consumers)
            case "release":
                self._relay.release()

    def _believe(self, domains: Sequence[str]) -> None:
        """Take what is now believed of all trust domains; who is believed no more is put out at once."""
        if self._credentials is not None:
            told = [DomainTrust.from_json(domain) for domain in domains]
            self._credentials.change_trust(lambda trust: trust.told(told, complete=True))
            self._admission.reap()

    def _seal(self, question: _Question) -> None:
        cause = account_pb2.EndCause.Value(f"END_CAUSE_{question.cause}")
        if cause != account_pb2.END_CAUSE_DONE:
            # Before it is sealed, which fails on a full disk, and counts all the same.
            self._loop.call_later(_SEAL_GRACE, self._relay.give_up)
        self._relay.seal(cause, question.detail)

    def _seal_group(self, question: _Question) -> None:
        self._relay.end_group(
            question.group, account_pb2.EndCause.Value(f"END_CAUSE_{question.cause}"), question.detail
        )
        self._loop.call_later(_SEAL_GRACE, self._relay.give_up_group, question.group)

    async def _watch(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        watcher = _Watcher()
        self._watchers.add(watcher)
        # One who watches says nothing more: what comes is its end.
        leaving = asyncio.create_task(reader.read())
        leaving.add_done_callback(lambda _: watcher.close())
        try:
            last = ""
            while True:
                self._told = False
                line = self._relay.status().model_dump_json()
                if line != last:
                    last = line
                    _write(writer, line)
                    await writer.drain()
                if not await watcher.wait():
                    return
        finally:
            self._watchers.discard(watcher)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    """One question; nothing if there will be none, or if it has no end."""
    try:
        return await reader.readline()
    except ValueError:
        return b""


class _Watcher:
    """One who watches: what changed since it was last told."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._urgent = asyncio.Event()
        self._closed = False

    def change(self, urgent: bool) -> None:
        self._changed.set()
        if urgent:
            self._urgent.set()

    def close(self) -> None:
        self._closed = True
        self.change(True)

    async def wait(self) -> bool:
        """Wait for a change, at least one period unless it is urgent; False if this is the end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_WATCH_PERIOD):
                await self._urgent.wait()
        await self._changed.wait()
        self._changed.clear()
        self._urgent.clear()
        return not self._closed


def _write(writer: asyncio.StreamWriter, line: str) -> None:
    writer.write(line.encode() + b"\n")
