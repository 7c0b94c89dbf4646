"""A member's own files: key, chain, bundle and whom it believes besides, and the TLS settings made of them."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity import tls
from beamwire.mesh.identity import trust as trust_files
from beamwire.mesh.identity.ids import Clock, SpiffeId, utcnow
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.mesh.identity.verifier import Verifier, spiffe_id_of

if TYPE_CHECKING:
    import grpc

# gRPC is imported where it is used: a cache, which never speaks it, is 12 MB smaller without.
KEY_FILE: Final = "key.pem"
CHAIN_FILE: Final = "chain.pem"
BUNDLE_FILE: Final = "bundle.pem"
TRUST_DIRECTORY: Final = "trust"
# Which facility the member enrolled in, and where that is called.
MEMBER_FILE: Final = "member.json"
PRIVATE: Final = 0o600
PUBLIC: Final = 0o644
_FILES: Final = (KEY_FILE, CHAIN_FILE, BUNDLE_FILE)
_PENDING: Final = "pending"

_log = logging.getLogger(__name__)


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Create a file that has its mode from the first moment and is on disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key in a PEM file; BeamwireError CERTIFICATE_INVALID if there is none that can be used."""
    try:
        return _parse_key(path.read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read: {error}") from error


def _parse_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("the key is not an elliptic-curve key")
    return key


def new_key_and_csr(identity_hint: str = "") -> tuple[bytes, bytes]:
    """A new P-256 key and a signing request for it, both PEM. The hint is for people who read the request."""
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, identity_hint[:64])] if identity_hint else []
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes)).sign(key, hashes.SHA256())
    return key_pem(key), csr.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class _State:
    """One consistent reading of the three files."""

    key_pem: bytes
    chain_pem: bytes
    bundle_pem: bytes
    identity: SpiffeId
    not_after: datetime
    verifier: Verifier

    @classmethod
    def read(cls, directory: Path, clock: Clock) -> _State:
        try:
            with _locked(directory):
                _finish_save(directory)
                key, chain, bundle = ((directory / name).read_bytes() for name in _FILES)
                leaf = x509.load_pem_x509_certificates(chain)[0]
                identity = spiffe_id_of(leaf)
                own = DomainTrust(identity.trust_domain, bundle)
                trust = trust_files.load(directory / TRUST_DIRECTORY, own)
            private_key = _parse_key(key)
            verifier = Verifier(trust, clock=clock)
        except FileNotFoundError as error:
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID, f"{error.filename} is missing: there are no credentials; enrol first"
            ) from error
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID, f"the credentials in {directory} cannot be read ({error}); enrol again"
            ) from error
        if private_key.public_key() != leaf.public_key():
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID, f"{directory}: {CHAIN_FILE} does not belong to {KEY_FILE}; enrol again"
            )
        return cls(key, chain, bundle, identity, leaf.not_valid_after_utc, verifier)

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        import grpc

        return grpc.ssl_server_certificate_configuration(
            [(self.key_pem, self.chain_pem)], root_certificates=self.verifier.trust.handshake_roots_pem
        )

    def roots_of(self, trust_domain: str) -> bytes:
        """The roots that vouch for the servers of a domain, of which those of no other are part."""
        domain = self.verifier.trust.get(trust_domain or self.identity.trust_domain)
        if domain is None:
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID,
                f"the trust domain {trust_domain} is not believed here; an operator can introduce it "
                "(`beamwire trust accept`)",
                metadata={"check": "domain"},
            )
        return domain.roots_pem


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other readers and writers of the directory waiting, in this process and others."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Closing alone would leave it to a process that was forked meanwhile, for as long as that lives.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _finish_save(directory: Path) -> None:
    """Move what a save has committed into place; also what a save that was interrupted had committed."""
    pending = directory / _PENDING
    if not pending.is_dir():
        return
    for name in _FILES:
        with suppress(FileNotFoundError):  # moved before the interruption
            (pending / name).replace(directory / name)
    pending.rmdir()


