"""`python -m tests.faults.produce JSON`: one life of a producer; it goes on behind what the cache has stored."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader
from tests.faults.frames import arrays, event_id


def main() -> None:
    """Send all frames of this producer, and END."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    task = json.loads(sys.argv[1])
    credentials = Credentials.load(Path(task["credentials"])) if task["credentials"] else None
    header = StreamHeader(buffer="buffers/faults", producer_count=task["producer_count"])
    number = task["producer"]
    connect = ConnectString.parse(task["connect"])
    with Producer(connect, credentials, header, producer=number, dial_timeout=task["patience"]) as out:
        for frame in range(out.resumed_frame_count + 1, task["frames"] + 1):
            event = event_id(number, frame)
            out.send(arrays(event, task["size"]), np.array([event], np.uint64))


if __name__ == "__main__":
    main()
