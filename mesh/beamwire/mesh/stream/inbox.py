"""A bounded queue that can be closed: putters and getters that wait are told so at once."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class ClosedError(Exception):
    """The inbox was closed."""


class Inbox(Generic[T]):
    """Items in the order in which they were put, `limit` of them at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._condition = threading.Condition()
        self._closed = False

    def put(self, item: T) -> None:
        """Wait for room; ClosedError if there will be none."""
        with self._condition:
            self._condition.wait_for(lambda: self._closed or len(self._items) < self._limit)
            if self._closed:
                raise ClosedError
            self._items.append(item)
            self._condition.notify_all()

    def get(self) -> T:
        """Wait for an item; ClosedError if the inbox was closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._closed or bool(self._items))
            if self._closed:
                raise ClosedError
            item = self._items.popleft()
            self._condition.notify_all()
            return item

    def close(self) -> None:
        """Forget what is left and end all waiting."""
        with self._condition:
            self._closed = True
            self._items.clear()
            self._condition.notify_all()
