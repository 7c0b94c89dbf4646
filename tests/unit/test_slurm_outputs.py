"""What Slurm's commands print, as they printed it, and what is made of it."""

from __future__ import annotations

import json
import os

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.job.backends.interface import Active, Ended, Ending, Outcome, Queued
from beamwire.services.job.backends.slurm import chosen
from beamwire.services.job.backends.slurm_commands import (
    Listed,
    expand,
    parse_accounted,
    parse_columns,
    parse_json,
)
from beamwire.services.job.backends.slurm_states import STATES, Told, observe

# squeue(1) of 22.05, JOB STATE CODES.
MANUAL = """BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING
PREEMPTED RUNNING RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED SIGNALING SPECIAL_EXIT STAGE_OUT
STOPPED SUSPENDED TIMEOUT"""
# Slurm 22.05.8, the parts that are read. It gives every user's jobs, whatever it is asked for.
JSON_2205 = {
    "errors": [],
    "jobs": [
        {
            "job_id": 7, "name": "bw-x-a-1", "job_state": "COMPLETED", "state_reason": "None", "nodes": "node[1-2]",
            "exit_code": 0, "restart_cnt": 0, "user_id": os.geteuid(),
        },
        {
            "job_id": 8, "name": "bw-x-b-1", "job_state": "FAILED", "state_reason": "NonZeroExitCode", "nodes": "node1",
            "exit_code": 768, "restart_cnt": 1, "user_id": os.geteuid(),
        },
        {
            "job_id": 9, "name": "bw-x-c-1", "job_state": "PENDING", "state_reason": "Resources", "nodes": "",
            "exit_code": 0, "restart_cnt": 0, "user_id": os.geteuid() + 1,
        },
    ],
}  # fmt: skip
# The form of Slurm 23.11 and later, by its documentation: it could not be tried here.
JSON_2311 = {
    "errors": [],
    "jobs": [
        {
            "job_id": 7, "name": "bw-x-a-1", "job_state": ["RUNNING", "COMPLETING"], "state_reason": "None",
            "nodes": "node1", "user_id": os.geteuid(), "restart_cnt": 0,
            "exit_code": {
                "status": ["SIGNALED"],
                "return_code": {"set": False, "infinite": False, "number": 0},
                "signal": {"id": {"set": True, "infinite": False, "number": 15}, "name": "Terminated"},
            },
        },
        {
            "job_id": 8, "name": "bw-x-b-1", "job_state": ["FAILED"], "state_reason": "NonZeroExitCode",
            "nodes": "node1", "user_id": os.geteuid(), "restart_cnt": 0,
            "exit_code": {
                "status": ["ERROR"],
                "return_code": {"set": True, "infinite": False, "number": 3},
                "signal": {"id": {"set": False, "infinite": False, "number": 0}, "name": ""},
            },
        },
    ],
}  # fmt: skip
# Slurm 22.05.8 without its controller, with exit code 0.
JSON_AWAY = (
    '{"errors": [{"description": "Failed while looking for jobs", "error_number": -1, "error": "Unspecified error",'
    ' "source": "slurm_load_jobs"}], "jobs": []}'
)


def test_json_of_2205() -> None:
    assert parse_json(json.dumps(JSON_2205)) == [
        Listed(7, "bw-x-a-1", "COMPLETED", "", ("node1", "node2"), 0, 0),
        Listed(8, "bw-x-b-1", "FAILED", "NonZeroExitCode", ("node1",), 3, 1),
    ]


def test_json_of_2311() -> None:
    assert parse_json(json.dumps(JSON_2311)) == [
        Listed(7, "bw-x-a-1", "COMPLETING", "", ("node1",), 143, 0),
        Listed(8, "bw-x-b-1", "FAILED", "NonZeroExitCode", ("node1",), 3, 0),
    ]


def test_no_jobs_from_a_controller_that_is_away_are_no_answer() -> None:
    with pytest.raises(BeamwireError) as refused:
        parse_json(JSON_AWAY)
    assert refused.value.reason is Reason.SERVICE_UNAVAILABLE


def test_columns() -> None:
    text = (
        "3|bw-x-b-1|FAILED|BadConstraints||1|0|\n"
        "5|bw-x-c-1|PENDING|Nodes required for job are DOWN, DRAINED or reserved||0|0|\n"
        "2|bw-x-a-1|RUNNING|None|node[1-2]|0|0|\n"
    )
    assert parse_columns(text) == [
        Listed(3, "bw-x-b-1", "FAILED", "BadConstraints", (), 129),
        Listed(5, "bw-x-c-1", "PENDING", "Nodes required for job are DOWN, DRAINED or reserved", (), 0),
        Listed(2, "bw-x-a-1", "RUNNING", "", ("node1", "node2"), 0),
    ]


def test_accounting() -> None:
    text = (
        "1|bw-x-a-1|CANCELLED by 0|None assigned|0:0|None\n"
        "2|bw-x-a-2|FAILED|node1|0:9|None\n"
        "3|x|OUT_OF_MEMORY|n1|0:125|OutOfMemory\n"
    )
    assert parse_accounted(text) == [
        Listed(1, "bw-x-a-1", "CANCELLED", "by 0", (), 0),
        Listed(2, "bw-x-a-2", "FAILED", "", ("node1",), 137),
        Listed(3, "x", "OUT_OF_MEMORY", "OutOfMemory", ("n1",), 253),
    ]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", ()),
        ("node1", ("node1",)),
        ("node[08-11,3]", ("node08", "node09", "node10", "node11", "node3")),
        ("a[1-2],login,b[0-1]-ib", ("a1", "a2", "login", "b0-ib", "b1-ib")),
        ("r[1-2]n[1-2]", ("r1n1", "r1n2", "r2n1", "r2n2")),
    ],
)
def test_lists_of_hosts(text: str, hosts: tuple[str, ...]) -> None:
    assert expand(text) == hosts


