"""Delegation tokens themselves: Biscuits, made and signed by a facility, narrowed offline, checked before use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from biscuit_auth import (
    Biscuit,
    BiscuitBlockError,
    BiscuitBuilder,
    BiscuitSerializationError,
    BiscuitValidationError,
    BlockBuilder,
    PrivateKey,
    PublicKey,
    UnverifiedBiscuit,
)
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import PRIVATE, write_file
from beamwire.mesh.identity.delegation import (
    LARGEST_TOKEN,
    Delegation,
    Restriction,
    check_text,
    first_block,
    next_block,
    read_blocks,
    refuse,
)
from beamwire.mesh.identity.ids import Clock, SpiffeId, parse_id, utcnow
from beamwire.mesh.identity.trust import Trust

MOST_BLOCKS: Final = 8
# Characters of what a block says. Those that holders make in good faith have no more than a few hundred, and references
# to one long word can blow a small block up a thousandfold.
_LARGEST_SOURCE: Final = 4096
_CACHE_SIZE: Final = 1024
# What the stubs of biscuit-python say of its keys is of an older release.
_PRIVATE_KEY: Final[Any] = PrivateKey
_PUBLIC_KEY: Final[Any] = PublicKey
_FAULTS: Final = (BiscuitValidationError, BiscuitBlockError, BiscuitSerializationError)


@dataclass(frozen=True, slots=True)
class TokenKey:
    """The key that a facility signs its delegation tokens with."""

    _key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def create(cls) -> TokenKey:
        """A new key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> TokenKey:
        """The key in a PEM file; CERTIFICATE_INVALID if there is none that can be used."""
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} is not an Ed25519 key")
        return cls(key)

    def save(self, path: Path) -> None:
        """Keep it in a new file that only its owner can read: PKCS#8 PEM."""
        write_file(path, self._pem(), PRIVATE)

    @classmethod
    def open(cls, path: Path) -> TokenKey:
        """The key in a file, which is made if there is none."""
        if not path.exists():
            cls.create().save(path)
        return cls.load(path)

    @property
    def public(self) -> bytes:
        """What its tokens are checked with (32 bytes): `DomainTrust.token_root`."""
        return self._key.public_key().public_bytes_raw()

    @property
    def root(self) -> PublicKey:
        """The same, as Biscuits take it."""
        return _public(self.public)

    def sign(self, source: str) -> Biscuit:
        """A token of one block."""
        return BiscuitBuilder(source).build(_PRIVATE_KEY.from_pem(self._pem().decode()))

    def _pem(self) -> bytes:
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def create(
    key: TokenKey, *, owner: SpiffeId, holder: SpiffeId, resource: str = "", read_only: bool = False, expire: datetime
) -> str:
    """Make a token by which `holder` may use rights of `owner`: for one transfer, or with no resource for all.

    Returns URL-safe base64. INVALID_FIELD if the resource is not a transfer's name, or the names are too long.
    """
    text: str = key.sign(first_block(Delegation(str(owner), str(holder), resource, read_only, expire))).to_base64()
    return _fitting(text)


def attenuate(text: str, restriction: Restriction, root: bytes) -> str:
    """Narrow a token, which needs nobody's leave; `root` is the public key of its facility. It ends with the old one.

    TOKEN_REFUSED if the token is not good or nothing would be left of it, INVALID_FIELD if it would be too long.
    """
    _read(text, root)
    block = BlockBuilder(next_block(restriction))
    try:
        narrowed: str = Biscuit.from_base64(text, _public(root)).append(block).to_base64()
    except _FAULTS:
        refuse("form", "it is sealed, and cannot be narrowed")
    inspect(_fitting(narrowed))
    return narrowed


def inspect(text: str) -> Delegation:
    """What a token claims to allow, for which no key is needed: who made it is not looked at.

    TOKEN_REFUSED if it is not one that a facility of this release could have made.
    """
    return _read(text, None)


class TokenChecker:
    """Decides what a token that came with a call allows to the one who showed it.

    No Datalog is evaluated: the blocks are held against a grammar of a few sentences (`mesh.delegation`), and narrow
    one another. What was read of good tokens is cached; holder, time and revocation are looked at on every call.
    """

    def __init__(self, trust: Callable[[], Trust], *, clock: Clock = utcnow) -> None:
        self._trust = trust
        self._clock = clock
        self._read: OrderedDict[tuple[str, bytes], Delegation] = OrderedDict()

    def check(self, text: str, holder: SpiffeId) -> Delegation:
        """What the token allows now; TOKEN_REFUSED, `metadata["check"]` saying which check failed."""
        trust = self._trust()
        own = trust.own
        known = self._read.get((text, own.token_root)) or self._remember(text, own.token_root)
        if known.holder != str(holder):
            refuse("holder", f"it is for another holder than {holder}")
        if self._clock() >= known.expire:
            refuse("time", f"it was good until {known.expire:%Y-%m-%d %H:%M:%S} UTC")
        if not own.revoked_tokens.isdisjoint(known.ids):
            refuse("revocation", "it was revoked")
        if parse_id(known.owner).trust_domain not in trust:
            refuse("domain", f"{known.owner} is of a trust domain that is not believed here")
        return known

    def _remember(self, text: str, root: bytes) -> Delegation:
        read = _read(text, root)
        self._read[text, root] = read
        if len(self._read) > _CACHE_SIZE:
            self._read.popitem(last=False)
        return read


def _read(text: str, root: bytes | None) -> Delegation:
    """What a token says, cheapest check first; without a root the signature is not checked."""
    try:
        token = UnverifiedBiscuit.from_base64(check_text(text))
        if token.block_count() > MOST_BLOCKS:
            refuse("form", f"it was narrowed too often: it has {token.block_count()} blocks and may have {MOST_BLOCKS}")
        if root is not None:
            _check_signature(text, root)
        sources = [token.block_source(number) for number in range(token.block_count())]
    except _FAULTS:
        refuse("form", "it cannot be decoded")
    if any(len(source) > _LARGEST_SOURCE for source in sources):
        refuse("grammar", "one of its blocks says too much")
    return read_blocks(sources, token.revocation_ids)


def _check_signature(text: str, root: bytes) -> None:
    if not root:
        refuse("signature", "this facility signs none")
    try:
        token = Biscuit.from_base64(text, _public(root))
    except _FAULTS:
        refuse("signature", "this facility did not sign it as it is")
    # A third party's block says what somebody else vouches for, and nothing here asks for that.
    if any(token.block_external_key(number) is not None for number in range(token.block_count())):
        refuse("grammar", "it has a block of a third party")


def _public(root: bytes) -> PublicKey:
    key = Ed25519PublicKey.from_public_bytes(root)
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    public: PublicKey = _PUBLIC_KEY.from_der(der)
    return public


def _fitting(text: str) -> str:
    if len(text) > LARGEST_TOKEN:
        raise invalid_field("token", f"would have {len(text)} characters, and may have {LARGEST_TOKEN}")
    if UnverifiedBiscuit.from_base64(text).block_count() > MOST_BLOCKS:
        raise invalid_field("token", f"was narrowed {MOST_BLOCKS - 1} times, which is as often as can be")
    return text
