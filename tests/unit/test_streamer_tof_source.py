"""The made-up spectrometer: what it claims about hits is in its waveforms, and depends on seed and event alone."""

from typing import Any

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError
from beamwire.services.streamer import config
from beamwire.services.streamer.components import Event, Share, SourceContext
from beamwire.services.streamer.sources.synthetic_tof import (
    BASELINE,
    SAMPLING_RATE_GHZ,
    Spectrometer,
    SyntheticTofEventSource,
    SyntheticTofFragments,
    SyntheticTofHits,
    SyntheticTofWaveforms,
    pulse,
)

EVENTS = 60


def source(context: SourceContext | None = None, **parameters: Any) -> SyntheticTofEventSource:
    return SyntheticTofEventSource(SyntheticTofEventSource.Parameters(**parameters), context or SourceContext())


def spectrometer(**parameters: Any) -> Spectrometer:
    return source(**parameters).spectrometer


def test_a_pulse_is_as_wide_as_it_says_and_rings() -> None:
    times = np.linspace(-10, 60, 700_001)
    shape = pulse(times, 0.25)
    assert shape.max() == pytest.approx(1, abs=1e-9)
    assert np.ptp(times[shape > 0.5]) == pytest.approx(3.3, abs=1e-3)
    assert float(pulse(np.zeros(1))[0]) == pytest.approx(0.5, abs=1e-12)
    assert shape[times > 6].max() == pytest.approx(0.1, abs=0.01)
    assert shape.min() == pytest.approx(-0.1, abs=0.01)
    assert np.abs(shape[(times < -8) | (times > 56)]).max() < 1e-3


def test_waveforms_are_pulses_on_noise() -> None:
    made = spectrometer(noise=2.0, seed=3)
    hits = made.hits(5)
    waveforms = made.waveforms(5).astype(np.float64)
    assert waveforms.shape == (16, 8192)
    expected = np.full(waveforms.shape, BASELINE)
    places = np.arange(8192)
    for when, height, channel in zip(hits.time, hits.amplitude, hits.channel, strict=True):
        expected[channel] += height * pulse(places - when, 0.25)
    rest = waveforms - expected
    assert rest.std() == pytest.approx(np.sqrt(4 + 1 / 12), rel=0.01)
    assert np.abs(rest).max() < 2.0 * 6 + 1


@pytest.mark.parametrize("pile_up", [False, True])
def test_fragments_are_parts_of_the_waveforms_and_hold_every_pulse(pile_up: bool) -> None:
    made = spectrometer(pile_up=pile_up, hits_per_channel=20.0 if pile_up else 1.8)
    for event in range(EVENTS):
        waveforms, parts, hits = made.waveforms(event), made.fragments(event), made.hits(event)
        begin = 0
        held = np.zeros(waveforms.shape, dtype=np.bool_)
        for start, length, channel in zip(parts.starts, parts.lengths, parts.channels, strict=True):
            assert np.array_equal(parts.samples[begin : begin + length], waveforms[channel, start : start + length])
            assert not held[channel, start : start + length].any()
            held[channel, start : start + length] = True
            begin += length
        assert begin == len(parts.samples)
        assert (np.diff(parts.channels.astype(np.int64) * 8192 + parts.starts) > 0).all()
        for steps in (-6, 0, 6):
            assert held[hits.channel, np.rint(hits.time).astype(np.int64) + steps].all()
        # What is left out is quiet: the threshold and seven times the noise.
        assert (waveforms[~held] < BASELINE + 25 + 7 * 3).all()


def test_sizes_are_those_of_the_instrument() -> None:
    made = spectrometer()
    parts = [made.fragments(event) for event in range(EVENTS)]
    assert made.waveforms(0).nbytes == 262_144
    suppressed = sum(part.samples.nbytes for part in parts) / EVENTS
    assert 1500 < suppressed < 2100
    lengths = np.concatenate([part.lengths for part in parts])
    assert 20 <= np.percentile(lengths, 5) <= np.percentile(lengths, 75) <= 36


def test_hits_are_in_order_and_apart_unless_they_may_pile_up() -> None:
    for pile_up in (False, True):
        made = spectrometer(pile_up=pile_up, hits_per_channel=30.0)
        gaps = []
        for event in range(EVENTS):
            hits = made.hits(event)
            assert hits.time.dtype == np.float64
            assert hits.amplitude.dtype == np.float32
            assert hits.channel.dtype == np.uint16
            assert hits.time.min() >= 64
            assert hits.time.max() <= 8192 - 64
            gaps.append(np.diff(hits.channel * 1e6 + hits.time).min())
        assert min(gaps) > 0
        assert (min(gaps) < 64) == pile_up


def test_content_depends_on_seed_and_event_alone() -> None:
    first, again, other = spectrometer(seed=1), spectrometer(seed=1), spectrometer(seed=2)
    first.fragments(8)
    assert np.array_equal(first.waveforms(7), again.waveforms(7))
    assert np.array_equal(first.fragments(7).samples, again.fragments(7).samples)
    assert not np.array_equal(first.waveforms(7), first.waveforms(8))
    assert not np.array_equal(first.waveforms(7), other.waveforms(7))


def test_data_sources_give_the_columns() -> None:
    made = source(seed=4, channels=3, samples=2048)
    event = Event(11)
    hits, parts = made.spectrometer.hits(11), made.spectrometer.fragments(11)
    waveforms = SyntheticTofWaveforms(SyntheticTofWaveforms.Parameters(), made)
    assert np.array_equal(waveforms.read(event), made.spectrometer.waveforms(11))
    assert (waveforms.unit, waveforms.ragged) == ("ADU", False)
    for part in ("samples", "starts", "lengths", "channels"):
        column = SyntheticTofFragments(SyntheticTofFragments.Parameters(part=part), made)
        assert np.array_equal(column.read(event), getattr(parts, part))
        assert column.ragged
    for part, unit, values in (
        ("time", "ns", hits.time / SAMPLING_RATE_GHZ),
        ("amplitude", "ADU", hits.amplitude),
        ("channel", "", hits.channel),
    ):
        truth = SyntheticTofHits(SyntheticTofHits.Parameters.model_validate({"part": part}), made)
        assert np.array_equal(truth.read(event), values)
        assert truth.unit == unit


def test_no_hits_at_all() -> None:
    made = spectrometer(hits_per_channel=0.0, noise=0.0)
    parts = made.fragments(0)
    assert [len(column) for column in (parts.samples, parts.starts, parts.lengths, parts.channels)] == [0] * 4
    assert (made.waveforms(0) == BASELINE).all()


@pytest.mark.parametrize("size", [1, 2, 3, 70])
def test_the_shares_are_all_and_do_not_overlap(size: int) -> None:
    found: list[int] = []
    for rank in range(size):
        made = source(SourceContext(share=Share(rank, size), max_events=50), number_of_events=EVENTS)
        assert made.expected_event_count == 50
        found += [event.id for event in made.events()]
        made.close()
    assert sorted(found) == list(range(50))


def test_the_rate_is_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    context = SourceContext(share=Share(1, 2), pause=deadlines.append)
    made = source(context, number_of_events=6, events_per_second=2.0)
    assert [event.id for event in made.events()] == [1, 3, 5]
    assert deadlines == [100.5, 101.5, 102.5]


def test_its_data_needs_it() -> None:
    with pytest.raises(BeamwireError, match="SyntheticTofHits needs SyntheticTofEventSource"):
        config.load(
            {
                "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 1},
                "data_sources": {"truth": {"type": "SyntheticTofHits", "part": "time"}},
            }
        )