RAN = Told(started=True, native_id="7", nodes=("n1",))
EXITED = Told(started=True, nodes=("n1",), ended=True, exit_code=3)
ASKED = Told(started=True, nodes=("n1",), ended=True, exit_code=143, signal=15, asked=True)
SHELL = Told(started=True, nodes=("n1",), ended=True, exit_code=143)
KILLED = Told(started=True, nodes=("n1",), ended=True, exit_code=137, signal=9)


def listed(state: str, code: int | None = 0, *, reason: str = "", restarts: int = 0) -> Listed:
    return Listed(7, "x", state, reason, exit_code=code, restarts=restarts)


@pytest.mark.parametrize(
    ("told", "job", "ending", "code"),
    [
        # The agent's word is enough, whatever Slurm says or does not.
        (EXITED, None, Ending.EXITED, 3),
        (EXITED, listed("RUNNING"), Ending.EXITED, 3),
        (Told(ended=True, exit_code=127, error="no such file"), None, Ending.NOT_STARTED, 127),
        (Told(started=True, ended=True, exit_code=143, signal=15, timed_out=True), None, Ending.TIMED_OUT, 143),
        (Told(started=True, ended=True, exit_code=137, signal=9, out_of_memory=True), None, Ending.OUT_OF_MEMORY, 137),
        # Ended from outside: Slurm knows why.
        (ASKED, listed("TIMEOUT"), Ending.TIMED_OUT, 143),
        (ASKED, listed("CANCELLED"), Ending.CANCELLED, 143),
        (ASKED, listed("PREEMPTED"), Ending.NODE_FAILED, 143),
        (ASKED, listed("FAILED", 143), Ending.SIGNALED, 143),
        (SHELL, listed("CANCELLED"), Ending.CANCELLED, 143),
        (SHELL, listed("PENDING", restarts=1), Ending.NODE_FAILED, None),
        (SHELL, listed("FAILED", 143), Ending.EXITED, 143),
        (SHELL, None, Ending.EXITED, 143),
        (KILLED, listed("OUT_OF_MEMORY", 253), Ending.OUT_OF_MEMORY, 137),
        (KILLED, listed("FAILED", 137), Ending.SIGNALED, 137),
        # The agent could not say it any more.
        (RAN, listed("NODE_FAIL"), Ending.NODE_FAILED, None),
        (RAN, listed("BOOT_FAIL"), Ending.NODE_FAILED, None),
        (RAN, listed("DEADLINE"), Ending.TIMED_OUT, None),
        (RAN, listed("FAILED", 137), Ending.SIGNALED, 137),
        (RAN, listed("COMPLETED", 0), Ending.EXITED, 0),
        (RAN, listed("REQUEUED"), Ending.NODE_FAILED, None),
        (RAN, listed("SPECIAL_EXIT"), Ending.NODE_FAILED, None),
        (RAN, listed("PENDING", restarts=1), Ending.NODE_FAILED, None),
        # It never began.
        (Told(), listed("CANCELLED", 0), Ending.CANCELLED, None),
        (Told(), listed("FAILED", 129, reason="BadConstraints"), Ending.NOT_STARTED, 129),
    ],
)
def test_how_it_ended(told: Told, job: Listed | None, ending: Ending, code: int | None) -> None:
    seen = observe(told, job, asked_slurm=True)
    assert isinstance(seen, Ended)
    assert (seen.outcome.ending, seen.outcome.exit_code) == (ending, code)


def test_nothing_is_lost_because_slurm_cannot_be_asked() -> None:
    assert observe(Told(), None, asked_slurm=False) is None
    assert observe(RAN, None, asked_slurm=False) == Active(("n1",))
    # Why it was ended, Slurm alone can say; it is waited for.
    assert observe(ASKED, None, asked_slurm=False) == Active(("n1",))
    assert observe(SHELL, None, asked_slurm=False) == Active(("n1",))
    lost = observe(RAN, None, asked_slurm=True)
    assert isinstance(lost, Ended)
    assert lost.outcome.ending is Ending.LOST
    forgotten = observe(ASKED, None, asked_slurm=True)
    assert forgotten == Ended(Outcome(Ending.SIGNALED, 143, "ended by signal 15"), ("n1",))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("PENDING", Queued("Priority")),
        ("CONFIGURING", Queued("Priority")),
        ("RUNNING", Active()),
        ("SUSPENDED", Active()),
        ("STOPPED", Active()),
        ("COMPLETING", Active()),
        ("A_STATE_OF_TOMORROW", Active()),
    ],
)
def test_what_goes_on(state: str, expected: object) -> None:
    assert observe(Told(), listed(state, reason="Priority"), asked_slurm=True) == expected


def test_the_table_has_every_state_of_slurms_manual() -> None:
    assert set(MANUAL.split()) <= set(STATES)


def test_of_several_jobs_of_a_name_one_has_the_step() -> None:
    jobs = [Listed(9, "a", "PENDING"), Listed(7, "a", "FAILED"), Listed(8, "a", "RUNNING"), Listed(1, "b", "RUNNING")]
    assert chosen(jobs, "a", "9").id == 9
    assert chosen(jobs, "a", "").id == 8
    assert chosen(jobs, "a", "4711").id == 8
    assert chosen(jobs, "c", "") is None
