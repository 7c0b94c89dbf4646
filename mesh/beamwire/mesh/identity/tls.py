"""TLS of the data plane: settings made of PEM in memory, and the certificates that a peer showed."""

from __future__ import annotations

import _ssl
import os
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cryptography import x509

from beamwire.mesh.errors import BeamwireError, Reason


def context(protocol: ssl._SSLMethod, identity_pem: bytes, roots_pem: bytes) -> ssl.SSLContext:
    """TLS settings that show a key and its chain, and believe these roots and no other."""
    made = ssl.SSLContext(protocol)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    # A root that another authority signed ends the chain all the same: whom that authority vouches for besides is
    # nothing to us. gRPC goes by the same rule.
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    made.load_verify_locations(cadata=roots_pem.decode())
    with _memory_file(identity_pem) as path:
        made.load_cert_chain(path)
    return made


def peer_chain(connection: ssl.SSLSocket | ssl.SSLObject) -> list[x509.Certificate]:
    """The certificates that the peer showed, leaf first; CERTIFICATE_INVALID if it showed none."""
    chain = [x509.load_der_x509_certificate(der) for der in _peer_chain_der(connection)]
    if not chain:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, "the peer showed no certificate", metadata={"check": "chain"})
    return chain


def _peer_chain_der(connection: ssl.SSLSocket | ssl.SSLObject) -> list[bytes]:
    if sys.version_info >= (3, 13):
        return connection.get_unverified_chain()
    # Before 3.13 the chain that the peer sent is only known to the object underneath.
    inner = connection._sslobj  # type: ignore[union-attr]
    return [certificate.public_bytes(_ssl.ENCODING_DER) for certificate in inner.get_unverified_chain() or ()]


@contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    # OpenSSL's Python face reads certificates from files only, and the files on disk may not be the last good state.
    descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
