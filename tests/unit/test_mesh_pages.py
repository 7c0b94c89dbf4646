"""Page tokens, filters, page sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.pages import Pager, page_size, parse_filter

PAGER = Pager(b"0123456789abcdef")
ALLOWED = ("state", "owner", "labels.*")
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(cursor=words, query=words, caller=words)
def test_a_token_gives_its_cursor_back(cursor: str, query: str, caller: str) -> None:
    assert PAGER.cursor(PAGER.token(cursor, query, caller), query, caller) == cursor


@pytest.mark.parametrize(
    ("query", "caller"),
    [("state=B", "alice"), ("state=A", "bob"), ("state=Aa", "lice"), ("", "state=Aalice"), ("state=A", "")],
)
def test_a_token_serves_only_its_query_and_caller(query: str, caller: str) -> None:
    token = PAGER.token("cursor", "state=A", "alice")
    with pytest.raises(BeamwireError) as caught:
        PAGER.cursor(token, query, caller)
    assert caught.value.reason is Reason.INVALID_PAGE_TOKEN


@given(st.binary(max_size=60))
def test_no_other_bytes_are_a_token(data: bytes) -> None:
    token = data.hex() or "x"
    with pytest.raises(BeamwireError) as caught:
        PAGER.cursor(token, "", "alice")
    assert caught.value.reason is Reason.INVALID_PAGE_TOKEN


@pytest.mark.parametrize("token", ["x", "!!!!", "é", "AAAA", "A" * 40, " "])
def test_malformed_tokens(token: str) -> None:
    with pytest.raises(BeamwireError) as caught:
        PAGER.cursor(token, "", "alice")
    assert caught.value.reason is Reason.INVALID_PAGE_TOKEN


@given(st.integers(0, 200), st.integers(1, 255))
def test_a_changed_token_is_refused(position: int, change: int) -> None:
    token = bytearray(PAGER.token("2026-01-01|transfers/a", "q", "c").encode())
    position %= len(token)
    token[position] = 33 + (token[position] - 33 + 1 + change % 92) % 93
    with pytest.raises(BeamwireError):
        PAGER.cursor(token.decode(), "q", "c")


def test_another_key_makes_other_tokens() -> None:
    with pytest.raises(BeamwireError):
        Pager(b"another key 16 b").cursor(PAGER.token("cursor", "q", "c"), "q", "c")
    with pytest.raises(ValueError, match="16 bytes"):
        Pager(b"short")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("   ", {}),
        ("state=READY", {"state": "READY"}),
        ("  state =  READY ", {"state": "READY"}),
        ('owner="spiffe://x/user/alice"', {"owner": "spiffe://x/user/alice"}),
        ("owner=spiffe://x/user/alice", {"owner": "spiffe://x/user/alice"}),
        ('state=A AND labels.k="two words"', {"state": "A", "labels.k": "two words"}),
        ('labels.k="a AND b" AND state=B', {"labels.k": "a AND b", "state": "B"}),
        ('labels.k=""', {"labels.k": ""}),
        (r'labels.k="say \"hi\" \\"', {"labels.k": r'say "hi" \ '[:-1]}),
        ("labels.a-b_C.d=1", {"labels.a-b_C.d": "1"}),
        ("state=AND AND owner=AND", {"state": "AND", "owner": "AND"}),
    ],
)
def test_filters(text: str, expected: dict[str, str]) -> None:
    assert parse_filter(text, ALLOWED) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("state", "expected a comparison"),
        ("state=", "expected a comparison"),
        ("=A", "expected a comparison"),
        ("state==A", "expected a comparison"),
        ("state=A owner=B", "at 'owner=B': expected AND"),
        ("state=A and owner=B", "expected AND"),
        ("state=A AND", "expected AND"),
        ("state=A AND ", "at the end: expected a comparison"),
        ("state=A OR state=B", "expected AND"),
        ("state=A ANDowner=B", "expected AND"),
        ("state!=A", "expected a comparison"),
        ("colour=red", "'colour' cannot be compared; what can: labels.*, owner, state"),
        ("labels=red", "'labels' cannot be compared"),
        ("state.x=red", "'state.x' cannot be compared"),
        ("state=A AND state=B", "compared twice"),
        ('labels.k="open', "expected a comparison"),
        ('labels.k="a"b"', "expected AND"),
    ],
)
def test_wrong_filters_say_where_and_what(text: str, says: str) -> None:
    with pytest.raises(BeamwireError) as caught:
        parse_filter(text, ALLOWED)
    assert caught.value.reason is Reason.INVALID_FIELD
    (violation,) = caught.value.violations
    assert violation.field == "filter"
    assert says in violation.description


@given(st.text(max_size=30))
def test_any_text_is_a_filter_or_an_error_that_names_it(text: str) -> None:
    try:
        keys = parse_filter(text, ALLOWED).keys()
        fields = {"filter"}
    except BeamwireError as error:
        keys = {}.keys()
        fields = {violation.field for violation in error.violations}
    assert fields == {"filter"}
    assert all(key in ("state", "owner") or key.startswith("labels.") for key in keys)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_every_value_can_be_quoted(value: str) -> None:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    assert parse_filter(f'labels.k="{quoted}" AND state=A', ALLOWED) == {"labels.k": value, "state": "A"}


@pytest.mark.parametrize(("requested", "size"), [(0, 50), (1, 1), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)])
def test_page_sizes(requested: int, size: int) -> None:
    assert page_size(requested) == size


def test_a_negative_page_size_is_refused() -> None:
    with pytest.raises(BeamwireError) as caught:
        page_size(-1)
    assert [violation.field for violation in caught.value.violations] == ["page_size"]
