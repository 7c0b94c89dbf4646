"""Lists in pages: page tokens that only their maker can make, the filter language, the page size."""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Collection

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
_MAC_BYTES = 16

_TERM = re.compile(
    r"""\s*(?P<key>[a-z][a-z0-9_]*(?:\.[A-Za-z0-9][A-Za-z0-9_-]*)*)\s*=\s*
        (?:"(?P<quoted>(?:[^"\\]|\\["\\])*)"|(?P<plain>[^\s"=\\]+))\s*""",
    re.VERBOSE,
)
_AND = re.compile(r"AND(?=\s)")


class Pager:
    """Makes and reads the page tokens of one service.

    A token holds the cursor, readable, and a MAC over cursor, query and caller: it serves only the query and the
    caller it was made for. `key` is at least 16 random bytes, the same as long as tokens should stay good.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise ValueError("a page token key has at least 16 bytes")
        self._key = key

    def token(self, cursor: str, query: str, caller: str) -> str:
        """The token for the page after `cursor`; "" for the cursor "", which has no page after it."""
        if not cursor:
            return ""
        raw = self._mac(cursor, query, caller) + cursor.encode()
        return base64.urlsafe_b64encode(raw).decode().rstrip("=")

    def cursor(self, token: str, query: str, caller: str) -> str:
        """The cursor in a token; "" for the token "". INVALID_PAGE_TOKEN if it was not made for query and caller."""
        if not token:
            return ""
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
            cursor = raw[_MAC_BYTES:].decode()
        except (binascii.Error, ValueError):
            raise _invalid_token() from None
        # Made again and compared whole, since several texts decode to the same bytes.
        if not hmac.compare_digest(token, self.token(cursor, query, caller)):
            raise _invalid_token()
        return cursor

    def _mac(self, *parts: str) -> bytes:
        mac = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in parts:
            data = part.encode()
            # The length first, so that no two lists of parts are the same bytes.
            mac.update(len(data).to_bytes(8, "big") + data)
        return mac.digest()[:_MAC_BYTES]


def parse_filter(text: str, allowed: Collection[str]) -> dict[str, str]:
    """`state=READY AND labels.sample="two words"` as {"state": "READY", "labels.sample": "two words"}.

    `allowed` lists the keys that may be compared; "labels.*" stands for every label. INVALID_FIELD of the field
    `filter`, saying where and what would be right, for anything else.
    """
    found: dict[str, str] = {}
    position = 0
    while text[position:].strip():
        if found:
            joined = _AND.match(text, position)
            if joined is None:
                raise _invalid_filter(text, position, "AND", allowed)
            position = joined.end()
        term = _TERM.match(text, position)
        if term is None:
            raise _invalid_filter(text, position, 'a comparison such as state=READY or labels.sample="x"', allowed)
        key = term["key"]
        if not _is_allowed(key, allowed):
            raise invalid_field("filter", f"{key!r} cannot be compared; what can: {', '.join(sorted(allowed))}")
        if key in found:
            raise invalid_field("filter", f"{key!r} is compared twice; name each key once")
        found[key] = term["plain"] or re.sub(r"\\(.)", r"\1", term["quoted"] or "")
        position = term.end()
    return found


def page_size(requested: int) -> int:
    """How many to return: `requested`, 50 if 0, at most 1000; INVALID_FIELD of the field `page_size` if negative."""
    if requested < 0:
        raise invalid_field("page_size", f"{requested} is negative; leave it 0 for {DEFAULT_PAGE_SIZE}")
    return min(requested or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def _is_allowed(key: str, allowed: Collection[str]) -> bool:
    head, dot, rest = key.partition(".")
    return key in allowed or (bool(dot) and bool(rest) and f"{head}.*" in allowed)


def _invalid_filter(text: str, position: int, expected: str, allowed: Collection[str]) -> BeamwireError:
    rest = text[position:].strip()
    where = f"at {rest[:30]!r}" if rest else "at the end"
    return invalid_field(
        "filter", f"{where}: expected {expected}; comparisons are joined by AND, of: {', '.join(sorted(allowed))}"
    )


def _invalid_token() -> BeamwireError:
    return BeamwireError(
        Reason.INVALID_PAGE_TOKEN,
        "the page token was not made for this query and caller; begin again without one",
        metadata={"field": "page_token"},
    )
