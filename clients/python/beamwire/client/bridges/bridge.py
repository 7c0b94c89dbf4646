"""A bridge at work: a thread that reads a stream, consumers that are served, and an end in good order."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from beamwire.client.batch import Batch
from beamwire.client.bridges.account import Account
from beamwire.client.bridges.contract import Contract
from beamwire.client.bridges.endpoints import Endpoint
from beamwire.client.bridges.hub import Hub
from beamwire.client.stream import Part, Stream
from beamwire.mesh.errors import BeamwireError, Reason

# Between looks at how it goes.
_INTERVAL = 0.2
# How long consumers that have everything may take to leave.
_LAST_WORD = 0.5
_CUT_AFTER = 0.3


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: `drain`, how long consumers may take nothing before a bridge that is stopped gives up what they have;
    `linger`, how long consumers are served that stay after the end."""

    drain: float = 10.0
    linger: float = 10.0


class Bridge:
    """Serves a stream to the consumers at an endpoint."""

    def __init__(self, hub: Hub, contract: Contract, endpoint: Endpoint, patience: Patience) -> None:
        self._hub = hub
        self._contract = contract
        self._endpoint = endpoint
        self._patience = patience
        self._confirmed = True

    @property
    def account(self) -> Account:
        """The account as of now."""
        return replace(self._hub.account(), confirmed=self._confirmed)

    @property
    def connected(self) -> int:
        """Consumers that are connected now."""
        return self._endpoint.connected

    def run(self, stream: Stream, show: Callable[[], None]) -> None:
        """Enter the stream and serve it to its end; `show` is called all the while.

        Whatever is raised (BeamwireError, KeyboardInterrupt), consumers are first given the chance to finish what they
        have, and the rest goes back to the buffer.
        """
        parts: list[Part] = []
        try:
            with ThreadPoolExecutor(1, "bridge reads") as pool, stream:
                self._endpoint.start()
                parts += stream.split()
                self._serve(stream, [pool.submit(self._read, part) for part in parts], show)
        finally:
            self._confirmed = all(part.settled for part in parts)
        self._check()

    def _serve(self, stream: Stream, reading: Collection[Future[None]], show: Callable[[], None]) -> None:
        try:
            while wait(reading, _INTERVAL).not_done:
                self._check()
                show()
            self._check()
            self._hub.finish()
            self._hub.dismiss()
            self._await_end(stream, show)
            self._endpoint.await_gone(self._patience.linger)
        except BaseException:
            self._drain()
            raise
        finally:
            self._hub.close()
            self._endpoint.stop(_CUT_AFTER)

    def _drain(self) -> None:
        """Let consumers finish what was begun."""
        self._hub.stop()
        self._hub.await_drained(self._patience.drain)
        self._hub.dismiss()
        self._endpoint.await_gone(_LAST_WORD)

    def _check(self) -> None:
        if self._hub.failure is not None:
            raise self._hub.failure

    def _await_end(self, stream: Stream, show: Callable[[], None]) -> None:
        """Wait until the others of the stream have read everything too."""
        while True:
            try:
                stream.wait(_INTERVAL if stream.transfer is not None else None)
            except TimeoutError:
                show()
            else:
                return

    def _read(self, part: Part) -> None:
        begun = False
        try:
            while self._hub.await_room():
                held = part.hold()
                if held is None:
                    return
                if self._hub.offer_again(held):
                    continue
                batches = [Batch(frame) for frame in held.frames]
                if not begun:
                    self._contract.begin(part.header.fields if part.header is not None else (), batches[0])
                    begun = True
                pieces = [piece for batch in batches for piece in self._contract.pieces(batch)]
                self._hub.offer(held, pieces, held.done)
        except Exception as error:
            # When the bridge stops, the stream is closed while this thread waits for it.
            if not (self._hub.stopping and isinstance(error, BeamwireError) and error.reason is Reason.CANCELLED):
                self._hub.fail(error)
