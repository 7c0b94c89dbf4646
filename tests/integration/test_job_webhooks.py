"""Events of jobs at a receiver that is well, slow, down, or wrong: each comes, in order, signed, and none is lost."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
import sqlite3
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh import outbox, sqlite
from beamwire.mesh.database import patience
from beamwire.mesh.errors import BeamwireError
from beamwire.services.job import webhooks
from beamwire.testing.facility import Facility
from beamwire.testing.ports import free_port
from tests.integration.jobplay import Play, Served, create, ended, shell

SECRET = b"0123456789abcdef"
OK = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"


@dataclass
class Receiver:
    """Takes events as an HTTP server would, and answers as it is told to."""

    port: int
    answers: list[bytes] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    refused: int = 0
    connections: int = 0
    hosts: set[str] = field(default_factory=set)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    taken: Callable[[dict], Awaitable[None]] | None = None

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            headers = {name.lower(): value for name, value in headers.items()}
            self.hosts.add(headers["host"])
            body = await reader.readexactly(int(headers["content-length"]))
            answer = self.answers.pop(0) if self.answers else OK
            if answer == OK:
                self.events.append(self.checked(headers, body))
                if self.taken is not None:
                    await self.taken(self.events[-1])
            else:
                self.refused += 1
            self.arrived.set()
            writer.write(answer)
            if not answer:
                await asyncio.sleep(3600)
            await writer.drain()
        finally:
            writer.close()

    def checked(self, headers: dict[str, str], body: bytes) -> dict:
        """What docs/webhooks.md tells receivers to do."""
        signed = headers["beamwire-timestamp"].encode() + b"." + body
        expected = "v1=" + hmac.new(SECRET, signed, hashlib.sha256).hexdigest()
        assert hmac.compare_digest(expected, headers["beamwire-signature"])
        event = json.loads(body)
        assert event["id"] == headers["beamwire-event-id"]
        return event

    def states(self) -> list[str]:
        return [event["job"]["state"] for event in self.events]

    async def until(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.events) < count:
                self.arrived.clear()
                await self.arrived.wait()

    @asynccontextmanager
    async def listening(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        server = await asyncio.start_server(self.take, host, self.port, ssl=tls)
        try:
            yield
        finally:
            server.close()
            for task in asyncio.all_tasks():
                if task.get_coro().__qualname__ == "Receiver.take":
                    task.cancel()
            await asyncio.sleep(0)


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path, Facility(tmp_path / "members"), executables={"user/*": ("**",)})


@pytest.fixture
async def served(play: Play) -> AsyncIterator[Served]:
    async with play.serve() as served:
        yield served


@pytest.fixture
def receiver() -> Receiver:
    return Receiver(free_port())


def callback(receiver: Receiver, path: str = "/events") -> pb.Callback:
    return pb.Callback(url=f"http://127.0.0.1:{receiver.port}{path}", secret=SECRET)


async def told(jobs, name: str, **counts: int) -> pb.Job.CallbackStatus:
    async with asyncio.timeout(30):
        while True:
            job = await jobs.GetJob(pb.GetJobRequest(name=name))
            if all(getattr(job.callback_status, key) == value for key, value in counts.items()):
                return job.callback_status
            await asyncio.sleep(0.02)


async def test_each_state_is_told_once_in_order_and_signed(served: Served, receiver: Receiver):
    jobs = await served.as_("user/alice")
    async with receiver.listening():
        spec = shell("exit 3", callback=callback(receiver))
        job = await create(jobs, spec, labels={"sample": "x"})
        await receiver.until(4)
        await told(jobs, job.name, delivered_count=4, pending_count=0)
    assert receiver.states() == ["NEW", "QUEUED", "ACTIVE", "FAILED"]
    assert [event["sequence"] for event in receiver.events] == [1, 2, 3, 4]
    assert len({event["id"] for event in receiver.events}) == 4
    last = receiver.events[-1]["job"]
    assert (last["name"], last["exit_code"], last["error"]["reason"]) == (job.name, 3, "JOB_FAILED")
    assert last["labels"] == {"sample": "x"}
    assert SECRET.decode() not in json.dumps(receiver.events)


async def test_a_receiver_that_fails_gets_it_again_and_the_next_not_before(
    served: Served, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(webhooks, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(webhooks, "TIMEOUT", 3.0)
    receiver.answers = [
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"not HTTP at all\r\n\r\n",
        b"",
    ]
    jobs = await served.as_("user/alice")
    async with receiver.listening():
        job = await create(jobs, shell("true", callback=callback(receiver)))
        await receiver.until(4)
        status = await told(jobs, job.name, delivered_count=4, pending_count=0)
    assert receiver.refused == 4
    assert receiver.states() == ["NEW", "QUEUED", "ACTIVE", "COMPLETED"]
    assert status.last_error == "no answer within 3 s"


async def test_a_receiver_that_is_gone_is_told_no_more(served: Served, receiver: Receiver):
    receiver.answers = [b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n"] * 4
    jobs = await served.as_("user/alice")
    async with receiver.listening():
        job = await create(jobs, shell("true", callback=callback(receiver)))
        await told(jobs, job.name, abandoned_count=4, pending_count=0)
    assert not receiver.events


async def test_an_event_is_given_up_after_its_time(served: Served, receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(webhooks, "GIVE_UP", 0.0)
    jobs = await served.as_("user/alice")
    job = await create(jobs, shell("true", callback=callback(receiver)))
    status = await told(jobs, job.name, abandoned_count=4, pending_count=0)
    assert "ConnectError" in status.last_error


async def test_what_could_not_be_told_is_told_by_the_next_who_serves(
    play: Play, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    # The first may be telling it when it ends. Both are this process, which does not count as dead.
    monkeypatch.setattr(outbox, "ITEM_LEASE_SECONDS", 5.0)
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        job = await ended(jobs, (await create(jobs, shell("true", callback=callback(receiver)))).name)
        status = await told(jobs, job.name, delivered_count=0, pending_count=4)
        assert "ConnectError" in (await told(jobs, job.name)).last_error or not status.last_error
    async with receiver.listening(), play.serve() as served:
        await receiver.until(4)
        await told(await served.as_("user/alice"), job.name, delivered_count=4)
    assert receiver.states() == ["NEW", "QUEUED", "ACTIVE", "COMPLETED"]


async def test_what_was_told_while_the_database_was_away_is_not_told_again(
    play: Play, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sqlite, "BUSY_MILLISECONDS", 20)
    patience.set(0.1)
    away = sqlite3.connect(play.directory / "job.sqlite", isolation_level=None, check_same_thread=False, timeout=10)

    async def leave(event: dict) -> None:
        if event["job"]["state"] == "COMPLETED":
            await asyncio.to_thread(away.execute, "BEGIN IMMEDIATE")
            asyncio.get_running_loop().call_later(1.0, away.rollback)

    receiver.taken = leave
    with closing(away):
        async with receiver.listening(), play.serve() as served:
            jobs = await served.as_("user/alice")
            job = await create(jobs, shell("true", callback=callback(receiver)))
            await receiver.until(4)
            # Long before the lease of the event is over.
            await told(jobs, job.name, delivered_count=4, pending_count=0)
    assert receiver.connections == 4


async def test_a_slow_receiver_keeps_nobody_else_waiting(
    served: Served, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    slow = Receiver(free_port(), [b""] * 100)
    jobs = await served.as_("user/alice")
    # On another host, as far as anybody can tell: each has so many calls at once.
    async with receiver.listening("127.0.0.2"), slow.listening():
        for _ in range(4):
            await create(jobs, shell("true", callback=callback(slow)))
        spec = shell("true")
        spec.callback.url, spec.callback.secret = f"http://127.0.0.2:{receiver.port}/", SECRET
        await create(jobs, spec)
        await receiver.until(4)


async def test_a_dead_receiver_takes_no_more_than_its_part(
    play: Play, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(webhooks, "CONCURRENT", 8)
    monkeypatch.setattr(webhooks, "TIMEOUT", 60.0)
    slow = Receiver(free_port(), [b""] * 100)
    async with play.serve() as served, receiver.listening("127.0.0.2"), slow.listening():
        jobs = await served.as_("user/alice")
        made = [await create(jobs, shell("true", callback=callback(slow))) for _ in range(12)]
        await asyncio.gather(*(ended(jobs, job.name) for job in made))
        began = asyncio.get_running_loop().time()
        spec = shell("true")
        spec.callback.url, spec.callback.secret = f"http://127.0.0.2:{receiver.port}/", SECRET
        await create(jobs, spec)
        await receiver.until(4)
        assert asyncio.get_running_loop().time() - began < webhooks.TIMEOUT / 2
        assert slow.refused == webhooks.EACH
    assert receiver.states() == ["NEW", "QUEUED", "ACTIVE", "COMPLETED"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/",
        "http://localhost:8000/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[fe80::1]/",
        "https://[fd00::1]/",
        "https://10.0.0.1/",
        "https://192.168.1.1/",
        "https://100.64.0.1/",
        "https://0.0.0.0/",
        "https://224.0.0.1/",
        "https://a.localhost./",
    ],
)
async def test_a_receiver_that_is_not_public_is_refused(play: Play, url: str):
    play.private_receivers = ()
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        with pytest.raises(BeamwireError, match="which is not public") as caught:
            await create(jobs, shell("true", callback=pb.Callback(url=url, secret=SECRET)))
        assert [each.field for each in caught.value.violations] == ["job.spec.callback.url"]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has names mean what is said, one answer after the other."""
    answers: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def lookup(host: str, *arguments: Any, **options: Any) -> list[Any]:
        if host not in answers:
            return real(host, *arguments, **options)
        address = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
        return real(address, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return lambda host, *addresses: answers.update({host: list(addresses)})


@pytest.mark.parametrize("name", ["metadata.example", "0x7f000001", "127.1"])
async def test_a_name_of_a_receiver_that_is_not_public_is_not_dialed(
    play: Play, receiver: Receiver, named: Callable[..., None], name: str
):
    play.private_receivers = ("127.0.0.2/32",)
    named("metadata.example", "127.0.0.1")
    async with play.serve() as served, receiver.listening():
        jobs = await served.as_("user/alice")
        url = f"https://{name}:{receiver.port}/"
        job = await create(jobs, shell("true", callback=pb.Callback(url=url, secret=SECRET)))
        await told_of(jobs, job.name, f"{name} is at 127.0.0.1, which is not public")
    assert not receiver.arrived.is_set()
    assert not receiver.connections


async def test_what_was_looked_at_is_what_is_dialed_and_says_who_it_is(
    play: Play, receiver: Receiver, named: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    credentials = play.facility.member("service/hooks", ["hooks.example"])
    monkeypatch.setenv("SSL_CERT_FILE", str(credentials.directory / "bundle.pem"))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(credentials.directory / "chain.pem", credentials.directory / "key.pem")
    play.private_receivers = ("127.0.0.2/32",)
    # Every second answer means somebody else.
    named("hooks.example", *["127.0.0.2", "127.0.0.1"] * 4, "127.0.0.2")
    named("other.example", "127.0.0.2")
    monkeypatch.setattr(webhooks, "FIRST_DELAY", 0.05)
    stranger = Receiver(receiver.port)
    async with play.serve() as served, receiver.listening("127.0.0.2", tls), stranger.listening("127.0.0.1", tls):
        jobs = await served.as_("user/alice")
        url = f"https://hooks.example:{receiver.port}/"
        job = await create(jobs, shell("true", callback=pb.Callback(url=url, secret=SECRET)))
        await receiver.until(4)
        await told(jobs, job.name, delivered_count=4)
        assert {event["job"]["name"] for event in receiver.events} == {job.name}
        assert receiver.hosts == {f"hooks.example:{receiver.port}"}
        url = f"https://other.example:{receiver.port}/"
        job = await create(jobs, shell("true", callback=pb.Callback(url=url, secret=SECRET)))
        await told_of(jobs, job.name, "Hostname mismatch")
    assert not stranger.connections
    assert len(receiver.events) == 4


async def told_of(jobs, name: str, problem: str) -> None:
    async with asyncio.timeout(30):
        while problem not in (await told(jobs, name)).last_error:  # noqa: ASYNC110  (it is told elsewhere)
            await asyncio.sleep(0.02)


async def test_a_deleted_job_is_told_of_no_more(served: Served, receiver: Receiver):
    jobs = await served.as_("user/alice")
    job = await create(jobs, shell("true", hold=True, callback=callback(receiver)))
    # An attempt that has begun goes on.
    await told_of(jobs, job.name, "ConnectError")
    await jobs.DeleteJob(pb.DeleteJobRequest(name=job.name))
    async with receiver.listening():
        other = await create(jobs, shell("true", callback=callback(receiver)))
        await receiver.until(4)
    assert {event["job"]["name"] for event in receiver.events} == {other.name}


async def test_the_receiver_of_the_documentation_checks_what_it_takes(served: Served, tmp_path: Path):
    text = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
    program = text.partition("```python\n")[2].partition("```")[0]
    port = free_port()
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    (tmp_path / "receiver.py").write_text(program.replace("8000", str(port)))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "receiver.py", cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        jobs = await served.as_("user/alice")
        spec = shell("true", callback=pb.Callback(url=f"http://127.0.0.1:{port}/", secret=SECRET))
        job = await create(jobs, spec)
        assert process.stdout is not None
        async with asyncio.timeout(30):
            for state in ("NEW", "QUEUED", "ACTIVE", "COMPLETED"):
                assert (await process.stdout.readline()).decode() == f"{job.name} {state}\n"
        spec.callback.secret = b"another secret of 16 bytes"
        other = await create(jobs, spec)
        async with asyncio.timeout(30):
            while "answered 403" not in (await told(jobs, other.name)).last_error:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        process.kill()
        await process.wait()
