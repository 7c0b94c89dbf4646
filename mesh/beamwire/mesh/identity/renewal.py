"""Renewing a certificate: when it is time, and how.

`python -m beamwire.mesh.identity.renewal <directory>` does it once. The command is for members that do not speak gRPC
themselves, such as caches.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from beamwire.mesh.addresses import Addresses
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import MEMBER_FILE, Credentials, new_key_and_csr
from beamwire.mesh.identity.ids import BACKDATE, utcnow
from beamwire.mesh.identity.verifier import Verifier

if TYPE_CHECKING:
    import grpc

LOCK_FILE: Final = ".renewal"
# Seconds for the one call, and for the whole command.
CALL_TIMEOUT: Final = 15.0
COMMAND_TIMEOUT: Final = 30.0
RENEWED, FAILED, NOT_YET = 0, 1, 3
"""Exit codes of the command."""
_JITTER: Final = 0.1
# Of a certificate's life; when less is left people are told.
WARNING_PART: Final = 0.25


def half_life(chain_pem: bytes, jitter: float = 0.0) -> datetime:
    """When half of the life of a certificate is over; `jitter` moves it by that part of the half."""
    begin, end = life(chain_pem)
    return begin + (end - begin) / 2 * (1 + jitter)


def random_jitter() -> float:
    """Ten per cent either way, so that members which began together do not ask together."""
    return random.uniform(-_JITTER, _JITTER)


def life(chain_pem: bytes) -> tuple[datetime, datetime]:
    """From when, which is its issue and not the date that stands on it, until when a certificate is good."""
    leaf = x509.load_pem_x509_certificates(chain_pem)[0]
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    # Authorities date certificates back, for the sake of clocks that are slow. Of a short life that would be most.
    return (begin + BACKDATE if begin + BACKDATE < end else begin), end


def is_superseded(credentials: Credentials) -> bool:
    """Whether the authority that signs now is another one than that which signed this member's certificate."""
    chain = x509.load_pem_x509_certificates(credentials.chain_pem)
    current = x509.load_pem_x509_certificates(credentials.roots_of())[0]
    return not any(_is_issued_by(certificate, current) for certificate in chain)


def _is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return certificate == authority
    return True


def is_due(credentials: Credentials, jitter: float = 0.0) -> bool:
    """Whether it is time to renew: past half life, or the authority was rotated."""
    return utcnow() >= half_life(credentials.chain_pem, jitter) or is_superseded(credentials)


def certificate_address(directory: Path) -> str:
    """Where the Certificate service of a member's facility is called; CERTIFICATE_INVALID if that is not on disk."""
    path = directory / MEMBER_FILE
    try:
        return Addresses.parse(str(json.loads(path.read_text())["address"])).of("certificate")
    except (OSError, ValueError, KeyError, TypeError, BeamwireError) as error:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read ({error!r}); enrol again") from error


async def renew(credentials: Credentials, channel: grpc.aio.Channel) -> bool:
    """Get a new certificate for a new key, and save them. False if another process does that, or has just done so.

    Raises what the Certificate service says, CERTIFICATE_INVALID if what it sends is not a certificate of this member
    for this key.
    """
    before = credentials.chain_pem
    with _alone(credentials.directory) as alone:
        if not alone or credentials.chain_pem != before:
            return False
        await _replace(credentials, channel)
    return True


async def _replace(credentials: Credentials, channel: grpc.aio.Channel) -> None:
    from beamwire.certificate.v1 import certificate_service_pb2 as pb
    from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc

    key_pem, csr_pem = new_key_and_csr()
    request = pb.RenewCertificateRequest(csr_pem=csr_pem.decode(), request_id=str(uuid.uuid4()))
    certificate = await pb_grpc.CertificateServiceStub(channel).RenewCertificate(request, timeout=CALL_TIMEOUT)
    chain_pem = certificate.chain_pem.encode()
    _check(credentials, chain_pem)
    # It waits for the disk.
    await asyncio.to_thread(Credentials.save, credentials.directory, key_pem, chain_pem, None)
    credentials.refresh()


