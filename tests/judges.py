"""Programs of others that judge ours and are not on every machine: a test that asks for one is skipped without it."""

from __future__ import annotations

from typing import Any

import pytest

_WHY = "pip install 'beamwire[judges]', which needs a C compiler, to compare with DECTRIS' decoder"


def need_decompress() -> None:
    """Skip here rather than inside of a library that takes the skip for an error."""
    pytest.importorskip("dectris.compression", reason=_WHY)


def decompress(*arguments: Any, **options: Any) -> bytes:
    """What DECTRIS' own `dectris.compression.decompress` gives. It is compiled when it is installed."""
    found: bytes = pytest.importorskip("dectris.compression", reason=_WHY).decompress(*arguments, **options)
    return found
