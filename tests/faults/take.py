"""`python -m tests.faults.take TRANSFER FILE`: takes the events of a transfer, and writes each id down."""

from __future__ import annotations

import os
import sys

from beamwire.client import connect


def main() -> None:
    """Take all of them; what could not be begun because the services were away left the file empty."""
    transfer, path = sys.argv[1:]
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with connect() as client, client.stream(transfer) as stream:
        for batch in stream:
            os.write(log, b"".join(b"%d\n" % int(number) for number in batch.event_ids))


if __name__ == "__main__":
    main()