def _check(credentials: Credentials, chain_pem: bytes) -> None:
    try:
        chain = x509.load_pem_x509_certificates(chain_pem)
    except ValueError as error:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"the renewed certificate cannot be read: {error}") from error
    identity = Verifier(credentials.trust).verify(chain[0], chain[1:])
    if identity != credentials.identity:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{credentials.identity} was sent a certificate of {identity}")


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Whether no other process renews the credentials of a directory, for as long as this lasts."""
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        # Closing alone would leave it to a process that was forked meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def renew_in_background(credentials: Credentials) -> bool:
    """For programs that may end at any moment: if it is time, start the command below and forget it; whether it was.

    It ends by itself in bounded time, and whatever becomes of it is not for this program to say.
    """
    if not (credentials.directory / MEMBER_FILE).exists() or not is_due(credentials):
        return False
    if not remaining(credentials)[0]:
        # Only enrolling helps.
        return False
    command = [sys.executable, "-m", "beamwire.mesh.identity.renewal", str(credentials.directory)]
    null = subprocess.DEVNULL
    with contextlib.suppress(OSError), _alone(credentials.directory) as alone:
        # While the service is away, each of many commands would start another one, which waits for it.
        if not alone:
            return True
    with contextlib.suppress(OSError):
        # Through a shell, which leaves it at once: nobody here waits for its end.
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *command],
            stdin=null,
            stdout=null,
            stderr=null,
            start_new_session=True,
            check=False,
        )
    return True


async def renew_once(directory: Path, *, force: bool = False) -> bool:
    """Renew the credentials of a directory if it is time, or in any case; whether that was done. Errors as `renew`."""
    from beamwire.mesh.rpc.channel import connect

    credentials = Credentials.load(directory)
    with _alone(directory) as alone:
        if not alone or not (force or is_due(credentials, -_JITTER)):
            return False
        async with connect(certificate_address(directory), credentials) as channel:
            await learn(credentials, channel)
            await _replace(credentials, channel)
    return True


async def learn(credentials: Credentials, channel: grpc.aio.Channel) -> None:
    """Believe what the member's own facility says of itself now: the root that is to sign next, above all.

    For members that follow nothing: whoever renews once between the announcement of an authority and its activation is
    not cut off by it.
    """
    from beamwire.certificate.v1 import certificate_service_pb2 as pb
    from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
    from beamwire.mesh.identity.membership import read_bundle

    request = pb.GetTrustBundleRequest(name=f"trustBundles/{credentials.identity.trust_domain}")
    answer = await pb_grpc.CertificateServiceStub(channel).GetTrustBundle(request, timeout=CALL_TIMEOUT)
    own = read_bundle(answer)
    await asyncio.to_thread(credentials.change_trust, lambda trust: trust.told([own]))


async def _within_time(directory: Path) -> bool:
    async with asyncio.timeout(COMMAND_TIMEOUT):
        return await renew_once(directory)


def main() -> int:
    """Renew the credentials of a directory once, if half of their life is over or the authority was rotated.

    Exit code 0 if that was done, 3 if it was not yet time (or another process does it), 1 if it failed.
    """
    parser = argparse.ArgumentParser(prog="beamwire.mesh.identity.renewal", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="holds key.pem, chain.pem, bundle.pem and member.json")
    directory: Path = parser.parse_args().directory
    os.umask(0o077)
    try:
        renewed = asyncio.run(_within_time(directory))
    except TimeoutError:
        print(f"the Certificate service did not answer within {COMMAND_TIMEOUT:g} s", file=sys.stderr)
        return FAILED
    except BeamwireError as error:
        print(f"the certificate in {directory} cannot be renewed: {error}", file=sys.stderr)
        return FAILED
    return RENEWED if renewed else NOT_YET


def remaining(credentials: Credentials, now: datetime | None = None) -> tuple[timedelta, float]:
    """What is left of the life of a member's certificate, as a time and as a part of the whole, 0 to 1."""
    begin, end = life(credentials.chain_pem)
    left = max(end - (now or utcnow()), timedelta())
    return left, min(left / max(end - begin, timedelta(seconds=1)), 1.0)


def issues_of(credentials: Credentials) -> list[str]:
    """What is wrong with a member's credentials, or will be soon; each as a sentence."""
    credentials.refresh()
    found = []
    if credentials.problem:
        found.append(f"the credentials on disk cannot be read, the last good ones are used: {credentials.problem}")
    left, part = remaining(credentials)
    _, end = life(credentials.chain_pem)
    if not left:
        found.append(f"the certificate of {credentials.identity} ended {_date(end)}; enrol again")
    elif part <= WARNING_PART:
        found.append(
            f"the certificate of {credentials.identity} ends {_date(end)}, in {_words(left)}, and was not renewed"
        )
    return found


def _date(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _words(left: timedelta) -> str:
    seconds = int(left.total_seconds())
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {name}"
    return f"{seconds} seconds"


if __name__ == "__main__":
    sys.exit(main())
