"""What a member does as long as it lives to stay one: it renews its certificate, and follows whom to believe."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Final

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import utcnow
from beamwire.mesh.identity.renewal import half_life, is_due, is_superseded, issues_of, random_jitter, remaining, renew
from beamwire.mesh.identity.revocation import RevocationList
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.mesh.rpc.channel import connect

WARNING_PERIOD: Final = timedelta(hours=1)
# Seconds between attempts that fail, the first and the most.
FIRST_PAUSE: Final = 0.5
LONGEST_RENEWAL_PAUSE: Final = 60.0
FIRST_WATCH_PAUSE: Final = 0.05
LONGEST_WATCH_PAUSE: Final = 10.0
# Whose certificates are short does not wait for long when renewal fails: this part of what is left.
_PART_OF_REST: Final = 0.1
# How often a loop looks at the files, which another process may have changed, in seconds.
_LOOK_PERIOD: Final = 5.0
# After a rotation all members renew: within so many seconds, and not all in one moment.
_ROTATION_SPREAD: Final = 1.0

_log = logging.getLogger(__name__)


def read_bundle(bundle: pb.TrustBundle) -> DomainTrust:
    """What a bundle says of a trust domain; CERTIFICATE_INVALID if its roots or its revocation list are none."""
    roots_pem = bundle.roots_pem.encode()
    return DomainTrust(
        trust_domain=bundle.name.removeprefix("trustBundles/"),
        roots_pem=roots_pem,
        sequence=bundle.sequence,
        revoked=RevocationList.read(bundle.revocation_list, bundle.revocation_issuer, roots_pem),
        address=bundle.address,
        enroll_address=bundle.enroll_address,
        token_root=bundle.token_root,
        revoked_tokens=frozenset(bundle.revoked_tokens),
    )


@dataclass
class _News:
    """What a watch said and is not yet believed."""

    told: dict[str, DomainTrust] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    # Domains of which something was said that cannot be believed; what was believed before stays.
    unreadable: set[str] = field(default_factory=set)
    # All there is was said.
    complete: bool = False

    def applied(self, trust: Trust) -> Trust:
        """The trust with the news in it."""
        told = [*self.told.values(), *(trust[name] for name in self.unreadable if name in trust)]
        return trust.told(told, removed=self.removed, complete=self.complete)


class Membership:
    """Keeps the members of one process, as long as `run` runs.

    Each of them renews at half of its certificate's life, ten per cent before or after, and at once if another
    authority signs. The first one follows the trust, which all of them then have on disk. Losing the Certificate
    service harms nothing until a certificate ends.

    Args:
        credentials: of the members.
        address: of their Certificate service, `host:port`.
    """

    def __init__(self, credentials: Sequence[Credentials], address: str) -> None:
        self._members = tuple(credentials)
        self._address = address
        self._listeners: list[Callable[[Trust], None]] = []
        self._away_since: datetime | None = None
        self._trust_changed = asyncio.Event()
        self._warned: dict[str, datetime] = {}
        # What the listeners know.
        self._told = self._members[0].trust

    def on_trust(self, listener: Callable[[Trust], None]) -> None:
        """Have somebody told what is believed now, after each change that this process was told of."""
        self._listeners.append(listener)

    async def run(self, delay: float = 0.0) -> None:
        """Renew and follow, until it is cancelled.

        Begins after `delay` seconds, which programs that are mostly short give, unless it is time to renew.
        """
        if not any(map(is_due, self._members)):
            await asyncio.sleep(delay)
        async with asyncio.TaskGroup() as group:
            for credentials in self._members:
                group.create_task(self._keep_renewed(credentials), name=f"renewal of {credentials.identity.path}")
            group.create_task(self._follow(), name="trust")

    async def believe(self, change: Callable[[Trust], Trust]) -> None:
        """Change what the members believe, on disk and here."""
        first, *others = self._members
        # They wait for the disk; the first one is what others go by.
        await asyncio.to_thread(first.change_trust, change)
        trust = first.trust
        # It may be on the disk already by another replica, and be news here all the same.
        new, self._told = trust != self._told, trust
        if new:
            for listener in self._listeners:
                listener(trust)
        await asyncio.gather(*(asyncio.to_thread(member.change_trust, change) for member in others))
        if new:
            self._trust_changed.set()

    @property
    def issues(self) -> list[str]:
        """What a person should know, each as a sentence; empty if all is well."""
        found = [issue for credentials in self._members for issue in issues_of(credentials)]
        if self._away_since is not None:
            found.append(
                f"the Certificate service at {self._address} cannot be reached since "
                f"{self._away_since:%Y-%m-%d %H:%M:%S} UTC"
            )
        return found

    async def _keep_renewed(self, credentials: Credentials) -> None:
        pause = FIRST_PAUSE
        async with connect(self._address, credentials) as channel:
            while True:
                chain_pem, jitter = credentials.chain_pem, random_jitter()
                await self._wait_until_due(credentials, chain_pem, jitter)
                if credentials.chain_pem != chain_pem:
                    # Somebody else has renewed it.
                    continue
                try:
                    renewed = await renew(credentials, channel)
                except (BeamwireError, OSError) as error:
                    self._failed("renewed", credentials, error)
                    longest = min(LONGEST_RENEWAL_PAUSE, _PART_OF_REST * remaining(credentials)[0].total_seconds())
                    await self._pause(min(pause, max(longest, FIRST_PAUSE)))
                    pause = min(2 * pause, LONGEST_RENEWAL_PAUSE)
                    continue
                pause = FIRST_PAUSE
                if renewed:
                    self._reached()
                    _log.info("%s is renewed until %s", credentials.identity, credentials.not_after)
                else:
                    await self._pause(pause)

    async def _wait_until_due(self, credentials: Credentials, chain_pem: bytes, jitter: float) -> None:
        """Wait until it is time to renew a certificate, or it is no longer the one on disk."""
        due = half_life(chain_pem, jitter)
        while credentials.chain_pem == chain_pem:
            self._trust_changed.clear()
            if is_superseded(credentials):
                await asyncio.sleep(random.uniform(0, _ROTATION_SPREAD))
                return
            self._warn(credentials)
            left = (due - utcnow()).total_seconds()
            if left <= 0:
                return
            # Not `wait_for`: in Python 3.11 it forgets that it was cancelled if the change comes at the same time.
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, _LOOK_PERIOD)):
                    await self._trust_changed.wait()

    async def _follow(self) -> None:
        pause = FIRST_WATCH_PAUSE
        async with connect(self._address, self._members[0]) as channel:
            stub = pb_grpc.CertificateServiceStub(channel)
            while True:
                try:
                    async for news in _read(stub.WatchTrustBundles(pb.WatchTrustBundlesRequest())):
                        await self.believe(news.applied)
                        self._reached()
                        pause = FIRST_WATCH_PAUSE
                except (BeamwireError, OSError) as error:
                    # A watch that only ended, with the certificate that it began with say, is begun again at once.
                    if pause > FIRST_WATCH_PAUSE:
                        self._failed("told whom to believe", self._members[0], error)
                await self._pause(pause)
                pause = min(4 * pause, LONGEST_WATCH_PAUSE)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds * random.uniform(0.5, 1))

    def _reached(self) -> None:
        if self._away_since is not None:
            _log.info("the Certificate service at %s is back", self._address)
        self._away_since = None

    def _failed(self, what: str, credentials: Credentials, error: BeamwireError | OSError) -> None:
        away = isinstance(error, BeamwireError) and error.reason in (Reason.SERVICE_UNAVAILABLE, Reason.TIMED_OUT)
        if away and self._away_since is None:
            self._away_since = utcnow()
        self._tell(f"{credentials.identity} cannot be {what}", f"{credentials.identity} cannot be {what}: {error}")

    def _warn(self, credentials: Credentials) -> None:
        for issue in issues_of(credentials):
            self._tell(f"{credentials.identity} issue", issue)

    def _tell(self, subject: str, story: str) -> None:
        """Write something down, not too often."""
        now = utcnow()
        told = self._warned.get(subject)
        if told is None or now - told >= WARNING_PERIOD:
            self._warned[subject] = now
            _log.warning("%s", story, extra={telemetry.ATTR_CALLER: subject.partition(" ")[0]})


class MembershipThread:
    """A membership for a program without an event loop, as long as its `with` block lasts. It never ends the program.

    Args:
        credentials: of the member.
        address: of its Certificate service, `host:port`.
        delay: seconds, as for `Membership.run`.
    """

    def __init__(self, credentials: Credentials, address: str, *, delay: float = 0.0) -> None:
        self._work = partial(keep_member, credentials, address, delay)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beamwire membership", daemon=True)
        self._stop: Callable[[], object] = lambda: None

    def __enter__(self) -> None:
        self._thread.start()
        self._ready.wait()

    def __exit__(self, *_: object) -> None:
        # It may have ended by itself.
        with suppress(RuntimeError):
            self._stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            with suppress(asyncio.CancelledError), asyncio.Runner() as runner:
                runner.get_loop()
                runner.run(self._work_until_stopped())
        except OSError:
            # There are too many open files for an event loop.
            _log.exception("the membership did not begin")
        finally:
            self._ready.set()

    async def _work_until_stopped(self) -> None:
        work = asyncio.create_task(self._work())
        loop = asyncio.get_running_loop()
        self._stop = lambda: loop.call_soon_threadsafe(work.cancel)
        self._ready.set()
        await work


async def keep_member(credentials: Credentials, address: str, delay: float = 0.0) -> None:
    """As `Membership.run`, for a program that goes on whatever becomes of it."""
    try:
        await Membership([credentials], address).run(delay)
    except Exception:
        _log.exception("the membership of %s ended", credentials.identity)


async def _read(answers: AsyncIterable[pb.WatchTrustBundlesResponse]) -> AsyncIterator[_News]:
    """What a watch says: first all of it together, then one thing at a time."""
    news, complete = _News(), False
    async for answer in answers:
        name = answer.trust_bundle.name.removeprefix("trustBundles/")
        if answer.removed:
            news.removed.add(name)
        elif name:
            try:
                news.told[name] = read_bundle(answer.trust_bundle)
            except (BeamwireError, ValueError) as error:
                news.unreadable.add(name)
                _log.error("what is said of the trust domain %s is not believed: %s", name, error)
        if answer.synchronized:
            complete = news.complete = True
        if complete:
            yield news
            news = _News()
