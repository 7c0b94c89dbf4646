"""Who takes part over one transport, and why somebody does not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from beamwire.mesh.stream.connect import Delivery, Transport
from bench import acked, aio, flight, middles, nng, ours, python_relay, zeromq
from bench.ends import depth
from bench.match import Contestant, Load, Middle, forked
from bench.middles import Compiler, Members

__all__ = ["Field", "Transport"]


@dataclass(frozen=True)
class Field:
    """The contestants of one transport by name, and with whom they show who they are."""

    members: Members | None
    contestants: dict[str, Contestant]

    @classmethod
    def prepare(cls, directory: Path, transport: Transport) -> Field:
        """Build what must be built, into a directory; say on stderr who cannot take part."""
        directory.mkdir(parents=True)
        members = Members.create(directory) if transport == "tls+tcp" else None
        contestants = _ours(members) | _others(members)
        contestants["relay"] = _relay(members, Compiler(directory))
        if members is None:
            contestants |= _zeromq(Compiler(directory))
        return cls(members, contestants)

    @property
    def titles(self) -> dict[str, str]:
        """What each of them is called in the table."""
        return {name: contestant.title for name, contestant in self.contestants.items()}


def _ours(members: Members | None) -> dict[str, Contestant]:
    def cache(delivery: Delivery) -> Callable[[Load], AbstractContextManager[Middle]]:
        return lambda _load: middles.cache(members, delivery)

    found = {"push": Contestant("push", cache("push"), ours.push, ours.pull)}
    found["sdk push"] = Contestant("push with SDK ends", cache("push"), *ours.sdk("push"))
    if middles.is_acked():
        found["acked"] = Contestant("acked", cache("acked"), acked.push, acked.pull)
        found["sdk acked"] = Contestant("acked with SDK ends", cache("acked"), *ours.sdk("acked"))
    else:
        print("acked: left out, the cache cannot deliver so", file=sys.stderr)
    return found


def _relay(members: Members | None, compiler: Compiler) -> Contestant:
    name = "OpenSSL relay" if members else "raw relay"
    path = compiler.build("relay", "-lssl", "-lcrypto")
    if path is None:
        print(f"{name}: in Python, because it cannot be built from C here", file=sys.stderr)
        return Contestant(
            f"{name} (Python)",
            lambda load: _forked(python_relay.relay, members, load.producers),
            ours.push,
            ours.pull,
        )
    return Contestant(
        f"{name} (C)", lambda load: middles.program([str(path), str(load.producers)], members), ours.push, ours.pull
    )


def _zeromq(compiler: Compiler) -> dict[str, Contestant]:
    found = {
        "zmq proxy": Contestant(
            "ZeroMQ proxy", lambda load: forked(zeromq.proxy, load.size, credentials=None), zeromq.push, zeromq.pull
        )
    }
    path = compiler.build("forwarder", "-ldl")
    if path is None:
        print("zmq forwarder: left out, it cannot be built here", file=sys.stderr)
        return found

    def forward(load: Load, environment: Mapping[str, str] = {}) -> AbstractContextManager[Middle]:
        command = [str(path), str(zeromq.library()), str(depth(load.size))]
        return middles.program(command, None, environment)

    def forward_tuned(load: Load) -> AbstractContextManager[Middle]:
        return forward(load, zeromq.TUNED_MALLOC)

    found["zmq forwarder"] = Contestant("ZeroMQ forwarder (C)", forward, zeromq.push, zeromq.pull)
    found["zmq tuned"] = Contestant("the same, malloc tuned", forward_tuned, zeromq.push_tuned, zeromq.pull_tuned)
    return found


def _others(members: Members | None) -> dict[str, Contestant]:
    nng_ends = ours.push_singly, ours.pull_singly
    return {
        "pynng": Contestant("pynng recv/send", lambda _: _forked(nng.byte_cache, members), *nng_ends),
        "nng_device": Contestant("nng_device", lambda _: _forked(nng.device, members), *nng_ends),
        "flight": Contestant(
            "Arrow Flight", lambda load: _forked(flight.relay, members, load.size), flight.put, flight.get
        ),
        "grpc.aio": Contestant("grpc.aio", lambda load: _forked(aio.relay, members, load.size), aio.put, aio.get),
    }


def _forked(serve: Callable[..., None], members: Members | None, *arguments: object) -> AbstractContextManager[Middle]:
    if members is None:
        return forked(serve, None, *arguments, credentials=None)
    return forked(serve, members.cache.directory, *arguments, credentials=members.end.directory)
