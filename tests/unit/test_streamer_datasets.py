"""What a configuration would read: every file and experiment in it is named, and none is opened to tell it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import pytest
from pydantic import BaseModel, Field

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer import datasets as module
from beamwire.services.streamer import registry
from beamwire.services.streamer.check import check
from beamwire.services.streamer.components import ComponentParameters
from beamwire.services.streamer.config import load
from beamwire.services.streamer.datasets import datasets, in_words
from beamwire.services.streamer.named import ArrayName, FileName, experiment
from beamwire.services.streamer.registry import BUILT_IN, Kind, find

SYNTHETIC = {"type": "SyntheticEventSource"}
IMAGE = {"image": {"type": "SyntheticDetector"}}


def found(identifier: str = "", source: Mapping[str, Any] | None = None, *stages: Mapping[str, Any], **more: Any):
    """The names by the fields that they stand in."""
    kind = {
        "HDF5EventSource": "HDF5Dataset",
        "ReplayEventSource": "ReplayArray",
        "Psana2EventSource": "Psana2Timestamp",
    }
    source = source or SYNTHETIC
    data = {"HDF5Dataset": {"path": "entry/data"}, "ReplayArray": {"name": "x"}}
    type_ = kind.get(source["type"], "")
    sources = {"x": {"type": type_, **data.get(type_, {})}} if type_ else more.pop("sources", IMAGE)
    config = {
        "source_identifier": identifier,
        "event_source": source,
        "data_sources": sources,
        "processing_pipeline": list(stages),
        **more,
    }
    answer: dict[str, list[str]] = {}
    for each in datasets(load(config)):
        answer.setdefault(each.field, []).extend(each.found)
    return answer


HDF5 = {"type": "HDF5EventSource"}
PSANA2 = {"type": "Psana2EventSource"}
IDENTIFIER = "config.source_identifier"


def test_a_source_that_reads_nothing_names_nothing():
    assert found("whatever,/etc/passwd") == {}


def test_files_and_patterns_are_named_with_what_they_lead_to(tmp_path):
    for name in ("a1.h5", "a2.h5", ".hidden.h5"):
        (tmp_path / name).touch()
    (tmp_path / "a3.h5").symlink_to("/etc/hostname")
    assert found(f"{tmp_path}/a1.h5", HDF5) == {IDENTIFIER: [f"path:{tmp_path}/a1.h5"]}
    names = found(f"{tmp_path}/a*.h5, {tmp_path}/nothing.h5", HDF5)[IDENTIFIER]
    assert set(names) == {
        f"path:{tmp_path}/a*.h5",
        *(f"path:{tmp_path}/a{n}.h5" for n in (1, 2, 3)),
        "path:/etc/hostname",
        f"path:{tmp_path}/nothing.h5",
    }
    # A pattern that fits nothing is refused, or not, like one that does.
    assert found(f"{tmp_path}/z*.h5", HDF5)[IDENTIFIER] == [f"path:{tmp_path}/z*.h5"]


def test_a_file_with_a_comma_or_a_bracket_in_its_name_is_one_file(tmp_path):
    for name in ("a,b.h5", "c[1].h5"):
        (tmp_path / name).touch()
        assert found(f"{tmp_path}/{name}", HDF5) == {IDENTIFIER: [f"path:{tmp_path}/{name}"]}


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("/data/run7/../../etc/passwd", ["path:/etc/passwd"]),
        ("//data//run7/./x.h5", ["path:/data/run7/x.h5"]),
        ("/data/%2e%2e/x", ["path:/data/%2e%2e/x"]),
        ("/data/\u2025/x", ["path:/data/\u2025/x"]),
        ("/DATA/x", ["path:/DATA/x"]),
        ("/data/x\n.h5", ["path:/data/x\n.h5"]),
    ],
)
def test_a_path_is_told_as_the_system_takes_it(written, names):
    assert found(written, HDF5)[IDENTIFIER] == names


@pytest.mark.parametrize(
    "written", ["x.h5", "./x.h5", "../x.h5", "~/x.h5", "data/../../etc/passwd", "/d/*/../x", "/a\0b"]
)
def test_what_is_not_absolute_or_cannot_be_told_is_refused(written):
    with pytest.raises(BeamwireError) as refused:
        found(written, HDF5)
    assert refused.value.reason is Reason.INVALID_FIELD
    assert refused.value.violations[0].field == IDENTIFIER


def test_a_link_in_the_middle_of_a_path_is_followed(tmp_path):
    (tmp_path / "inside").symlink_to("/etc")
    assert found(f"{tmp_path}/inside/passwd", HDF5)[IDENTIFIER] == [
        f"path:{tmp_path}/inside/passwd",
        "path:/etc/passwd",
    ]
    # As the system does it: the link first, then the way up.
    names = found(f"{tmp_path}/inside/../root/x", HDF5)[IDENTIFIER]
    assert "path:/root/x" in names


def test_a_directory_of_frames_is_named_with_the_files_in_it(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "1.frame").touch()
    (tmp_path / "r" / "2.frame").symlink_to("/etc/hostname")
    names = found(f"{tmp_path}/r", {"type": "ReplayEventSource"})[IDENTIFIER]
    assert f"path:{tmp_path}/r/" in names
    assert "path:/etc/hostname" in names


@pytest.mark.parametrize(
    ("identifier", "names"),
    [
        ("exp=tmoc00118,run=222", ["exp:tmoc00118"]),
        ("exp=tmoc00118,run=222,dir=/data/x", ["path:/data/x/"]),
        ("files=/data/a.xtc2,/data/../etc/b.xtc2", ["path:/data/a.xtc2", "path:/etc/b.xtc2"]),
    ],
)
def test_what_psana2_reads(identifier, names):
    assert found(identifier, PSANA2)[IDENTIFIER] == names


@pytest.mark.parametrize("exp", ["../../etc", "/etc", "tmo*", "a/b", ".", "tmo c"])
def test_an_experiment_is_no_path(exp):
    for more in ("", ",dir=/data"):
        with pytest.raises(BeamwireError, match="no name of an experiment"):
            found(f"exp={exp},run=1{more}", PSANA2)


def test_a_run_that_leads_out_of_its_directory_is_told(tmp_path):
    (tmp_path / "x-r0001-s000-c000.xtc2").symlink_to("/etc/hostname")
    assert "path:/etc/hostname" in found(f"exp=x,run=1,dir={tmp_path}", PSANA2)[IDENTIFIER]


@pytest.mark.parametrize(
    ("identifier", "names"),
    [
        ("exp=CXI/cxilr6716:run=22:idx", ["exp:cxilr6716"]),
        ("exp=cxilr6716:run=22:dir=/data/x:smd", ["exp:cxilr6716", "path:/data/x/"]),
        ("shmem=psana.0:stop=no", ["shmem:psana.0"]),
    ],
)
def test_what_psana1_reads(identifier, names):
    source = {"type": "Psana1EventSource"}
    data = {"t": {"type": "Psana1Timestamp"}}
    assert found(identifier, source, sources=data)[IDENTIFIER] == names
    # What psana1 makes of blanks and of other spellings of its keys is not known here.
    for more in ("calib=/etc", " exp=secret", "exp =secret", "EXP=secret", "cxi43212"):
        with pytest.raises(BeamwireError, match="that the policy of the facility has words for"):
            found(f"{identifier}:{more}", source, sources=data)


def test_constants_of_stages_are_named_without_the_array_in_them(tmp_path):
    stages = [
        {"type": "Calibrate", "field": "image", "pedestal": "/data/dark.h5:/a/b", "gain": "/data/g.npy"},
        {"type": "Mask", "field": "image", "mask": "/data/m.npz:/x:/y"},
        {"type": "Assemble", "field": "image", "geometry": "/data/x:/../etc/y.geom"},
    ]
    where = "config.processing_pipeline"
    assert found("", None, *stages) == {
        f"{where}.0.pedestal": ["path:/data/dark.h5"],
        f"{where}.0.gain": ["path:/data/g.npy"],
        f"{where}.1.mask": ["path:/data/m.npz:/x"],
        f"{where}.2.geometry": ["path:/data/etc/y.geom"],
    }
    with pytest.raises(BeamwireError, match="absolute path"):
        found("", None, {"type": "Mask", "field": "image", "mask": "m.npy"})


def test_a_path_of_a_source_is_named():
    names = found("exp=x,run=1", {**PSANA2, "calibration": "/data/../etc/c.h5"})
    assert names["config.event_source.calibration"] == ["path:/etc/c.h5"]


class Deep(BaseModel):
    dark: ArrayName = ""


class PluginParameters(ComponentParameters):
    file: str = ""
    many: list[str] = Field(default_factory=list[str])
    table: dict[str, Any] = Field(default_factory=dict[str, Any])
    path: Path | None = None


class MarkedParameters(ComponentParameters):
    one: FileName = ""
    some: dict[str, list[Annotated[str, "of mine"] | FileName]] = Field(default_factory=dict)
    deep: Deep = Deep()


class Plugin:
    Parameters = PluginParameters


class Marked:
    Parameters = MarkedParameters

    @staticmethod
    def datasets(parameters: MarkedParameters) -> list[Any]:
        return [experiment("one", "x")] if parameters.one else []


@pytest.fixture
def plugins(monkeypatch) -> None:
    known = {"Plugin": Plugin, "Marked": Marked}
    ours = registry.find
    monkeypatch.setattr(registry, "find", lambda kind, name: known.get(name) or ours(kind, name))


@pytest.mark.usefixtures("plugins")
def test_a_component_that_does_not_say_what_it_reads_is_a_dataset_itself():
    stage = {"type": "Plugin", "many": ["/data/a", "x=/etc/b"], "table": {"k": {"/etc/k": "~root/v"}}, "path": "/p"}
    assert {name for names in found("", None, stage).values() for name in names} == {
        "component:Plugin",
        *(f"path:{name}" for name in ("/data/a", "/etc/b", "/etc/k", "/root/v", "/p")),
    }
    source = {"type": "Plugin", "file": "http://x/y"}
    assert "path:/etc/x" in found("db=/etc/x", source, sources={"id": {"type": "EventId"}})[IDENTIFIER]


@pytest.mark.usefixtures("plugins")
def test_a_component_that_marks_its_files_is_believed():
    stage = {
        "type": "Marked",
        "one": "/data/x:/y",
        "some": {"a": ["/data/a", "/data/b"]},
        "deep": {"dark": "/data/d.h5:/dark"},
    }
    assert {name for names in found("", None, stage).values() for name in names} == {
        "exp:x",
        *(f"path:/data/{name}" for name in ("x:/y", "a", "b", "d.h5")),
    }


# What the text parameters of our own components are that name no file: arrays, detectors, words, what is in a file.
NO_FILES = {
    "array_dtype", "beam_center_x", "beam_center_y", "channel", "compression", "count_path", "data_collection_rate",
    "data_source_to_serialize", "detector", "detector_description", "detector_distance", "detector_name",
    "detector_serial_number", "detector_type", "dtype", "field", "fields", "id_path", "image", "incident_energy",
    "incident_wavelength", "key", "member", "members", "name", "output", "partial_to", "path", "peaks",
    "photon_energy_field", "pixel_size_x", "pixel_size_y", "psana_field", "psana_fields", "psana_name", "rois",
    "sensor_material", "sensor_thickness", "series_unique_id", "source", "start_time", "threshold_energy", "unit",
    "user_data", "conditions", "common_mode", "zfp", "sz3",
}  # fmt: skip


def test_every_text_parameter_of_our_own_components_is_a_file_or_known_to_be_none():
    unknown = set()
    for kind in (Kind.EVENT_SOURCE, Kind.DATA_SOURCE, Kind.STAGE, Kind.SERIALIZER):
        for name in BUILT_IN[kind]:
            model = find(kind, name).Parameters
            marked = module._marked(model)
            for field, info in model.model_fields.items():
                text = "str" in str(info.annotation) or "Any" in str(info.annotation)
                if text and "Literal" not in str(info.annotation) and field not in marked and field not in NO_FILES:
                    unknown.add(f"{name}.{field}")
    assert unknown == set(), "mark them as FileName or ArrayName, or say here that they name no file"


def test_every_source_of_our_own_says_what_it_reads():
    silent = {name for name in BUILT_IN[Kind.EVENT_SOURCE] if not hasattr(find(Kind.EVENT_SOURCE, name), "datasets")}
    assert silent == {"InternalEventSource", "SyntheticEventSource", "SyntheticTofEventSource"}


def test_nothing_is_opened_to_tell_it(tmp_path):
    constants = tmp_path / "c.npy"
    np.save(constants, np.zeros(3))
    (tmp_path / "x.h5").write_bytes(b"secret")
    opened: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and watching[0] else None)
    try:
        found(f"{tmp_path}/*.h5", HDF5, {"type": "Mask", "field": "x", "mask": str(constants)})
        found(f"exp=x,run=1,dir={tmp_path}", {**PSANA2, "calibration": str(tmp_path / "x.h5")})
    finally:
        watching[0] = False
    assert [path for path in opened if path.startswith(str(tmp_path))] == []


@pytest.mark.parametrize("way", ["link", "virtual"])
def test_what_a_later_file_leads_to_is_told_although_it_is_closed_again(tmp_path, way):
    for name in ("secret.h5", "a.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["d"] = np.arange(100)
    layout = h5py.VirtualLayout((100,), "i8")
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "d", (100,))
    with h5py.File(tmp_path / "b.h5", "w") as file:
        if way == "link":
            file["d"] = h5py.ExternalLink("secret.h5", "/d")
        else:
            file.create_virtual_dataset("d", layout)
    config = {
        "source_identifier": f"{tmp_path}/a.h5,{tmp_path}/b.h5",
        "event_source": HDF5,
        "data_sources": {"x": {"type": "HDF5Dataset", "path": "d"}},
    }
    assert str(tmp_path / "secret.h5") in check(config, ask=lambda *_: None)["opened"]


def test_it_is_printed_as_json_takes_it(tmp_path):
    config = {
        "source_identifier": "/data/x.h5",
        "event_source": HDF5,
        "data_sources": {"x": {"type": "HDF5Dataset", "path": "d"}},
    }
    words = in_words(datasets(load(config)))
    assert words == {"datasets": [{"field": IDENTIFIER, "named": "path:/data/x.h5", "found": ["path:/data/x.h5"]}]}
