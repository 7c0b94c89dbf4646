"""A server of ours each of whose answers takes some time, of the processor or of something of which there is little.

`python -m bench.loaded_server CREDENTIALS processor|waiting SECONDS` prints its port and serves until it is ended.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from beamwire.job.v1 import job_service_pb2, job_service_pb2_grpc
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.server import Server, Service

# How many answers have what they wait for at a time.
AT_ONCE = 2


class Jobs:
    """Answers GetJob, whatever it is asked."""

    def __init__(self, what: str, seconds: float) -> None:
        self._wait = asyncio.Semaphore(AT_ONCE) if what == "waiting" else None
        self._seconds = seconds

    async def GetJob(self, request: Any, _context: object) -> job_service_pb2.Job:  # noqa: N802
        """Take the time, and answer."""
        if self._wait is not None:
            async with self._wait:
                await asyncio.sleep(self._seconds)
        else:
            end = time.thread_time() + self._seconds
            while time.thread_time() < end:
                pass
        return job_service_pb2.Job(name=request.name)

    def __getattr__(self, name: str) -> Any:
        """The methods that nobody calls."""
        return self.GetJob


async def _serve(credentials: Path, what: str, seconds: float) -> None:
    jobs = Jobs(what, seconds)
    service = Service("beamwire.job.v1.JobService", job_service_pb2_grpc.add_JobServiceServicer_to_server, jobs)
    server = Server(Credentials.load(credentials), services=[service])
    print(await server.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
