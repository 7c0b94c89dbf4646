"""A transfer whose streamer and cache run on the nodes of a real Slurm, checked there before its job begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beamwire.client import BeamwireError, Reason, connect
from beamwire.testing import xtc2
from beamwire.testing.slurm import Slurm
from tests.conftest import LiveFacility, make_live_facility

needs_psana = pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is here")

ON_SLURM = {"placement": {"backend": "slurm", "queue": "main"}}


@pytest.fixture
def facility(slurm: Slurm, tmp_path: Path) -> Iterator[LiveFacility]:
    """A facility with a Slurm."""
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    path = live.directory / "facility.toml"
    backend = f'[backends.slurm]\nkind = "slurm"\nconf = "{slurm.conf}"\npath = "/usr/bin"\n'
    path.write_text(path.read_text().replace("nodes = []", 'nodes = ["127.0.0.1"]') + backend)
    try:
        live.start()
        live.enroll("user/alice", live.config_dir)
        yield live
    finally:
        live.stop()


@needs_psana
def test_a_real_run_is_read_on_a_node_and_comes_whole(facility: LiveFacility, tmp_path: Path) -> None:
    run = xtc2.write_run(tmp_path / "run", events=40, shape=(16, 32))
    detector = {"type": "Psana2DetectorInterface", "psana_name": run.detectors[0], "psana_fields": "raw.raw"}
    request = {
        "source_identifier": run.source_identifier,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {"timestamp": {"type": "Psana2Timestamp"}, "detector_data": detector},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 4}],
        "processes": 2,
        "buffer": {"placement": {"backend": "slurm"}},
        **ON_SLURM,
    }
    with connect(config_dir=facility.config_dir) as client:
        with client.stream(request) as stream:
            stamps = [int(stamp) for batch in stream for stamp in batch["timestamp"]]
        assert sorted(stamps) == sorted(run.timestamp(event) for event in range(40))
        assert stream.transfer is not None
        transfer = client.get_transfer(stream.transfer.name)
        assert transfer.receipt.balanced
        assert transfer.counters.expected_event_count == 40, "as the check on the node has found"
        assert any("checked on the backend slurm" in line.reason for line in transfer.transitions)
        assert client.jobs.get(transfer.job).native_id.isdigit()


def test_what_does_not_exist_there_fails_before_anything_is_made(facility: LiveFacility) -> None:
    request = {
        "source_identifier": "/no/such/file.h5",
        "event_source": {"type": "HDF5EventSource"},
        "data_sources": {"x": {"type": "HDF5Dataset", "path": "/x"}},
        **ON_SLURM,
    }
    with connect(config_dir=facility.config_dir) as client:
        with pytest.raises(BeamwireError, match=r"/no/such/file\.h5") as failed, client.stream(request) as stream:
            next(iter(stream))
        assert failed.value.reason is Reason.DATASET_NOT_FOUND
        with pytest.raises(BeamwireError) as gone:
            client.get_buffer(next(client.list_transfers()).buffer)
        assert gone.value.reason is Reason.NOT_OWNER, "there is none"
        estimate = client.estimate_transfer(request)
        assert "it is checked when the transfer has begun" in estimate.warnings[0]
        assert estimate.HasField("queue_duration")
        assert estimate.queue_duration.seconds < 10, "nobody else wants the nodes"


def test_a_backend_that_does_not_exist_is_refused_with_those_that_do(facility: LiveFacility) -> None:
    request = {
        "event_source": {"type": "SyntheticEventSource", "number_of_events": 8},
        "data_sources": {"x": {"type": "SyntheticDetector"}},
        "placement": {"backend": "slum"},
    }
    with connect(config_dir=facility.config_dir) as client, pytest.raises(BeamwireError) as refused:
        client.create_transfer(request)
    (violation,) = refused.value.violations
    assert violation.field == "transfer.streamer_placement.backend"
    assert "slurm" in violation.description
