"""Tells of the states of jobs: signed, in order, again and again until the receiver takes it or a day is over."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Final

import httpx

from beamwire.mesh.database import patience
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.outbox import Outbox, OutboxItem, Room
from beamwire.mesh.store import Store
from beamwire.services.job.model import Callback, Deliveries, JobRecord
from beamwire.services.job.receivers import Receivers

log = logging.getLogger(__name__)

CONCURRENT: Final = 64
"""Events that are being told at one time."""
EACH: Final = 4
"""Of them to one host: who is slow or dead there keeps only what is for that host waiting."""
TIMEOUT: Final = 10.0
"""Seconds that a receiver has to answer."""
FIRST_DELAY, LONGEST_DELAY = 1.0, 3600.0
"""Seconds between attempts, doubled with each."""
GIVE_UP: Final = 86400.0
"""Seconds after which an event is given up."""
GONE: Final = 410
PORTS: Final = {"https": 443, "http": 80}
ID_HEADER: Final = "Beamwire-Event-Id"
TIMESTAMP_HEADER: Final = "Beamwire-Timestamp"
SIGNATURE_HEADER: Final = "Beamwire-Signature"


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """Return what proves that an event is ours: `v1=` and the HMAC-SHA256 of `<timestamp>.<body>` in hexadecimal."""
    return "v1=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class Deliverer:
    """Takes what is in the outbox to the receivers. Each replica has one.

    Args:
        store: where jobs are kept.
        outbox: where their events are.
        receivers: where events may go.
    """

    def __init__(self, store: Store[JobRecord], outbox: Outbox, receivers: Receivers) -> None:
        self._store = store
        self._outbox = outbox
        self._receivers = receivers
        # Of their own: names that nobody answers for are waited for long, and must not keep other work waiting.
        self._threads = ThreadPoolExecutor(CONCURRENT, "names of receivers")

    async def run(self) -> None:
        """Deliver until cancelled."""
        # Nothing of the environment: no proxy, and no password of a netrc file for whatever host a job names. No
        # connection is used again: hosts that share an address have each to say who they are.
        client = httpx.AsyncClient(
            timeout=httpx.Timeout(TIMEOUT, connect=TIMEOUT / 2),
            limits=httpx.Limits(max_keepalive_connections=0),
            follow_redirects=False,
            trust_env=False,
            verify=ssl.create_default_context(),
        )
        try:
            async with client, asyncio.TaskGroup() as group:
                await self._tell(client, group)
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _tell(self, client: httpx.AsyncClient, group: asyncio.TaskGroup) -> None:
        busy: dict[asyncio.Task[None], str] = {}
        while True:
            items = await self._claim(CONCURRENT - len(busy), Room(EACH, busy.values()))
            for item in items:
                task = group.create_task(self._deliver(client, item), name=f"event {item.event_id}")
                busy[task] = item.receiver
                task.add_done_callback(busy.pop)
            if len(busy) == CONCURRENT:
                await asyncio.wait(busy, return_when=asyncio.FIRST_COMPLETED)
            elif not items:
                await self._outbox.wait()

    async def _claim(self, limit: int, room: Room) -> list[OutboxItem]:
        try:
            return await self._outbox.claim(limit, room)
        except BeamwireError as error:
            log.warning("the events of jobs cannot be read: %s", error)
            return []

    async def _deliver(self, client: httpx.AsyncClient, item: OutboxItem) -> None:
        try:
            record = await self._store.get(item.resource)
            if record is None or record.spec.callback is None:
                await self._outbox.done(item)
                return
            problem, gone = await self._post(client, record.spec.callback, item)
            await self._settle(item, problem, gone=gone)
        except BeamwireError as error:
            # Its lease ends, and it is tried again.
            log.warning("the event %s of %s is left for later: %s", item.event_id, item.resource, error)
        except Exception:
            # One event that cannot be told must not end the service.
            log.exception("the event %s of %s is left for later", item.event_id, item.resource)

    async def _settle(self, item: OutboxItem, problem: str, *, gone: bool) -> None:
        # What was told is written down however long the database is away: it would be told once more otherwise, and not
        # before the lease of the item is over.
        patience.set(float("inf"))
        age = (datetime.now(UTC) - item.created).total_seconds()
        if not problem:
            await self._count(item.resource, delivered=1)
            await self._outbox.done(item)
        elif gone or age >= GIVE_UP:
            log.warning("the event %s of %s is given up: %s", item.event_id, item.resource, problem)
            await self._count(item.resource, problem, abandoned=1)
            await self._outbox.done(item)
        else:
            await self._count(item.resource, problem)
            delay = min(FIRST_DELAY * 2.0 ** min(item.attempts, 20), LONGEST_DELAY)
            await self._outbox.retry(item, delay * random.uniform(0.5, 1.0), problem)

    async def _count(self, name: str, problem: str = "", *, delivered: int = 0, abandoned: int = 0) -> None:
        def changed(record: JobRecord) -> dict[str, object]:
            before = record.deliveries
            now = Deliveries(
                events=before.events,
                delivered=min(before.events, before.delivered + delivered),
                abandoned=before.abandoned + abandoned,
                last_error=problem or before.last_error,
            )
            return {} if now == before else {"deliveries": now}

        try:
            await self._store.change(name, changed)
        except BeamwireError as error:
            if error.reason is not Reason.RESOURCE_NOT_FOUND:
                raise

    async def _post(self, client: httpx.AsyncClient, callback: Callback, item: OutboxItem) -> tuple[str, bool]:
        """Tell of one event; returns what went wrong, empty if nothing, and whether it is never to be told again."""
        try:
            async with asyncio.timeout(TIMEOUT):
                status = await self._send(client, callback, item)
        except TimeoutError:
            return f"no answer within {TIMEOUT:g} s", False
        except BeamwireError as error:
            return error.message, False
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return f"{type(error).__name__}: {error}"[:200], False
        return ("", False) if 200 <= status < 300 else (f"answered {status}", status == GONE)

    async def _send(self, client: httpx.AsyncClient, callback: Callback, item: OutboxItem) -> int:
        """Send an event to the first address of its receiver that takes connections; returns the status."""
        url = httpx.URL(callback.url)
        host, port = url.raw_host.decode(), url.port or PORTS[url.scheme]
        refused: httpx.TransportError | None = None
        for address in await self._receivers.addresses(host, port, self._threads):
            # What was looked at is what is dialed: the name may mean another address a moment later.
            request = client.build_request(
                "POST",
                url.copy_with(host=address),
                content=item.payload.encode(),
                headers={"Host": url.netloc.decode(), **_headers(callback, item)},
                extensions={"sni_hostname": host},
            )
            try:
                answer = await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                refused = error
                continue
            # What the receiver answers besides is not read: it may be as long as it likes.
            await answer.aclose()
            return answer.status_code
        assert refused is not None, "who may be told has an address"
        raise refused


def _headers(callback: Callback, item: OutboxItem) -> dict[str, str]:
    timestamp = str(int(datetime.now(UTC).timestamp()))
    return {
        "Content-Type": "application/json",
        "User-Agent": "beamwire",
        ID_HEADER: item.event_id,
        TIMESTAMP_HEADER: timestamp,
        SIGNATURE_HEADER: signature(callback.secret, timestamp, item.payload.encode()),
    }
