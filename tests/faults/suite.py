"""One run of the fault suite: a stream, everything that can happen to it, and what became of each event."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from beamwire.testing.facility import Facility
from beamwire.testing.proxy import Proxy
from tests.faults.agenda import Agenda
from tests.faults.parts import BUFFER, Cache, Peer, consumer, producer
from tests.faults.verdict import GroupVerdict, judge_account, judge_group

# Consumers of `shared` are killed; the one of `steady` is not, and must see each event exactly once and in order.
SHARED: Final = "default"
STEADY: Final = "steady"
PRODUCERS: Final = 2
SHARED_CONSUMERS: Final = 2
HEARTBEAT: Final = 0.5
_TICK: Final = 0.01
_STALL: Final = 60.0


@dataclass(frozen=True)
class Plan:
    """A stream of so many frames of about so many bytes, and how often which fault comes in which part of it.

    Frames that are lost to flipped bits are never finished with, so that less than all of it may pass.
    """

    name: str
    frames: int
    size: int
    faults: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    until: float = 0.85

    @property
    def shares(self) -> list[int]:
        """How many frames each producer sends."""
        share, rest = divmod(self.frames, PRODUCERS)
        return [share + (number < rest) for number in range(PRODUCERS)]


@dataclass
class Result:
    """What a run came to; `failures` is empty if it is as it must be."""

    name: str
    seed: int
    frames: int
    size: int
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    flipped_bits: int = 0
    groups: list[GroupVerdict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def run(plan: Plan, seed: int) -> Result:
    """Carry out a plan and judge it. What the processes left on disk stays only if it failed, for a person to read."""
    result = Result(plan.name, seed, plan.frames, plan.size)
    directory = Path(tempfile.mkdtemp(prefix=f"beamwire-faults-{plan.name}-"))
    before = _belongings()
    begin = time.monotonic()
    try:
        with _parts(plan, seed, directory) as parts:
            _stream(plan, parts, result)
            _judge(plan, parts, result)
    except (RuntimeError, AssertionError, OSError) as error:
        result.failures.append(str(error))
    result.seconds = round(time.monotonic() - begin, 1)
    result.failures += _left_behind(before)
    if result.failures:
        result.failures.append(f"what the processes wrote is in {directory}")
    else:
        shutil.rmtree(directory)
    return result


@dataclass
class _Parts:
    cache: Cache
    producers: list[Peer]
    shared: list[Peer]
    steady: Peer
    proxies: list[Proxy]
    agenda: Agenda

    @property
    def peers(self) -> list[Peer]:
        return [*self.producers, *self.shared, self.steady]

    @property
    def done(self) -> bool:
        """Whether all peers came to their end; RuntimeError if one failed."""
        ends = [peer.done for peer in self.peers]
        return all(ends)

    @property
    def handled(self) -> tuple[int, int]:
        """How many events each group of consumers has finished with."""
        return sum(peer.logged() for peer in self.shared), self.steady.logged()


@contextmanager
def _parts(plan: Plan, seed: int, directory: Path) -> Iterator[_Parts]:
    chance = random.Random(seed)
    facility = Facility(directory / "members")
    with ExitStack() as stack:
        options = {"groups": [SHARED, STEADY], "heartbeat_interval": HEARTBEAT, **plan.options}
        cache = Cache(directory / "cache", facility, producer_count=PRODUCERS, **options)
        stack.callback(cache.close)
        proxies = [stack.enter_context(Proxy(cache.address, seed=chance.getrandbits(32))) for _ in range(3)]
        towards, shared_side, steady_side = (cache.connect(proxy.address) for proxy in proxies)
        producers = [
            producer(cache, towards, number, PRODUCERS, share, plan.size) for number, share in enumerate(plan.shares)
        ]
        shared = [
            consumer(cache, shared_side, f"shared-{number}", plan.size, SHARED) for number in range(SHARED_CONSUMERS)
        ]
        steady = consumer(cache, steady_side, "steady", plan.size, STEADY)
        for peer in (*producers, *shared, steady):
            peer.live()
            stack.callback(peer.close)
        agenda = Agenda(
            chance.getrandbits(32),
            cache=cache,
            producers=producers,
            consumers=shared,
            proxies=proxies,
            facility=facility,
        )
        agenda.schedule(plan.faults, plan.until)
        yield _Parts(cache, producers, shared, steady, proxies, agenda)


def _stream(plan: Plan, parts: _Parts, result: Result) -> None:
    """Let the stream run to its end; RuntimeError if a peer fails, or if nothing moves for a minute."""
    moved, last = time.monotonic(), (-1, -1)
    while not parts.done:
        handled = parts.handled
        if handled != last:
            moved, last = time.monotonic(), handled
        if time.monotonic() - moved > _STALL:
            raise RuntimeError(_stalled(parts))
        # That of the group which is ahead: the other may be far behind, and those to break done by then.
        parts.agenda.go_on(max(handled) / plan.frames)
        # Nobody tells when a file grows.
        time.sleep(_TICK)
    result.faults = dict(parts.agenda.counts)
    result.flipped_bits = sum(proxy.flipped_bits for proxy in parts.proxies)


def _stalled(parts: _Parts) -> str:
    story = [f"nothing moved for {_STALL:g} s; the cache: {parts.cache.complaints()}"]
    try:
        story.append(str(parts.cache.status()))
    except Exception as error:
        story.append(f"no status: {error}")
    story += [f"{peer.name}, life {peer.lives}: {peer.complaints()}" for peer in parts.peers if peer.alive]
    return "\n".join(story)


def _judge(plan: Plan, parts: _Parts, result: Result) -> None:
    status = parts.cache.ended()
    kills = result.faults.get("kill consumer", 0)
    shared = judge_group(status, SHARED, parts.shared, plan.shares, lone=False)
    # A frame that was rejected comes after those that were on their way; with TLS none arrives broken.
    in_order = parts.cache.secure
    steady = judge_group(status, STEADY, [parts.steady], plan.shares, lone=in_order)
    result.groups = [shared, steady]
    result.failures += shared.failures(kills) + steady.failures(0) + judge_account(status, plan.shares)
    result.failures += _missed(plan, result)
    if code := parts.cache.stop():
        result.failures.append(f"the cache ended with {code}: {parts.cache.complaints()}")


def _missed(plan: Plan, result: Result) -> list[str]:
    """Faults that were planned and found nothing to break: a run without them shows nothing."""
    missed = [
        f"{count} times '{kind}' was planned, and only {result.faults.get(kind, 0)} happened"
        for kind, count in plan.faults.items()
        if result.faults.get(kind, 0) < count
    ]
    if plan.faults.get("flip") and not result.flipped_bits:
        missed.append("no bit was flipped")
    return missed


def _belongings() -> dict[str, str]:
    """Processes, listening ports and files in shared memory that are ours now, and what to say of each."""
    me = psutil.Process()
    # Not what these have started in turn: a facility that serves beside us keeps interpreters ready.
    found = {f"process {child.pid}": "was left behind" for child in me.children()}
    listening = [c for c in me.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    found |= {f"port {connection.laddr.port}": "was left open" for connection in listening}
    return found | {str(path): "was left behind" for path in Path("/dev/shm").glob(f"*-{BUFFER}.*")}


def _left_behind(before: Mapping[str, str]) -> list[str]:
    """What outlived the run and was not there before."""
    return [f"{what} {said}" for what, said in _belongings().items() if what not in before]
