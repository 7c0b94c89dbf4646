"""Which files a source identifier of psana2 names: the streams of each run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from beamwire.services.streamer.sources.psana2_streams import Patience, StreamFiles
from beamwire.services.streamer.sources.smalldata import invalid, not_found, resolve

SETTLE = 5
"""Looks at a directory that must see the same streams before a run that is being written is opened."""

_NAME = re.compile(r"(?P<stream>.*-r\d+-s\d+)-c(?P<chunk>\d+)(\.smd)?\.xtc2(\.inprogress)?")


def of_files(paths: Sequence[Path], patience: Patience | None) -> list[StreamFiles]:
    """The streams of one run that was named by its big files.

    Files whose names differ in the chunk only, `…-s000-c000.xtc2` and `…-s000-c001.xtc2`, are one stream. Raises
    BeamwireError DATASET_NOT_FOUND, or INVALID_FIELD if a file is named twice.
    """
    for path in paths:
        while patience and not resolve(path).exists():
            patience.wait(f"file {path}")
        if not resolve(path).is_file():
            raise not_found(f"there is no file {path}")
    if len({path.resolve() for path in paths}) < len(paths):
        raise invalid("files= names a file twice")
    ordered = sorted(paths, key=_place)
    return [StreamFiles(name, tuple(chunks)) for name, chunks in groupby(ordered, key=lambda path: _place(path)[0])]


def of_run(exp: str, run: int, directory: Path, patience: Patience | None) -> list[StreamFiles]:
    """The streams of a run by its number, each with small data.

    Raises BeamwireError DATASET_NOT_FOUND if there are none, or one has no big file.
    """
    small = _small_files(exp, run, directory)
    same = 0
    while patience and same < SETTLE:
        patience.wait(f"small data of run {run} of {exp} in {directory}")
        before, small = small, _small_files(exp, run, directory)
        if small:
            patience.progress()
        same = same + 1 if small and small == before else 0
    if not small:
        raise not_found(f"there is no run {run} of {exp}: no {exp}-r{run:04d}-s*.smd.xtc2 in {directory / 'smalldata'}")
    return [_with_big(name, tuple(paths), directory, patience) for name, paths in small.items()]


def directory_of(exp: str, directory: Path | None) -> Path:
    """Where the runs of an experiment are. Raises BeamwireError DATASET_NOT_FOUND if there is no such directory."""
    found = directory or Path(os.environ.get("SIT_PSDM_DATA", "/reg/d/psdm"), exp[:3], exp, "xtc")
    if not found.is_dir():
        hint = "" if directory else f"; dir= says where the runs of {exp} are"
        raise not_found(f"there is no directory {found}{hint}")
    return found


def _place(path: Path) -> tuple[str, int]:
    match = _NAME.fullmatch(path.name)
    return (str(path.parent / match["stream"]), int(match["chunk"])) if match else (str(path), 0)


def _small_files(exp: str, run: int, directory: Path) -> dict[str, list[Path]]:
    """The small data by stream, without the `.inprogress` that it may have."""
    found = (directory / "smalldata").glob(f"{exp}-r{run:04d}-s*.smd.xtc2*")
    paths = {path.with_name(path.name.removesuffix(".inprogress")) for path in found if _NAME.fullmatch(path.name)}
    ordered = sorted(paths, key=_place)
    return {name: list(chunks) for name, chunks in groupby(ordered, key=lambda path: _place(path)[0])}


def _with_big(name: str, small: tuple[Path, ...], directory: Path, patience: Patience | None) -> StreamFiles:
    big = directory / small[0].name.replace(".smd.xtc2", ".xtc2")
    while patience and not resolve(big).exists():
        patience.wait(f"file {big}")
    if not resolve(big).is_file():
        raise not_found(f"there is small data, {small[0]}, but no {big}")
    return StreamFiles(name, small, big)
