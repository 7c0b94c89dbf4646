"""Data connections between facilities: each side is believed by the roots of its own facility, and by no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.testing.facility import Facility

BOB = "spiffe://b.test/user/bob"


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    """The facility that has the cache; its members believe nobody else until they are told to."""
    return Facility(tmp_path / "members", "a.test")


@pytest.fixture
def other(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "others", "b.test")


def believe(credentials: Credentials, facility: Facility) -> Credentials:
    domain = DomainTrust(facility.trust_domain, facility.roots_pem)
    credentials.change_trust(lambda trust: trust.believe(domain))
    return credentials


@pytest.fixture
def cache(start_cache, facility: Facility, other: Facility):
    """A cache of a.test that believes b.test and lets bob consume."""
    members = believe(facility.member("cache/b0"), other)
    return start_cache(credentials=str(members.directory), consumers=[BOB])


def at(cache, facility: str) -> ConnectString:
    return replace(cache.connect, facility=facility)


def consume(connect: ConnectString, credentials: Credentials) -> list[int]:
    with Consumer(connect, credentials, dial_timeout=5) as stream:
        return [int(frame.event_ids[0]) for frame in stream]


def produce(connect: ConnectString, credentials: Credentials) -> None:
    with Producer(connect, credentials, StreamHeader(buffer="buffers/b0", producer_count=1)) as producer:
        producer.send({"x": np.zeros((1, 4))}, np.array([1], np.uint64))


def refused(connect: ConnectString, credentials: Credentials, match: str) -> BeamwireError:
    with pytest.raises(BeamwireError, match=match) as caught:
        consume(connect, credentials)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID
    return caught.value


def test_a_member_of_the_other_facility_consumes(cache, facility: Facility, other: Facility) -> None:
    bob = believe(other.member("user/bob"), facility)
    produce(at(cache, "a.test"), cache.user)
    assert consume(at(cache, "a.test"), bob) == [1]


def test_a_cache_is_believed_by_the_roots_of_its_own_facility_only(cache, facility: Facility, other: Facility) -> None:
    bob = believe(other.member("user/bob"), facility)
    for named in ("", "b.test"):
        refused(at(cache, named), bob, "is not valid")
    refused(at(cache, "a.test"), other.member("user/bob"), "a.test is not believed here")


def test_who_is_not_believed_is_refused_by_the_cache(start_cache, facility: Facility, other: Facility) -> None:
    bob = believe(other.member("user/bob"), facility)
    cache = start_cache(consumers=[BOB])
    refused(at(cache, "a.test"), bob, "refused our certificate")


def test_the_other_authority_cannot_make_our_members(cache, facility: Facility, other: Facility) -> None:
    """b.test's authority is believed, and signs the name of a.test's alice, who may produce."""
    impostor = Facility(other.directory / "impostor", "a.test")
    impostor.authority = other.authority
    impostor.authority.trust_domain = "a.test"
    alice = believe(impostor.member("user/alice"), facility)
    for side in (consume, produce):
        with pytest.raises(BeamwireError):
            side(at(cache, "a.test"), alice)
        status = cache.wait(lambda status: status.counters.refused_peer_count >= 1)
        assert "spiffe://a.test/user/alice does not lead to a root of a.test" in status.counters.last_refusal
    assert (status.counters.producers, status.counters.consumers) == ((), ())


def test_the_other_authority_cannot_make_our_caches(start_cache, facility: Facility, other: Facility) -> None:
    """A cache that shows a.test's name, signed by b.test, is none to whoever believes both."""
    impostor = Facility(other.directory / "impostor", "a.test")
    impostor.authority = other.authority
    impostor.authority.trust_domain = "a.test"
    cache = start_cache(credentials=str(believe(impostor.member("cache/b0"), facility).directory))
    alice = believe(facility.member("user/alice"), other)
    other.authority.trust_domain = "b.test"
    for named in ("", "a.test"):
        refused(at(cache, named), alice, "is not valid")
    # Called by the facility whose roots it leads to, it has the wrong name.
    refused(at(cache, "b.test"), alice, "does not lead to a root of a.test")
