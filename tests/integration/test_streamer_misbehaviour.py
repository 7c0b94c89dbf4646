"""What streamers have been seen to do wrong, and this one does not: it says so, ends with an error, and loses
nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError
from beamwire.services.streamer import registry
from beamwire.services.streamer.components import SourceContext
from beamwire.services.streamer.registry import Kind
from beamwire.testing import layouts, xtc2
from beamwire.testing.ports import free_port

STREAMER = [sys.executable, "-m", "beamwire.services.streamer"]
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

# Asked here, since psana opens sockets when it is imported.
NO_PSANA = xtc2.psana_missing()


def internal(**more: Any) -> dict[str, Any]:
    return {
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 20},
        "data_sources": {"id": {"type": "EventId"}},
    } | more


def start(command: list[str], data: dict[str, Any], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input=json.dumps(data), text=True, capture_output=True, timeout=60, check=False, **more
    )


@pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec (pip install beamwire[mpi])")
def test_a_rank_whose_port_is_taken_ends_the_job() -> None:
    """Elsewhere such a rank dies, half of the events vanish, and the exit code is 0."""
    zmq = pytest.importorskip("zmq")
    taken = socket.create_server(("127.0.0.1", 0))
    ports = [free_port(), taken.getsockname()[1]]
    reader = zmq.Context()
    pull = reader.socket(zmq.PULL)
    try:
        pull.connect(f"tcp://127.0.0.1:{ports[0]}")
        handler = {
            "type": "BinaryDataStreamingDataHandler",
            "urls": [f"tcp://127.0.0.1:{port}" for port in ports],
            "role": "server",
            "library": "zmq",
            "distribute": True,
        }
        command = [MPIEXEC or "mpiexec", "-n", "2", sys.executable, "-m", "mpi4py", "-m", "beamwire.services.streamer"]
        result = start([*command, "run", "--config", "-"], internal(data_handlers=[handler]))
    finally:
        pull.close(linger=0)
        reader.term()
        taken.close()
    assert result.returncode == 1
    assert f"nobody can listen on tcp://127.0.0.1:{ports[1]} here" in result.stderr


@pytest.mark.parametrize("option", ["--num-event=5", "--nmu-events=5", "--nun-events", "--max-events=3"])
def test_a_misspelt_option_is_an_error(tmp_path: Path, option: str) -> None:
    written = tmp_path / "out"
    handlers = [{"type": "BinaryFileWritingDataHandler", "write_directory": str(written)}]
    result = start([*STREAMER, "run", "--config", "-", option], internal(data_handlers=handlers))
    assert result.returncode == 2
    assert "No such option" in result.stderr
    assert not written.exists()


def test_a_misspelt_key_is_an_error(tmp_path: Path) -> None:
    written = tmp_path / "out"
    handlers = [{"type": "BinaryFileWritingDataHandler", "write_directroy": str(written)}]
    result = start([*STREAMER, "run", "--config", "-"], internal(data_handlers=handlers))
    assert result.returncode == 1
    assert "config.data_handlers.0.write_directroy: unknown key; did you mean write_directory?" in result.stderr
    assert not written.exists()


def test_a_second_run_does_not_overwrite_the_first(tmp_path: Path) -> None:
    handlers = [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path / "out")}]
    command = [*STREAMER, "run", "--config", "-"]
    assert start(command, internal(data_handlers=handlers)).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = start(command, internal(data_handlers=handlers))
    assert again.returncode == 1
    assert "exists and is not overwritten" in again.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_files_of_a_run_are_not_for_everybody(tmp_path: Path) -> None:
    """With the mask that keeps others out, nothing is made readable for them."""
    handlers = [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path / "out")}]
    result = start([*STREAMER, "run", "--config", "-"], internal(data_handlers=handlers), umask=0o077)
    assert result.returncode == 0, result.stderr
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "out").iterdir()} == {0}


def open_files() -> set[str]:
    names: set[str] = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            names.add(str(link.readlink()))
        except FileNotFoundError:
            # The one of this listing.
            continue
    return names


def broken_hdf5(directory: Path) -> tuple[str, dict[str, Any], str]:
    layouts.write_cxi(directory, [3, 2])
    return "HDF5EventSource", {"id_path": "/LCLS/none"}, str(directory / "*.cxi")


def truncated_hdf5(directory: Path) -> tuple[str, dict[str, Any], str]:
    layouts.write_cxi(directory, [3, 2])
    path = directory / "r0017_1.cxi"
    path.write_bytes(path.read_bytes()[:600])
    return "HDF5EventSource", {}, str(directory / "*.cxi")


def broken_dectris(directory: Path) -> tuple[str, dict[str, Any], str]:
    pytest.importorskip("hdf5plugin")
    master = layouts.write_dectris(directory)
    (directory / "lyso_1_data_000002.h5").unlink()
    return "DectrisEventSource", {}, str(master)


def broken_xfel(directory: Path) -> tuple[str, dict[str, Any], str]:
    pytest.importorskip("extra_data")
    layouts.write_xfel(directory, 2, modules=range(2))
    return "XfelEventSource", {"events": "pulses", "detector": "NO_DETECTOR"}, str(directory)


def truncated_xtc2(directory: Path) -> tuple[str, dict[str, Any], str]:
    if NO_PSANA:
        pytest.skip(NO_PSANA)
    run = xtc2.write_run(directory, events=6, detectors=("jungfrau", "epixq"))
    small = directory / "smalldata" / f"{run.stem(1)}.smd.xtc2"
    small.write_bytes(small.read_bytes()[:-7])
    return "Psana2EventSource", {}, run.source_identifier


def stream_of_xtc2_without_its_begin(directory: Path) -> tuple[str, dict[str, Any], str]:
    _, parameters, identifier = truncated_xtc2(directory)
    small = sorted((directory / "smalldata").iterdir())[1]
    small.write_bytes(b"")
    return "Psana2EventSource", parameters, identifier


def cut_recording(directory: Path) -> tuple[str, dict[str, Any], str]:
    (directory / "a.frame").write_bytes(b"BWF1" + bytes(100))
    return "ReplayEventSource", {}, str(directory)


@pytest.mark.parametrize(
    "made",
    [
        broken_hdf5,
        truncated_hdf5,
        broken_dectris,
        broken_xfel,
        truncated_xtc2,
        stream_of_xtc2_without_its_begin,
        cut_recording,
    ],
)
def test_a_source_that_cannot_be_opened_keeps_no_file_open(
    tmp_path: Path, made: Callable[[Path], tuple[str, dict[str, Any], str]]
) -> None:
    name, parameters, identifier = made(tmp_path)
    component = registry.find(Kind.EVENT_SOURCE, name)
    with pytest.raises(BeamwireError) as caught:
        component(component.Parameters(**parameters), SourceContext(identifier))
    assert str(tmp_path) in str(caught.value) or "config." in str(caught.value)
    del caught
    assert not [name for name in open_files() if name.startswith(str(tmp_path))]


def test_datasets_of_the_wrong_shape_are_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"], file["single"], file["short"] = np.zeros((4, 3)), 5.0, np.zeros(3)
        file["nothing"] = h5py.Empty("f4")
    for path, words in (("single", "no axis"), ("nothing", "no axis"), ("short", "/image")):
        source = registry.find(Kind.EVENT_SOURCE, "HDF5EventSource")
        data = registry.find(Kind.DATA_SOURCE, "HDF5Dataset")
        opened = source(source.Parameters(), SourceContext(str(tmp_path / "a.h5")))
        try:
            data(data.Parameters(path="/image"), opened)
            with pytest.raises(BeamwireError, match=words) as caught:
                data(data.Parameters(path=f"/{path}"), opened)
            assert [at.field for at in caught.value.violations] == ["path"]
        finally:
            opened.close()
