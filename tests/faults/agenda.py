"""What goes wrong in a run of the fault suite, and when: all of it follows from a seed."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from beamwire.mesh.identity.credentials import Credentials
from beamwire.testing.facility import Facility
from beamwire.testing.proxy import BOTH, Proxy, Way
from tests.faults.parts import Cache, Peer

# Faults do not begin before this part of the stream, so that there is something to break.
_BEGIN: Final = 0.02
_SHORT_CUT: Final = (0.2, 1.0)
# Longer than it takes to notice, and than the cache waits for a consumer to come back.
_LONG_CUT: Final = (4.5, 5.0)
_FLIP_SECONDS: Final = 0.5
# With TLS each flip costs a connection, without it a frame or a bundle: half a stream of them could go in that time.
_BYTES_PER_FLIP: Final = 200_000
_BYTES_PER_FLIP_BARE: Final = 300_000
_FLIPS_BARE: Final = 25


class Agenda:
    """Breaks things as a stream goes on. `counts` says what was done how often.

    The first of the proxies is that of the producers, the last one that of a consumer which is there to the end.
    """

    def __init__(
        self,
        seed: int,
        *,
        cache: Cache,
        producers: Sequence[Peer],
        consumers: Sequence[Peer],
        proxies: Sequence[Proxy],
        facility: Facility,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._cache = cache
        self._producers = producers
        self._consumers = consumers
        self._proxies = proxies
        self._facility = facility
        self._plan: list[tuple[float, str]] = []
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._actions: dict[str, Callable[[], None]] = {
            "kill producer": lambda: self._kill_peer("kill producer", self._producers),
            "kill cache": self._kill_cache,
            "kill consumer": lambda: self._kill_peer("kill consumer", self._consumers),
            "reset": self._reset,
            "cut": lambda: self._cut(BOTH, _SHORT_CUT),
            "cut one way": lambda: self._cut((self._random.choice(BOTH),), _SHORT_CUT),
            "long cut": lambda: self._cut(BOTH, _LONG_CUT),
            "flip": self._flip,
            "rotate": self._rotate,
        }

    def schedule(self, faults: dict[str, int], until: float) -> None:
        """So many of each kind, anywhere in this part of the stream."""
        for kind, count in faults.items():
            self._plan += [(self._random.uniform(_BEGIN, until), kind) for _ in range(count)]
        self._plan.sort(reverse=True)

    def go_on(self, progress: float) -> None:
        """Do what is due when this part of the stream, 0 to 1, has passed."""
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()
        while self._plan and self._plan[-1][0] <= progress:
            kind = self._plan.pop()[1]
            self.counts[kind] += 1
            self._actions[kind]()

    def _kill_cache(self) -> None:
        self._cache.kill()
        self._cache.restart()

    def _kill_peer(self, kind: str, peers: Sequence[Peer]) -> None:
        living = [peer for peer in peers if peer.alive]
        if not living:
            # All of them are done: the fault finds nothing to break.
            self.counts[kind] -= 1
            return
        victim = self._random.choice(living)
        victim.kill()
        victim.live()

    def _reset(self) -> None:
        self._random.choice(self._proxies).reset()

    def _cut(self, ways: Sequence[Way], seconds: tuple[float, float]) -> None:
        proxy = self._random.choice(self._proxies)
        proxy.cut(ways)
        self._do_later(self._random.uniform(*seconds), proxy.heal)

    def _flip(self, proxy: Proxy | None = None) -> None:
        proxy = proxy or self._random.choice([proxy for proxy in self._proxies if proxy.open] or self._proxies)
        if self._cache.secure:
            proxy.flip(_BYTES_PER_FLIP)
        else:
            # Signals and lengths have no checksum: without TLS nobody could tell that they are not what was sent.
            way = Way.UP if proxy is self._proxies[0] else Way.DOWN
            proxy.flip(_BYTES_PER_FLIP_BARE, [way], most=_FLIPS_BARE, noise=True)
        before = proxy.flipped_bits

        def stop() -> None:
            proxy.flip(0)
            if proxy.flipped_bits == before:
                # Nothing passed there: its peers are done. The last one has something to the end.
                self._flip(self._proxies[-1])

        self._do_later(_FLIP_SECONDS, stop)

    def _rotate(self) -> None:
        """New keys and certificates for all, and new connections that must use them."""
        held: list[Credentials | None] = [self._cache.credentials, self._cache.user]
        for credentials in held:
            if credentials is not None:
                self._facility.renew(credentials)
        self._reset()

    def _do_later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), action))
