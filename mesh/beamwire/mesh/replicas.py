"""Who a process is among the replicas of a service, and whether one that ran on this host still lives."""

from __future__ import annotations

import itertools
import os
import socket
from functools import cache
from pathlib import Path

from beamwire.mesh import shim

_opened = itertools.count(1)


def this_host() -> str:
    """The name of this host, as records that are bound to its processes have it."""
    return socket.gethostname()


@cache
def _processes() -> str:
    # Process ids mean something within one boot and one namespace only: containers may share the name of a host.
    return f"{shim.boot_id()[:8]}.{Path('/proc/self/ns/pid').stat().st_ino:x}"


def new_replica() -> str:
    """`<host>:<pid>:<start>`, where the start also tells databases apart that one process has opened."""
    return f"{this_host()}:{os.getpid()}:{shim.start_time(os.getpid())}.{_processes()}.{next(_opened)}"


def has_died(replica: str) -> bool:
    """Whether a replica is known to have ended: it ran on this host, and its process is not there any more."""
    host, _, rest = replica.partition(":")
    pid, _, start = rest.partition(":")
    ticks, _, processes = start.rpartition(".")[0].partition(".")
    if host != this_host() or processes != _processes() or not (pid.isdigit() and ticks.isdigit()):
        return False
    return shim.start_time(int(pid)) != int(ticks)
