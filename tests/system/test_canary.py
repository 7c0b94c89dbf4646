"""Known secrets go through a whole facility, and are looked for where they must not be: logs, traces, argv, files."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from beamwire.client import connect
from beamwire.mesh.identity.enrollment import JoinToken
from tests.conftest import LiveFacility, make_live_facility

T = TypeVar("T")

# What a secret looks like, whatever it is: a private key, a ticket, a join token.
PATTERNS = {
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a ticket": re.compile(rb"bwt1\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
    "a join token": re.compile(rb"bwj1\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_.-]{40,}"),
}
# Where a secret may be, on the disk of the one it belongs to. All of them are readable by nobody else.
ALLOWED = {
    # Keys are in their own files.
    "a private key": re.compile(r"(^|/)(key|[a-z]+-key)\.pem$"),
    # The Buffer service keeps what it makes tickets with, and tells each cache.
    "ticket key": re.compile(r"state/buffer\.sqlite(-wal)?$|state/buffers/[^/]+/shard-\d+/cache\.json$"),
    "page key": re.compile(r"state/page\.key$"),
    # A job and a cache enrol with a token of their own, which works once.
    "a join token": re.compile(r"join[-_.]?token$|\.token$"),
    "delegation token": re.compile(r"delegation\.txt$"),
}
EVENTS = 64
REQUEST = {
    "event_source": {
        "type": "SyntheticEventSource",
        "number_of_events": EVENTS,
        "shape": [32, 48],
        "events_per_second": 40,
    },
    "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
    "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 8}],
    "processes": 2,
}
BROKEN = {**REQUEST, "data_sources": {"detector_data": {"type": "NoSuchDetector"}}}


@dataclass
class Canaries:
    """Secrets by what they are, each as the bytes it might be found as."""

    secrets: dict[str, set[bytes]] = field(default_factory=dict)

    def add(self, kind: str, *texts: str | bytes) -> None:
        for text in texts:
            data = text.encode() if isinstance(text, str) else text
            assert len(data) >= 16, "too short to be recognised"
            self.secrets.setdefault(kind, set()).add(data)

    def add_key(self, pem: bytes) -> None:
        """A private key: the lines of its file, and the number itself."""
        lines = [line for line in pem.splitlines() if not line.startswith(b"-----")]
        self.add("a private key", *(line for line in lines[1:] if len(line) >= 16))
        key = serialization.load_pem_private_key(pem, None)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            number = key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big")
            self.add("a private key", number, number.hex(), base64.b64encode(number)[:-4])

    def known_in(self, data: bytes) -> set[str]:
        """The kinds of our own secrets that some bytes hold."""
        return {kind for kind, texts in self.secrets.items() if any(text in data for text in texts)}

    def found_in(self, data: bytes) -> set[str]:
        """The kinds of secrets that some bytes hold, known or not."""
        return self.known_in(data) | {kind for kind, pattern in PATTERNS.items() if pattern.search(data)}


class Watch:
    """Remembers argv and environment of every process that it saw, and whether it was one of ours."""

    def __init__(self, top: Path) -> None:
        self.seen: set[tuple[bytes, bool]] = set()
        self._top = str(top).encode()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="canary-watch")

    def _look(self) -> None:
        while not self._over.wait(0.01):
            for process in Path("/proc").iterdir():
                if process.name.isdigit():
                    with suppress(OSError):
                        said = (process / "cmdline").read_bytes() + b"\0\0" + (process / "environ").read_bytes()
                        self.seen.add((said, self._top in said))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """What is made without a mode of its own is open to everybody."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def everything_below(*directories: Path) -> Iterator[Path]:
    for directory in directories:
        # Not `rglob`, which fails if a directory goes while it looks.
        for parent, _, names in os.walk(directory):
            for path in (Path(parent, name) for name in names):
                with suppress(OSError):
                    if stat.S_ISREG(path.lstat().st_mode):
                        yield path


def keys_below(*directories: Path) -> Iterator[bytes]:
    for path in everything_below(*directories):
        if path.name.endswith("key.pem"):
            with suppress(OSError):
                yield path.read_bytes()


