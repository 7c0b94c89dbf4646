"""Which files a source identifier names: paths and patterns, joined by commas."""

from __future__ import annotations

from glob import has_magic
from pathlib import Path

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason

FIELD = "config.source_identifier"


def not_found(description: str) -> BeamwireError:
    """A DATASET_NOT_FOUND error about the source identifier."""
    return BeamwireError(
        Reason.DATASET_NOT_FOUND, f"{FIELD}: {description}", violations=[FieldViolation(FIELD, description)]
    )


def named_files(identifier: str) -> list[Path]:
    """The files in the order in which they are named, those of a pattern by their names, each once.

    Raises BeamwireError DATASET_NOT_FOUND for a name that no file has, or a pattern that fits none.
    """
    if not identifier.strip():
        raise not_found("names no file")
    # A path may have a comma in it, or a bracket.
    parts = [identifier] if Path(identifier).is_file() else [part.strip() for part in identifier.split(",")]
    files: dict[Path, Path] = {}
    for part in filter(None, parts):
        for path in _matches(part):
            files.setdefault(path.resolve(), path)
    return list(files.values())


def _matches(part: str) -> list[Path]:
    path = Path(part)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise not_found(f"{path} is a directory; name the files in it, as in {path}/*")
    if not has_magic(part):
        raise not_found(f"there is no file {path}")
    found = fitting(part)
    if not found:
        raise not_found(f"no file fits {part}")
    return found


def fitting(pattern: str) -> list[Path]:
    """The files that fit a pattern, by their names; those that begin with a dot are hidden."""
    path = Path(pattern)
    root = Path(path.anchor)
    found = root.glob(str(path.relative_to(root)))
    return sorted(path for path in found if path.is_file() and path.name[0] != ".")
