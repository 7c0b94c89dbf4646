"""gRPC does not survive a fork: which process has used it, so that another one is told and does not hang."""

from __future__ import annotations

import os

from beamwire.mesh.errors import BeamwireError, Reason

# Which process made a channel: this one, or one that it was forked from.
_user_pid = 0


def has_used_grpc() -> bool:
    """Whether this process, or one that it was forked from, has called a facility."""
    return bool(_user_pid)


def refuse_after_fork() -> None:
    """Raise instead of waiting for ever, or worse: gRPC has threads, which a forked process lacks."""
    global _user_pid
    if _user_pid not in (0, os.getpid()):
        raise BeamwireError(
            Reason.ILLEGAL_STATE,
            "this process was forked from one that has called a facility, which gRPC does not survive; fork before, or "
            'start processes with multiprocessing\'s "spawn"',
        )
    _user_pid = os.getpid()
