"""The configuration of the streamer: LCLStreamer's keys are taken, and each error is named where it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer import config, registry
from beamwire.services.streamer.registry import BUILT_IN, Kind


def internal() -> dict[str, Any]:
    """A small configuration as LCLStreamer writes it."""
    made: dict[str, Any] = yaml.safe_load(
        """
        source_identifier: ""
        skip_incomplete_events: false
        event_source: {type: InternalEventSource, number_of_events_to_generate: 76}
        data_sources:
            random: {type: GenericRandomNumpyArray, array_shape: "20,2", array_dtype: float32}
            int: {type: IntValue, value: 3}
            float: {type: FloatValue, value: 4.5}
        processing_pipeline: {type: BatchProcessingPipeline, batch_size: 10}
        data_serializer:
            type: HDF5BinarySerializer
            compression_level: 3
            compression: null
            fields: {random: /data/random, int: /data/int, float: /data/float}
        data_handlers:
            - {type: BinaryFileWritingDataHandler, file_prefix: "", file_suffix: h5, write_directory: workspace/output}
        """
    )
    return made


def violations(data: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(BeamwireError) as caught:
        config.load(data)
    assert caught.value.reason is Reason.INVALID_FIELD
    return {at.field: at.description for at in caught.value.violations}


def test_takes_lclstreamers_layout() -> None:
    loaded = config.load(internal())
    assert loaded.event_source.type == "InternalEventSource"
    assert list(loaded.data_sources) == ["random", "int", "float"]
    assert loaded.data_sources["random"].parameters.model_dump()["array_shape"] == (20, 2)
    assert [part.type for part in loaded.processing_pipeline] == ["BatchProcessingPipeline"]
    assert loaded.max_events == 0
    assert loaded.optional == frozenset()


def test_defaults() -> None:
    loaded = config.load(
        {
            "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 1},
            "data_sources": {"id": {"type": "EventId", "required": False}},
        }
    )
    assert loaded.data_serializer.type == "NativeSerializer"
    assert not loaded.processing_pipeline
    assert not loaded.data_handlers
    assert not loaded.skip_incomplete_events
    assert loaded.optional == {"id"}


def test_numbers_of_a_protobuf_struct_are_numbers() -> None:
    data = internal()
    data["event_source"]["number_of_events_to_generate"] = 76.0
    data["processing_pipeline"]["batch_size"] = 10.0
    data["data_sources"]["random"]["array_shape"] = [20.0, 2.0]
    assert config.load(data).data_sources["random"].parameters.model_dump()["array_shape"] == (20, 2)


@pytest.mark.parametrize("shape", ["20,2", "20, 2,", [20, 2], (20, 2)])
def test_shapes_as_people_write_them(shape: object) -> None:
    data = internal()
    data["data_sources"]["random"]["array_shape"] = shape
    assert config.load(data).data_sources["random"].parameters.model_dump()["array_shape"] == (20, 2)


def _set(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return change


def _delete(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        (_set("source_identifer", value="x"), "config.source_identifer", "did you mean source_identifier?"),
        (_delete("event_source"), "config.event_source", "is required"),
        (_set("data_sources", value={}), "config.data_sources", "at least 1"),
        (_delete("event_source", "type"), "config.event_source.type", "is required"),
        (_set("event_source", "type", value="Psana2EvntSource"), "config.event_source.type", "Psana2EventSource?"),
        (_set("event_source", "type", value="qqqqqqqqqqq"), "config.event_source.type", "known: DectrisEventSource"),
        (
            _set("event_source", "number_of_events_to_generate", value=-3),
            "config.event_source.number_of_events_to_generate",
            "greater than or equal to 0 (it is -3)",
        ),
        (
            _set("event_source", "number_of_events", value=3),
            "config.event_source.number_of_events",
            "did you mean number_of_events_to_generate?",
        ),
        (_set("data_sources", "int", "valeu", value=3), "config.data_sources.int.valeu", "did you mean value?"),
        (_set("data_sources", "int", "requird", value=True), "config.data_sources.int.requird", "mean required?"),
        (_set("data_sources", "int", "value", value="x"), "config.data_sources.int.value", "integer"),
        (
            _set("data_sources", "random", "array_dtype", value="float33"),
            "config.data_sources.random.array_dtype",
            "'float33' is no element type of numpy",
        ),
        (
            _set("data_sources", "random", "array_dtype", value="str"),
            "config.data_sources.random.array_dtype",
            "not an element type of numbers",
        ),
        (_set("data_sources", "random", "array_shape", value="0,2"), "config.data_sources.random.array_shape.0", "1"),
        (_set("data_sources", "a/b", value={"type": "EventId"}), "config.data_sources.a/b", "must be letters"),
        (
            _set("data_sources", "t", value={"type": "Psana2Timestamp"}),
            "config.data_sources.t.type",
            "needs Psana2EventSource, not InternalEventSource",
        ),
        (_set("processing_pipeline", "batch_size", value=-1), "config.processing_pipeline.batch_size", "equal to 1"),
        (
            _set("processing_pipeline", value=[{"type": "BatchProcessingPipeline"}]),
            "config.processing_pipeline.0.batch_size",
            "is required",
        ),
        (_set("data_handlers", 0, "when_slow", value="hurry"), "config.data_handlers.0.when_slow", "'wait'"),
        (_set("data_handlers", 0, "patience", value=-1), "config.data_handlers.0.patience", "equal to 0"),
        (_set("data_handlers", 0, "patiense", value=1), "config.data_handlers.0.patiense", "did you mean patience?"),
        (_set("consumer", value="peeknet"), "config.consumer", "did you mean peaknet?"),
        (_set("data_serializer", "compression", value="lzma"), "config.data_serializer.compression", "'gzip'"),
        (_set("data_serializer", "compression", value="zfp"), "config.data_serializer", "loses precision silently"),
        (_set("data_handlers", 0, "file_prefix", value="../x"), "config.data_handlers.0.file_prefix", "pattern"),
        (
            _set("data_handlers", 0, value={"type": "BufferDataHandler", "connect": "tcp://x:1"}),
            "config.data_handlers.0.connect",
            "is not a connect string",
        ),
        (
            _set("data_handlers", 0, value={"type": "BufferDataHandler", "buffer": "b1"}),
            "config.data_handlers.0.buffer",
            "must be buffers/<id>",
        ),
        (_set("data_handlers", 0, value={"type": "BufferDataHandler"}), "config.data_handlers.0", "either connect"),
        (_set("max_events", value=-1), "config.max_events", "equal to 0"),
        (_set("skip_incomplete_events", value="perhaps"), "config.skip_incomplete_events", "boolean"),
    ],
)
def test_names_what_is_wrong(change: Callable[[dict[str, Any]], None], field: str, words: str) -> None:
    data = internal()
    change(data)
    found = violations(data)
    assert list(found) == [field]
    assert words in found[field]


def test_names_everything_that_is_wrong_at_once() -> None:
    data = internal()
    data["event_source"]["nubmer"] = 1
    data["data_sources"]["int"]["value"] = "x"
    data["processing_pipeline"]["batch_size"] = 0
    assert set(violations(data)) == {
        "config.event_source.nubmer",
        "config.data_sources.int.value",
        "config.processing_pipeline.batch_size",
    }


def test_the_companion_of_an_optional_data_source_keeps_its_name() -> None:
    data = internal()
    data["data_sources"] |= {"a": {"type": "EventId", "required": False}, "a_present": {"type": "EventId"}}
    assert list(violations(data)) == ["config.data_sources.a_present"]
    data["data_sources"]["a"]["required"] = True
    config.load(data)


@pytest.mark.parametrize("data", [[], "text", None, 3])
def test_refuses_what_is_no_table(data: Any) -> None:
    assert list(violations(data)) == ["config"]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in BUILT_IN.items() for name in names])
def test_each_built_in_component_is_there(kind: Kind, name: str) -> None:
    component = registry.find(kind, name)
    assert component.__name__ == name
    assert component.__doc__
    assert component.Parameters.model_config["extra"] == "forbid"


def test_yaml_errors_say_where() -> None:
    with pytest.raises(BeamwireError, match="line 2, column 4"):
        config.parse_text("a: 1\nb: }")
    with pytest.raises(BeamwireError, match="must be a table"):
        config.parse_text("- a\n- b")
    assert config.parse_text('{"a": [1, 2]}') == {"a": [1, 2]}


def test_yaml_makes_no_objects() -> None:
    with pytest.raises(BeamwireError, match="neither YAML nor JSON"):
        config.parse_text("a: !!python/object/apply:os.getcwd []")


def test_components_of_others_are_found_by_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_parts.py").write_text(
        "from beamwire.services.streamer.components import ComponentParameters\n"
        "class Theirs:\n"
        "    class Parameters(ComponentParameters):\n"
        "        gain: float = 1.0\n"
    )
    (tmp_path / "theirs-1.dist-info").mkdir()
    (tmp_path / "theirs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (tmp_path / "theirs-1.dist-info" / "entry_points.txt").write_text(
        "[beamwire.data_sources]\nTheirs = their_parts:Theirs\nEventId = their_parts:Theirs\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = internal()
    data["data_sources"]["x"] = {"type": "Theirs", "gain": 2}
    assert config.load(data).data_sources["x"].parameters.model_dump() == {"gain": 2.0}
    data["data_sources"]["x"] = {"type": "Theirs", "gian": 2}
    assert "did you mean gain?" in violations(data)["config.data_sources.x.gian"]
    data["data_sources"]["x"] = {"type": "Thiers"}
    assert "did you mean Theirs?" in violations(data)["config.data_sources.x.type"]
    # A name of ours cannot be taken.
    data["data_sources"]["x"] = {"type": "EventId"}
    assert config.load(data).data_sources["x"].component.__module__.startswith("beamwire.")


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_right(path: Path) -> None:
    data = dict(config.parse_text(path.read_text()))
    for key in ("processes", "buffer", "lease", "labels"):  # of `beamwire get`, not of the streamer
        data.pop(key, None)
    config.load(data)
