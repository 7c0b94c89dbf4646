"""What a member's own facility says of other facilities: where they are, and by which roots they are known."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1.certificate_service_pb2_grpc import CertificateServiceStub
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.membership import read_bundle
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.mesh.rpc.channel import connect

_PAGE = 1000


def learn_trust(credentials: Credentials, address: str) -> Trust:
    """Ask the Certificate service at an address whom to believe, and keep that with the credentials.

    Blocks for some milliseconds. Raises BeamwireError if the service cannot be asked.
    """
    # In a thread of its own, because the caller's may run an event loop already.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="beamwire-trust") as pool:
        told = pool.submit(asyncio.run, _ask(credentials, address)).result()

    return credentials.change_trust(lambda before: before.told(told, complete=True))


async def _ask(credentials: Credentials, address: str) -> list[DomainTrust]:
    told: list[DomainTrust] = []
    request = pb.ListTrustBundlesRequest(page_size=_PAGE)
    async with connect(address, credentials) as channel:
        stub = CertificateServiceStub(channel)
        while True:
            page = await stub.ListTrustBundles(request)
            told += map(read_bundle, page.trust_bundles)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return told
