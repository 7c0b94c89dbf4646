"""Tells a person what keeps a transfer from doing well, once for each thing that comes up."""

from __future__ import annotations

from beamwire.client.cli.context import Cli
from beamwire.common.v1.health_pb2 import SEVERITY_WARNING
from beamwire.request.v1.request_service_pb2 import Transfer


class Issues:
    """Remembers what it has told; what went away and came back is told again. Remarks of no weight are left out."""

    def __init__(self, cli: Cli) -> None:
        self._cli = cli
        self._told: set[str] = set()

    def tell(self, transfer: Transfer | None) -> None:
        """Tell what is new."""
        if transfer is None or self._cli.json:
            return
        issues = {issue.type: issue for issue in transfer.health_issues if issue.severity >= SEVERITY_WARNING}
        for kind in issues.keys() - self._told:
            self._cli.say(f"{kind}: {issues[kind].detail}")
        self._told = set(issues)
