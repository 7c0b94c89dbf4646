"""Several handlers at once: each in a thread of its own, with a few messages before it, so that a slow one holds up the
others no longer than it may."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Final, Literal

from pydantic import Field

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import ComponentParameters, Handler, Message, StreamInfo

_MOST_WAITING: Final = 4
# One that is told of a bad end gets so long for the message that it is at.
_LAST_PATIENCE: Final = 1.0


class Pace(ComponentParameters):
    """What happens when a handler does not keep up.

    `wait`: the others wait with it. `drop`: after `patience` seconds it loses messages, which are counted as OVERFLOW
    for it alone. `fail`: after `patience` seconds the run ends.
    """

    when_slow: Literal["wait", "drop", "fail"] = "wait"
    patience: Annotated[float, Field(ge=0)] = 10.0


class Lane:
    """One handler and its thread. What goes wrong there is raised by the next call here."""

    def __init__(self, handler: Handler, pace: Pace, name: str) -> None:
        self.name = name
        self.dropped = 0
        self._handler = handler
        self._pace = pace
        self._changed = threading.Condition()
        self._acts: deque[tuple[Callable[[], None], int]] = deque()
        self._waiting = 0
        self._overdue = False
        self._ended = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"handler {name}", daemon=True)

    def open(self, info: StreamInfo) -> None:
        """Opens the handler, in the caller's thread: what is wrong with it is known before anything is sent."""
        self._handler.open(info)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Hands over a message, whose arrays and bytes must stay as they are."""
        with self._changed:
            if self._has_room():
                self._add(lambda: self._handler.send(message), 1)
                return
        if self._pace.when_slow == "fail":
            raise self._stuck()
        count = len(message.event_ids)
        self.dropped += count
        self.skip(account_pb2.LOSS_CAUSE_OVERFLOW, count)

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Accounts for events, in the order of the messages; never waits."""
        with self._changed:
            self._check()
            self._add(lambda: self._handler.skip(cause, count), 0)

    def end(self, cause: account_pb2.EndCause.ValueType, detail: str = "") -> None:
        """Waits until the handler has sent everything and ended; a bad end does not wait for what is still to be sent.

        BeamwireError TIMED_OUT if the handler is stuck.
        """
        if self._thread.ident is None:
            self._handler.end(cause, detail)
            return
        done = cause == account_pb2.END_CAUSE_DONE
        with self._changed:
            if not done:
                self._acts.clear()
            self._ended = True
            self._add(lambda: self._handler.end(cause, detail), 0)
        waits = done and self._pace.when_slow == "wait"
        self._thread.join(None if waits else max(self._pace.patience if done else 0.0, _LAST_PATIENCE))
        self._check()
        if self._thread.is_alive():
            raise self._stuck()

    def _has_room(self) -> bool:
        """Waits for room as long as the pace says; whether there is some."""
        waits = self._pace.when_slow == "wait"
        # One that was waited for in vain is not waited for again before it has moved.
        patience = None if waits else 0.0 if self._overdue else self._pace.patience
        room = self._changed.wait_for(lambda: self._waiting < _MOST_WAITING or self._failure is not None, patience)
        self._check()
        self._overdue = not room
        return room

    def _add(self, act: Callable[[], None], messages: int) -> None:
        self._acts.append((act, messages))
        self._waiting += messages
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._acts)
                act, messages = self._acts.popleft()
                last = self._ended and not self._acts
            try:
                act()
            except Exception as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting -= messages
                self._changed.notify_all()
            if last:
                return

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _stuck(self) -> BeamwireError:
        return BeamwireError(
            Reason.TIMED_OUT,
            f"{self.name} took nothing for {self._pace.patience:g} s; is somebody reading there? `when_slow` and "
            "`patience` of the handler say what happens then",
        )


class Handlers:
    """All handlers as one. A single one that may make the others wait needs no thread, and no copy of the arrays."""

    def __init__(self, handlers: Sequence[tuple[Handler, Pace, str]]) -> None:
        self._lanes: list[Lane] = []
        self._handlers: list[Handler] = []
        if len(handlers) == 1 and handlers[0][1].when_slow == "wait":
            self._handlers = [handlers[0][0]]
        else:
            self._lanes = [Lane(handler, pace, name) for handler, pace, name in handlers]
            self._handlers = [*self._lanes]

    @property
    def dropped(self) -> dict[str, int]:
        """Events that a slow handler lost, for each that did."""
        return {lane.name: lane.dropped for lane in self._lanes if lane.dropped}

    def open(self, info: StreamInfo) -> None:
        """Prepares all of them to send."""
        for handler in self._handlers:
            handler.open(info)

    def send(self, message: Message) -> None:
        """To each of them."""
        kept = _kept(message) if self._lanes else message
        for handler in self._handlers:
            handler.send(kept)

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Accounts for events that none of them gets."""
        for handler in self._handlers:
            handler.skip(cause, count)

    def end(self, cause: account_pb2.EndCause.ValueType, detail: str = "") -> None:
        """Ends all of them, whatever happens to one; raises the first error."""
        failures: list[Exception] = []
        for handler in self._handlers:
            try:
                handler.end(cause, detail)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]


def _kept(message: Message) -> Message:
    """The message with memory of its own: the stages and the serializer use theirs again."""
    arrays = {name: value.copy() for name, value in message.arrays.items()}
    data = None if message.data is None else bytes(message.data)
    return replace(message, event_ids=message.event_ids.copy(), arrays=arrays, data=data)