class Story:
    """A facility from its making to its end, and everything that anybody was told on the way."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.canaries = Canaries()
        self.said: list[bytes] = []
        self.misplaced: set[str] = set()
        self.in_place: set[str] = set()

    def hear(self, done: object) -> None:
        self.said += [getattr(done, "stdout", "").encode(), getattr(done, "stderr", "").encode()]

    def token(self, live: LiveFacility, path: str) -> str:
        """A join token in a file, as an operator hands it over."""
        file = self.top / f"{path.replace('/', '-')}.token"
        self.hear(live.beamwired("token", path, "--dir", str(live.directory), "-o", str(file)))
        text = file.read_text().strip()
        self.canaries.add("a join token", text, JoinToken.parse(text).secret)
        return str(file)

    def tell(self, live: LiveFacility) -> None:
        """Enrol, transfer, consume, hand rights over; and be refused at each of them."""
        file = self.token(live, "user/alice")
        self.hear(live.beamwire("enroll", "--token-file", file))
        again = live.beamwire("enroll", "--token-file", file, config_dir=self.top / "again", check=False)
        assert again.returncode != 0, "a join token works once"
        self.hear(again)
        request, broken = self.top / "request.yaml", self.top / "broken.yaml"
        request.write_text(yaml.safe_dump(REQUEST))
        broken.write_text(yaml.safe_dump(BROKEN))
        self.hear(live.beamwire("get", str(broken), "-o", str(self.top / "none"), check=False))
        with connect(config_dir=live.config_dir) as client, client.stream(REQUEST) as stream:
            assert sum(len(batch.event_ids) for batch in self.learning(live, stream)) == EVENTS
        self.hear(live.beamwire("--json", "get", str(request), "-o", str(self.top / "out")))
        bob = self.top / "bob"
        self.hear(live.beamwire("enroll", "--token-file", self.token(live, "user/bob"), config_dir=bob))
        transfer = last_transfer(live)
        denied = live.beamwire("pull", transfer, "-o", str(self.top / "no"), config_dir=bob, check=False)
        assert denied.returncode != 0
        self.hear(denied)
        self.delegate(live, transfer, bob)

    def delegate(self, live: LiveFacility, transfer: str, holder: Path) -> None:
        """Hand a right over, use it, and end it."""
        file = self.top / "delegation.txt"
        self.hear(live.beamwire("token", "create", transfer, "--holder", "user/bob", "-o", str(file)))
        self.canaries.add("delegation token", file.read_text().strip())
        self.hear(live.beamwire("token", "inspect", str(file)))
        self.hear(live.beamwire("--token-file", str(file), "describe", transfer, config_dir=holder))
        self.hear(live.beamwire("token", "revoke", str(file)))
        refused = live.beamwire("--token-file", str(file), "-v", "describe", transfer, config_dir=holder, check=False)
        assert refused.returncode != 0
        self.hear(refused)

    def learning(self, live: LiveFacility, batches: Iterable[T]) -> Iterator[T]:
        """The batches; with the first of them, learn the secrets of what runs right now."""
        for number, batch in enumerate(batches):
            if not number:
                self.learn(live)
            yield batch

    def learn(self, live: LiveFacility) -> None:
        for config in (live.directory / "state").glob("buffers/*/shard-*/cache.json"):
            found = re.search(r'"ticket_key": ?"([0-9a-f]{32,})"', config.read_text())
            if found:
                self.canaries.add("ticket key", found[1], bytes.fromhex(found[1]))
        assert self.canaries.secrets.get("ticket key"), "there is no cache whose tickets could leak"
        page_key = (live.directory / "state" / "page.key").read_bytes()
        self.canaries.add("page key", page_key, page_key.hex(), base64.b64encode(page_key))
        self.look()

    def look(self) -> None:
        """Look for secrets in every file there is, and for who may read it."""
        for pem in keys_below(self.top):
            self.canaries.add_key(pem)
        for path in everything_below(self.top):
            name = str(path.relative_to(self.top))
            try:
                data, mode = path.read_bytes(), stat.S_IMODE(path.stat().st_mode)
            except FileNotFoundError:
                continue  # a job or a cache is at work
            for kind in self.canaries.found_in(data):
                allowed = ALLOWED.get(kind)
                if allowed is None or not allowed.search(name):
                    self.misplaced.add(f"{kind} in {name}")
                elif mode & 0o077:
                    self.misplaced.add(f"{name} holds {kind} and has the mode {mode:o}")
                else:
                    self.in_place.add(kind)


def last_transfer(live: LiveFacility) -> str:
    listed = json.loads(live.beamwire("--json", "list").stdout.strip().splitlines()[-1])
    name = re.search(r"transfers/[a-z0-9-]+", json.dumps(listed))
    assert name is not None
    return name[0]


def test_no_secret_leaves_its_place(tmp_path: Path) -> None:
    story = Story(tmp_path)
    with umask(0), Watch(tmp_path) as watch:
        live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
        live.start()
        try:
            story.tell(live)
        finally:
            live.stop()
    story.look()
    canaries, found = story.canaries, set(story.misplaced)
    for data in story.said:
        found |= {f"{kind} was printed" for kind in canaries.found_in(data)}
    for data, is_ours in watch.seen:
        kinds = canaries.found_in(data) if is_ours else canaries.known_in(data)
        found |= {f"{kind} in argv or environment of {data[:200]!r}" for kind in kinds}
    assert not found, "\n".join(sorted(found))
    # It finds them where they belong, so it would have found them elsewhere.
    assert story.in_place == set(ALLOWED)
    assert sum(is_ours for _, is_ours in watch.seen) > 10
