"""The life of a buffer: its cache process is started, watched, sealed and stopped, and found again after a restart."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.failure import Failure
from beamwire.mesh.processes import Process, launch
from beamwire.mesh.store import Store
from beamwire.mesh.stream.connect import ConnectString, Transport
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.services.buffer.model import BUFFER_STATES, BufferRecord, BufferSpec, BufferState, Seal

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0
# A cache that was there answers at once, or not at all.
TELL_TIMEOUT = 8.0
EXPIRE_TIMEOUT = 30.0
# How long the cache still answers latecomers with END after the stream has ended.
LINGER = 3.0
LOG_TAIL_LINES = 10
UNSUPPORTED = {"overflow_policy": ("BLOCK",), "delivery": ("PUSH",)}
TRANSPORTS: dict[str, Transport] = {"TLS_TCP": "tls+tcp", "TCP": "tcp"}

# Mints a join token for a cache, for an identity and the names it may serve under.
Minter = Callable[[str, tuple[str, ...]], Awaitable[str]]


@dataclass(frozen=True)
class Placement:
    """Where caches run and how they are reached.

    Args:
        host: the address they listen on.
        advertise: the name or address that peers dial.
        allow_plain_tcp: whether the operator admits buffers without TLS (on a loopback address only).
        capacity_bytes: the largest ring one buffer may have.
        active_buffers: how many buffers one user may hold, besides those of transfers.
        lease: how long a buffer may live.
        trace_dir: where their traces go, or "".
        otlp_endpoint: where else, or "".
    """

    host: str = "127.0.0.1"
    advertise: str = "127.0.0.1"
    allow_plain_tcp: bool = False
    capacity_bytes: int = 8 * 1024**3
    active_buffers: int = 16
    lease: timedelta = timedelta(days=8)
    trace_dir: str = ""
    otlp_endpoint: str = ""

    @property
    def plain_tcp(self) -> bool:
        """Whether buffers without TLS are admitted: the operator says so, and nobody else can reach them."""
        return self.allow_plain_tcp and _is_loopback(self.host)


class Buffers:
    """Drives every buffer of the facility.

    Args:
        store: where buffers are kept.
        directory: holds one directory for each buffer.
        trust_domain: the domain the caches are members of.
        placement: where caches run.
        mint: mints a join token for a cache.
        runner: runs one task for each buffer that has not ended.
    """

    def __init__(
        self,
        store: Store[BufferRecord],
        directory: Path,
        trust_domain: str,
        placement: Placement,
        mint: Minter,
        runner: TaskRunner,
    ) -> None:
        self._store = store
        self._directory = directory
        self._trust_domain = trust_domain
        self._placement = placement
        self._mint = mint
        self._runner = runner
        self._admission = asyncio.Lock()

    def check(self, spec: BufferSpec) -> None:
        """Raise BeamwireError naming what is wrong with a specification, or what this release does not do."""
        limit = self._placement.capacity_bytes
        if not 1 <= spec.capacity_bytes <= limit:
            raise invalid_field("buffer.spec.capacity_bytes", f"must be from 1 to {limit}, the limit of this facility")
        for field in ("capacity_frames", "producer_count"):
            if getattr(spec, field) < 1:
                raise invalid_field(f"buffer.spec.{field}", "must be at least 1")
        if not 0 < spec.lease <= self._placement.lease.total_seconds():
            raise invalid_field("buffer.spec.lease", f"must be positive and at most {self._placement.lease}")
        for field, supported in UNSUPPORTED.items():
            if getattr(spec, field) not in supported:
                raise BeamwireError(
                    Reason.UNSUPPORTED,
                    f"buffer.spec.{field}: {getattr(spec, field)} is not in this release; use {' or '.join(supported)}",
                )
        if spec.transport == "TCP" and not self._placement.plain_tcp:
            raise invalid_field("buffer.spec.transport", "this facility does not allow plain TCP here; use TLS_TCP")

    async def create(self, name: str, owner: str, transfer: str, spec: BufferSpec) -> BufferRecord:
        """Store a buffer and begin to drive it; a buffer of that name with the same contents is returned as it is."""
        self.check(spec)
        now = datetime.now(UTC)
        record = BufferRecord(
            name=name,
            owner=owner,
            state=BufferState.STARTING,
            create_time=now,
            update_time=now,
            spec=spec,
            transfer=transfer,
            expire_time=now + timedelta(seconds=spec.lease),
            traceparent=telemetry.current_traceparent(),
        )
        async with self._admission:
            if not transfer:
                await self._admit(owner)
            record = await self._store.add(record, lambda r: (r.spec, r.owner, r.transfer))
        self._keep(record)
        return record

    async def resume(self) -> None:
        """Take up every buffer that had not ended when the service stopped, and stop caches that outlived their end."""
        unfinished = await self._store.unfinished(BUFFER_STATES.terminal)
        for record in unfinished:
            self._keep(record)
        driven = {record.name for record in unfinished}
        for directory in sorted(self._directory.glob("*")):
            if f"buffers/{directory.name}" not in driven:
                self._runner.keep(f"discarding {directory.name}", partial(self._discard, directory))

    def _keep(self, record: BufferRecord) -> None:
        if not _ended(record):
            self._runner.keep(record.name, lambda: self._drive(record.name))

    async def _admit(self, owner: str) -> None:
        """Bound what a user may hold besides the buffers of transfers, which have a limit of their own."""
        active = await self._store.unfinished(BUFFER_STATES.terminal)
        limit = self._placement.active_buffers
        if sum(record.owner == owner and not record.transfer for record in active) >= limit:
            raise BeamwireError(
                Reason.LIMIT_REACHED,
                f"{owner} has {limit} buffers that have not ended, the limit here; delete one or wait for one to end",
                quota="active_buffers",
                retry_after=10.0,
            )

    async def seal(self, name: str, seal: Seal) -> BufferRecord:
        """Say that no more frames will come. The word is stored before it is passed on to the cache.

        DONE may still give way to a worse cause: who waits in vain for consumers must be able to end it.
        """
        record = await self._store.change(name, lambda r: {"seal": seal} if _supersedes(seal, r) else {})
        if record.state in (BufferState.READY, BufferState.DRAINING):
            await self._tell(record)
        return record

    async def _tell(self, record: BufferRecord) -> None:
        """Pass the stored word on to the cache."""
        if record.seal is not None:
            async with await CacheControl.connect(self.directory_of(record.name), TELL_TIMEOUT) as control:
                await control.seal(record.seal.cause, record.seal.detail)

    async def delete(self, name: str) -> None:
        """Stop the cache if it runs, and forget the buffer."""
        # To the end even if the caller hangs up: between the lines the buffer has no driver.
        await self._store.db.carry_out(self._delete(name))

    async def _delete(self, name: str) -> None:
        await self._runner.cancel(name)
        await self._discard(self.directory_of(name))
        await self._store.delete(name)

    def directory_of(self, name: str) -> Path:
        """Return the directory that holds a cache's files."""
        return self._directory / name.removeprefix("buffers/")

    async def _drive(self, name: str) -> None:
        """Bring one buffer from the state it is in to its end."""
        record = await self._store.require(name)
        directory = self.directory_of(name)
        try:
            process = await self._started(record, directory)
            lease = (record.expire_time - datetime.now(UTC)).total_seconds()
            try:
                async with asyncio.timeout(lease):
                    await self._watch(name, directory, process)
            except TimeoutError:
                await self._expire(name, directory, process)
            await self._linger(directory)
        except Exception as error:
            if not isinstance(error, BeamwireError | OSError):
                log.exception("%s met a fault", name)
            failure = Failure.of(error)
            await self._store.change(name, lambda r: {**_to(r, BufferState.FAILED), "error": failure})
        await self._discard(directory)

    async def _linger(self, directory: Path) -> None:
        """Leave the cache to latecomers for a while, but do not leave it behind when the service stops."""
        try:
            await asyncio.sleep(LINGER)
        except asyncio.CancelledError:
            await self._discard(directory)
            raise

    async def _started(self, record: BufferRecord, directory: Path) -> Process:
        """Return the cache process: the one that was started before, or one started now."""
        process = Process.attach(directory)
        if process is not None:
            return process
        if record.state != BufferState.STARTING:
            raise BeamwireError(Reason.CACHE_FAILED, f"the cache of {record.name} was gone when the service came back")
        await self._write_configuration(record, directory)
        return await launch(
            [sys.executable, "-m", "beamwire.services.buffer.cache", str(directory)],
            directory=directory,
            env=dict(os.environ),
            cwd=directory,
            grace=15.0,
        )

    async def _write_configuration(self, record: BufferRecord, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        cache_id = record.name.removeprefix("buffers/")
        encrypted = record.spec.transport == "TLS_TCP"
        token_file = directory / "join-token"
        if encrypted:
            names = tuple(dict.fromkeys((self._placement.advertise, "localhost", "127.0.0.1")))
            token_file.touch(mode=0o600)
            token_file.write_text(await self._mint(f"spiffe://{self._trust_domain}/cache/{cache_id}", names))
        spec = record.spec
        configuration = {
            "buffer": cache_id,
            "transfer": record.transfer,
            "epoch": record.epoch,
            "capacity_bytes": spec.capacity_bytes,
            "capacity_frames": spec.capacity_frames,
            "producer_count": spec.producer_count,
            "producers": spec.producers,
            "consumers": spec.consumers,
            "transport": TRANSPORTS[spec.transport],
            "host": self._placement.host,
            "advertise": self._placement.advertise,
            "port": 0,
            "credentials": str(directory / "credentials") if encrypted else None,
            "join_token_file": str(token_file) if encrypted else None,
            "trace_dir": self._placement.trace_dir or None,
            "otlp_endpoint": self._placement.otlp_endpoint,
            "traceparent": record.traceparent,
        }
        (directory / "cache.json").write_text(json.dumps(configuration, indent=1))

    async def _watch(self, name: str, directory: Path, process: Process) -> None:
        """Follow the cache until the stream has ended; raise if the process dies first."""
        followed = asyncio.create_task(self._follow(name, directory))
        died = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({followed, died}, return_when=asyncio.FIRST_COMPLETED)
            if followed.done():
                problem = followed.exception()
                if problem is None:
                    return
                if not isinstance(problem, BeamwireError) or problem.reason is not Reason.CACHE_FAILED:
                    raise problem
                # The control socket closes a moment before the process is gone; one that stays is broken.
                await asyncio.wait({died}, timeout=START_TIMEOUT)
            raise self._death(name, directory, died)
        finally:
            for task in (followed, died):
                task.cancel()
            await asyncio.gather(followed, died, return_exceptions=True)

    async def _follow(self, name: str, directory: Path) -> None:
        async with await CacheControl.connect(directory, START_TIMEOUT) as control:
            await self._tell(await self._store.require(name))
            async for status in control.watch():
                await self._note(name, status)
                if status.state == "ENDED":
                    return
        raise BeamwireError(Reason.CACHE_FAILED, f"the cache of {name} closed its control connection")

    async def _note(self, name: str, status: CacheStatus) -> None:
        """Store what the cache says if its state changed; otherwise only show the new counters."""
        record = await self._store.require(name)
        if status.state == record.state:
            self._store.publish(record.model_copy(update=_seen(status)))
            return
        host, _, port = status.address.rpartition(":")
        transport = TRANSPORTS[record.spec.transport]
        buffer_id = name.removeprefix("buffers/")
        connect = ConnectString(hosts=((host, int(port)),), buffer=buffer_id, epoch=record.epoch, transport=transport)
        was_starting = record.state == BufferState.STARTING
        record = await self._store.change(
            name,
            lambda r: {
                **_to(r, BufferState(status.state)),
                **_seen(status),
                "connect_string": str(connect),
                "end_cause": status.end_cause,
            },
        )
        if was_starting:
            # Who sealed the buffer before it was seen to be ready left the telling to this line.
            await self._tell(record)

    async def _expire(self, name: str, directory: Path, process: Process) -> None:
        """The lease ended: tell the consumers, then follow the cache to its end."""
        await self.seal(name, Seal(cause="EXPIRED", detail="the lease of the buffer ended"))
        try:
            async with asyncio.timeout(EXPIRE_TIMEOUT):
                await self._watch(name, directory, process)
        except TimeoutError:
            raise BeamwireError(
                Reason.LEASE_EXPIRED, f"the lease of {name} ended, and its cache did not within {EXPIRE_TIMEOUT:g} s"
            ) from None

    def _death(self, name: str, directory: Path, died: asyncio.Task[object]) -> BeamwireError:
        stderr = directory / "stderr"
        lines = stderr.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if stderr.exists() else []
        how = str(died.result()) if died.done() and not died.cancelled() else "its control socket closed"
        printed = "; it printed:\n" + "\n".join(lines) if lines else ""
        return BeamwireError(
            Reason.CACHE_FAILED, f"the cache of {name} died ({how}){printed}", metadata={"buffer": name}
        )

    async def _discard(self, directory: Path) -> None:
        """Stop the cache process of a directory, if there is one, and remove the directory."""
        process = Process.attach(directory)
        if process is not None and process.alive():
            await process.terminate()
            await process.wait()
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ended(record: BufferRecord) -> bool:
    return BUFFER_STATES.is_terminal(BufferState(record.state))


def _supersedes(seal: Seal, record: BufferRecord) -> bool:
    if _ended(record):
        return False
    return record.seal is None or (record.seal.cause == "DONE" and seal.cause != "DONE")


def _to(record: BufferRecord, state: BufferState) -> dict[str, object]:
    """Return the change that takes a buffer to a state, if the table allows it."""
    BUFFER_STATES.check(BufferState(record.state), state, story=record.name)
    return {"state": state}


def _seen(status: CacheStatus) -> dict[str, object]:
    """Return what a cache counted, as a change of the record."""
    return {
        "counters": status.counters,
        "first_frame_time": _time(status.first_frame_time),
        "last_frame_time": _time(status.last_frame_time),
    }


def _time(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None
