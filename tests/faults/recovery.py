"""How long the services take, once they answer calls again, until everything is as their records say."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import SecretStr

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.replicas import has_died
from beamwire.mesh.store import utcnow
from beamwire.services.config import Layout, ServiceName, load_facility
from beamwire.services.inspection.records import TERMINAL, Kept, read
from beamwire.services.inspection.remains import SETTLING, left_behind, look, without_process

# Seconds from the first call that is answered until nothing is left to recover.
GOAL = 2.0
# On a machine that has other things to do.
BOUND = 15.0
# Between two looks, and when they end.
LOOK, LAST_LOOK = 0.05, 30.0
SERVICES: tuple[ServiceName, ...] = ("request", "job", "buffer")


@dataclass(frozen=True)
class Recovery:
    """One start after a death: seconds to the first answer, and from there to the end of what was found wrong then."""

    store: str
    starting: float
    recovering: float
    found: tuple[str, ...] = ()
    load: float = 0.0

    @property
    def in_time(self) -> bool:
        """Whether it kept the goal, or on a busy machine the bound."""
        quiet = self.load <= (os.cpu_count() or 1)
        return self.recovering <= (GOAL if quiet else BOUND)

    def line(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def wrong(layout: Layout, url: str) -> set[str]:
    """What does not agree with the records: what nobody needs, what lacks its process, what has no driver."""
    host = look(layout)
    kept = asyncio.run(_kept(layout, url))
    # What has just ended is not given the time here that it is given elsewhere.
    now = utcnow() + SETTLING
    found = {f"{remain.what.value} {remain.place}" for remain in left_behind(host, kept, now)}
    found |= {f"without a process: {row.name}" for row in without_process(host, kept, now)}
    for service, records in kept.items():
        unfinished = [row for row in records.rows if row.state not in TERMINAL[service]]
        found |= {f"without a driver: {row.name}" for row in unfinished if row.holder and has_died(row.holder)}
    return found


async def _kept(layout: Layout, url: str) -> dict[ServiceName, Kept]:
    _, settings = load_facility(layout.directory)
    # The services were told in their environment.
    database = settings.database.model_copy(update={"url": SecretStr(url)})
    settings = settings.model_copy(update={"database": database})
    return {service: await read(layout, settings, service) for service in SERVICES}


class Recovering:
    """Listens to services that say when they are ready, as systemd does, and measures what follows a death."""

    def __init__(self, layout: Layout, environment: Mapping[str, str]) -> None:
        self.found: list[Recovery] = []
        self._layout = layout
        self._url = environment.get("BEAMWIRE_DATABASE__URL", "")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        name = f"beamwire-faults-{os.getpid()}-{id(self)}"
        self._socket.bind(f"\0{name}")
        self.environment = {"NOTIFY_SOCKET": f"@{name}"}
        self._dead = False
        self._began = 0.0
        self._thread = threading.Thread(target=self._listen, name="recovering")

    def wrong(self) -> set[str]:
        """What does not agree with the records now."""
        return wrong(self._layout, self._url)

    def start(self) -> None:
        """Listen."""
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(b"END", f"\0{self.environment['NOTIFY_SOCKET'][1:]}")
        self._thread.join()
        self._socket.close()

    def died(self) -> None:
        """The services were killed."""
        self._dead = True

    def begun(self) -> None:
        """They are started now."""
        self._began = time.monotonic()

    def _listen(self) -> None:
        while (said := self._socket.recv(4096)) != b"END":
            if said == b"READY=1" and self._dead:
                self._dead = False
                self._measure(time.monotonic())

    def _measure(self, ready: float) -> None:
        began, found = self._began, self._look(ready)
        left = found
        # What is found later is not of that death.
        while left and not self._dead and time.monotonic() < ready + LAST_LOOK:
            time.sleep(LOOK)
            left &= self._look(ready)
        if self._dead and left:
            return
        took = time.monotonic() - ready if found else 0.0
        store = "postgres" if self._url else "sqlite"
        self.found.append(Recovery(store, ready - began, took, tuple(sorted(found)), os.getloadavg()[0]))

    def _look(self, ready: float) -> set[str]:
        """What is wrong now, as soon as the databases can be read."""
        while True:
            try:
                return self.wrong()
            except BeamwireError:
                if time.monotonic() > ready + LAST_LOOK:
                    raise
                time.sleep(LOOK)


def read_report(path: Path) -> list[Recovery]:
    """What was reported, by whichever tests."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Recovery(**{**(document := json.loads(line)), "found": tuple(document["found"])}) for line in lines]
