"""Sends the frames of a producer at most once: PUSH, nothing is kept, nothing is sent again."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from beamwire.mesh.credentials import Credentials
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.outbox import Payload
from beamwire.mesh.stream.sockets import PUSH
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.stream.v1.frame_pb2 import FrameHeader

_SHORTEST_TIMEOUT: Final = 0.001


class PushSender:
    """One connection to a cache; `header` is the first frame on it."""

    stored_sequence = stored_frame_count = stored_event_count = 0

    def __init__(
        self,
        connect: ConnectString,
        host: tuple[str, int],
        credentials: Credentials | None,
        header: FrameHeader,
        *,
        dial_timeout: float,
    ) -> None:
        self.epoch = connect.epoch
        self.message_bytes = 0
        self.open = True
        self._address = f"{host[0]}:{host[1]}"
        self._sequence = 0
        self._writer = FrameWriter()
        self._connection = dial(connect, host, credentials, PUSH, timeout=dial_timeout)
        self.send(header, None)

    def wait_for_room(self) -> None:
        """There is room when the kernel takes what is sent."""

    def send(self, header: FrameHeader, payload: Payload) -> None:
        """Send a frame, and return when the kernel has it."""
        self._sequence = header.sequence
        if isinstance(payload, memoryview):
            message = self._writer.encode_opaque(header, payload)
        else:
            message = self._writer.encode(header, payload)
        try:
            self._connection.send(message)
            self.message_bytes += len(message)
        except OSError as error:
            self.abort()
            raise self._failed(error) from error
        except BaseException:
            # Ctrl-C: what would be sent now would land inside this frame, or END would not count it.
            self.abort()
            raise

    def end(self, header: FrameHeader, timeout: float) -> None:
        """Send END and wait until the cache has read everything."""
        deadline = time.monotonic() + timeout
        try:
            self._connection.set_timeout(timeout)
            self.send(header, None)
            self._connection.set_timeout(max(deadline - time.monotonic(), _SHORTEST_TIMEOUT))
            self._connection.finish()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        finally:
            self.close()

    def interrupt(self) -> None:
        """End every call that waits in another thread."""
        self._connection.interrupt()

    def abort(self) -> None:
        """Close so that the cache sees that it was not in good order."""
        with suppress(OSError):
            self._connection.abort_on_close(True)
        self.close()

    def close(self) -> None:
        """Close the connection; while nobody else uses it."""
        self.open = False
        self._connection.close()

    def _failed(self, error: Exception) -> BeamwireError:
        # One with an errno is the kernel's word that the peer is gone.
        if isinstance(error, TimeoutError) and error.errno is None:
            return BeamwireError(Reason.TIMED_OUT, f"the cache at {self._address} did not read everything in time")
        story = f"the cache at {self._address} closed or lost the connection at frame {self._sequence} ({error})"
        return BeamwireError(Reason.CACHE_FAILED, story, metadata={"address": self._address})
