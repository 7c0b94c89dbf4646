"""The search for hits, compiled: local maxima, the constant fraction on their rise, and the veto on ringing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from beamwire.services.streamer.components import Array
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.fragments import Fragments

_CLOSE = 1e-2
"""Newton's last step but one is as near as this, of the height between two samples; its last one much nearer."""


class Search(NamedTuple):
    """What to look for; `sign` is -1 for pulses that go down."""

    threshold: float
    fraction: float
    sign: float
    ringing_samples: float
    ringing_fraction: float


Hits = npt.NDArray[np.float64]
"""Room for hits: (4, size), rows of place (samples), slope (ADU per sample), height (ADU) and channel."""

Levels = npt.NDArray[np.float64]


def search_fragments(
    given: Fragments, levels: Levels, level_samples: int, search: Search, hits: Hits, nedges: npt.NDArray[np.int32]
) -> int:
    """Writes the hits into `hits` and their number in each event and channel into `nedges` (events, channels).

    `levels` (fragments,) are the baselines, NaN for the mean of the first `level_samples`. Gives how many hits there
    are, -1 if there is no room for them.
    """
    return _search(
        readonly(given.samples),
        readonly(given.starts),
        readonly(given.lengths),
        readonly(given.channels),
        readonly(given.rows),
        levels,
        level_samples,
        search,
        hits,
        nedges,
    )


def quiet_levels(waveforms: Array, given: Levels, level_samples: int, threshold: float) -> Levels:
    """The baselines of waveforms (events, channels, samples): (events, channels).

    Those that are `given` (channels,); where that is NaN, the mean of what is no farther than the threshold from the
    median of the first `level_samples`.
    """
    levels = np.empty(waveforms.shape[:2])
    _quiet_levels(readonly(waveforms[:, :, :level_samples]), given, threshold, levels)
    return levels


@njit(error_model="numpy")
def _bisected(a: float, b: float, c: float, level: float) -> float:
    """Where x (a + x (b + x c)) passes the level between 0, where it is below, and 1."""
    low, high = 0.0, 1.0
    for _ in range(40):
        x = (low + high) / 2
        if x * (a + x * (b + x * c)) < level:
            low = x
        else:
            high = x
    return (low + high) / 2


@njit(error_model="numpy")
def _crossing(y0: float, y1: float, y2: float, y3: float, level: float) -> tuple[float, float]:
    """Where the cubic through samples at -1, 0, 1, 2 passes a level between the middle two, 0 to 1, and its slope
    there."""
    # y1 + x (a + x (b + x c)) goes through all four.
    c = (y3 - y0) / 6 + (y1 - y2) / 2
    b = (y0 + y2) / 2 - y1
    a = y2 - y1 - b - c
    x = (level - y1) / (y2 - y1)
    slope = a
    error = 0.0
    for _ in range(3):
        error = y1 + x * (a + x * (b + x * c)) - level
        slope = a + x * (2 * b + x * 3 * c)
        x = min(max(x - error / slope, 0.0), 1.0)
    if not abs(error) < _CLOSE * (y2 - y1):
        x = _bisected(a, b, c, level - y1)
        slope = a + x * (2 * b + x * 3 * c)
    return x, slope


# One function, since numba counts references to each array that is passed on, which takes longer than the search.
@njit(error_model="numpy")
def _search(
    samples: Array,
    starts: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    channels: npt.NDArray[np.uint16],
    rows: npt.NDArray[np.int64],
    levels: Levels,
    level_samples: int,
    search: Search,
    hits: Hits,
    nedges: npt.NDArray[np.int32],
) -> int:
    nedges[:] = 0
    sign = search.sign
    count = 0
    begin = 0
    for event in range(len(rows) - 1):
        previous = last_start = -1
        # The highest pulse that may still ring.
        strong_place = strong = 0.0
        for fragment in range(rows[event], rows[event + 1]):
            channel = int(channels[fragment])
            end = begin + int(lengths[fragment])
            start = int(starts[fragment])
            shift = start - begin
            if channel != previous:
                strong_place = strong = 0.0
            if channel < previous or (channel == previous and start <= last_start):
                return -2
            previous, last_start = channel, start
            base = sign * levels[fragment]
            if np.isnan(base):
                last = min(begin + level_samples, end)
                total = 0.0
                for place in range(begin, last):
                    total += samples[place]
                base = sign * total / max(last - begin, 1)
            least = base + search.threshold
            earliest = begin
            for peak in range(begin + 1, end - 1):
                value = sign * samples[peak]
                if value <= least:
                    continue
                before, after = sign * samples[peak - 1], sign * samples[peak + 1]
                if before >= value or after > value:
                    continue
                rise, fall = value - before, value - after
                height = value - base + (rise - fall) ** 2 / (8 * (rise + fall))
                rings = peak + shift - strong_place <= search.ringing_samples
                if rings and height < search.ringing_fraction * strong:
                    continue
                level = base + search.fraction * height
                left = peak - 1
                while left >= earliest and sign * samples[left] >= level:
                    left -= 1
                if left < earliest:
                    continue
                earliest = peak
                if count == hits.shape[1]:
                    return -1
                y1, y2 = sign * samples[left], sign * samples[left + 1]
                # Where there are no four samples, the straight line.
                y0, y3 = 2 * y1 - y2, 2 * y2 - y1
                if left > begin and left + 2 < end:
                    y0, y3 = sign * samples[left - 1], sign * samples[left + 2]
                x, slope = _crossing(y0, y1, y2, y3, level)
                # Rounded as in a waveform, wherever in the batch the samples are.
                hits[0, count] = left + shift + x
                hits[1, count] = slope
                hits[2, count] = height
                hits[3, count] = channel
                count += 1
                nedges[event, channel] += 1
                if height >= strong or not rings:
                    strong_place, strong = float(peak + shift), height
            begin = end
    return count


@njit(error_model="numpy")
def _quiet_levels(waveforms: Array, given: Levels, threshold: float, levels: Levels) -> None:
    for event in range(waveforms.shape[0]):
        for channel in range(waveforms.shape[1]):
            levels[event, channel] = given[channel]
            if not np.isnan(given[channel]):
                continue
            median = np.median(waveforms[event, channel])
            total, used = 0.0, 0
            for value in waveforms[event, channel]:
                if abs(value - median) <= threshold:
                    total += value
                    used += 1
            levels[event, channel] = total / used if used else median
