"""`python -m tests.faults.consume JSON`: one life of a consumer; it writes down each event before it asks for more."""

from __future__ import annotations

import json
import logging
import os
import struct
import sys
from pathlib import Path

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from tests.faults.frames import is_right

_ID = struct.Struct("<Q")


def main() -> None:
    """Take frames to the end of the stream: what is right goes to the log, what is wrong beside it."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    task = json.loads(sys.argv[1])
    credentials = Credentials.load(Path(task["credentials"])) if task["credentials"] else None
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    log = os.open(task["log"], flags, 0o600)
    wrong = os.open(task["log"] + ".wrong", flags, 0o600)
    connect = ConnectString.parse(task["connect"])
    with Consumer(connect, credentials, group=task["group"], dial_timeout=task["patience"]) as stream:
        for frame in stream:
            record = _ID.pack(frame.header.event_ids[0] if frame.header.event_ids else 0)
            os.write(log if is_right(frame, task["size"]) else wrong, record)


if __name__ == "__main__":
    main()
