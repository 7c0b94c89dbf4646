"""Jobs of the release before steps, resources and placements: read, shown, followed to their ends, run once."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from beamwire.mesh.processes import launch
from beamwire.testing.facility import Facility
from tests.integration.jobplay import Play, until

SCHEMA = """
CREATE TABLE resources (name TEXT NOT NULL, kind TEXT NOT NULL, owner TEXT NOT NULL, state TEXT NOT NULL,
    create_time TEXT NOT NULL, revision INTEGER NOT NULL, document JSON NOT NULL, PRIMARY KEY (name));
CREATE INDEX ix_resources_create_time ON resources (create_time);
CREATE INDEX ix_resources_kind ON resources (kind);
CREATE INDEX ix_resources_owner ON resources (owner);
CREATE INDEX ix_resources_state ON resources (state);
CREATE TABLE answers (caller TEXT NOT NULL, method TEXT NOT NULL, request_id TEXT NOT NULL, body_sha256 BLOB NOT NULL,
    begun FLOAT NOT NULL, answer BLOB, PRIMARY KEY (caller, method, request_id));
CREATE INDEX ix_answers_begun ON answers (begun);
"""
OWNER = "spiffe://facility.test/user/alice"
BORN = "2026-07-01T10:00:00.000000Z"
PROGRAM = """
import time, pathlib
with open("runs", "a") as file: file.write("run\\n")
print("hello", flush=True)
while not pathlib.Path("go").exists(): time.sleep(0.02)
"""


def document(name: str, states: list[str], **changes: Any) -> dict[str, Any]:
    transitions = [{"state": state, "time": f"2026-07-01T10:00:0{n}Z", "reason": ""} for n, state in enumerate(states)]
    spec = {
        "display_name": "",
        "executable": sys.executable,
        "arguments": ["-c", PROGRAM],
        "directory": "",
        "environment": {},
        "process_count": 1,
        "duration": None,
        "backend": "local",
        "mpi": False,
        "stdin": "_wA=",
        "enroll": False,
        "grace": 5.0,
    }
    return {
        "name": name,
        "owner": OWNER,
        "state": states[-1],
        "create_time": BORN,
        "update_time": BORN,
        "revision": 3,
        "spec": spec,
        "transitions": transitions,
        "exit_code": None,
        "error": None,
        "native_id": "12",
        "identity": "spiffe://facility.test/job/old",
        "cancel_requested": False,
        "traceparent": "",
        **changes,
    }


def write(path: Path, documents: list[dict[str, Any]]) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA)
        for each in documents:
            row = (each["name"], "JobRecord", OWNER, each["state"], BORN, 3, json.dumps(each))
            connection.execute("INSERT INTO resources VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        connection.commit()


async def test_jobs_of_the_release_before_are_read_and_go_on(tmp_path: Path) -> None:
    directory = tmp_path / "jobs" / "running"
    process = await launch([sys.executable, "-c", PROGRAM], directory=directory, env=dict(os.environ))
    ran = ["NEW", "QUEUED", "ACTIVE"]
    limited = document("jobs/done", [*ran, "FAILED"], exit_code=3)
    limited["spec"] |= {"duration": 60.0, "process_count": 2, "mpi": True}
    write(tmp_path / "job.sqlite", [document("jobs/running", ran), limited, document("jobs/new", ["NEW", "CANCELED"])])
    try:
        async with Play(tmp_path, Facility(tmp_path / "members")).serve() as served:
            done = await served.store.require("jobs/done")
            assert (done.spec.resources.process_count, done.spec.resources.duration) == (2, 60.0)
            assert (done.spec.stdin, done.spec.placement.backend) == (b"\xff\x00", "local")
            assert (done.step.exit_code, done.step.native_id) == (3, "12")
            assert done.step.start_time == done.transitions[2].time
            assert done.end_time == done.step.end_time == done.transitions[3].time
            assert (await served.store.require("jobs/new")).step.start_time is None
            await until(await served.as_("user/alice"), "jobs/running", "ACTIVE")
            (directory / "go").touch()
            job = await until(await served.as_("user/alice"), "jobs/running", "COMPLETED", "FAILED")
            assert served.store.kind == "JobRecord"
            assert (job.state, job.steps[0].exit_code) == (job.STATE_COMPLETED, 0)
            assert (directory / "runs").read_text() == "run\n"
            assert (directory / "steps" / "1" / "stdout").read_text() == "hello\n"
    finally:
        async with asyncio.timeout(10):
            await process.terminate()
