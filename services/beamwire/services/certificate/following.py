"""Keeps up with other facilities: their roots and revocations, read from each by the roots that are held of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.addresses import Addresses, check_address, target
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.failure import as_error
from beamwire.mesh.identity.ids import services_name
from beamwire.mesh.identity.introduction import MAX_ROOTS, UNREADABLE
from beamwire.mesh.identity.membership import read_bundle
from beamwire.mesh.identity.roots import check_readable
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.rpc.status import error_from_rpc
from beamwire.services.certificate.board import TrustBoard
from beamwire.services.certificate.model import bundle_name

# Seconds. A watch that says nothing for so long is asked whether it missed something: what is revoked there is refused
# here within a minute, even if something in between has forgotten the connection.
QUIET: Final = 20.0
READ_TIMEOUT: Final = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
# Between two bundles that are taken: a facility that changes its mind all the time must not keep our disks busy.
BREATH: Final = 0.2
# Who says much at a time is heard less often, but often enough for that minute: a disk may have been slow once.
REST, LONGEST_REST = 20, 20.0
# Of one bundle; a revocation list of 100,000 entries is as long.
_MAX_BYTES: Final = 4 * 1024 * 1024
_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", _MAX_BYTES),
)

# Characters.
_MAX_PROBLEM: Final = 500

Bundles = AsyncGenerator[pb.TrustBundle, None]

_log = logging.getLogger(__name__)


class Following:
    """Reads what other facilities say of themselves, and puts it on the board.

    What is not newer than what is held is not taken, nor what comes by other roots than those held at that moment.
    """

    def __init__(self, board: TrustBoard) -> None:
        self._board = board

    async def follow(self, trust_domain: str) -> None:
        """Keep what is believed of one facility as it says itself, until that is believed no more.

        While it cannot be reached, what was read last stays, and the board says why.
        """
        pause = FIRST_PAUSE
        while (held := self._held(trust_domain)) is not None:
            newest = held.sequence
            try:
                async with aclosing(_listen(held)) as bundles:
                    async for bundle in bundles:
                        newest = await self._take(held, bundle, newest)
                        pause = FIRST_PAUSE
                        if not _same_way(held, self._held(trust_domain)):
                            break
            except Exception as error:
                if isinstance(error, BeamwireError) and error.reason is Reason.LIMIT_REACHED:
                    # Nobody else may watch there now. It may be asked.
                    with suppress(Exception):  # of which the board was told
                        await self.read(trust_domain)
                else:
                    await self._unreached(trust_domain, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def read(self, trust_domain: str) -> None:
        """Ask a facility for its bundle once; the error if it cannot be had, which the board is told too."""
        held = self._held(trust_domain)
        if held is None:
            return
        try:
            async with _stub_of(held) as stub:
                bundle = await stub.GetTrustBundle(_request(held), timeout=READ_TIMEOUT)
            await self._take(held, bundle, held.sequence)
        except Exception as error:
            await self._unreached(trust_domain, error)
            raise

    async def _take(self, way: DomainTrust, bundle: pb.TrustBundle, newest: int) -> int:
        """Believe a bundle that was read by the roots of `way`, if it is newer than what is held; its sequence.

        ILLEGAL_STATE if it went back behind the `newest` that was read so. What is only older than what another replica
        has read meanwhile is no news and no fault.
        """
        domain = domain_of(bundle, way)
        if domain.sequence < newest:
            raise BeamwireError(
                Reason.ILLEGAL_STATE,
                f"the trust bundle of {way.trust_domain} went back from {newest} to {domain.sequence}; if "
                "that facility was restored from a backup, remove it and accept a new introduction",
            )
        while self._is_news(domain, way):
            try:
                await self._believe(domain)
            except BeamwireError as error:
                if error.reason not in (Reason.ETAG_MISMATCH, Reason.RESOURCE_NOT_FOUND):
                    raise
                # Another replica was faster, with this or with what was before it, or believes the facility no more.
                await self._board.look()
        await self._board.refreshed(way.trust_domain)
        return domain.sequence

    def _is_news(self, domain: DomainTrust, way: DomainTrust) -> bool:
        held = self._held(way.trust_domain)
        return held is not None and _same_way(way, held) and domain.sequence > held.sequence

    async def _believe(self, domain: DomainTrust) -> None:
        held = self._held(domain.trust_domain)
        if held is not None and held.roots_pem == domain.roots_pem:
            await self._board.believe(domain, known=True)
        else:
            # Other roots can be at odds with what is believed of others.
            async with self._board.changing():
                await self._board.look()
                await self._board.believe(domain, known=True)
        _log.info("%s: trust bundle %d", domain.trust_domain, domain.sequence)

    async def _unreached(self, trust_domain: str, error: Exception) -> None:
        known = as_error(error)
        if known is not error:
            _log.error("%s cannot be followed", trust_domain, exc_info=error)
        record = self._board.records.get(trust_domain)
        if record is not None and record.refresh_error != _printable(known.message):
            _log.warning("what is believed of %s stays as it was: %s", trust_domain, _printable(known.message))
        # Part of it may be of that facility's making, and it is shown on terminals here.
        await self._board.refreshed(trust_domain, _printable(known.message))

    def _held(self, trust_domain: str) -> DomainTrust | None:
        return self._board.trust.others.get(trust_domain)


def domain_of(bundle: pb.TrustBundle, held: DomainTrust) -> DomainTrust:
    """What a bundle says of the facility it was read from; CERTIFICATE_INVALID if that cannot be believed.

    Its delegation tokens are nothing to us.
    """
    try:
        if bundle.name != bundle_name(held.trust_domain):
            raise ValueError(f"it answered with {bundle.name[:100]!r}")
        roots_pem = _roots_pem(bundle.roots_pem)
        Addresses.parse(bundle.address)
        check_address(bundle.enroll_address)
        domain = read_bundle(bundle)
    except (*UNREADABLE, BeamwireError) as error:
        raise BeamwireError(
            Reason.CERTIFICATE_INVALID, f"what {held.trust_domain} says of itself cannot be believed: {error}"
        ) from error
    return replace(domain, roots_pem=roots_pem, token_root=b"", revoked_tokens=frozenset())


def _roots_pem(text: str) -> bytes:
    """The roots of a bundle and nothing else; ValueError if one is no authority."""
    roots = x509.load_pem_x509_certificates(text.encode())
    if len(roots) > MAX_ROOTS:
        raise ValueError(f"it has {len(roots)} roots, and {MAX_ROOTS} are the most")
    if not all(root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca for root in roots):
        raise ValueError("one of its roots is no authority")
    check_readable(text.encode())
    return b"".join(root.public_bytes(serialization.Encoding.PEM) for root in roots)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_PROBLEM])


def _same_way(held: DomainTrust, other: DomainTrust | None) -> bool:
    """Whether two states of a facility are read at the same address by the same roots."""
    return other is not None and (held.roots_pem, held.enroll_address) == (other.roots_pem, other.enroll_address)


async def _listen(held: DomainTrust) -> Bundles:
    """Yield the facility's own bundle now, after every change, and now and then when there was none."""
    async with _stub_of(held) as stub:
        stream = stub.WatchTrustBundles(pb.WatchTrustBundlesRequest())
        reading = asyncio.ensure_future(stream.read())
        try:
            while True:
                # Not `wait_for`: what that cancels is the call.
                if not (await asyncio.wait({reading}, timeout=QUIET))[0]:
                    yield await stub.GetTrustBundle(_request(held), timeout=READ_TIMEOUT)
                    continue
                answer = reading.result()
                if not isinstance(answer, pb.WatchTrustBundlesResponse):
                    raise BeamwireError(Reason.SERVICE_UNAVAILABLE, f"{held.trust_domain} ended the watch")
                reading = asyncio.ensure_future(stream.read())
                if answer.HasField("trust_bundle") and not answer.removed:
                    began = asyncio.get_running_loop().time()
                    yield answer.trust_bundle
                    took = asyncio.get_running_loop().time() - began
                    await asyncio.sleep(min(max(BREATH, REST * took), LONGEST_REST))
        finally:
            stream.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def _stub_of(held: DomainTrust) -> AsyncIterator[pb_grpc.CertificateServiceAsyncStub]:
    """The Certificate service of a facility, known by the roots held of it alone. It is shown no certificate."""
    roots = grpc.ssl_channel_credentials(root_certificates=held.roots_pem)
    options = [*_OPTIONS, ("grpc.ssl_target_name_override", services_name(held.trust_domain))]
    # Its names may have to be looked up.
    address = await asyncio.to_thread(target, held.enroll_address)
    async with grpc.aio.secure_channel(address, roots, options) as channel:
        try:
            yield pb_grpc.CertificateServiceStub(channel)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, address=held.enroll_address) from error


def _request(held: DomainTrust) -> pb.GetTrustBundleRequest:
    return pb.GetTrustBundleRequest(name=bundle_name(held.trust_domain))
