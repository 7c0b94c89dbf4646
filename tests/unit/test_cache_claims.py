"""What a consumer says of its frames is taken as it is meant, also where ranges overlap."""

from __future__ import annotations

import random

from beamwire.services.buffer.cache.claims import Claims
from beamwire.stream.v1.link_pb2 import FrameRange


def test_no_ranges_cover_nothing():
    assert not Claims([]).covers(0, 1)


def test_a_range_inside_a_longer_one_takes_nothing_from_it():
    claims = Claims(
        [
            FrameRange(producer=1, first_sequence=1, last_sequence=10),
            FrameRange(producer=1, first_sequence=3, last_sequence=4),
        ]
    )
    assert [sequence for sequence in range(13) if claims.covers(1, sequence)] == list(range(1, 11))
    assert not claims.covers(2, 3)


def test_any_ranges_cover_what_one_of_them_covers():
    chance = random.Random(7)
    for _ in range(200):
        ranges = []
        for _ in range(chance.randrange(8)):
            first = chance.randrange(1, 40)
            last = first + chance.randrange(12)
            ranges.append(FrameRange(producer=chance.randrange(3), first_sequence=first, last_sequence=last))
        claims = Claims(ranges)
        for producer in range(3):
            for sequence in range(60):
                meant = any(
                    claim.producer == producer and claim.first_sequence <= sequence <= claim.last_sequence
                    for claim in ranges
                )
                assert claims.covers(producer, sequence) == meant
