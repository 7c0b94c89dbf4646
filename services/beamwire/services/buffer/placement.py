"""Where caches run: what a facility admits, what each cache is told, and where its frames are."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.placements import Place
from beamwire.mesh.policy import Policy, check_place
from beamwire.mesh.stream.connect import Transport
from beamwire.services.buffer.model import DEFAULT_GROUP, AddedGroup, BufferRecord, BufferSpec

TRANSPORTS: Final[dict[str, Transport]] = {"TLS_TCP": "tls+tcp", "TCP": "tcp", "IPC": "ipc"}
MOST_GROUPS: Final = 16
MOST_SHARDS: Final = 64
SHORTEST_FRAME_LEASE: Final = 1.0
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - each file there is made by us, with a name of our own, mode 0600
GROUP: Final = re.compile(r"[a-z][a-z0-9-]{0,30}")
GROUP_NAMES: Final = "1 to 31 of a-z, 0-9 and `-`, beginning with a letter"


@dataclass(frozen=True)
class Placement:
    """Where caches run and how they are reached.

    Args:
        host: the address they listen on.
        advertise: the name or address that peers dial.
        allow_plain_tcp: whether the operator admits buffers without TLS (on a loopback address only).
        allow_ipc: whether the operator admits buffers for processes of this service's user only.
        capacity_bytes: the largest ring one buffer may have, all its shards together.
        active_buffers: how many buffers one user may hold, besides those of transfers.
        lease: how long a buffer may live.
        trace_dir: where their traces go, or "".
        otlp_endpoint: where else, or "".
        nodes: the names of the nodes on which a batch system may run caches.
    """

    host: str = "127.0.0.1"
    advertise: str = "127.0.0.1"
    allow_plain_tcp: bool = False
    allow_ipc: bool = True
    capacity_bytes: int = 8 * 1024**3
    active_buffers: int = 16
    lease: timedelta = timedelta(days=8)
    trace_dir: str = ""
    otlp_endpoint: str = ""
    nodes: tuple[str, ...] = ()

    @property
    def plain_tcp(self) -> bool:
        """Whether buffers without TLS are admitted: the operator says so, and nobody else can reach them."""
        return self.allow_plain_tcp and _is_loopback(self.host)

    @property
    def server_names(self) -> tuple[str, ...]:
        """The names that a cache may serve under."""
        return tuple(dict.fromkeys((self.advertise, "localhost", "127.0.0.1")))

    def check(self, spec: BufferSpec) -> None:
        """Raise BeamwireError naming what is wrong with a specification, or what this release does not do."""
        self._check_transport(spec)
        for field in ("capacity_frames", "producer_count", "shard_count"):
            if getattr(spec, field) < 1:
                raise invalid_field(f"buffer.spec.{field}", "must be at least 1")
        self._check_sizes(spec)
        self._check_leases(spec)
        _check_groups(spec)
        if not spec.acked and spec.overflow_policy == "SPILL":
            raise invalid_field("buffer.spec.overflow_policy", "spill needs delivery acked: push keeps nothing")
        if not spec.local:
            self._check_place(spec)

    def _check_place(self, spec: BufferSpec) -> None:
        if not self.nodes:
            raise invalid_field(
                "buffer.spec.placement.backend",
                "this facility does not say on which nodes caches may run; an operator can: `nodes` in [data] of "
                "facility.toml",
            )
        if spec.transport != "TLS_TCP":
            raise invalid_field("buffer.spec.transport", "a cache on another host is reached by tls_tcp alone")

    def _check_transport(self, spec: BufferSpec) -> None:
        field = "buffer.spec.transport"
        if spec.transport not in TRANSPORTS:
            raise BeamwireError(
                Reason.UNSUPPORTED, f"{field}: {spec.transport.lower()} is not in this release; use tls_tcp"
            )
        if spec.transport == "TCP" and not self.plain_tcp:
            raise invalid_field(field, "this facility does not allow plain tcp here; use tls_tcp")
        if spec.transport == "IPC" and not self.allow_ipc:
            raise invalid_field(field, "this facility does not allow ipc; use tls_tcp")
        if spec.transport == "IPC" and not spec.acked:
            raise invalid_field(field, "ipc needs delivery acked")

    def _check_sizes(self, spec: BufferSpec) -> None:
        most = min(spec.producer_count, MOST_SHARDS)
        if spec.shard_count > most:
            why = (
                "each shard needs a producer, and there are no more (of a transfer: processes)"
                if most == spec.producer_count
                else "no buffer may have more"
            )
            raise invalid_field("buffer.spec.shard_count", f"must be at least 1 and at most {most}: {why}")
        limit = self.capacity_bytes // spec.shard_count
        if not 1 <= spec.capacity_bytes <= limit:
            each = " for each of its shards" if spec.shard_count > 1 else ""
            raise invalid_field(
                "buffer.spec.capacity_bytes", f"must be from 1 to {limit}{each}, the limit of this facility"
            )
        if not 0 <= spec.retain_bytes <= spec.capacity_bytes:
            raise invalid_field(
                "buffer.spec.retain_bytes", f"must be from 0 to {spec.capacity_bytes}, the capacity of the buffer"
            )
        for field in ("retain_bytes", "keep"):
            if getattr(spec, field) and not spec.acked:
                raise invalid_field(f"buffer.spec.{field}", "needs delivery acked: push keeps nothing")

    def _check_leases(self, spec: BufferSpec) -> None:
        longest = self.lease.total_seconds()
        self.check_lease("buffer.spec.lease", spec.lease)
        if not 0 <= spec.keep <= longest:
            raise invalid_field("buffer.spec.keep", f"must be at most {self.lease}")
        if not SHORTEST_FRAME_LEASE <= spec.frame_lease <= longest:
            raise invalid_field("buffer.spec.frame_lease", f"must be from {SHORTEST_FRAME_LEASE:g} s to {self.lease}")

    def check_lease(self, field: str, seconds: float) -> None:
        """Raise INVALID_FIELD if nothing may live for so long."""
        if not 0 < seconds <= self.lease.total_seconds():
            raise invalid_field(field, f"must be positive and at most {self.lease}")


def check_policy(spec: BufferSpec, owner: str, policy: Policy) -> None:
    """Raise POLICY_REFUSED for caches that may not run where they are to run; on this host they may for everybody."""
    if not spec.local:
        place = Place(**spec.place.model_dump(), processes=spec.shard_count)
        check_place(policy, owner, place, {"place": "buffer.spec.placement", "processes": "buffer.spec.shard_count"})


def _check_groups(spec: BufferSpec) -> None:
    if spec.groups and not spec.acked:
        raise invalid_field(
            "buffer.spec.groups", "needs delivery acked: the consumers of a buffer with delivery push share its frames"
        )
    if len(spec.groups) > MOST_GROUPS:
        raise invalid_field("buffer.spec.groups", f"may be at most {MOST_GROUPS}")
    for index, group in enumerate(spec.groups):
        if not GROUP.fullmatch(group):
            raise invalid_field(
                f"buffer.spec.groups[{index}]",
                f"{group[:40]!r} is no name of a group: {GROUP_NAMES}",
            )
        if group in spec.groups[:index]:
            raise invalid_field(f"buffer.spec.groups[{index}]", f"{group} is named twice")


class Rings:
    """The files that hold the frames of caches and outlive them: in shared memory, or in the buffer's directory.

    Args:
        directory: holds one directory for each buffer of the facility.
    """

    def __init__(self, directory: Path) -> None:
        # Several facilities may run on one machine, under one user, with buffers of the same names.
        # However a command names the directory, so that `clean` finds what `serve` has left.
        facility = zlib.crc32(os.fsencode(directory.resolve()))
        self._directory = directory
        self._prefix = f"beamwire-{os.getuid()}-{facility:08x}-"

    def place(self, buffer: str, shard: int, spec: BufferSpec) -> str:
        """Return where the ring of a new cache shall be; empty for memory of its own."""
        if not spec.acked:
            return ""
        room = os.statvfs(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
        if spec.overflow_policy == "SPILL" or room is None or room.f_bavail * room.f_frsize < spec.capacity_bytes:
            return str(self._directory.absolute() / buffer / f"shard-{shard}" / "ring")
        return str(self.in_memory(buffer, shard))

    def in_memory(self, buffer: str, shard: int) -> Path:
        """Return the name of a ring in shared memory, on whichever host."""
        # No id has a dot in it, so that no buffer's files look like another's.
        return SHARED_MEMORY / f"{self._prefix}{buffer}.{shard}"

    def remove(self, buffer: str) -> None:
        """Remove the rings of a buffer from shared memory; those in its directory go with it."""
        for path in SHARED_MEMORY.glob(f"{self._prefix}{buffer}.*"):
            path.unlink(missing_ok=True)

    def buffers(self) -> Iterator[str]:
        """Yield the ids of the buffers that have rings in shared memory."""
        names = {path.name.removeprefix(self._prefix) for path in SHARED_MEMORY.glob(f"{self._prefix}*")}
        yield from sorted({name.partition(".")[0] for name in names})


def write_configuration(
    directory: Path, record: BufferRecord, number: int, placement: Placement, token_file: Path | None
) -> None:
    """Write what a cache on this host is told when it starts, `cache.json`; the file holds a secret."""
    encrypted = record.spec.transport == "TLS_TCP"
    here = {
        "host": placement.host,
        "advertise": placement.advertise,
        "credentials": str(directory / "credentials") if encrypted else None,
        "join_token_file": str(token_file) if token_file else None,
        "trace_dir": placement.trace_dir or None,
    }
    path = directory / "cache.json"
    part = path.with_suffix(".part")
    part.touch(mode=0o600)
    part.write_text(
        json.dumps(configuration(record, number) | here | {"otlp_endpoint": placement.otlp_endpoint}, indent=1)
    )
    part.replace(path)


def configuration(record: BufferRecord, number: int) -> dict[str, object]:
    """Return what one cache of a buffer is told wherever it runs."""
    spec, shard = record.spec, record.shards[number]
    port = "" if spec.transport == "IPC" else shard.address.rpartition(":")[2]
    return {
        "buffer": record.name.removeprefix("buffers/"),
        "transfer": record.transfer,
        "epoch": record.epoch,
        "shard": number,
        "delivery": spec.delivery,
        # Consumers that are pushed to share the work of one group too.
        "groups": spec.groups or (DEFAULT_GROUP,),
        "frame_lease": spec.frame_lease,
        "overflow_policy": spec.overflow_policy,
        "capacity_bytes": spec.capacity_bytes,
        "capacity_frames": spec.capacity_frames,
        "retain_bytes": spec.retain_bytes,
        "keep": spec.keep > 0,
        "added": [_added(group) for group in record.added],
        "producer_count": spec.producer_count,
        "producer_numbers": range_of_shard(spec, number),
        "producers": spec.producers,
        "consumers": spec.consumers,
        "revoked": record.revoked,
        # Over TCP a ticket is bound to a certificate, and without TLS there is none.
        "ticket_key": "" if spec.transport == "TCP" else record.ticket_key,
        "ring": shard.ring or None,
        "transport": TRANSPORTS[spec.transport],
        "port": int(port or 0),
        "traceparent": record.traceparent,
    }


def _added(group: AddedGroup) -> dict[str, object]:
    seal = group.seal
    ended = {"cause": seal.cause, "detail": seal.detail} if seal is not None else {}
    return {"name": group.name, "consumers": group.consumers, **ended}


def range_of_shard(spec: BufferSpec, number: int) -> tuple[int, ...]:
    """Return the numbers of the producers that one shard serves."""
    return tuple(range(number, spec.producer_count, spec.shard_count))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
