"""Programs of others that judge ours and are not on every machine: a test that asks for one is skipped without it."""

from __future__ import annotations

from typing import Any

import pytest


def decompress(*arguments: Any, **options: Any) -> bytes:
    """What DECTRIS' own `dectris.compression.decompress` gives. It is compiled when it is installed."""
    why = "pip install 'beamwire[judges]', which needs a C compiler, to compare with DECTRIS' decoder"
    found: bytes = pytest.importorskip("dectris.compression", reason=why).decompress(*arguments, **options)
    return found
