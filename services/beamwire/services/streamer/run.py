"""A run from its begin to its exit code: identity, traces, signals, and the other ranks."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import MEMBER_FILE, Credentials
from beamwire.mesh.identity.enrollment import STARTING_PATIENCE, JoinToken, enroll
from beamwire.mesh.identity.renewal import certificate_address
from beamwire.services.streamer import config as configuration
from beamwire.services.streamer.config import StreamerConfig
from beamwire.services.streamer.parallel import Ranks
from beamwire.services.streamer.pipeline import Account, Pipeline, one_line, say
from beamwire.services.streamer.stopping import CancelledError, Stop

FAILED = 1
# Most jobs are over before their membership has to be looked after, in seconds.
MEMBERSHIP_DELAY = 10.0

# Errors of the one who asked, who is helped by the sentence and not by where in our code it arose.
_PLAIN = (
    Reason.INVALID_FIELD,
    Reason.DATASET_NOT_FOUND,
    Reason.UNSUPPORTED,
    Reason.RESOURCE_EXISTS,
    Reason.INVALID_JOIN_TOKEN,
    Reason.SERVICE_UNAVAILABLE,
    Reason.TIMED_OUT,
)


def run(
    load: Callable[[], Mapping[str, Any]],
    ranks: Ranks,
    num_events: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Streams what the configuration says, and returns the exit code: 0, 1 failed, 143 or 130 told to end.

    `load` reads the configuration and is called on rank 0. `num_events` is the most to take over all ranks, and goes
    before the configuration's own limit. If another rank than this one is waiting, a failure ends the MPI job.
    """
    stop = Stop()
    with stop.installed():
        traces = _telemetry(environment)
        try:
            parent = environment.get("TRACEPARENT") or None
            attributes = {telemetry.ATTR_PRODUCER: ranks.share.rank}
            with telemetry.span(telemetry.SPAN_STREAMER_RUN, parent=parent, attributes=attributes) as span:
                account = _stream(load, ranks, stop, num_events, environment)
                span.set_attribute(telemetry.ATTR_EVENTS, account.sent)
        except CancelledError:
            code = stop.exit_code
            say(f"rank {ranks.share.rank}: told to end")
        except Exception as error:
            code = FAILED
            if not (isinstance(error, BeamwireError) and error.reason in _PLAIN):
                traceback.print_exc()
            say(f"rank {ranks.share.rank}: {one_line(error)}")
        else:
            code = 0
        traces.shutdown()
    if code:
        ranks.abort(code)
    return code


def _stream(
    load: Callable[[], Mapping[str, Any]],
    ranks: Ranks,
    stop: Stop,
    num_events: int | None,
    environment: Mapping[str, str],
) -> Account:
    data = ranks.broadcast(load() if ranks.share.rank == 0 else None)
    config = configuration.load(data)
    if num_events is not None:
        config = replace(config, max_events=num_events)
    if not config.data_handlers:
        raise invalid_field("config.data_handlers", "is empty: nothing would become of the events")
    credentials = _credentials(ranks, environment)
    with _kept(ranks.share.rank, environment), _reported(ranks, environment):
        account = Pipeline(config, ranks, stop, credentials).run()
    _report(ranks.gather(account), ranks, config)
    return account


def _report(accounts: list[Account], ranks: Ranks, config: StreamerConfig) -> None:
    if ranks.share.rank == 0:
        sent = sum(account.sent for account in accounts)
        incomplete = sum(account.incomplete for account in accounts)
        vetoed = sum(account.vetoed for account in accounts)
        source = config.source_identifier or config.event_source.type
        say(f"{sent} events sent, {incomplete} incomplete, {vetoed} vetoed, from {source}")


def _credentials(ranks: Ranks, environment: Mapping[str, str]) -> Callable[[], Credentials]:
    """Enrols with the join token, if there is one, for all ranks; the credentials are read when they are needed."""
    directory = _directory(environment)
    token_file = environment.get("BEAMWIRE_JOIN_TOKEN_FILE", "")
    if token_file:
        if ranks.share.rank == 0 and Path(token_file).is_file():
            _enroll(Path(token_file), directory)
        ranks.gather(None)
    return lambda: Credentials.load(directory)


def _directory(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("BEAMWIRE_CREDENTIALS_DIR") or "credentials")


def _kept(rank: int, environment: Mapping[str, str]) -> AbstractContextManager[None]:
    """Rank 0 renews what it enrolled, for a job that outlives its certificate; the others read the same files."""
    directory = _directory(environment)
    if rank != 0 or not (directory / MEMBER_FILE).exists():
        return nullcontext()
    # Brings gRPC with it.
    from beamwire.mesh.identity.membership import MembershipThread

    return MembershipThread(Credentials.load(directory), certificate_address(directory), delay=MEMBERSHIP_DELAY)


def _reported(ranks: Ranks, environment: Mapping[str, str]) -> AbstractContextManager[object]:
    """Rank 0 tells the Job service that the job runs, which it otherwise learns from its backend a little later."""
    directory = _directory(environment)
    if ranks.share.rank != 0 or not (directory / MEMBER_FILE).exists():
        return nullcontext()
    # Brings gRPC with it.
    from beamwire.mesh.reporting import ReportingThread

    return ReportingThread(Credentials.load(directory), {"ranks": str(ranks.share.size)}, environment)


def _enroll(token_file: Path, directory: Path) -> None:
    try:
        enroll(JoinToken.parse(token_file.read_text()), directory, patience=STARTING_PATIENCE)
    finally:
        # It is good once, and it is a secret.
        token_file.unlink()


def _telemetry(environment: Mapping[str, str]) -> telemetry.Telemetry:
    directory = environment.get("BEAMWIRE_TRACE_DIR")
    return telemetry.setup(
        "streamer",
        trace_dir=Path(directory) if directory else None,
        otlp_endpoint=environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
    )
