"""Join tokens for the processes that a service starts, from the Certificate service, which may be away for a while."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import grpc

from beamwire.certificate.v1 import certificate_service_pb2, certificate_service_pb2_grpc
from beamwire.mesh.rpc.convert import to_duration
from beamwire.mesh.rpc.patience import patiently

TOKEN_TTL = timedelta(minutes=10)
# How long a job or a buffer waits for a Certificate service that is away.
MINT_PATIENCE = 300.0
# Certificates of one identity: of those that are good it may have fewer.
MOST_LISTED = 1000


class Minter:
    """Mints join tokens for the processes that a service starts."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = certificate_service_pb2_grpc.CertificateServiceStub(channel)

    async def __call__(self, identity: str, server_names: Sequence[str] = (), *, ttl: timedelta = TOKEN_TTL) -> str:
        """Return a token for an identity that may serve under some names."""
        request = certificate_service_pb2.CreateJoinTokenRequest(
            identity=identity, ttl=to_duration(ttl), server_names=server_names
        )
        return (await patiently(lambda: self._stub.CreateJoinToken(request), MINT_PATIENCE)).token

    async def taken_until(self, identity: str, before: datetime) -> datetime | None:
        """Return when the last certificate ends that somebody got for an identity before a moment; None if all have."""
        request = certificate_service_pb2.ListCertificatesRequest(
            filter=f'identity="{identity}" AND state="ISSUED"', page_size=MOST_LISTED
        )
        answer = await patiently(lambda: self._stub.ListCertificates(request), MINT_PATIENCE)
        ends = [
            each.expire_time.ToDatetime(UTC)
            for each in answer.certificates
            if each.create_time.ToDatetime(UTC) < before
        ]
        last = max(ends, default=before)
        return last if last > datetime.now(UTC) else None
