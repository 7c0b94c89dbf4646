"""What a job tells the Job service of itself: that it runs, where, and what others should know."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, Self

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.job.v1 import job_service_pb2_grpc as pb_grpc
from beamwire.mesh.addresses import Addresses
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import MEMBER_FILE, Credentials
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.patience import patiently

# Which job and which of its steps a program is, as its environment says.
JOB: Final = "BEAMWIRE_JOB"
STEP: Final = "BEAMWIRE_STEP"

_log = logging.getLogger(__name__)


async def report(
    credentials: Credentials, outputs: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> None:
    """Tell that this job is ACTIVE and what it wants others to know, however long the service is away.

    Nothing if this is no job, or it was not enrolled. What cannot be told is logged: the Job service finds out by its
    backend that a job runs.
    """
    name, step = environment.get(JOB, ""), environment.get(STEP, "")
    if not name or not step.isdigit() or not (credentials.directory / MEMBER_FILE).exists():
        return
    request = pb.ReportJobRequest(
        name=name, step=int(step), state=pb.Job.STATE_ACTIVE, node=socket.gethostname(), outputs=outputs
    )
    try:
        member = json.loads((credentials.directory / MEMBER_FILE).read_text())
        async with connect(Addresses.parse(str(member["address"])).of("job"), credentials) as channel:
            stub = pb_grpc.JobServiceStub(channel)
            await patiently(lambda: stub.ReportJob(request))
    except (BeamwireError, OSError, ValueError, KeyError) as error:
        _log.warning("%s could not tell the Job service that it runs: %s", name, error)


class ReportingThread:
    """A report by a program without an event loop, made while its `with` block lasts and not waited for."""

    def __init__(
        self, credentials: Credentials, outputs: Mapping[str, str], environment: Mapping[str, str] = os.environ
    ) -> None:
        self._args = credentials, outputs, environment
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beamwire report", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        loop, task = self._loop, self._task
        if loop is not None and task is not None:
            # It may have ended by itself.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            with suppress(asyncio.CancelledError):
                asyncio.run(self._report())
        except OSError:
            # There are too many open files for an event loop.
            _log.exception("the job could not tell that it runs")
        finally:
            self._ready.set()

    async def _report(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(report(*self._args))
        self._ready.set()
        await self._task
