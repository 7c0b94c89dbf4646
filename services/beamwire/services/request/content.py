"""What is asked for, as one number: two requests for the same events have the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from pydantic import JsonValue


def content_sha256(content: Mapping[str, JsonValue]) -> str:
    """Return the SHA-256 of a streamer's configuration with every default filled in, in hexadecimal.

    Everything counts that decides which events come and what is in them: source, data sources, stages, serializer and
    the most events. What does not: names, labels, lease, processes, buffer and where anything runs.
    """
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