class Credentials:
    """What a member proves its identity with, and whom it believes. Safe to share between threads.

    The files may change at any time (renewal): every new connection is made with what is then on disk, or with the
    last good state if that cannot be used.
    """

    def __init__(self, directory: Path, state: _State, *, clock: Clock = utcnow) -> None:
        self.directory = directory
        self._state = state
        self._clock = clock
        self._lock = threading.Lock()
        own = f"{TRUST_DIRECTORY}/{state.identity.trust_domain}{trust_files.SUFFIX}"
        self._paths = [str(directory / name) for name in (*_FILES, TRUST_DIRECTORY, own)]
        self._stamp = self._read_stamp()
        self._listeners: list[Callable[[], None]] = []
        self.problem = ""
        """Why what is on disk is not used, and the last good state is; empty if it is used."""

    @classmethod
    def load(cls, directory: Path, *, clock: Clock = utcnow) -> Credentials:
        """The credentials in a directory; BeamwireError CERTIFICATE_INVALID says which file is missing or broken."""
        return cls(directory, _State.read(directory, clock), clock=clock)

    @classmethod
    def save(
        cls, directory: Path, key_pem: bytes, chain_pem: bytes, roots_pem: bytes | None, *, clock: Clock = utcnow
    ) -> Credentials:
        """Write the three files so that a crash leaves either the old ones or the new ones, never a mixture.

        Without roots, those that are there stay, also if they are changed meanwhile.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
        try:
            write_file(staging / KEY_FILE, key_pem, PRIVATE)
            write_file(staging / CHAIN_FILE, chain_pem, PUBLIC)
            write_file(staging / BUNDLE_FILE, roots_pem or (directory / BUNDLE_FILE).read_bytes(), PUBLIC)
            _State.read(staging, clock)
            if roots_pem is None:
                (staging / BUNDLE_FILE).unlink()
            with _locked(directory):
                _finish_save(directory)
                staging.rename(directory / _PENDING)
                _finish_save(directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return cls.load(directory, clock=clock)

    @property
    def identity(self) -> SpiffeId:
        """Who this member is."""
        return self._state.identity

    @property
    def not_after(self) -> datetime:
        """When the certificate ends."""
        return self._state.not_after

    @property
    def verifier(self) -> Verifier:
        """Decides about the certificates of others; another object after each change of the files."""
        return self._state.verifier

    @property
    def trust(self) -> Trust:
        """Whom this member believes, as it now is on disk."""
        return self._fresh().verifier.trust

    def save_trust(self, trust: Trust) -> None:
        """Believe this from now on. The roots of the own domain go into the bundle, where others look for them."""
        self.change_trust(lambda _: trust)

    def change_trust(self, change: Callable[[Trust], Trust]) -> Trust:
        """Believe from now on what is made of what is believed, which nobody else changes meanwhile."""
        with _locked(self.directory):
            _finish_save(self.directory)
            before = self._kept_trust()
            trust = change(before)
            if trust.own.trust_domain != self.identity.trust_domain:
                raise ValueError(f"{self.identity} cannot be told to be of {trust.own.trust_domain}")
            if trust != before:
                trust_files.save(self.directory / TRUST_DIRECTORY, trust)
            if trust.own.roots_pem != before.own.roots_pem:
                trust_files.replace_file(self.directory / BUNDLE_FILE, trust.own.roots_pem.decode(), PUBLIC)
        if trust != self.verifier.trust:
            with self._lock:
                # In any case: two changes, even of two replicas, can be too close together for a file system's clock.
                self.reload()
        return trust

    def _kept_trust(self) -> Trust:
        """What is believed as it is on disk; the last good state if that cannot be read."""
        try:
            own = DomainTrust(self.identity.trust_domain, (self.directory / BUNDLE_FILE).read_bytes())
            return trust_files.load(self.directory / TRUST_DIRECTORY, own)
        except (OSError, BeamwireError):
            return self._state.verifier.trust

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have somebody called after every change, in the thread that noticed it; returns what ends that.

        A change by another process is noticed when the credentials are next used. The listener must not use them.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    @property
    def chain_pem(self) -> bytes:
        """The certificate chain as it now is on disk; the same object until it changes."""
        return self._fresh().chain_pem

    def roots_of(self, trust_domain: str = "") -> bytes:
        """The roots (PEM) of a domain, its own if none is named; CERTIFICATE_INVALID if it is not believed."""
        return self._fresh().roots_of(trust_domain)

    def check(self) -> None:
        """Raise CERTIFICATE_INVALID or CERTIFICATE_EXPIRED if this member's own facility would refuse it."""
        chain = x509.load_pem_x509_certificates(self._state.chain_pem)
        self.verifier.verify(chain[0], chain[1:])

    def reload(self) -> bool:
        """Read the files again. False, and the last good state stays, if they cannot be used."""
        stamp = self._read_stamp()
        try:
            self._state = _State.read(self.directory, self._clock)
        except BeamwireError as error:
            if error.message != self.problem:
                _log.warning("credentials kept as they were: %s", error)
            self.problem = error.message
            return False
        finally:
            self._stamp = stamp
        self.problem = ""
        for listener in list(self._listeners):
            listener()
        return True

    def refresh(self) -> None:
        """Look whether the files were changed, and take them if they can be used."""
        self._fresh()

    def channel_credentials(self, trust_domain: str = "") -> grpc.ChannelCredentials:
        """What a gRPC client shows to a server of a trust domain (its own if none is named), and what it believes.

        A channel keeps it for its life. CERTIFICATE_INVALID if the domain is not believed.
        """
        import grpc

        state = self._fresh()
        return grpc.ssl_channel_credentials(
            root_certificates=state.roots_of(trust_domain),
            private_key=state.key_pem,
            certificate_chain=state.chain_pem,
        )

    def server_credentials(
        self, *, require_client: bool = True, may_change: Callable[[], bool] = lambda: True
    ) -> grpc.ServerCredentials:
        """What a gRPC server shows and believes at one port. A renewal counts from the next handshake on.

        gRPC is given a new configuration only after a change, and when `may_change`, which its threads ask one at a
        time, says so: while it replaces one, a second handshake at the same time may use memory that is already free
        (see `beamwire.mesh.rpc.handover`). In return a client can resume a TLS session after its certificate has ended,
        so a server must check the time at every call.
        """
        import grpc

        served = self._fresh()

        def renewed() -> Any:
            nonlocal served
            state = self._fresh()
            if state is served or not may_change():
                return None  # which the stubs of grpcio do not know
            served = state
            return state.server_configuration()

        return grpc.dynamic_ssl_server_credentials(
            served.server_configuration(), renewed, require_client_authentication=require_client
        )

    def client_context(self, trust_domain: str = "") -> ssl.SSLContext:
        """TLS settings to dial the data plane of a trust domain with (its own if none is named).

        They show this member's certificate and check the server's name. CERTIFICATE_INVALID if the domain is not
        believed.
        """
        state = self._fresh()
        return tls.context(ssl.PROTOCOL_TLS_CLIENT, state.key_pem + state.chain_pem, state.roots_of(trust_domain))

    def server_context(self) -> ssl.SSLContext:
        """TLS settings to listen with on the data plane: a client certificate is required, no session is resumed."""
        state = self._fresh()
        roots_pem = state.verifier.trust.handshake_roots_pem
        context = tls.context(ssl.PROTOCOL_TLS_SERVER, state.key_pem + state.chain_pem, roots_pem)
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        return context

    def peer_identity(self, connection: ssl.SSLSocket | ssl.SSLObject) -> SpiffeId:
        """Who is at the other end of a TLS connection; what `Verifier.verify` raises if that is not proven."""
        chain = tls.peer_chain(connection)
        return self.verifier.verify(chain[0], chain[1:])

    def _fresh(self) -> _State:
        with self._lock:
            if self._read_stamp() != self._stamp:
                self.reload()
            return self._state

    def _read_stamp(self) -> tuple[tuple[int, int], ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116 - read on every call of a channel, where pathlib would double its cost
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_ino
