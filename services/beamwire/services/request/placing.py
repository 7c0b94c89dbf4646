"""The Job services of all facilities that are believed, as the consumers of a transfer need them: gRPC clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from datetime import timedelta

import grpc
from google.protobuf import json_format

from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.job.v1 import job_service_pb2_grpc as job_grpc
from beamwire.mesh.addresses import Addresses
from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.patience import patiently
from beamwire.services.request.clients import TAKEN, JobClient, request_id
from beamwire.services.request.model import ConsumerJob, TransferRecord
from beamwire.services.request.ports import JobView

CONNECT_VARIABLE = "BEAMWIRE_CONNECT"
FACILITY_VARIABLE = "BEAMWIRE_FACILITY"
# The facility that places a job ends it; this ends it even if that one cannot. Seconds.
_LONGER = 120.0


class ConsumerClient:
    """Implements `ConsumerPort` over gRPC.

    Args:
        credentials: of the Request service, which other facilities know it by.
        own: the address of this facility's own Job service.
        stack: closes the channels in the end.
    """

    def __init__(self, credentials: Credentials, own: str, stack: AsyncExitStack) -> None:
        self._credentials = credentials
        self._own = own
        self._stack = stack
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}

    async def check(self, record: TransferRecord, consumer: ConsumerJob) -> None:
        """Have a consumer job checked at its facility without creating it."""
        request = self._request(record, consumer, "")
        request.validate_only = True
        request.request_id = ""
        await job_grpc.JobServiceStub(self._channel(consumer)).CreateJob(request)

    async def place(self, record: TransferRecord, consumer: ConsumerJob, connect_string: str) -> None:
        """Create a consumer job at its facility, or find it created."""
        request = self._request(record, consumer, connect_string)
        stub = job_grpc.JobServiceStub(self._channel(consumer))
        try:
            await patiently(lambda: stub.CreateJob(request))
        except BeamwireError as error:
            if error.reason not in TAKEN:
                raise
            # Created before this service was started again, with the connect string of an earlier epoch.
            await patiently(lambda: stub.GetJob(job_pb.GetJobRequest(name=consumer.job)))

    def watch(self, consumer: ConsumerJob) -> AsyncIterator[JobView]:
        """Follow a consumer job until it has ended."""
        return JobClient(self._channel(consumer)).watch(consumer.job)

    async def cancel(self, consumer: ConsumerJob) -> None:
        """End a consumer job."""
        await JobClient(self._channel(consumer)).cancel(consumer.job)

    def _request(self, record: TransferRecord, consumer: ConsumerJob, connect_string: str) -> job_pb.CreateJobRequest:
        spec = json_format.ParseDict(consumer.spec, job_pb.JobSpec())
        spec.display_name = spec.display_name or f"consumer of {record.name}"
        spec.enroll = True
        spec.environment[CONNECT_VARIABLE] = connect_string
        spec.environment[FACILITY_VARIABLE] = self._credentials.identity.trust_domain
        if not spec.resources.HasField("duration"):
            spec.resources.duration.FromTimedelta(timedelta(seconds=record.lease + _LONGER))
        # Elsewhere a job is owned by whoever places it: this service.
        owner = "" if consumer.trust_domain else record.owner
        return job_pb.CreateJobRequest(
            job=job_pb.Job(spec=spec, owner=owner),
            job_id=consumer.job.removeprefix("jobs/"),
            request_id=request_id(consumer.job, "create-consumer"),
        )

    def _channel(self, consumer: ConsumerJob) -> grpc.aio.Channel:
        """The channel to the Job service of a facility; INVALID_FIELD if that is not believed (any more)."""
        trust_domain = consumer.trust_domain
        way = trust_domain, self._address(trust_domain)
        if way not in self._channels:
            channel = connect(way[1], self._credentials, trust_domain=trust_domain)
            self._stack.push_async_callback(channel.close)
            self._channels[way] = channel
        return self._channels[way]

    def _address(self, trust_domain: str) -> str:
        if not trust_domain:
            return self._own
        others: Mapping[str, object] = self._credentials.trust.others
        if trust_domain not in others:
            believed = ", ".join(others) or "none"
            raise invalid_field(
                "trust_domain",
                f"{trust_domain} is not believed at {self._credentials.identity.trust_domain} (of other facilities: "
                f"{believed}); an operator there can accept its introduction (`beamwire trust accept`)",
            )
        return Addresses.parse(self._credentials.trust.others[trust_domain].address).of("job")
