"""Renewals under load, a tenth of what `python -m tests.rotations` does."""

from __future__ import annotations

from tests.rotations.suite import run


def test_a_hundred_rotations_fail_no_call_and_lose_no_frame() -> None:
    result = run(100)
    assert not result.failures
    assert result.calls >= 900
    assert result.frames >= 1000
    assert result.reconnects >= 4
