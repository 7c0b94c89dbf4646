"""A cache and proxies in front of it for the tests of single faults."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from beamwire.testing.facility import Facility
from beamwire.testing.proxy import Proxy
from tests.faults.parts import Cache, Peer

StartCache = Callable[..., Cache]
StartProxy = Callable[[Cache], Proxy]
Live = Callable[[Peer], Peer]


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "members")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def cache(tmp_path: Path, facility: Facility, stack: ExitStack) -> StartCache:
    """Start the cache, with options of cache.json."""

    numbers = itertools.count()

    def start(**options: object) -> Cache:
        cache = Cache(tmp_path / f"cache-{next(numbers)}", facility, **options)  # type: ignore[arg-type]
        stack.callback(cache.close)
        return cache

    return start


@pytest.fixture
def proxy(stack: ExitStack) -> StartProxy:
    """Put a proxy in front of a cache."""
    return lambda cache: stack.enter_context(Proxy(cache.address))


@pytest.fixture
def live(stack: ExitStack) -> Live:
    """Start a peer, which does not outlive the test."""

    def start(peer: Peer) -> Peer:
        stack.callback(peer.close)
        peer.live()
        return peer

    return start
