"""What several unit tests of the streamer ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.psana2play import OpenPsana2, opening

Saved = Callable[[Any], str]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Saves an array and says where."""

    def save(values: Any) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
        np.save(path, values)
        return str(path)

    return save


@pytest.fixture
def open_psana2() -> Iterator[OpenPsana2]:
    """Opens psana2's event source on an identifier."""
    with opening() as made:
        yield made
