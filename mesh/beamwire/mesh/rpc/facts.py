"""What is known of a call, also after it has ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import grpc

# grpcio is generic in its stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class CallFacts:
    """What a handler may ask of its call when that may have ended: it was read while the call was there.

    What changes something goes on to its end although its caller has gone, and grpcio's own context reads memory that
    is freed when it is asked then.
    """

    def __init__(self, context: Context) -> None:
        self._peer = context.peer()
        self._auth_context = context.auth_context()

    def peer(self) -> str:
        """Where the caller is, `ipv4:127.0.0.1:5000`."""
        return self._peer

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What the transport knows of the caller, its certificate for one."""
        return self._auth_context
