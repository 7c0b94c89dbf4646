"""How output files are named, kept apart while they are incomplete, and never overwritten unasked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from beamwire.mesh.errors import invalid_field

PART = ".part"


@dataclass(frozen=True, slots=True)
class Target:
    """Where one consumer of a stream writes: `<directory>/<prefix><stem>…`."""

    directory: Path
    prefix: str
    stem: str
    suffix: str = "h5"
    consumer: int = 0
    consumer_count: int = 1

    @property
    def whole(self) -> Path:
        """The file that holds all the events of this consumer."""
        number = f"-c{self.consumer}" if self.consumer_count > 1 else ""
        return self.directory / f"{self.prefix}{self.stem}{number}.{self.suffix}"

    def frame(self, producer: int, sequence: int, suffix: str) -> Path:
        """The file that holds one frame."""
        return self.directory / f"{self.prefix}{self.stem}-p{producer}-{sequence}.{suffix}"

    def refuse_overwriting(self) -> None:
        """Raise BeamwireError INVALID_FIELD if a file of this name, finished or not, is there already."""
        stem = f"{self.prefix}{self.stem}"
        known = [self.whole, part_of(self.whole)]
        if self.directory.is_dir():
            known += [path for path in self.directory.iterdir() if path.name.startswith(f"{stem}-p")]
        for path in known:
            if path.exists():
                raise invalid_field("output", f"{path} exists; move it away, or use --overwrite")


def part_of(path: Path) -> Path:
    """Return the name a file has until it is complete."""
    return path.with_name(path.name + PART)
