"""Events from runs of the European XFEL: its trains, or the pulses that a detector saw in them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.services.streamer.components import Array, ComponentParameters, Event, SourceContext
from beamwire.services.streamer.named import Dataset, files_or_directory
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.sources.files import named_files, not_found
from beamwire.services.streamer.sources.hdf5_files import check_storage

PULSE_BITS = 12
"""The id of a pulse is the id of its train << 12 | its pulse id; that of a train is the train's id."""


@dataclass(frozen=True, slots=True)
class Shot:
    """What an event is: the position of its train in the run; of a pulse, which of the train's frames, and its id."""

    train: int
    frame: int | None = None
    pulse: int | None = None


class XfelEventSource:
    """Reads a run directory, or files of one; the id of an event is that of its train, or train << 12 | pulse.

    A pulse is a frame of a detector of several modules (AGIPD, DSSC, LPD: its pulse id; JUNGFRAU: its memory cell,
    counted from 0). Trains without a frame have no pulses.
    """

    class Parameters(ComponentParameters):
        """What an event is; and the detector whose frames are the pulses, if the run has several."""

        events: Literal["trains", "pulses"] = "trains"
        detector: str | None = None

    @staticmethod
    def datasets(parameters: XfelEventSource.Parameters, identifier: str) -> Iterator[Dataset]:
        """The files that the source identifier names."""
        del parameters
        return files_or_directory(identifier, "*.h5")

    def __init__(self, parameters: XfelEventSource.Parameters, context: SourceContext) -> None:
        self.context = context
        self.run: Any = _opened(_files(context.source_identifier))
        self.pulses = parameters.events == "pulses"
        self.train_ids: npt.NDArray[np.uint64] = np.asarray(self.run.train_ids, dtype=np.uint64)
        self._detectors: dict[str, Detector] = {}
        self._shots = self._find_pulses(parameters.detector) if self.pulses else None
        count = len(self.train_ids) if self._shots is None else len(self._shots)
        self.expected_event_count = context.limit(count)
        self.attributes: Mapping[str, str] = self._metadata()

    def events(self) -> Iterator[Event]:
        """Every `size`-th train or pulse from `rank` on, in order."""
        for index in self.context.share.of(self.expected_event_count):
            if self._shots is None:
                yield Event(int(self.train_ids[index]), Shot(index))
                continue
            train, frame, pulse = (int(number) for number in self._shots[index])
            yield Event(int(self.train_ids[train]) << PULSE_BITS | pulse, Shot(train, frame, pulse))

    def close(self) -> None:
        """Closes the files."""
        for file in self.run.files:
            file.close()

    def detector(self, name: str | None) -> Detector:
        """A detector of several modules, the only one if no name is given.

        Raises BeamwireError INVALID_FIELD naming "detector".
        """
        from extra_data.components import identify_multimod_detectors

        found = dict(identify_multimod_detectors(self.run))
        if name is None and len(found) == 1:
            name = next(iter(found))
        if name is None or name not in found:
            what = f"the run has no detector {name!r}; {nearest(name, found)}" if name else _which(found)
            raise _wrong("detector", what)
        if name not in self._detectors:
            with warnings.catch_warnings():
                # That raw data are given where there are no others is what we want.
                warnings.simplefilter("ignore")
                try:
                    self._detectors[name] = Detector(name, found[name](self.run, name), self.train_ids)
                except ValueError as error:
                    raise not_found(f"{name}: {error}") from None
        return self._detectors[name]

    def key(self, source: str, key: str) -> Any:
        """extra-data's KeyData of a source; raises BeamwireError INVALID_FIELD naming "source" or "key"."""
        if source not in self.run.all_sources:
            raise _wrong("source", f"the run has no source {source!r}; {_near(source, self.run.all_sources)}")
        known = self.run.keys_for_source(source)
        found = next((name for name in (key, f"{key}.value") if name in known), None)
        if found is None:
            raise _wrong("key", f"{source} has no {key!r}; {_near(key, known)}")
        return self.run[source, found]

    def _find_pulses(self, name: str | None) -> npt.NDArray[np.int64]:
        """Of each pulse the position of its train, its frame in that, and its pulse id: (pulses, 3)."""
        try:
            detector = self.detector(name)
        except BaseException as error:
            self.close()
            if isinstance(error, BeamwireError) and error.reason is Reason.INVALID_FIELD:
                raise _wrong("config.event_source.detector", error.violations[0].description) from None
            raise
        trains = np.repeat(np.arange(len(self.train_ids)), detector.frame_counts)
        ends = np.cumsum(detector.frame_counts)
        frames = np.arange(len(trains)) - np.repeat(ends - detector.frame_counts, detector.frame_counts)
        pulses = detector.pulse_ids() if detector.many_entries else frames
        if pulses.max(initial=0) >> PULSE_BITS or len(np.unique(trains << PULSE_BITS | pulses)) != len(trains):
            self.close()
            raise not_found(
                f"the pulse ids of {detector.name} do not tell its frames apart (they are not below "
                f"{1 << PULSE_BITS}, or two of a train are the same); take events: trains"
            )
        return np.stack([trains, frames, pulses], axis=1)

    def _metadata(self) -> dict[str, str]:
        found: Mapping[str, Any] = self.run.run_metadata()
        names = {"proposalNumber": "proposal", "runNumber": "run", "sample": "sample"}
        return {names[key]: str(value) for key, value in found.items() if key in names}


