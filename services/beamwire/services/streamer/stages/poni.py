"""Where the pixels of a flat detector are: the geometry of pyFAI, given by numbers or in a .poni file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import invalid_field

PARAMETER = "poni"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Lengths in m, angles in radian, pairs are (slow axis, fast axis).

    `poni` is the point of the detector that is nearest to the sample, from the outer corner of the first pixel; the
    detector is turned about the sample by `rotations`.
    """

    distance: float
    pixel: tuple[float, float]
    poni: tuple[float, float]
    rotations: tuple[float, float, float] = (0.0, 0.0, 0.0)
    wavelength: float | None = None

    @classmethod
    def read(cls, path: str, pixel_size: float | None = None) -> Geometry:
        """The geometry in a .poni file, version 1 to 2.1; `pixel_size` (um) takes the place of that of the file.

        Raises BeamwireError INVALID_FIELD naming `poni` if there is no such file, or it lacks something.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise invalid_field(PARAMETER, f"{path} cannot be read: {error}") from None
        pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))
        # Calibrations are appended: the last one counts.
        found = {key.strip().lower(): value.strip() for key, value in pairs}
        try:
            config = json.loads(found.get("detector_config") or "{}")
            return cls(
                float(found["distance"]),
                (pixel_size / 1e6, pixel_size / 1e6) if pixel_size else _pixel(path, found, config),
                (float(found["poni1"]), float(found["poni2"])),
                (float(found.get("rot1", 0)), float(found.get("rot2", 0)), float(found.get("rot3", 0))),
                float(found["wavelength"]) if found.get("wavelength", "None") != "None" else None,
            )
        except KeyError as error:
            raise invalid_field(PARAMETER, f"{path} has no {error}") from None
        except ValueError as error:
            raise invalid_field(PARAMETER, f"{path} is no .poni file: {error}") from None

    def positions(self, shape: tuple[int, int], *, corners: bool = False) -> npt.NDArray[np.float64]:
        """Where the centres of the pixels, or their corners, are: (3, ss, fs) or (3, ss + 1, fs + 1), m.

        The axes are those of the slow and the fast axis of the detector before it is turned, and the beam.
        """
        shift = 0.0 if corners else 0.5
        slow = (np.arange(shape[0] + corners) + shift) * self.pixel[0] - self.poni[0]
        fast = (np.arange(shape[1] + corners) + shift) * self.pixel[1] - self.poni[1]
        turn = self._turn()
        return np.stack([row[0] * slow[:, np.newaxis] + row[1] * fast + row[2] * self.distance for row in turn])

    def _turn(self) -> npt.NDArray[np.float64]:
        """Rotations about the first axis, the second, and the beam, in this order; the first two are left-handed."""
        (c1, c2, c3), (s1, s2, s3) = np.cos(self.rotations), np.sin(self.rotations)
        first = np.array([[1, 0, 0], [0, c1, s1], [0, -s1, c1]])
        second = np.array([[c2, 0, -s2], [0, 1, 0], [s2, 0, c2]])
        third = np.array([[c3, -s3, 0], [s3, c3, 0], [0, 0, 1]])
        turn: npt.NDArray[np.float64] = third @ second @ first
        return turn


def _pixel(path: str, found: Mapping[str, str], config: Mapping[str, float]) -> tuple[float, float]:
    if config.get("orientation", 3) not in (0, 3):
        raise invalid_field(PARAMETER, f"{path} has orientation {config['orientation']}; turn the image, or use 3")
    if "pixel1" in config:
        return config["pixel1"], config["pixel2"]
    if "pixelsize1" in found:
        return float(found["pixelsize1"]), float(found["pixelsize2"])
    raise invalid_field(
        PARAMETER, f"{path} names the detector {found.get('detector')} and no pixel size; give pixel_size too"
    )
