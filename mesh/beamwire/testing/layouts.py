"""Small files in the layouts that facilities and detectors write: CXI of LCLS, DECTRIS master files, European XFEL."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

CXI_SHAPE = (4, 6)
DECTRIS_SHAPE = (67, 130)
DECTRIS_TRIGGERS = DECTRIS_IMAGES = 3
DECTRIS_FRAMES = DECTRIS_TRIGGERS * DECTRIS_IMAGES
FRAMES_PER_FILE = 4
XFEL_TRAINS, XFEL_FIRST_TRAIN = 6, 10_000
XFEL_DETECTOR = "SPB_DET_AGIPD1M-1"
XFEL_XGM = "SPB_XTD9_XGM/DOOCS/MAIN"


def cxi_image(number: int) -> npt.NDArray[np.uint16]:
    """The image of an event, counted over all files."""
    return np.random.default_rng(number).integers(0, 60_000, CXI_SHAPE, np.uint16)


def write_cxi(directory: Path, lengths: Iterable[int]) -> None:
    """`r0017_0.cxi` and so on, with so many events, as Cheetah writes them at LCLS."""
    first = 0
    for place, length in enumerate(lengths):
        numbers = np.arange(first, first + length)
        with h5py.File(directory / f"r0017_{place}.cxi", "w") as file:
            file["cxi_version"] = 140
            file["entry_1/data_1/data"] = np.stack([cxi_image(int(number)) for number in numbers])
            file["entry_1/instrument_1/detector_1/data"] = h5py.SoftLink("/entry_1/data_1/data")
            file["LCLS/machineTime"] = (1_400_000_000 + numbers // 2).astype(np.int32)
            file["LCLS/machineTimeNanoSeconds"] = (numbers * 8_333_333 % 1_000_000_000).astype(np.int32)
            file["LCLS/fiducial"] = (numbers * 3 + 6).astype(np.int32)
            file["LCLS/photon_energy_eV"] = 9000.0 + numbers
            file["LCLS/photon_energy_eV"].attrs["units"] = "eV"
            file["LCLS/eventTimeString"] = np.array([f"Tue {number}" for number in numbers], dtype="S26")
            file["entry_1/result_1/nPeaks"] = numbers % 4
            file["entry_1/result_1/peakXPosRaw"] = numbers[:, np.newaxis] + np.arange(4.0)
        first += length


def dectris_pixels(number: int, dtype: str = "uint32") -> npt.NDArray[Any]:
    """The pixels of a frame; some are saturated."""
    found = np.random.default_rng([7, number]).poisson(2.0, DECTRIS_SHAPE).astype(dtype)
    found[number % DECTRIS_SHAPE[0], :5] = np.iinfo(dtype).max
    return found


def write_dectris(
    directory: Path, name: str = "lyso_1", *, first: int = 0, dtype: str = "uint32", **filters: Any
) -> Path:
    """A master file and its data files, as the FileWriter of an Eiger makes them; returns the master file's path.

    `filters` are those of h5py; bitshuffle with LZ4 by default.
    """
    import hdf5plugin

    filters = filters or dict(hdf5plugin.Bitshuffle(nelems=0, cname="lz4"))
    master = directory / f"{name}_master.h5"
    with h5py.File(master, "w") as file:
        data = file.create_group("entry/data")
        data.attrs["NX_class"] = "NXdata"
        for number, start in enumerate(range(0, DECTRIS_FRAMES, FRAMES_PER_FILE), 1):
            end = min(start + FRAMES_PER_FILE, DECTRIS_FRAMES)
            part = directory / f"{name}_data_{number:06d}.h5"
            with h5py.File(part, "w") as other:
                stack = np.stack([dectris_pixels(first + frame, dtype) for frame in range(start, end)])
                frames = other.create_dataset("entry/data/data", data=stack, chunks=(1, *DECTRIS_SHAPE), **filters)
                frames.attrs["image_nr_low"] = start + 1
                frames.attrs["image_nr_high"] = end
            data[f"data_{number:06d}"] = h5py.ExternalLink(part.name, "/entry/data/data")
        _describe(file)
    return master


def write_xfel(
    directory: Path, frames: int | npt.NDArray[Any], *, raw: bool = False, modules: Iterable[int] = range(16)
) -> None:
    """A run of an AGIPD with small modules and of a gas monitor, written by extra-data's own writers.

    `frames` is how many each train has. As in real runs the pulse ids are not counted one by one.
    """
    from extra_data.tests.mockdata import write_file
    from extra_data.tests.mockdata.detectors import AGIPDModule

    # extra-data has no types.
    base: Any = AGIPDModule

    class SmallModule(base):  # type: ignore[misc]
        image_dims = (2, 16, 8)

    for number in modules:
        path = directory / f"{'RAW' if raw else 'CORR'}-R0238-AGIPD{number:02}-S00000.h5"
        name = f"{XFEL_DETECTOR}/DET/{number}CH0"
        device = SmallModule(name, raw=raw, frames_per_train=frames)
        write_file(path, [device], ntrains=XFEL_TRAINS, chunksize=2, format_version="1.0")
        fill_at_random(path, f"INSTRUMENT/{name}:xtdf/image/data", number)
        with h5py.File(path, "r+") as file:
            for key in ("pulseId", "cellId"):
                ids: Any = file[f"INSTRUMENT/{name}:xtdf/image/{key}"]
                ids[:] = ids[:] * 4 + 8


def write_xfel_monitor(directory: Path) -> None:
    """The gas monitor of the same run: slow values, and an array for each train."""
    from extra_data.tests.mockdata import write_file
    from extra_data.tests.mockdata.xgm import XGM

    path = directory / "RAW-R0238-DA01-S00000.h5"
    write_file(path, [XGM(XFEL_XGM)], ntrains=XFEL_TRAINS, chunksize=2, format_version="1.0")
    fill_at_random(path, f"CONTROL/{XFEL_XGM}/beamPosition/ixPos/value", 90)
    fill_at_random(path, f"INSTRUMENT/{XFEL_XGM}:output/data/intensityTD", 91)
    with h5py.File(path, "r+") as file:
        group = file[f"CONTROL/{XFEL_XGM}/beamPosition/ixPos"]
        group.attrs["metricPrefixSymbol"] = "m"
        group.attrs["unitSymbol"] = "m"


def fill_at_random(path: Path, dataset: str, seed: int) -> None:
    """Random numbers for all elements of a dataset."""
    with h5py.File(path, "r+") as file:
        data: Any = file[dataset]
        random = np.random.default_rng(seed)
        data[:] = random.normal(size=data.shape) if data.dtype.kind == "f" else random.integers(0, 200, data.shape)


def _describe(file: h5py.File) -> None:
    detector = file.create_group("entry/instrument/detector")
    detector["beam_center_x"] = np.float32(64.5)
    detector["beam_center_x"].attrs["units"] = "pixel"
    detector["beam_center_y"] = np.float32(33.5)
    detector["beam_center_y"].attrs["units"] = "pixel"
    detector["detector_distance"] = np.float32(0.12)
    detector["detector_distance"].attrs["units"] = b"m"
    detector["description"] = np.bytes_("Dectris EIGER 1M")
    detector["detector_number"] = "E-02-0107"
    detector["detectorSpecific/nimages"] = np.uint32(DECTRIS_IMAGES)
    detector["detectorSpecific/ntrigger"] = np.uint32(DECTRIS_TRIGGERS)
    mask = np.zeros(DECTRIS_SHAPE, np.uint32)
    mask[:, 60:64] = 1
    detector["detectorSpecific/pixel_mask"] = mask
    file["entry/instrument/beam/incident_wavelength"] = np.float32(1.03)
    file["entry/instrument/beam/incident_wavelength"].attrs["units"] = "angstrom"
    file["entry/sample/goniometer/omega"] = np.arange(DECTRIS_FRAMES) * 0.1
