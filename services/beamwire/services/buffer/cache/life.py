"""Where the stream of a cache is in its life, and how it ends: READY, DRAINING, perhaps KEPT, ENDED.

All of it is called with the lock of the relay held.
"""

from __future__ import annotations

from beamwire.common.v1 import account_pb2
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.ending import Seal, ending
from beamwire.services.buffer.cache.holdings import Holdings
from beamwire.services.buffer.cache.intake import Intake
from beamwire.services.buffer.cache.outlet import Outlet
from beamwire.services.buffer.cache.status import received_by_producer
from beamwire.services.buffer.cache.vault import Vault
from beamwire.services.buffer.control import CacheState
from beamwire.stream.v1.frame_pb2 import StreamEnd


class StreamLife:
    """The life of one stream. What may change `state` is followed by `settle`."""

    def __init__(self, config: CacheConfig, vault: Vault, holdings: Holdings, intake: Intake, outlet: Outlet) -> None:
        self.state: CacheState = "READY"
        self._config = config
        self._vault = vault
        self._holdings = holdings
        self._intake = intake
        self._outlet = outlet
        self._seal: Seal | None = None
        self._keeps = False
        self._released = False

    def restore(self) -> None:
        """Take up what an earlier process was told."""
        seal = self._vault.facts.seal
        if seal is not None:
            self._seal = Seal(seal["cause"], seal["detail"], forced=seal["cause"] != account_pb2.END_CAUSE_DONE)
            self._intake.seal()
        self.settle()

    def settle(self) -> bool:
        """Move on to the state that the facts allow; whether it changed."""
        before = self.state
        if self.state == "READY" and (self._seal is not None or self._intake.all_ended):
            self.state = "DRAINING"
            self._outlet.offer_end()
        if self.state == "DRAINING" and not self._outlet.has_sinks:
            forced = self._seal is not None and self._seal.forced
            if forced:
                self._drop()
            if forced or self._outlet.is_done:
                self.state = "KEPT" if not forced and self._is_kept() else "ENDED"
        if self.state == "KEPT" and (self._released or (self._seal is not None and self._seal.forced)):
            self.state = "ENDED"
        return self.state != before

    def seal(self, cause: account_pb2.EndCause.ValueType, detail: str, *, deliver: bool | None) -> bool:
        """Take no more frames: see `Relay.seal`. Whether this is the seal that counts."""
        done = cause == account_pb2.END_CAUSE_DONE
        superseded = self._seal is None or (self._seal.cause == account_pb2.END_CAUSE_DONE and not done)
        if self.state in ("KEPT", "ENDED") or not superseded:
            return False
        self._seal = Seal(cause, detail, forced=not done)
        self._intake.seal()
        if not (done if deliver is None else deliver):
            self._drop()
        return True

    def release(self) -> None:
        """Keep nothing any longer for those who come later."""
        self._released = True

    def leave_to_the_next(self) -> None:
        """What is held and not delivered is not lost: another process may go on with it."""
        self._keeps = True

    def give_up(self) -> None:
        """Wait for nobody any more: what is held or not confirmed is lost."""
        seal = self._seal or Seal(self.ending().cause, "", forced=True)
        self._seal = Seal(seal.cause, seal.detail, forced=True)
        self._outlet.give_up()
        self._drop()

    @property
    def is_whole(self) -> bool:
        """Whether every frame that ever came is there, and will be."""
        if not self._config.keep or self._vault.afresh:
            return False
        return self._holdings.is_whole(sum(frames for frames, _ in self.received().values()))

    def ending(self) -> StreamEnd:
        """The END of the stream, as it would be now."""
        ends = {number: source.end for number, source in self._intake.sources.items()}
        return ending(ends, self.received(), self._seal, len(self._config.expected_producers))

    def received(self) -> dict[int, tuple[int, int]]:
        """Frames and events that came from each producer."""
        return received_by_producer(self._intake, self._holdings.ledger)

    def _is_kept(self) -> bool:
        return self.is_whole and self.ending().cause == account_pb2.END_CAUSE_DONE

    def _drop(self) -> None:
        if not self._keeps:
            self._outlet.drop(account_pb2.LOSS_CAUSE_UNDELIVERED)
