"""The account of a bridge: what came, what was taken, what was handed out again and why, and what is left."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class Account:
    """Counts events.

    `received` came from the stream. Of these `served` were taken by a consumer, `refused` were given up because every
    worker that had one of them died, and `left` went back to the buffer. `repeated` counts, by its reason, each time
    that an event was handed out, or will be, once more. If the buffer has not `confirmed` what it was told last, some
    of it may come again besides.
    """

    received: int = 0
    served: int = 0
    refused: int = 0
    left: int = 0
    repeated: dict[str, int] = field(default_factory=dict[str, int])
    messages: int = 0
    bytes: int = 0
    consumers: int = 0
    confirmed: bool = True

    @property
    def balanced(self) -> bool:
        """Whether every event that came is accounted for."""
        return self.received == self.served + self.refused + self.left

    def repeat(self, reason: str, events: int) -> None:
        """Count events that are handed out again."""
        if events:
            self.repeated[reason] = self.repeated.get(reason, 0) + events

    def document(self) -> dict[str, object]:
        """The account for programs."""
        return {**asdict(self), "balanced": self.balanced}
