"""Several handlers at once: each in a thread of its own, with a few messages before it, so that a slow one holds up the
others no longer than it may."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Final, Literal

from pydantic import Field

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import ComponentParameters, Handler, Message, StreamInfo

_MOST_WAITING: Final = 4
# One that is told of a bad end gets so long for the message that it is at.
_LAST_PATIENCE: Final = 0.75


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
        # `tell_end` counts with the lock held.
        self._changed = threading.Condition(threading.RLock())
        # Messages, and how many events are to be accounted for in between, by cause.
        self._acts: deque[Message | Counter[account_pb2.LossCause.ValueType] | Callable[[], None]] = deque()
        self._waiting = 0
        self._overdue = False
        self._ended = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"handler {name}", daemon=True)

    def open(self, info: StreamInfo) -> None:
        """Opens the handler, in the caller's thread: what is wrong with it is known before anything is sent."""
        self._handler.open(info)
        self._thread.start()

    def await_room(self) -> bool:
        """Waits for room as long as the pace says; whether there is some. BeamwireError TIMED_OUT if there must be."""
        waits = self._pace.when_slow == "wait"
        # One that was waited for in vain is not waited for again before it has moved.
        patience = None if waits else 0.0 if self._overdue else self._pace.patience
        with self._changed:
            room = self._changed.wait_for(lambda: self._waiting < _MOST_WAITING or self._failure is not None, patience)
            self._check()
        self._overdue = not room
        if not room and self._pace.when_slow == "fail":
            raise self._stuck()
        return room

    def put(self, message: Message, *, room: bool) -> None:
        """Hands over a message, whose arrays and bytes must stay as they are, or counts its events as lost."""
        if room:
            with self._changed:
                self._waiting += 1
                self._acts.append(message)
                self._changed.notify_all()
        else:
            self.dropped += len(message.event_ids)
            self.skip(account_pb2.LOSS_CAUSE_OVERFLOW, len(message.event_ids))

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Accounts for events, in the order of the messages; never waits."""
        with self._changed:
            last = self._acts[-1] if self._acts else None
            # One that is stuck for long would gather them.
            if not isinstance(last, Counter):
                last = Counter()
                self._acts.append(last)
            last[cause] += count
            self._changed.notify_all()

    def tell_end(self, cause: account_pb2.EndCause.ValueType, detail: str) -> None:
        """Lets the handler end when it has sent everything. Before a bad end what waits is only accounted for."""
        if self._thread.ident is None:
            self._handler.end(cause, detail)
            return
        with self._changed:
            if cause != account_pb2.END_CAUSE_DONE:
                waiting = list(self._acts)
                self._acts.clear()
                self._acts.extend(act for act in waiting if isinstance(act, Counter))
                for act in waiting:
                    if isinstance(act, Message):
                        self.skip(account_pb2.LOSS_CAUSE_NOT_READ, len(act.event_ids))
            self._ended = True
            self._acts.append(lambda: self._handler.end(cause, detail))
            self._changed.notify_all()

    def await_end(self, cause: account_pb2.EndCause.ValueType, since: float) -> None:
        """Waits until the handler, told at `since` (monotonic), has ended; BeamwireError TIMED_OUT if it is stuck.

        After a bad end it is not waited for long.
        """
        if self._thread.ident is None:
            return
        done = cause == account_pb2.END_CAUSE_DONE
        patience = max(self._pace.patience if done else 0.0, _LAST_PATIENCE)
        waits = done and self._pace.when_slow == "wait"
        self._thread.join(None if waits else max(since + patience - time.monotonic(), 0.0))
        self._check()
        if self._thread.is_alive():
            raise self._stuck()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._acts)
                act = self._acts.popleft()
                last = self._ended and not self._acts
            try:
                self._carry_out(act)
            except Exception as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting -= isinstance(act, Message)
                self._changed.notify_all()
            if last:
                return

    def _carry_out(self, act: Message | Counter[account_pb2.LossCause.ValueType] | Callable[[], None]) -> None:
        if isinstance(act, Message):
            self._handler.send(act)
        elif isinstance(act, Counter):
            for cause, count in act.items():
                self._handler.skip(cause, count)
        else:
            act()

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
        self._single: Handler | None = None
        if len(handlers) == 1 and handlers[0][1].when_slow == "wait":
            self._single = handlers[0][0]
        else:
            self._lanes = [Lane(handler, pace, name) for handler, pace, name in handlers]

    @property
    def dropped(self) -> dict[str, int]:
        """Events that a slow handler lost, for each that did."""
        return {lane.name: lane.dropped for lane in self._lanes if lane.dropped}

    def open(self, info: StreamInfo) -> None:
        """Prepares all of them to send."""
        for handler in [self._single] if self._single is not None else self._lanes:
            handler.open(info)

    def send(self, message: Message) -> None:
        """To each of them, or to none if one has failed."""
        if self._single is not None:
            self._single.send(message)
            return
        # What belongs to the stream as a whole, as its end does, is small and must not be missing.
        whole = not len(message.event_ids)
        rooms = [lane.await_room() or whole for lane in self._lanes]
        kept = _kept(message)
        for lane, room in zip(self._lanes, rooms, strict=True):
            lane.put(kept, room=room)

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Accounts for events that none of them gets."""
        for handler in [self._single] if self._single is not None else self._lanes:
            handler.skip(cause, count)

    def end(self, cause: account_pb2.EndCause.ValueType, detail: str = "") -> None:
        """Ends all of them, whatever happens to one; raises the first error."""
        if self._single is not None:
            self._single.end(cause, detail)
            return
        failures: list[Exception] = []
        since = time.monotonic()
        for lane in self._lanes:
            try:
                lane.tell_end(cause, detail)
            except Exception as error:
                failures.append(error)
        for lane in self._lanes:
            try:
                lane.await_end(cause, since)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]


def _kept(message: Message) -> Message:
    """The message with memory of its own, unless it has that: the stages and the serializer use theirs again."""
    if message.lasting:
        return message
    arrays = {name: value.copy() for name, value in message.arrays.items()}
    data = None if message.data is None else bytes(message.data)
    return replace(message, event_ids=message.event_ids.copy(), arrays=arrays, data=data)
