"""Who holds the keys of an authority: files, in the clear or under a passphrase, or a holder that is plugged in."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import PRIVATE, write_file

ENTRY_POINTS: Final = "beamwire.keys"
FILES: Final = "files"

# What other people's authorities sign with.
SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class KeyHolder(Protocol):
    """Keeps elliptic-curve keys, each known by the path of the file that it is in, or would be in.

    What it gives need not hold the key: `sign` and `public_key` of `ec.EllipticCurvePrivateKey` are all that is asked
    of it, and may be answered elsewhere. A holder that is plugged in (a class with these methods, under the entry
    point group `beamwire.keys`) is made with the passphrase as its one argument.
    """

    def make(self, path: Path) -> ec.EllipticCurvePrivateKey:
        """A new P-256 key, kept from now on; RESOURCE_EXISTS if there is one."""
        ...

    def load(self, path: Path) -> ec.EllipticCurvePrivateKey:
        """The key that was made; CERTIFICATE_INVALID if it cannot be used."""
        ...

    def remove(self, path: Path) -> None:
        """Forget a key for good; nothing if there is none."""
        ...


class KeyFiles:
    """Keeps keys in files of mode 0600, PKCS#8 in PEM; encrypted if there is a passphrase."""

    def __init__(self, passphrase: bytes = b"") -> None:
        self._passphrase = passphrase

    def make(self, path: Path) -> ec.EllipticCurvePrivateKey:
        """A new key in a new file."""
        key = ec.generate_private_key(ec.SECP256R1())
        self.write(path, key)
        return key

    def write(self, path: Path, key: ec.EllipticCurvePrivateKey) -> None:
        """Keep a key that was made elsewhere."""
        encryption = (
            serialization.BestAvailableEncryption(self._passphrase)
            if self._passphrase
            else serialization.NoEncryption()
        )
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        try:
            write_file(path, pem, PRIVATE)
        except FileExistsError:
            raise BeamwireError(Reason.RESOURCE_EXISTS, f"{path} exists; a key is never replaced") from None

    def load(self, path: Path) -> ec.EllipticCurvePrivateKey:
        """The key in a file."""
        key = load_signing_key(path, self._passphrase)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read: the key is not elliptic-curve")
        return key

    def remove(self, path: Path) -> None:
        """Delete the file."""
        path.unlink(missing_ok=True)


def load_signing_key(path: Path, passphrase: bytes = b"") -> SigningKey:
    """The key in a PEM file, of any kind that signs certificates; CERTIFICATE_INVALID if there is none to be used."""
    try:
        data = path.read_bytes()
        # A key in the clear may not be given a passphrase, which may be there for the keys that come after it.
        password = passphrase if b"ENCRYPTED" in data else None
        key: Any = serialization.load_pem_private_key(data, password or None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read: {error}") from error
    if not isinstance(key, SigningKey):
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path}: {type(key).__name__} cannot sign certificates here")
    return key


def key_holder(name: str = FILES, passphrase_file: Path | None = None) -> KeyHolder:
    """The holder of a name, `files` or one that is plugged in; INVALID_FIELD naming what is there if it is not."""
    passphrase = read_passphrase(passphrase_file) if passphrase_file else b""
    if name == FILES:
        return KeyFiles(passphrase)
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        raise BeamwireError(
            Reason.INVALID_FIELD,
            f"authority.key_holder: there is no {name!r}; there is: {', '.join((FILES, *sorted(found)))}",
        )
    holder: KeyHolder = found[name].load()(passphrase)
    return holder


def read_passphrase(path: Path) -> bytes:
    """The passphrase in a file, without the end of the line; CERTIFICATE_INVALID if there is none."""
    try:
        passphrase = path.read_bytes().strip(b"\r\n")
    except OSError as error:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"the passphrase in {path} cannot be read: {error}") from error
    if not passphrase:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"there is no passphrase in {path}")
    return passphrase
