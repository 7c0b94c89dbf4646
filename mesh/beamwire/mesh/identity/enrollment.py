"""Becoming a member: the join token, and its exchange for credentials."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from beamwire.certificate.v1 import certificate_service_pb2, certificate_service_pb2_grpc
from beamwire.certificate.v1.certificate_service_pb2 import Certificate
from beamwire.mesh.addresses import target
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import MEMBER_FILE, PUBLIC, Credentials, new_key_and_csr, write_file
from beamwire.mesh.identity.ids import services_name
from beamwire.mesh.identity.membership import read_bundle
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.identity.verifier import Verifier
from beamwire.mesh.rpc.status import error_from_rpc

_PREFIX: Final = "bwj1"

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 1.0
"""Seconds before services that are away are asked again."""
STARTING_PATIENCE: Final = 20.0
"""Seconds for which a program that was started by a service waits for it: it may be started again just then."""
_AWAY: Final = (Reason.SERVICE_UNAVAILABLE, Reason.DRAINING, Reason.OVERLOADED, Reason.REQUEST_IN_FLIGHT)

_log = logging.getLogger(__name__)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A one-time right to enrol, as one word to hand over.

    `enroll_address` is where to enrol and `address` where to call afterwards, both `host:port` or several of them;
    `root_der` is the root certificate that the enrolment listener must lead to.
    """

    trust_domain: str
    enroll_address: str
    address: str
    root_der: bytes
    secret: str = field(repr=False)

    def encode(self) -> str:
        """The token as one word."""
        texts = (self.trust_domain, self.enroll_address, self.address, self.secret)
        return ".".join([_PREFIX, *(_encode(text.encode()) for text in texts), _encode(self.root_der)])

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """The token that a word spells; BeamwireError INVALID_JOIN_TOKEN if it was cut or is none."""
        prefix, *parts = text.strip().split(".")
        if prefix != _PREFIX or len(parts) != 5:
            raise BeamwireError(Reason.INVALID_JOIN_TOKEN, f"a join token begins with {_PREFIX}. and has six parts")
        try:
            *encoded, root_der = (_decode(part) for part in parts)
            trust_domain, enroll_address, address, secret = (part.decode() for part in encoded)
            x509.load_der_x509_certificate(root_der)
        except (binascii.Error, ValueError):
            raise BeamwireError(Reason.INVALID_JOIN_TOKEN, "the join token is damaged; was it copied whole?") from None
        return cls(trust_domain, enroll_address, address, root_der, secret)

    @property
    def roots_pem(self) -> bytes:
        """The root certificate as PEM."""
        return x509.load_der_x509_certificate(self.root_der).public_bytes(serialization.Encoding.PEM)


def enroll(token: JoinToken, directory: Path, *, timeout: float = 30, patience: float = 0) -> Credentials:
    """Exchange a join token for credentials, and save them with `member.json` in a directory.

    The key is made here and never leaves. The listener is believed only if it leads to the root in the token. If the
    services are away they are asked again for `patience` seconds: also a token that was spent by a request whose answer
    got lost is good for that.

    Raises:
        BeamwireError: INVALID_JOIN_TOKEN if the token is spent or expired, CERTIFICATE_INVALID if the listener is
            another, SERVICE_UNAVAILABLE or TIMED_OUT (after `timeout` seconds) if it cannot be reached.
    """
    key_pem, csr_pem = new_key_and_csr()
    request = certificate_service_pb2.EnrollMemberRequest(
        secret=token.secret, csr_pem=csr_pem.decode(), request_id=str(uuid.uuid4())
    )
    roots = grpc.ssl_channel_credentials(root_certificates=token.roots_pem)
    options = [("grpc.ssl_target_name_override", services_name(token.trust_domain))]
    with grpc.secure_channel(target(token.enroll_address), roots, options) as channel:
        stub = certificate_service_pb2_grpc.CertificateServiceStub(channel)
        certificate = _certificate(token, lambda: stub.EnrollMember(request, timeout=timeout), patience)
        trust = _read_trust(token, stub, timeout)
    chain_pem = certificate.chain_pem.encode()
    chain = x509.load_pem_x509_certificates(chain_pem)
    _check_issued(token, chain)
    credentials = Credentials.save(directory, key_pem, chain_pem, trust.own.roots_pem)
    credentials.save_trust(trust)
    _save_member(token, directory)
    return credentials


def _certificate(token: JoinToken, ask: Callable[[], Certificate], patience: float) -> Certificate:
    until, pause = time.monotonic() + patience, FIRST_PAUSE
    while True:
        try:
            return ask()
        except grpc.RpcError as error:
            problem = error_from_rpc(error, address=token.enroll_address)
            if problem.reason not in _AWAY or time.monotonic() + pause > until:
                raise problem from error
            _log.info("%s does not enrol now: %s; it is asked again", token.enroll_address, problem.message)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _check_issued(token: JoinToken, chain: list[x509.Certificate]) -> None:
    try:
        Verifier(Trust.of(token.trust_domain, token.roots_pem)).verify(chain[0], chain[1:])
    except BeamwireError as error:
        if error.metadata.get("check") != "chain":
            raise
        raise BeamwireError(
            Reason.INVALID_JOIN_TOKEN,
            f"{token.trust_domain} has another authority than when this join token was minted, and the token is spent; "
            "ask for another",
        ) from error


def _read_trust(token: JoinToken, stub: certificate_service_pb2_grpc.CertificateServiceStub, timeout: float) -> Trust:
    """What the facility says of itself: also the root that is to sign next, by which its services will soon be known.

    It is asked where the root in the token vouches for the answer. The token is spent, so if there is none that root
    has to do until the facility can be asked again.
    """
    request = certificate_service_pb2.GetTrustBundleRequest(name=f"trustBundles/{token.trust_domain}")
    try:
        own = read_bundle(stub.GetTrustBundle(request, timeout=timeout))
    except grpc.RpcError as error:
        problem = error_from_rpc(error, address=token.enroll_address).message
    except BeamwireError as error:
        problem = error.message
    else:
        if own.trust_domain == token.trust_domain:
            return Trust(own)
        problem = f"it is of {own.trust_domain[:100]!r}"
    _log.warning("the trust bundle of %s could not be read: %s", token.trust_domain, problem)
    return Trust.of(token.trust_domain, token.roots_pem)


def _save_member(token: JoinToken, directory: Path) -> None:
    member = {"trust_domain": token.trust_domain, "address": token.address, "enroll_address": token.enroll_address}
    staging = directory / f".{MEMBER_FILE}-{uuid.uuid4().hex}"
    write_file(staging, (json.dumps(member, indent=2) + "\n").encode(), PUBLIC)
    staging.replace(directory / MEMBER_FILE)
