"""The Request service on the wire: messages in, transfers and their receipts out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

from beamwire.mesh.listing import list_page, visible
from beamwire.mesh.pages import Pager
from beamwire.mesh.rpc.access import current_caller
from beamwire.mesh.store import Store
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.request.v1 import request_service_pb2_grpc as pb_grpc
from beamwire.services.request.asked import length, to_record
from beamwire.services.request.datasets import Reader
from beamwire.services.request.domain import Transfers
from beamwire.services.request.estimate import Estimates
from beamwire.services.request.model import TransferRecord
from beamwire.services.request.shown import to_estimate, to_message

FILTER_KEYS = {
    "state": "state",
    "owner": "owner",
    "labels.*": "labels.*",
    "source": "config.source_identifier",
    "content_sha256": "content_sha256",
}


class RequestService(pb_grpc.RequestServiceServicer):
    """Answers for the transfers of one facility.

    Args:
        transfers: the transfers.
        store: where they are kept.
        pager: makes and reads page tokens.
        trust_domain: of the facility.
        retention: how long a transfer that has ended can be read.
    """

    def __init__(
        self,
        transfers: Transfers,
        store: Store[TransferRecord],
        pager: Pager,
        trust_domain: str,
        retention: timedelta,
    ) -> None:
        self._transfers = transfers
        self._estimates = Estimates(transfers, store, transfers.jobs)
        self._trust_domain = trust_domain
        self._store = store
        self._pager = pager
        self._retention = retention

    async def CreateTransfer(self, request: pb.CreateTransferRequest, context: object) -> pb.Transfer:
        """Check, store and begin a transfer."""
        record = to_record(request.transfer, self._trust_domain, request.transfer_id, request.request_id)
        if request.validate_only:
            fitness = await self._transfers.check(record, _reader())
            return self._shown(record.model_copy(update={"expected_event_count": fitness.expected_event_count}))
        return self._shown(await self._transfers.create(record, _reader()))

    async def EstimateTransfer(
        self, request: pb.EstimateTransferRequest, context: object
    ) -> pb.EstimateTransferResponse:
        """Say what a transfer would give, without creating it."""
        record = to_record(request.transfer, self._trust_domain)
        return to_estimate(await self._estimates.estimate(record, _reader()))

    async def ExtendTransfer(self, request: pb.ExtendTransferRequest, context: object) -> pb.Transfer:
        """Give a transfer more time."""
        await visible(self._store, "transfers", request.name)
        return self._shown(await self._transfers.extend(request.name, length("lease", request.lease)))

    async def GetTransfer(self, request: pb.GetTransferRequest, context: object) -> pb.Transfer:
        """Read one transfer."""
        return self._shown(await visible(self._store, "transfers", request.name))

    async def ListTransfers(self, request: pb.ListTransfersRequest, context: object) -> pb.ListTransfersResponse:
        """List transfers."""
        records, token = await list_page(self._store, self._pager, request, FILTER_KEYS)
        return pb.ListTransfersResponse(transfers=map(self._shown, records), next_page_token=token)

    async def WatchTransfer(
        self, request: pb.WatchTransferRequest, context: object
    ) -> AsyncIterator[pb.WatchTransferResponse]:
        """Send the transfer after every change until it has ended."""
        record = await visible(self._store, "transfers", request.name)
        if record.ended and record.etag == request.etag:
            return
        async for record in self._store.watch(request.name, etag=request.etag):
            yield pb.WatchTransferResponse(transfer=self._shown(record))
            if record.ended:
                return

    async def CancelTransfer(self, request: pb.CancelTransferRequest, context: object) -> pb.Transfer:
        """End a transfer early."""
        await visible(self._store, "transfers", request.name)
        return self._shown(await self._transfers.cancel(request.name))

    def _shown(self, record: TransferRecord) -> pb.Transfer:
        return to_message(record, self._retention)


def _reader() -> Reader:
    caller = current_caller()
    assert caller.grant is not None, "nobody makes a transfer without a certificate"
    return Reader(caller.acts_for, caller.grant.rule, caller.grant.datasets)
