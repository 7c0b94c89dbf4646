"""Two replicas of the Request service over PostgreSQL: what one began, the other brings to its end."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from beamwire.client import connect
from beamwire.testing.ports import free_port
from beamwire.testing.postgres import Postgres
from tests.conftest import LiveFacility, make_live_facility, wait_until


@dataclass
class Replicated:
    """A facility with one process for each replica of the Request service, and one for the others."""

    facility: LiveFacility
    postgres: Postgres
    database: str

    def driver(self, transfer: str) -> subprocess.Popen[bytes]:
        """The replica that drives a transfer."""

        def look() -> subprocess.Popen[bytes] | None:
            query = f"SELECT holder FROM request.resources WHERE name = '{transfer}'"
            holder = self.postgres.sql(query, self.database)
            pids = holder.split(":")
            return next((each for each in self.facility.processes if str(each.pid) in pids), None)

        return wait_until(look, what=f"a replica that drives {transfer}")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.facility.processes.remove(process)
        assert process.stdout is not None
        process.stdout.close()

    def count(self, kind: str, schema: str) -> int:
        return int(self.postgres.sql(f"SELECT count(*) FROM {schema}.resources WHERE kind = '{kind}'", self.database))


@pytest.fixture
def replicated(postgres: Postgres, tmp_path: Path) -> Iterator[Replicated]:
    url = postgres.create_database("replicated")
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    replicas = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    file = live.directory / "facility.toml"
    addresses = f'\n[services]\nrequest = "{",".join(replicas)}"\n[database]\nurl = "{url}"\n'
    file.write_text(file.read_text() + addresses)
    try:
        live.start("certificate", "buffer", "job")
        for address in replicas:
            live.services["request"] = address
            live.start("request", "--listen", address)
        live.enroll("user/alice", live.config_dir)
        yield Replicated(live, postgres, "replicated")
    finally:
        live.stop()
        postgres.drop_database("replicated")


def request(events: int, rate: float, **more: object) -> dict[str, object]:
    source = {"type": "SyntheticEventSource", "number_of_events": events, "shape": [32, 48], "events_per_second": rate}
    return {
        "event_source": source,
        "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 8}],
        **more,
    }


def test_a_replica_that_is_killed_costs_nothing(replicated: Replicated) -> None:
    ids: list[int] = []
    with connect(config_dir=replicated.facility.config_dir) as client:
        with client.stream(request(400, rate=100, processes=2)) as stream:
            assert stream.transfer is not None
            name = stream.transfer.name
            for number, batch in enumerate(stream):
                ids += batch.event_ids.tolist()
                if number == 3:
                    replicated.kill(replicated.driver(name))
                if number == 12:
                    # The other one answers, and what it stores is what its driver goes by.
                    extended = client.extend_transfer(name, timedelta(days=2))
                    assert extended.expire_time.seconds - extended.create_time.seconds > 1.5 * 86400
        assert sorted(ids) == list(range(400))
        assert stream.receipt is not None
        assert stream.receipt.balanced
        states = [line.state for line in client.get_transfer(name).transitions]
    assert len(set(states)) == 5, "each state once, and none is gone back to"
    assert (replicated.count("JobRecord", "job"), replicated.count("BufferRecord", "buffer")) == (1, 1)


def test_a_cancel_is_acted_upon_whichever_replica_it_reaches(replicated: Replicated) -> None:
    with connect(config_dir=replicated.facility.config_dir) as client:
        for _ in range(4):
            transfer = client.create_transfer(request(100_000, rate=100))
            wait_until(lambda name=transfer.name: client.get_transfer(name).connect_string, what="the stream")
            # Calls go round: some of these reach the one that does not drive it.
            client.cancel_transfer(transfer.name)
            ended = wait_until(lambda name=transfer.name: _if_ended(client.get_transfer(name)), what="the end")
            assert ended.State.Name(ended.state) == "STATE_CANCELLED"


def _if_ended(transfer):
    return transfer if transfer.HasField("end_time") else None
