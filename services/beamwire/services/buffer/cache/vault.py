"""Opens what a cache keeps: ring, ledger and journal, new or as the process before left them."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from base64 import b64decode
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.checksum import crc32c
from beamwire.mesh.stream.pool import allocate
from beamwire.services.buffer.cache import ledger as at
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.journal import Journal
from beamwire.services.buffer.cache.ledger import Ledger
from beamwire.services.buffer.cache.ring import Ring

_COPIES: Final = ("ledger.0", "ledger.1")
# Generation, and CRC-32C of what follows.
_COPY: Final = struct.Struct("<QI")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(slots=True)
class Facts:
    """What the journal says.

    `producers` are identities by number, `ends` the messages of their ENDs, `groups` names, begin positions and first
    sequences of the groups that were not declared, by index, `joined` the instances of consumers that were connected,
    by group.
    """

    first_epoch: int = 0
    epoch: int = 0
    boot: str = ""
    header: bytes = b""
    producers: dict[int, str] = field(default_factory=dict)
    ends: dict[int, bytes] = field(default_factory=dict)
    groups: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    joined: dict[str, set[str]] = field(default_factory=dict)
    seal: dict[str, Any] | None = None
    revoked: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, notes: Iterable[dict[str, Any]]) -> Facts:
        """Put together what was noted."""
        facts = cls()
        for note in notes:
            facts._add(**note)
        return facts

    def _add(self, fact: str, **values: Any) -> None:
        match fact:
            case "begin":
                if values["epoch"] != self.epoch:
                    # Positions begin again.
                    self.groups.clear()
                    self.joined.clear()
                self.first_epoch = self.first_epoch or values["epoch"]
                self.epoch, self.boot = values["epoch"], values["boot"]
            case "header":
                self.header = b64decode(values["message"])
            case "producer":
                self.producers[values["number"]] = values["identity"]
            case "end":
                self.ends[values["number"]] = b64decode(values["message"])
            case "group":
                self.groups[values["index"]] = values["name"], values["begin"], values["first_sequence"]
            case "joined":
                self.joined.setdefault(values["group"], set()).add(values["instance"])
            case "left":
                self.joined.get(values["group"], set()).discard(values["instance"])
            case "seal":
                self.seal = values
            case "revoked":
                self.revoked.add(values["identity"])
            case _:
                raise ValueError(f"the journal holds an unknown fact {fact!r}")


class Copies:
    """The last two copies of the ledger on disk, each with a checksum: one of them is whole at any moment."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: list[int] = []
        self._generation = 0

    def read(self, size: int) -> bytes | None:
        """The newest one that is whole; None if there is none of this size."""
        found: list[tuple[int, bytes]] = []
        for name in _COPIES:
            with suppress(OSError, struct.error):
                data = (self._directory / name).read_bytes()
                generation, checksum = _COPY.unpack_from(data)
                if len(data) == _COPY.size + size and crc32c(data[_COPY.size :]) == checksum:
                    found.append((generation, data[_COPY.size :]))
        self._generation, copy = max(found, default=(0, None))
        return copy

    def write(self, copy: bytes) -> None:
        """Write one in place of the older one, and wait until it is there."""
        if not self._descriptors:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            self._descriptors = [os.open(self._directory / name, flags, 0o600) for name in _COPIES]
        self._generation += 1
        descriptor = self._descriptors[self._generation % len(_COPIES)]
        if os.pwrite(descriptor, _COPY.pack(self._generation, crc32c(copy)) + copy, 0) != _COPY.size + len(copy):
            raise OSError(errno.ENOSPC, "there is no room", str(self._directory))
        os.fdatasync(descriptor)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Vault:
    """All that outlives the process.

    `restored` if the ring is that of an earlier process, `afresh` if the ring of an earlier epoch is lost, `rebooted`
    if the machine was restarted since.
    """

    journal: Journal
    facts: Facts
    ledger: Ledger
    memory: memoryview
    epoch: int
    restored: bool
    afresh: bool
    rebooted: bool
    descriptor: int
    copies: Copies
    path: Path | None
    offset: int

    def sync(self, ledger: bytes) -> None:
        """Wait until the ring is on disk, and then this copy of the ledger, with which a restarted machine begins.

        The pages of the ledger itself reach the disk in any order, so that what is there may be of no one moment.
        """
        os.fdatasync(self.descriptor)
        self.journal.sync()
        self.copies.write(ledger)

    def close(self) -> None:
        """Close the files; what is mapped stays until nobody looks at it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.journal.close()
        self.copies.close()


def open_vault(config: CacheConfig, directory: Path) -> Vault:
    """Open or make it; BeamwireError CACHE_FAILED if there is no room for the ring."""
    journal = Journal(directory)
    facts = Facts.of(journal.read())
    producers = len(config.expected_producers)
    front = Ledger.size(config.capacity_frames, producers)
    size = front + Ring.size(config.capacity_bytes, config.capacity_frames)
    # What is pushed is not kept, and memory of its own has huge pages.
    path = config.ring if config.delivery == "ACKED" else None
    memory, descriptor = _map(path, size)
    shape = {
        at.CAPACITY_BYTES: config.capacity_bytes,
        at.CAPACITY_FRAMES: config.capacity_frames,
        at.PRODUCER_COUNT: producers,
    }
    words = memory[:front].cast("Q")
    known = {at.HEAD_MAGIC: at.MAGIC, at.EPOCH: facts.epoch, **shape}
    restored = bool(facts.epoch) and all(words[place] == value for place, value in known.items())
    boot = _BOOT_ID.read_text().strip()
    rebooted = bool(facts.boot) and facts.boot != boot
    copies = Copies(directory)
    copy = copies.read(front)
    if restored and rebooted:
        restored = copy is not None
        memory[:front] = copy or memory[:front]
    epoch = facts.epoch if restored else facts.epoch + 1 if facts.epoch else config.epoch
    if not restored:
        memory[:front] = bytes(front)
        for place, value in {**shape, at.EPOCH: epoch, at.HEAD_MAGIC: at.MAGIC}.items():
            words[place] = value
    journal.note(fact="begin", epoch=epoch, boot=boot)
    return Vault(
        journal,
        facts,
        Ledger(memory[:front], producers),
        memory[front:],
        epoch,
        restored=restored,
        afresh=bool(facts.epoch) and epoch > facts.first_epoch,
        rebooted=rebooted,
        descriptor=descriptor,
        copies=copies,
        path=path,
        offset=front,
    )


def _map(path: Path | None, size: int) -> tuple[memoryview, int]:
    if path is None:
        return memoryview(allocate(size)), -1
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, 0)
            # All of it now: a file that cannot grow later would kill the process that writes to its memory.
            os.posix_fallocate(descriptor, 0, size)
        return memoryview(mmap.mmap(descriptor, size)), descriptor
    except OSError as error:
        os.close(descriptor)
        raise BeamwireError(
            Reason.CACHE_FAILED,
            f"there is no room for a ring of {size} bytes at {path} ({error}); ask for a smaller buffer or make room",
        ) from error
