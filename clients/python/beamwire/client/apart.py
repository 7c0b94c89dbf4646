"""Calls a facility from a process of their own, for a program that is going to fork: gRPC does not survive that."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from beamwire.client.client import Client, connect
from beamwire.client.forks import has_used_grpc
from beamwire.client.request import ParsedRequest
from beamwire.client.transfers import has_ended
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.request.v1.request_service_pb2 import Transfer

# How long one waits for a transfer that somebody else creates, who has the request checked against the dataset.
_CREATE_SECONDS: Final = 90.0
_LOOK_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Apart:
    """A facility, as `connect` is told of it. Each call makes a client, and raises BeamwireError as that does."""

    facility: str | None
    config_dir: Path | None

    def create(self, request: ParsedRequest, transfer_id: str) -> None:
        """Create a transfer."""
        self._run(_create, request, transfer_id)

    def find(self, name: str) -> None:
        """Wait until another process has created a transfer."""
        self._run(_find, name)

    def cancel(self, name: str) -> None:
        """Cancel a transfer if it has not ended."""
        self._run(_cancel, name)

    def outcome(self, name: str) -> Transfer:
        """Wait for the end of a transfer, and return it."""
        found = self._run(_outcome, name)
        assert isinstance(found, Transfer)
        return found

    def _run(self, work: Callable[..., Transfer | None], *arguments: Any) -> Transfer | None:
        if has_used_grpc():
            # There is nothing left to be spared.
            with connect(self.facility, config_dir=self.config_dir) as client:
                return work(client, *arguments)
        task = pickle.dumps((self.facility, self.config_dir, work, arguments))
        done = subprocess.run([sys.executable, "-m", __name__], input=task, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise BeamwireError(Reason.INTERNAL, f"the process that calls the facility ended with {done.returncode}")
        result = pickle.loads(done.stdout)
        if isinstance(result, BaseException):
            raise result
        assert result is None or isinstance(result, Transfer)
        return result


def _create(client: Client, request: ParsedRequest, transfer_id: str) -> None:
    client.create_transfer(request, transfer_id=transfer_id)


def _find(client: Client, name: str) -> None:
    deadline = time.monotonic() + _CREATE_SECONDS
    while True:
        try:
            client.get_transfer(name)
        except BeamwireError as error:
            # So the service answers a user for what is not there.
            if error.reason not in (Reason.NOT_OWNER, Reason.RESOURCE_NOT_FOUND) or time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECONDS)
        else:
            return


def _cancel(client: Client, name: str) -> None:
    if not has_ended(client.get_transfer(name)):
        client.cancel_transfer(name)


def _outcome(client: Client, name: str) -> Transfer:
    last = Transfer()
    for seen in client.watch_transfer(name):
        last = seen
    return last


def main() -> None:
    """Do what standard input says, and say on standard output how it went."""
    facility, config_dir, work, arguments = pickle.load(sys.stdin.buffer)
    try:
        with connect(facility, config_dir=config_dir) as client:
            result = work(client, *arguments)
    except BeamwireError as error:
        result = error
    pickle.dump(result, sys.stdout.buffer)


if __name__ == "__main__":
    main()
