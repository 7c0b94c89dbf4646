"""psana2 on real xtc2 that was written here: bit-exact, every event once, what is missing is noticed."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer import check, config
from beamwire.services.streamer.components import Share
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.pipeline import Account, Pipeline
from beamwire.services.streamer.sources import psana2_run
from beamwire.services.streamer.sources.psana2_data import Psana2DetectorInterface, Psana2RunInfo, Psana2Timestamp
from beamwire.services.streamer.stopping import Stop
from beamwire.testing import xtc2
from beamwire.testing.xtc2 import XtcRun
from tests.unit.psana2play import OpenPsana2, detector

pytestmark = pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is there")

EVENTS = 40
MISSING = {"jungfrau": {3, 11}, "gmd": {3, 5}, "epixq": {7, 11}}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> XtcRun:
    return xtc2.write_run(tmp_path_factory.mktemp("complete"), exp="tstx00417", run=12, events=EVENTS)


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> XtcRun:
    """Two streams; event 3 is missing in the first and 7 in the second, event 11 in both."""
    return xtc2.write_run(
        tmp_path_factory.mktemp("gaps"),
        events=EVENTS,
        detectors=("jungfrau", "epixq"),
        scalars=("gmd", "xgmd"),
        missing=MISSING,
    )


@pytest.mark.parametrize("by", ["source_identifier", "file_identifier"])
def test_every_event_is_bit_exact(complete: XtcRun, open_psana2: OpenPsana2, by: str) -> None:
    source = open_psana2(getattr(complete, by))
    assert source.expected_event_count == EVENTS
    assert source.attributes == {"exp": "tstx00417", "run": "12"}
    image = detector(source, "jungfrau", "raw.raw")
    energy = detector(source, "gmd", ["raw.energy"])
    timestamp = Psana2Timestamp(Psana2Timestamp.Parameters(), source)
    count = 0
    for number, event in enumerate(source.events()):
        values = image.read(event)
        assert values is not None
        assert values.dtype == np.uint16
        assert np.array_equal(values, complete.image(number))
        assert energy.read(event) == complete.scalar(number)
        stamp = timestamp.read(event)
        assert stamp.dtype == np.uint64
        assert int(stamp) == event.id == complete.timestamp(number)
        assert int(np.float64(stamp)) != complete.timestamp(number), "a float64 would have lost nothing"
        count += 1
    assert count == EVENTS


@pytest.mark.parametrize("by", ["source_identifier", "file_identifier"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("max_events", [0, 17])
def test_the_shares_are_all_and_do_not_overlap(
    complete: XtcRun, open_psana2: OpenPsana2, by: str, size: int, max_events: int
) -> None:
    found: list[int] = []
    for rank in range(size):
        source = open_psana2(getattr(complete, by), Share(rank, size), max_events)
        assert source.expected_event_count == (max_events or EVENTS)
        image = detector(source, "jungfrau", "raw.raw")
        for event in source.events():
            number = next(number for number in range(EVENTS) if complete.timestamp(number) == event.id)
            assert np.array_equal(image.read(event), complete.image(number))  # type: ignore[arg-type]
            found.append(number)
    assert sorted(found) == list(range(max_events or EVENTS))


@pytest.mark.parametrize("by", ["source_identifier", "file_identifier"])
def test_a_rank_without_a_share_has_no_events(complete: XtcRun, open_psana2: OpenPsana2, by: str) -> None:
    source = open_psana2(getattr(complete, by), Share(1, 2), 1)
    assert source.expected_event_count == 1
    assert list(source.events()) == []


def test_max_events_of_the_identifier(complete: XtcRun, open_psana2: OpenPsana2) -> None:
    source = open_psana2(f"{complete.source_identifier},max_events=9", max_events=20)
    assert len(list(source.events())) == source.expected_event_count == 9


def test_what_is_missing_is_none(gaps: XtcRun, open_psana2: OpenPsana2) -> None:
    names = ("jungfrau", "epixq", "gmd")
    seen: set[int] = set()
    for rank in range(2):
        source = open_psana2(gaps.source_identifier, Share(rank, 2))
        fields = {name: detector(source, name, "raw.energy" if name == "gmd" else "raw.raw") for name in names}
        for event in source.events():
            number = next(number for number in range(EVENTS) if gaps.timestamp(number) == event.id)
            seen.add(number)
            for name in names:
                values = fields[name].read(event)
                assert (values is not None) == gaps.has(name, number), (name, number)
                if values is not None and name != "gmd":
                    assert np.array_equal(values, gaps.image(number, name))
    assert seen == set(range(EVENTS))


def test_several_fields_are_stacked_and_converted(gaps: XtcRun, open_psana2: OpenPsana2) -> None:
    source = open_psana2(gaps.source_identifier)
    both = detector(source, "gmd", ["raw.energy", "raw.energy"], dtype="float32")
    words = detector(source, "jungfrau", "_dettype", dtype="str")
    event = next(source.events())
    values = both.read(event)
    assert values is not None
    assert values.dtype == np.float32
    assert values.tolist() == [gaps.scalar(0)] * 2
    assert str(words.read(event)) == "jungfrau"


def test_run_info(complete: XtcRun, open_psana2: OpenPsana2) -> None:
    source = open_psana2(complete.source_identifier)
    info = Psana2RunInfo(Psana2RunInfo.Parameters(), source).read(next(source.events())).tolist()
    assert info[0] == "tstx00417"
    assert info[2:] == ["12", complete.source_identifier]


@pytest.mark.parametrize(
    ("name", "fields", "field", "words"),
    [
        ("jungfau", "raw.raw", "psana_name", "did you mean jungfrau? it has: gmd, jungfrau"),
        ("NIX:PV", None, "psana_name", "it has: gmd, jungfrau"),
        ("jungfrau", "raw.rwa", "psana_fields", "there is no 'rwa'; it has: calib"),
        ("jungfrau", "raw.calib", "psana_fields", "needs calibration constants and there are none"),
    ],
)
def test_a_detector_that_is_not_there(
    complete: XtcRun, open_psana2: OpenPsana2, name: str, fields: str | None, field: str, words: str
) -> None:
    source = open_psana2(complete.source_identifier)
    with pytest.raises(BeamwireError) as caught:
        detector(source, name, fields)
    assert [at.field for at in caught.value.violations] == [field]
    assert words in str(caught.value)


def test_psana_fields_are_required_for_a_detector() -> None:
    with pytest.raises(ValueError, match="psana_fields is required"):
        Psana2DetectorInterface.Parameters(psana_name="jungfrau")


@pytest.mark.parametrize(
    ("identifier", "reason", "words"),
    [
        ("exp=tstx00417,run=9,dir={directory}", Reason.DATASET_NOT_FOUND, "no run 9 of tstx00417"),
        ("exp=tstx00417,run=12,dir=/nowhere/at/all", Reason.DATASET_NOT_FOUND, "no directory /nowhere/at/all"),
        ("files=/nowhere/at/all.xtc2", Reason.DATASET_NOT_FOUND, "no file /nowhere/at/all.xtc2"),
        ("exp=tstx00417,rnu=9", Reason.INVALID_FIELD, "did you mean run?"),
        ("exp=tstx00417", Reason.INVALID_FIELD, "needs run="),
        ("", Reason.INVALID_FIELD, "either exp= and run=, or files="),
        ("exp=a,run=1,files=b", Reason.INVALID_FIELD, "either exp= and run=, or files="),
        ("exp=a,run=one", Reason.INVALID_FIELD, "runs are written 3, 1-3 or 1,2"),
        ("exp=a,run=3-1", Reason.INVALID_FIELD, "runs are written 3, 1-3 or 1,2"),
        ("exp=a,run=1,1-2", Reason.INVALID_FIELD, "names a run twice"),
        ("exp=a,run=1,run=2", Reason.INVALID_FIELD, "run= is there twice"),
        ("exp=a,b,run=1", Reason.INVALID_FIELD, "'b' is no key=value"),
        ("exp=a,run=1-2,live=True", Reason.INVALID_FIELD, "live=True follows one run"),
        ("exp=a,run=1,live=perhaps", Reason.INVALID_FIELD, "valid boolean"),
        ("exp=tstx00417,run=12-13,dir={directory}", Reason.DATASET_NOT_FOUND, "no run 13 of tstx00417"),
        ("files={big},{big}", Reason.INVALID_FIELD, "names a file twice"),
        ("files={big},/nowhere.xtc2", Reason.DATASET_NOT_FOUND, "no file /nowhere.xtc2"),
        ("files={text}", Reason.DATASET_NOT_FOUND, "ends in the middle of a datagram"),
        ("shmem=tmo", Reason.UNSUPPORTED, "shared memory"),
        ("drp=True", Reason.UNSUPPORTED, "the DAQ's own processes"),
    ],
)
def test_identifiers_that_name_nothing(
    complete: XtcRun, open_psana2: OpenPsana2, tmp_path: Path, identifier: str, reason: Reason, words: str
) -> None:
    (tmp_path / "text").write_text("This is not xtc2, and long enough for a header.")
    with pytest.raises(BeamwireError) as caught:
        open_psana2(identifier.format(directory=complete.directory, big=complete.files[0], text=tmp_path / "text"))
    assert caught.value.reason is reason
    assert words in str(caught.value)
    assert str(caught.value).startswith("config.source_identifier: ")


def test_big_data_that_was_cut_is_noticed(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    run = xtc2.write_run(tmp_path, events=10)
    big = run.files[0]
    big.write_bytes(big.read_bytes()[: big.stat().st_size // 2])
    source = open_psana2(run.source_identifier)
    with pytest.raises(BeamwireError, match="does not hold the event at timestamp") as caught:
        list(source.events())
    assert caught.value.reason is Reason.PRODUCER_FAILED
    with pytest.raises(BeamwireError, match="ends in the middle of a datagram"):
        open_psana2(run.file_identifier)


def test_small_data_of_another_run_is_noticed(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    run = xtc2.write_run(tmp_path / "one", events=10)
    other = xtc2.write_run(tmp_path / "two", events=10, first=500)
    shutil.copy(other.files[0], run.files[0])
    source = open_psana2(run.source_identifier)
    with pytest.raises(BeamwireError, match=f"event at timestamp {run.timestamp(0)}: another is in its place"):
        list(source.events())
    run.files[0].write_bytes(np.random.default_rng(1).bytes(other.files[0].stat().st_size))
    source = open_psana2(run.source_identifier)
    with pytest.raises(BeamwireError, match="another is in its place"):
        list(source.events())


def test_a_run_without_its_big_file_is_refused(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    run = xtc2.write_run(tmp_path, events=3)
    run.files[0].unlink()
    with pytest.raises(BeamwireError, match="there is small data") as caught:
        open_psana2(run.source_identifier)
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_the_stand_in_for_kerberos_refuses_to_be_used() -> None:
    stand_in = psana2_run.KerberosStandIn("kerberos")
    with pytest.raises(BeamwireError, match=r"kerberos\.authGSSClientInit"):
        stand_in.authGSSClientInit("x")
    assert not hasattr(stand_in, "__path__")


def document(run: XtcRun, directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "source_identifier": run.source_identifier,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {
            "timestamp": {"type": "Psana2Timestamp"},
            "image": {"type": "Psana2DetectorInterface", "psana_name": "jungfrau", "psana_fields": "raw.raw"},
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 8},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(directory)}],
        **more,
    }


def stream(data: dict[str, Any]) -> Account:
    return Pipeline(config.load(data), Alone(), Stop(), lambda: pytest.fail("no credentials are needed")).run()


def test_incomplete_events_of_a_run_are_counted(gaps: XtcRun, tmp_path: Path) -> None:
    account = stream(document(gaps, tmp_path, skip_incomplete_events=True))
    assert account == Account(expected=EVENTS, read=EVENTS, sent=EVENTS - 2, incomplete=2)
    with pytest.raises(BeamwireError, match=f"event {gaps.timestamp(3)} has no image"):
        stream(document(gaps, tmp_path / "more"))


def test_check_tells_what_would_come(complete: XtcRun, gaps: XtcRun, tmp_path: Path) -> None:
    found = check.check(document(complete, tmp_path))
    wanted = {
        "ok": True,
        "fields": [
            {"name": "timestamp", "dtype": "<u8", "shape": [], "unit": ""},
            {"name": "image", "dtype": "<u2", "shape": [32, 64], "unit": ""},
        ],
        "expected_event_count": EVENTS,
        "event_bytes": 32 * 64 * 2 + 8,
    }
    assert {key: found[key] for key in wanted} == wanted
    data = document(gaps, tmp_path, max_events=17)
    data["data_sources"]["image"]["psana_name"] = "jungfrua"
    data["data_sources"]["energy"] = {"type": "Psana2DetectorInterface", "psana_name": "gm", "psana_fields": "raw.x"}
    with pytest.raises(BeamwireError) as caught:
        check.check(data)
    refusal = check.refusal(caught.value)
    assert refusal["reason"] == "INVALID_FIELD"
    assert [at["field"] for at in refusal["violations"]] == [
        "config.data_sources.image.psana_name",
        "config.data_sources.energy.psana_name",
    ]
    assert "epixq, gmd, jungfrau, xgmd" in refusal["violations"][0]["description"]
