"""What a consumer says of frames it has or had: ranges of sequences, looked up one frame at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from operator import attrgetter

from beamwire.stream.v1.link_pb2 import FrameRange


class Claims:
    """Frames by producer and sequence. Ranges may overlap."""

    def __init__(self, ranges: Iterable[FrameRange]) -> None:
        by_producer: dict[int, list[FrameRange]] = {}
        for claim in sorted(ranges, key=attrgetter("first_sequence")):
            by_producer.setdefault(claim.producer, []).append(claim)
        self._firsts = {
            producer: [claim.first_sequence for claim in claims] for producer, claims in by_producer.items()
        }
        # The farthest that any range reaches which begins there or before.
        self._reaches = {
            producer: list(accumulate((claim.last_sequence for claim in claims), max))
            for producer, claims in by_producer.items()
        }

    def covers(self, producer: int, sequence: int) -> bool:
        """Whether a frame is among them."""
        place = bisect_right(self._firsts.get(producer, []), sequence) - 1
        return place >= 0 and sequence <= self._reaches[producer][place]
