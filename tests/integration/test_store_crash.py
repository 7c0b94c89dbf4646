"""What was answered survives a kill of the process, and what was not is whole or absent."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.idempotency import Idempotency
from beamwire.mesh.store import Record, Store


class Thing(Record):
    count: int = 0


PREAMBLE = """
import asyncio, sys
from pathlib import Path
from beamwire.mesh.idempotency import Idempotency
from beamwire.mesh.database import Database
from beamwire.mesh.store import Record, Store
class Thing(Record):
    count: int = 0
def say(text):
    print(text, flush=True)
async def main(path):
    db = await Database.open(path)
    store = Store(db, Thing)
"""


def killed_after(path: Path, body: str, lines: int) -> list[str]:
    """What a process printed before it was killed, at the latest after so many lines."""
    program = PREAMBLE + textwrap.indent(textwrap.dedent(body), "    ") + "\nasyncio.run(main(Path(sys.argv[1])))"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().strip() for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        said += process.stdout.read().split()
    assert process.returncode == -signal.SIGKILL
    return said


async def test_every_answer_survives_the_kill(tmp_path: Path) -> None:
    body = """
        record = await store.insert(Thing(name="things/0", owner="o", state="NEW"))
        for n in range(1, 100000):
            record = await store.update(record.model_copy(update={"count": n}))
            await store.insert(Thing(name=f"things/{n}", owner="o", state="NEW", count=n))
            say(n)
    """
    said = await asyncio.to_thread(killed_after, tmp_path / "service.db", body, 40)
    last = int(said[-1])
    assert last >= 40
    db = await Database.open(tmp_path / "service.db")
    try:
        store = Store(db, Thing)
        counted = await store.get("things/0")
        assert counted is not None
        assert counted.count in (last, last + 1)
        assert counted.revision == counted.count + 1
        names = {record.name for record in await store.list(limit=100000)}
        assert names >= {f"things/{n}" for n in range(last + 1)}
        assert len(names) <= last + 2
    finally:
        await db.close()


async def test_an_answer_kept_before_the_kill_is_given_again(tmp_path: Path) -> None:
    body = """
        async def action():
            return b"the answer"
        await Idempotency(db).run("alice", "/x/Create", "id-1", b"body", action)
        say("answered")
        await asyncio.sleep(60)
    """
    await asyncio.to_thread(killed_after, tmp_path / "service.db", body, 1)
    db = await Database.open(tmp_path / "service.db")

    async def never() -> bytes:
        raise AssertionError

    try:
        kept = Idempotency(db)
        assert await kept.run("alice", "/x/Create", "id-1", b"body", never) == b"the answer"
        with pytest.raises(BeamwireError) as caught:
            await kept.run("alice", "/x/Create", "id-1", b"other", never)
        assert caught.value.reason is Reason.REQUEST_ID_REUSED
    finally:
        await db.close()


async def test_a_request_in_flight_at_the_kill_is_taken_over(tmp_path: Path) -> None:
    body = """
        async def action():
            await store.insert(Thing(name="things/1", owner="o", state="NEW"))
            say("half way")
            await asyncio.sleep(60)
        await Idempotency(db).run("alice", "/x/Create", "id-1", b"body", action)
    """
    await asyncio.to_thread(killed_after, tmp_path / "service.db", body, 1)
    db = await Database.open(tmp_path / "service.db")
    store = Store(db, Thing)
    kept = Idempotency(db)

    async def again() -> bytes:
        found = await store.get("things/1")
        assert found is not None
        return found.name.encode()

    try:
        with pytest.raises(BeamwireError) as caught:
            await kept.run("alice", "/x/Create", "id-1", b"other", again)
        assert caught.value.reason is Reason.REQUEST_ID_REUSED
        assert await kept.run("alice", "/x/Create", "id-1", b"body", again) == b"things/1"
        assert await kept.run("alice", "/x/Create", "id-1", b"body", again) == b"things/1"
    finally:
        await db.close()


async def test_the_file_is_free_after_the_kill(tmp_path: Path) -> None:
    for _ in range(2):
        name = f"things/{uuid.uuid4()}"
        body = f"""
            await store.insert(Thing(name="{name}", owner="o", state="NEW"))
            say("stored")
            await asyncio.sleep(60)
        """
        await asyncio.to_thread(killed_after, tmp_path / "service.db", body, 1)
    db = await Database.open(tmp_path / "service.db")
    try:
        assert len(await Store(db, Thing).list(limit=10)) == 2
    finally:
        await db.close()
