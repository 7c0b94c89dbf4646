"""Numbers that would be wrong without a word: what an element type does not hold, and what YAML makes of a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer import config
from beamwire.services.streamer.components import Batch, FieldSpec, SourceContext
from beamwire.services.streamer.sources.dectris import DectrisEventSource
from beamwire.services.streamer.sources.hdf5 import HDF5Dataset, HDF5EventSource
from beamwire.services.streamer.sources.psana_values import as_array
from beamwire.services.streamer.stages.calibration import Calibrate
from beamwire.services.streamer.stages.common_mode import CommonMode
from beamwire.services.streamer.stages.peaknet import PeaknetPreprocessing
from beamwire.services.streamer.values import converted, holds

SOURCE = "event_source: {type: InternalEventSource, number_of_events_to_generate: 3}\n"


def violations(text: str) -> dict[str, str]:
    with pytest.raises(BeamwireError) as caught:
        config.load(config.parse_text(text))
    assert caught.value.reason is Reason.INVALID_FIELD
    return {at.field: at.description for at in caught.value.violations}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("data_sources: {a: {type: EventId}}\nmax_events: yes", "config.max_events"),
        ("data_sources: {a: {type: FloatValue, value: no}}", "config.data_sources.a.value"),
        ("data_sources: {a: {type: IntValue, value: on}}", "config.data_sources.a.value"),
        ("data_sources: {a: {type: ConstValue, value: on, dtype: uint8}}", "config.data_sources.a.value"),
        (
            "data_sources: {a: {type: EventId}}\nprocessing_pipeline: {type: BatchProcessingPipeline, batch_size: yes}",
            "config.processing_pipeline.batch_size",
        ),
        (
            "data_sources: {a: {type: EventId}}\n"
            "processing_pipeline: [{type: HitVeto, conditions: [{field: a, min: yes}]}]",
            "config.processing_pipeline.0.conditions.0.min",
        ),
        (
            "data_sources: {a: {type: EventId}}\nprocessing_pipeline: [{type: Mask, field: a, edges: [yes, 1]}]",
            "config.processing_pipeline.0.edges",
        ),
    ],
)
def test_a_word_that_yaml_takes_for_true_is_no_number(text: str, field: str) -> None:
    assert "are no numbers" in violations(SOURCE + text)[field]


@pytest.mark.parametrize(("word", "required"), [("off", False), ("yes", True), ("false", False), ("true", True)])
def test_words_of_yaml_are_flags_where_flags_are_asked_for(word: str, required: bool) -> None:
    loaded = config.load(config.parse_text(f"{SOURCE}data_sources: {{a: {{type: EventId, required: {word}}}}}"))
    assert (loaded.optional == frozenset()) is required


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("data_sources: {a: {type: EventId}, a: {type: IntValue, value: 1}}", "line 2, column 36"),
        ("data_sources: {a: {type: IntValue, value: 1, value: 2}}", "'value'"),
        ('data_sources: {a: {type: EventId}}\n"max_events": 1\n"max_events": 2', "line 4, column 1"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(text: str, what: str) -> None:
    found = violations(SOURCE + text)["config"]
    assert "twice" in found
    assert what in found


def test_keys_that_are_merged_may_be_written_over() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}"
    assert config.parse_text(text)["more"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("300", "uint8"),
        ("-1", "uint16"),
        ("[1, 70000]", "uint16"),
        ("2.5", "int32"),
        ("1.0e+300", "float32"),
        ("70000", "float16"),
        ("18446744073709551616", "uint64"),
        ("16777217", "float32"),
    ],
)
def test_a_constant_that_its_element_type_does_not_hold_is_refused(value: str, dtype: str) -> None:
    text = f"{SOURCE}data_sources: {{a: {{type: ConstValue, value: {value}, dtype: {dtype}}}}}"
    assert "does not hold" in violations(text)["config.data_sources.a.dtype"]


@pytest.mark.parametrize(("value", "dtype"), [("255", "uint8"), ("0.1", "float32"), ("3.0", "int8"), ("1", "bool")])
def test_constants_that_are_held_are_taken(value: str, dtype: str) -> None:
    text = f"{SOURCE}data_sources: {{a: {{type: ConstValue, value: {value}, dtype: {dtype}}}}}"
    assert config.load(config.parse_text(text)).data_sources["a"].parameters.model_dump()["dtype"] == dtype


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([-1, 3], "uint16"),
        ([0, 70_000], "uint16"),
        ([200], "int8"),
        ([np.nan, 1.0], "int32"),
        ([np.inf], "int64"),
        ([2.0**63], "int64"),
        ([1e300], "float32"),
        ([-0.9, -1.1], "uint8"),
    ],
)
def test_what_an_element_type_does_not_hold_is_no_event(values: list[float], dtype: str) -> None:
    with pytest.raises(BeamwireError, match="image") as caught:
        converted(np.array(values), np.dtype(dtype), "image")
    assert caught.value.reason is Reason.PRODUCER_FAILED
    assert dtype in str(caught.value)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([0, 65535]), "uint16"),
        (np.array([-0.9, 254.9]), "uint8"),
        (np.array([np.nan, np.inf, 1e30]), "float32"),
        (np.array([], dtype=np.int64), "uint8"),
        (np.array(7.0), "int16"),
        (np.array([2**63 - 1024.0]), "int64"),
        (np.array([True, False]), "int8"),
        (np.array([3, 0]), "bool"),
        (np.array([2**64 - 1], dtype=np.uint64), "float64"),
    ],
)
def test_what_is_held_is_converted_as_numpy_does(values: Any, dtype: str) -> None:
    found = converted(values, np.dtype(dtype), "image")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values.astype(dtype))


def write(path: Path, **groups: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, (values, offsets) in groups.items():
            file[f"{name}/values"], file[f"{name}/row_offsets"] = values, offsets
        file["signed"] = np.array([5, -1], dtype=np.int32)
    return path


def test_a_row_that_its_element_type_does_not_hold_ends_the_run(tmp_path: Path) -> None:
    source = HDF5EventSource(HDF5EventSource.Parameters(), SourceContext(str(write(tmp_path / "a.h5"))))
    data = HDF5Dataset(HDF5Dataset.Parameters(path="signed", dtype="uint16"), source)
    events = source.events()
    found = data.read(next(events))
    assert found is not None
    assert found.item() == 5
    with pytest.raises(BeamwireError, match=r"signed.*uint16"):
        data.read(next(events))
    source.close()


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 5, 3, 8],
        [0, 3, 20],
        [-2, 3, 8],
        [[0, 1], [1, 2]],
        [0.0, 1.5, 8.0],
        np.zeros(0, dtype=np.int64),
    ],
)
def test_row_offsets_that_cannot_be_are_refused(tmp_path: Path, offsets: Any) -> None:
    path = write(tmp_path / "a.h5", rows=(np.arange(8.0), offsets))
    source = HDF5EventSource(HDF5EventSource.Parameters(), SourceContext(str(path)))
    with pytest.raises(BeamwireError, match="row_offsets") as caught:
        HDF5Dataset(HDF5Dataset.Parameters(path="rows"), source)
    assert [at.field for at in caught.value.violations] == ["path"]
    source.close()


def one(stage: Any, image: Any) -> Any:
    stage.fields([FieldSpec("image", image.dtype, image.shape)])
    (batch,) = stage.push(Batch(np.array([1], dtype=np.uint64), {"image": image[np.newaxis]}))
    return batch.arrays["image"][0]


@pytest.mark.parametrize("shape", [(512, 1024), (1, 4096)])
def test_the_mean_of_a_large_bank_is_exact(shape: tuple[int, int]) -> None:
    pytest.importorskip("numba")
    image = np.full(shape, 16000.3, dtype=np.float32)
    stage = CommonMode(CommonMode.Parameters(field="image", by=["bank"], method="mean"))
    assert np.abs(one(stage, image)).max() < 1e-2


@pytest.mark.parametrize("how", [None, {"by": ["row"], "min_pixels": 1}])
def test_a_bad_pixel_is_0_even_if_it_was_no_number(tmp_path: Path, how: Any) -> None:
    pytest.importorskip("numba")
    image = np.array([[np.nan, np.inf, 3.0, np.nan]], dtype=np.float32)
    np.save(tmp_path / "zero.npy", np.zeros(image.shape))
    np.save(tmp_path / "bad.npy", np.array([[1, 1, 0, 0]]))
    parameters = Calibrate.Parameters.model_validate(
        {
            "field": "image",
            "pedestal": str(tmp_path / "zero.npy"),
            "bad": str(tmp_path / "bad.npy"),
            "bad_as": "zero",
            "common_mode": how,
        }
    )
    found = one(Calibrate(parameters), image)
    assert found[0, :2].tolist() == [0, 0]
    assert np.isnan(found[0, 3])


def test_an_infinite_pixel_does_not_spoil_its_image() -> None:
    pytest.importorskip("numba")
    image = np.arange(16, dtype=np.float32).reshape(4, 4)
    image[0, 0] = np.inf
    parameters = PeaknetPreprocessing.Parameters(target_height=4, target_width=4, add_channel_dim=False, normalize=True)
    found = one(PeaknetPreprocessing(parameters), image)
    rest = np.arange(1, 16)
    np.testing.assert_allclose(found.ravel()[1:], (rest - rest.mean()) / rest.std(), rtol=1e-5)
    assert found[0, 0] == 0


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_a_number_of_psana_that_is_none_is_missing(kind: Any) -> None:
    assert as_array("gmd", kind("nan"), None) is None
    assert as_array("gmd", kind(2.0), np.dtype(np.int8)) == 2
    with pytest.raises(BeamwireError, match="gmd"):
        as_array("gmd", kind(200.0), np.dtype(np.int8))


def test_a_number_that_is_held() -> None:
    assert holds(np.dtype(np.int16), 20_000)
    assert holds(np.dtype(np.int8), 5.0)
    assert not holds(np.dtype(np.int16), 40_000)
    assert not holds(np.dtype(np.uint8), -1)


def test_data_files_without_leading_zeros_come_by_their_numbers(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a_master.h5", "w") as file:
        for number in range(1, 12):
            file[f"entry/data/data_{number}"] = np.full((1, 2, 2), number)
    source = DectrisEventSource(DectrisEventSource.Parameters(), SourceContext(str(tmp_path / "a_master.h5")))
    found = [source.dataset(event.data)[event.data.row].max() for event in source.events()]
    source.close()
    assert found == list(range(1, 12))
