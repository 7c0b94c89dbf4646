"""A bridge at work: threads that read a stream, consumers that are served, and an end in good order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from beamwire.client.batch import Batch
from beamwire.client.bridges.account import Account
from beamwire.client.bridges.contract import Contract
from beamwire.client.bridges.endpoints import Endpoint
from beamwire.client.bridges.hub import Hub
from beamwire.client.stream import Part, Stream
from beamwire.mesh.errors import BeamwireError, Reason

# Between looks at how it goes.
_INTERVAL = 0.2
# How long a reader may take to say that its last frame is done with.
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
        self._beginning = threading.Lock()
        self._begun = False

    @property
    def account(self) -> Account:
        """The account as of now."""
        return self._hub.account()

    @property
    def connected(self) -> int:
        """Consumers that are connected now."""
        return self._endpoint.connected

    def run(self, stream: Stream, consumers: int, show: Callable[[], None]) -> None:
        """Enter the stream and serve it to its end; `show` is called all the while.

        Whatever is raised (BeamwireError, KeyboardInterrupt), consumers are first given the chance to finish what they
        have, and the rest goes back to the buffer.
        """
        with ThreadPoolExecutor(consumers, thread_name_prefix="bridge reads") as pool, stream:
            self._endpoint.start()
            futures = [pool.submit(self._read, part) for part in stream.split()]
            try:
                pending = set(futures)
                while pending:
                    pending = wait(pending, _INTERVAL).not_done
                    self._check()
                    show()
                self._hub.finish()
                self._hub.dismiss()
                self._await_end(stream, show)
                self._endpoint.await_gone(self._patience.linger)
            except BaseException:
                self._drain(futures)
                raise
            finally:
                self._hub.close()
                self._endpoint.stop(_CUT_AFTER)
        self._check()

    def _drain(self, futures: list[Future[None]]) -> None:
        """Let consumers finish what was begun."""
        self._hub.stop()
        received = -1
        while self._hub.await_drained(self._patience.drain) and self._hub.account().received != received:
            received = self._hub.account().received
            # Reading on acknowledges, or brings the rest of a delivery; with neither it would last for ever.
            wait(futures, _LAST_WORD)
        self._hub.dismiss()
        self._endpoint.await_gone(_LAST_WORD)
        # A consumer that is closed has little time to acknowledge, and does not say whether it could.
        self._hub.rest(_LAST_WORD)

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
        memory = delivery = last = object()
        asked = time.monotonic()
        try:
            for batch in part:
                self._begin(part, batch)
                # Frames that came in one message are views of one block of memory, which nothing else has meanwhile.
                begun, memory = batch.payload.obj is memory, batch.payload.obj
                if not begun:
                    last, delivery = delivery, object()
                held = self._hub.hold(_key(batch), self._contract.pieces(batch), delivery, begun=begun)
                if held is None or not self._hub.await_done(held):
                    self._hub.doubt(last, asked)
                    return
                asked = time.monotonic()
        except Exception as error:
            # When the bridge stops, the stream is closed while this thread waits for it.
            if self._hub.stopping and isinstance(error, BeamwireError) and error.reason is Reason.CANCELLED:
                self._hub.doubt(delivery, asked)
            else:
                self._hub.fail(error)

    def _begin(self, part: Part, batch: Batch) -> None:
        with self._beginning:
            if not self._begun:
                self._contract.begin(part.header.fields if part.header is not None else (), batch)
                self._begun = True


def _key(batch: Batch) -> tuple[int, int, bytes]:
    # After a cache began afresh, a sequence may come again with other events.
    return batch.producer, batch.sequence, batch.event_ids.tobytes()