class TrainRows:
    """The entries of one key of a source, train by train."""

    def __init__(self, key: Any, train_ids: npt.NDArray[np.uint64]) -> None:
        self.dtype: np.dtype[Any] = key.dtype
        self.shape: tuple[int, ...] = tuple(key.entry_shape)
        self._path: str = key.hdf5_data_path
        self._files: Sequence[Any] = key.files
        self._open: tuple[int, Any] = (-1, None)
        self._file = np.full(len(train_ids), -1, dtype=np.int64)
        self._first = np.zeros(len(train_ids), dtype=np.int64)
        self.counts = np.zeros(len(train_ids), dtype=np.int64)
        _check_storage(key)
        for number, file in enumerate(self._files):
            firsts, counts = file.get_index(key.source, key.index_group)
            _, ours, theirs = np.intersect1d(train_ids, file.train_ids, return_indices=True)
            some = counts[theirs] > 0
            ours, theirs = ours[some], theirs[some]
            self._file[ours] = number
            self._first[ours] = firsts[theirs]
            self.counts[ours] = counts[theirs]

    def read(self, train: int) -> Array | None:
        """All entries of a train, (entries, …); None if there is none."""
        count = int(self.counts[train])
        return self._read(train, slice(int(self._first[train]), int(self._first[train]) + count)) if count else None

    def read_one(self, train: int, entry: int) -> Array | None:
        """One entry of a train; None if it has none."""
        return self._read(train, int(self._first[train]) + entry) if entry < self.counts[train] else None

    def _read(self, train: int, place: slice | int) -> Array:
        number = int(self._file[train])
        try:
            if self._open[0] != number:
                self._open = (number, self._files[number].file[self._path])
            return np.asarray(self._open[1][place])
        except OSError as error:
            raise BeamwireError(
                Reason.PRODUCER_FAILED, f"{self._path} of {self._files[number].filename} cannot be read: {error}"
            ) from error


class Detector:
    """A detector of several modules: its sources by module, and how many frames each train has."""

    def __init__(self, name: str, access: Any, train_ids: npt.NDArray[np.uint64]) -> None:
        self.name = name
        self._access = access
        first: int = access._modnos_start_at
        self.sources: Mapping[int, str] = {
            number - first: source for source, number in sorted(access.source_to_modno.items())
        }
        self.module_count = int(access.n_modules)
        self.main_key: str = access._main_data_key
        self.frames_per_entry = int(access._frames_per_entry)
        # AGIPD, DSSC and LPD have an entry for each frame, JUNGFRAU one for each train.
        self.many_entries = self.main_key.startswith("image.")
        self.frame_counts = np.zeros(len(train_ids), dtype=np.int64)
        _, ours, theirs = np.intersect1d(train_ids, access.frame_counts.index.values, return_indices=True)
        self.frame_counts[ours] = access.frame_counts.values[theirs] * self.frames_per_entry

    def pulse_ids(self) -> npt.NDArray[np.int64]:
        """The pulse ids of all frames, in order; raises BeamwireError DATASET_NOT_FOUND if the modules disagree."""
        for source in self.sources.values():
            if "image.pulseId" in self._access.data.keys_for_source(source):
                _check_storage(self._access.data[source, "image.pulseId"])
        try:
            found = self._access[self.main_key].pulse_id_coordinates()
        except Exception as error:
            raise not_found(f"{self.name}: {error}") from error
        return np.asarray(found, dtype=np.int64)


def _files(identifier: str) -> list[Path]:
    directory = Path(identifier)
    if not identifier or not directory.is_dir():
        return named_files(identifier)
    # An overview shows the data of the other files again.
    files = sorted(path for path in directory.glob("*.h5") if path.name.lower() != "overview.h5")
    if not files:
        raise not_found(f"{directory} has no .h5 file in it")
    return files


def _opened(files: Sequence[Path]) -> Any:
    try:
        from extra_data import DataCollection
        from extra_data.exceptions import FileStructureError
        from extra_data.file_access import FileAccess
    except ImportError:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            "config.event_source: XfelEventSource needs extra-data, which is not installed here: "
            "`pip install beamwire[xfel]`",
        ) from None
    for path in files:
        # extra-data would pass over a file that it cannot read.
        try:
            opened: Any = FileAccess(str(path)).file
        except (OSError, KeyError, ValueError, FileStructureError) as error:
            raise not_found(f"{path} cannot be read as a file of the European XFEL: {error}") from None
        for group in ("INDEX", "METADATA"):
            for name in opened.get(group, ()):
                if isinstance(found := opened[group].get(name), h5py.Dataset):
                    check_storage(found, "config.source_identifier")
    # Not as a run directory: that writes a cache into it.
    return DataCollection.from_paths([str(path) for path in files], is_single_run=True, parallelize=False)


def _check_storage(key: Any) -> None:
    for file in key.files:
        check_storage(file.file[key.hdf5_data_path], "key")


def _wrong(field: str, description: str) -> BeamwireError:
    return BeamwireError(
        Reason.INVALID_FIELD, f"{field}: {description}", violations=[FieldViolation(field, description)]
    )


def _which(found: Mapping[str, Any]) -> str:
    return f"say which of {', '.join(sorted(found))}" if found else "the run has no detector of several modules"


def _near(name: str, known: Sequence[str]) -> str:
    hint = nearest(name, known)
    listed = sorted(known)
    more = f" and {len(listed) - 30} more" if len(listed) > 30 else ""
    return hint if hint.startswith("did") else f"it has {', '.join(listed[:30])}{more}"
