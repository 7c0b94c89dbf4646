"""Delegation tokens that must be refused, each with the check that has to do it: what a hostile holder can make."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from biscuit_auth import Biscuit, BlockBuilder, KeyPair

from beamwire.mesh.identity.biscuits import TokenKey, attenuate, create
from beamwire.mesh.identity.delegation import Restriction
from beamwire.mesh.identity.ids import SpiffeId

_MANY: Final = " ".join(f"n({number});" for number in range(24))
_JOIN: Final = ", ".join(f"n($x{number})" for number in range(12))
_BLOCKS_FIELD: Final = 3

# What a block may not say.
HOSTILE_BLOCKS: Final = {
    "a rule": 'right("*", "write") <- owner($owner);',
    "a fact that widens": 'right("*", "write");',
    "a second owner": 'owner("spiffe://a.test/user/mallory");',
    "an exponential join": f"{_MANY} check if {_JOIN}, $x0 > 99;",
    "an exponential rule": f"{_MANY} m($x0) <- {_JOIN};",
    "recursion": "n(0, 1); n(1, 2); n($a, $c) <- n($a, $b), n($b, $c);",
    "a regex bomb": f'check if "{"a" * 60}!".matches("(a+)+$");',
    "a regex of a good shape": 'check if resource($name), $name.matches("transfers/.*");',
    "a closure": "check if [1, 2, 3].all($x -> [1, 2, 3].any($y -> $x == $y));",
    "a check for all": "check all time($time), $time < 2999-01-01T00:00:00Z;",
    "a check that rejects": 'reject if operation("write");',
    "another way out": 'check if operation("read") or true;',
    "trust in another key": f'check if operation("read") trusting {KeyPair().public_key};',
    "trust in earlier blocks": 'check if operation("read") trusting previous;',
    "a path for a name": 'check if resource("transfers/../secret");',
    "a name of another kind": 'check if resource("buffers/of-run7");',
    "no name": "check if resource($any);",
    "another operation": 'check if operation("write");',
    "a time without end": "check if time($time), $time > 2000-01-01T00:00:00Z;",
    "a word that ends its sentence": 'check if operation("read\\"); right(\\"*\\", \\"write");',
}


@dataclass(frozen=True, slots=True)
class TokenMint:
    """Makes tokens of `owner` for `holder`, good ones and others."""

    key: TokenKey
    owner: SpiffeId
    holder: SpiffeId
    now: datetime

    def good(
        self, *, resource: str = "transfers/run7", read_only: bool = False, ttl: timedelta = timedelta(hours=1)
    ) -> str:
        """One that is good for an hour."""
        return create(
            self.key,
            owner=self.owner,
            holder=self.holder,
            resource=resource,
            read_only=read_only,
            expire=self.now + ttl,
        )

    def append(self, source: str, text: str = "") -> str:
        """One that its holder added a block to, whatever it says."""
        token = Biscuit.from_base64(text or self.good(), self.key.root)
        appended: str = token.append(BlockBuilder(source)).to_base64()
        return appended


def hostile_tokens(mint: TokenMint) -> dict[str, tuple[str, str]]:
    """Bad tokens by what is bad about them: the text, and the check that must refuse it."""
    found = {f"says {what}": (mint.append(source), "grammar") for what, source in HOSTILE_BLOCKS.items()}
    good = mint.good()
    other = TokenMint(TokenKey.create(), mint.owner, mint.holder, mint.now)
    narrow = attenuate(good, Restriction(read_only=True), mint.key.public)
    found |= {
        "empty": ("", "form"),
        "blank": ("   ", "form"),
        "not UTF-8": (b"\xff\xfe\xfd".decode("latin-1"), "form"),
        "not base64": ("!" * 80, "form"),
        "no Biscuit": (base64.urlsafe_b64encode(bytes(200)).decode(), "form"),
        "cut short": (good[: len(good) // 2 // 4 * 4], "form"),
        "oversize": (mint.append(f'check if operation("{"read" * 600}");'), "form"),
        "deep": (_repeated(mint, 8), "form"),
        "blown up by references": (mint.append(_references()), "grammar"),
        "signed by another facility": (other.good(), "signature"),
        "with a signature that was changed": (
            _changed(good, lambda raw: raw[:-40] + bytes(4) + raw[-36:]),
            "signature",
        ),
        "with another owner": (
            _changed(
                good, lambda raw: raw.replace(mint.owner.path.encode(), b"user/" + b"x" * (len(mint.owner.path) - 5))
            ),
            "signature",
        ),
        "with a block taken off": (_changed(narrow, lambda raw: b"".join(_without(raw, _BLOCKS_FIELD))), "signature"),
        "with a third party's block": (_third_party(mint, good), "grammar"),
        "narrowed to another transfer": (mint.append('check if resource("transfers/other");', good), "resource"),
        "narrowed to another holder": (mint.append('check if holder("spiffe://a.test/user/carol");', good), "holder"),
        "for another holder": (
            TokenMint(mint.key, mint.owner, SpiffeId(mint.holder.trust_domain, "user/carol"), mint.now).good(),
            "holder",
        ),
        "expired": (mint.good(ttl=timedelta(seconds=-1)), "time"),
        "narrowed to the past": (
            attenuate(good, Restriction(until=mint.now - timedelta(seconds=1)), mint.key.public),
            "time",
        ),
    }
    return found


def _repeated(mint: TokenMint, times: int) -> str:
    text = mint.good()
    for _ in range(times):
        text = mint.append('check if operation("read");', text)
    return text


def _references() -> str:
    """A block of a thousand bytes that takes forty times as many to spell."""
    word = '"' + "w" * 500 + '"'
    return f"check if w([{', '.join([word] * 90)}]);"


def _third_party(mint: TokenMint, text: str) -> str:
    token = Biscuit.from_base64(text, mint.key.root)
    keys = KeyPair()
    block = token.third_party_request().create_block(keys.private_key, BlockBuilder('check if operation("read");'))
    appended: str = token.append_third_party(keys.public_key, block).to_base64()
    return appended


def _changed(text: str, change: Callable[[bytes], bytes]) -> str:
    changed = change(base64.urlsafe_b64decode(text))
    return base64.urlsafe_b64encode(changed).decode()


def _without(raw: bytes, field: int) -> Iterator[bytes]:
    """The fields of a protobuf message, all of them messages of their own, without one of them."""
    position = 0
    while position < len(raw):
        start = position
        number = raw[position] >> 3
        length, position = _varint(raw, position + 1)
        position += length
        if number != field:
            yield raw[start:position]


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
