"""Connect strings: what they say, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.connect import ConnectString, spell


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beamwire://localhost:7/buffers/b1?epoch=1", ConnectString((("localhost", 7),), "b1", 1)),
        (
            "beamwire://10.0.0.1:7,node-2.lab:65535/buffers/my-buffer?epoch=4294967295&transport=tcp",
            ConnectString((("10.0.0.1", 7), ("node-2.lab", 65535)), "my-buffer", 2**32 - 1, "tcp"),
        ),
        (
            "beamwire://h:7/buffers/b1?epoch=1&facility=lcls.example&ticket=bwt1.a.b",
            ConnectString((("h", 7),), "b1", 1, ticket="bwt1.a.b", facility="lcls.example"),
        ),
        ("beamwire://[::1]:7/buffers/b?epoch=0", ConnectString((("::1", 7),), "b", 0)),
        (
            "beamwire://localhost/buffers/b?epoch=1&transport=ipc&path=/a/data.sock&path=/b%20%2B%26/%C3%BC",
            ConnectString((), "b", 1, "ipc", paths=("/a/data.sock", "/b +&/ü")),
        ),
    ],
)
def test_the_text_and_the_value_are_the_same_thing(text, expected):
    assert ConnectString.parse(text) == expected
    assert str(expected) == text


def test_the_default_transport_may_be_spelt_out():
    for spelling in ("tls+tcp", "tls%2Btcp"):
        parsed = ConnectString.parse(f"beamwire://h:7/buffers/b1?epoch=1&transport={spelling}")
        assert parsed.transport == "tls+tcp"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it must be beamwire://"),
        ("http://h:7/buffers/b1?epoch=1", "it must be beamwire://"),
        ("beamwire://h:7/jobs/b1?epoch=1", "it must be beamwire://"),
        ("beamwire://h:7/buffers/b1?epoch=1#x", "it must be beamwire://"),
        ("beamwire://h/buffers/b1?epoch=1", "'h' is not host:port"),
        ("beamwire://h:7,/buffers/b1?epoch=1", "'' is not host:port"),
        ("beamwire://h:0/buffers/b1?epoch=1", "'h:0' is not host:port"),
        ("beamwire://h:65536/buffers/b1?epoch=1", "'h:65536' is not host:port"),
        ("beamwire://u@h:7/buffers/b1?epoch=1", "is not host:port"),
        ("beamwire://h:7/buffers/B1?epoch=1", "must be 1 to 60"),
        ("beamwire://h:7/buffers/a/b?epoch=1", "must be 1 to 60"),
        ("beamwire://h:7/buffers/b1", "it needs epoch"),
        ("beamwire://h:7/buffers/b1?epoch=-1", "it needs epoch"),
        ("beamwire://h:7/buffers/b1?epoch=4294967296", "it needs epoch"),
        ("beamwire://h:7/buffers/b1?epoch=1&tikcet=x", "'tikcet' is no option"),
        ("beamwire://h:7/buffers/b1?epoch=1&facility=LCLS.example", "'LCLS.example' is no trust domain"),
        ("beamwire://h:7/buffers/b1?epoch=1&facility=", "'' is no trust domain"),
        ("beamwire://h:7/buffers/b1?epoch=1&transport=ipc&path=/a", "beamwire://localhost"),
        ("beamwire://localhost/buffers/b1?epoch=1&transport=ipc", "beamwire://localhost"),
        ("beamwire://localhost/buffers/b1?epoch=1&transport=ipc&path=a", "'a' is no absolute path"),
        ("beamwire://localhost/buffers/b1?epoch=1&transport=ipc&path=/a&path=/b%00", "is no absolute path"),
        ("beamwire://localhost/buffers/b1?epoch=1&transport=ipc&path=/a&delivery=push", "delivery=acked only"),
        ("beamwire://h:7/buffers/b1?epoch=1&path=/a", "path is for transport=ipc"),
        ("beamwire://h:7/buffers/b1?epoch=1&transport=udp", "transport is tls+tcp or tcp or ipc"),
    ],
)
def test_what_is_wrong_is_said(text, said):
    with pytest.raises(BeamwireError) as caught:
        ConnectString.parse(text)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert said in caught.value.message


def test_what_a_cache_may_be_dialed_at_is_one_list():
    assert ConnectString((("h", 7),), "b", 1).places == (("h", 7),)
    assert ConnectString((), "b", 1, "ipc", paths=("/a", "/b")).places == ("/a", "/b")
    assert [spell(place) for place in (("h", 7), ("::1", 7), "/a")] == ["h:7", "[::1]:7", "/a"]


@given(st.lists(st.text(max_size=30).filter(str.isprintable).map(lambda text: f"/{text}"), min_size=1, max_size=3))
def test_any_path_comes_back_as_it_was(paths):
    connect = ConnectString((), "b", 1, "ipc", paths=tuple(paths))
    assert ConnectString.parse(str(connect)) == connect


@given(st.text(max_size=80).map(lambda tail: f"beamwire://{tail}") | st.text(max_size=80))
def test_any_text_is_parsed_or_refused(text):
    reason = None
    try:
        parsed = ConnectString.parse(text)
    except BeamwireError as error:
        reason = error.reason
    assert reason is Reason.INVALID_FIELD or (reason is None and ConnectString.parse(str(parsed)) == parsed)
