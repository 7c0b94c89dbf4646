"""Opens what a cache keeps: ring, ledger and journal, new or as the process before left them."""

from __future__ import annotations

import mmap
import os
from base64 import b64decode
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.pool import allocate
from beamwire.services.buffer.cache import ledger as at
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.journal import Journal
from beamwire.services.buffer.cache.ledger import Ledger
from beamwire.services.buffer.cache.ring import Ring

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(slots=True)
class Facts:
    """What the journal says.

    `producers` are identities by number, `ends` the messages of their ENDs, `groups` names and begin positions of the
    groups that were not declared, by index, `joined` the instances of consumers that were connected, by group.
    """

    epoch: int = 0
    boot: str = ""
    header: bytes = b""
    producers: dict[int, str] = field(default_factory=dict)
    ends: dict[int, bytes] = field(default_factory=dict)
    groups: dict[int, tuple[str, int]] = field(default_factory=dict)
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
                self.epoch, self.boot = values["epoch"], values["boot"]
            case "header":
                self.header = b64decode(values["message"])
            case "producer":
                self.producers[values["number"]] = values["identity"]
            case "end":
                self.ends[values["number"]] = b64decode(values["message"])
            case "group":
                self.groups[values["index"]] = values["name"], values["begin"]
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


@dataclass(frozen=True, slots=True)
class Vault:
    """All that outlives the process.

    `restored` if the ring is that of an earlier process, `afresh` if there was an earlier process and its ring is
    lost, `rebooted` if the machine was restarted since. `path` is the file of the ring, None if there is none, and
    `offset` where the memory for messages begins in it.
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
    path: Path | None
    offset: int

    def sync(self) -> None:
        """Wait until all of it is on disk, where it is kept on disk."""
        if self.descriptor >= 0:
            os.fdatasync(self.descriptor)
        self.journal.sync()

    def close(self) -> None:
        """Close the files; what is mapped stays until nobody looks at it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.journal.close()


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
    epoch = facts.epoch if restored else facts.epoch + 1 if facts.epoch else config.epoch
    if not restored:
        memory[:front] = bytes(front)
        for place, value in {**shape, at.EPOCH: epoch, at.HEAD_MAGIC: at.MAGIC}.items():
            words[place] = value
    boot = _BOOT_ID.read_text().strip()
    journal.note(fact="begin", epoch=epoch, boot=boot)
    return Vault(
        journal,
        facts,
        Ledger(memory[:front], producers),
        memory[front:],
        epoch,
        restored=restored,
        afresh=bool(facts.epoch) and not restored,
        rebooted=bool(facts.boot) and facts.boot != boot,
        descriptor=descriptor,
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
