"""What Slurm's states mean for a job, and how a step ended by what Slurm and the agent on the node say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from beamwire.services.job.backends.interface import Active, Ended, Ending, Observation, Outcome, Queued
from beamwire.services.job.backends.slurm_commands import Listed

QUEUED: Final = "QUEUED"
ACTIVE: Final = "ACTIVE"
# Back in the queue after it had run: nothing of it runs, and it must not run again.
AGAIN: Final = "AGAIN"
# A shell whose child was ended by signal n ends with 128 + n.
_SHELL_SIGNALLED: Final = 128

STATES: Final[dict[str, str | Ending]] = {
    "PENDING": QUEUED,
    # Its nodes are being booted.
    "CONFIGURING": QUEUED,
    "POWER_UP_NODE": QUEUED,
    "RESV_DEL_HOLD": QUEUED,
    "RUNNING": ACTIVE,
    "SUSPENDED": ACTIVE,
    "STOPPED": ACTIVE,
    "SIGNALING": ACTIVE,
    "RESIZING": ACTIVE,
    "EXPEDITING": ACTIVE,
    # Its processes have ended, or are being ended: it is not over before Slurm says so.
    "COMPLETING": ACTIVE,
    "STAGE_OUT": ACTIVE,
    "REQUEUED": AGAIN,
    "REQUEUE_HOLD": AGAIN,
    "REQUEUE_FED": AGAIN,
    "SPECIAL_EXIT": AGAIN,
    "COMPLETED": Ending.EXITED,
    "FAILED": Ending.EXITED,
    "CANCELLED": Ending.CANCELLED,
    # Another cluster of the federation has it.
    "REVOKED": Ending.CANCELLED,
    "TIMEOUT": Ending.TIMED_OUT,
    "DEADLINE": Ending.TIMED_OUT,
    "OUT_OF_MEMORY": Ending.OUT_OF_MEMORY,
    "NODE_FAIL": Ending.NODE_FAILED,
    "BOOT_FAIL": Ending.NODE_FAILED,
    "PREEMPTED": Ending.NODE_FAILED,
    "RECONFIG_FAIL": Ending.NODE_FAILED,
    "LAUNCH_FAILED": Ending.NOT_STARTED,
}
# What a state means that a newer Slurm has: it goes on.
UNKNOWN: Final = ACTIVE

# As shells say in an exit code that a signal ended a program.
SIGNAL_BASE: Final = 128

_REASONS: Final = {
    "TIMEOUT": "Slurm's limit of time ended it",
    "DEADLINE": "it could not end before its deadline",
    "OUT_OF_MEMORY": "it needed more memory than Slurm gave it",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "PREEMPTED": "it was preempted",
    "CANCELLED": "it was cancelled at Slurm",
    "REVOKED": "another cluster has it",
    "RECONFIG_FAIL": "its node could not be configured",
}


@dataclass(frozen=True)
class Told:
    """What the agent on the node wrote into the step's directory."""

    started: bool = False
    native_id: str = ""
    nodes: tuple[str, ...] = ()
    ended: bool = False
    exit_code: int | None = None
    signal: int | None = None
    error: str = ""
    asked: bool = False
    timed_out: bool = False
    out_of_memory: bool = False

    @property
    def certain(self) -> bool:
        """Whether it ended by itself, so that Slurm has no other word to say on it.

        Slurm ends a program with signals that need not come to its agent first, nor to a shell before its child.
        """
        if not self.ended or self.asked:
            return False
        signalled = self.signal is not None or (self.exit_code or 0) > _SHELL_SIGNALLED
        return not signalled or self.timed_out or self.out_of_memory


def observe(told: Told, listed: Listed | None, *, asked_slurm: bool) -> Observation | None:
    """Return how a step is; None if that cannot be said now.

    Args:
        told: what the agent wrote.
        listed: what Slurm knows of it, or its accounting.
        asked_slurm: whether Slurm was asked and answered. Without, no job is lost.
    """
    nodes = (listed.nodes if listed else ()) or told.nodes
    if told.certain:
        return Ended(by_agent(told), nodes)
    if listed is None:
        if asked_slurm:
            return Ended(by_agent(told) if told.ended else _lost(told), nodes)
        return Active(nodes) if told.started else None
    meaning = STATES.get(listed.state, UNKNOWN)
    again = meaning == AGAIN or (meaning == QUEUED and listed.restarts > 0)
    if again and told.started:
        words = f"Slurm has put it back into the queue ({listed.reason or listed.state}); it is not run twice"
        return Ended(Outcome(Ending.NODE_FAILED, None, words), nodes)
    if isinstance(meaning, Ending):
        return Ended(_ending(told, listed, meaning), nodes)
    if told.started or meaning == ACTIVE:
        return Active(nodes)
    return Queued(listed.reason)


def _ending(told: Told, listed: Listed, meaning: Ending) -> Outcome:
    if meaning in (Ending.EXITED, Ending.NOT_STARTED):
        if told.ended:
            return by_agent(told)
        if not told.started and listed.state != "COMPLETED":
            words = f"Slurm could not start it: {listed.reason or listed.state}"
            return Outcome(Ending.NOT_STARTED, listed.exit_code or None, words)
        return _by_code(listed.exit_code)
    # The agent saw the reason itself, or how the program took its end.
    if told.timed_out or told.out_of_memory:
        return by_agent(told)
    code = told.exit_code if told.ended else None
    words = _REASONS.get(listed.state, listed.state)
    return Outcome(meaning, code, f"{words} ({listed.reason})" if listed.reason else words)


def by_agent(told: Told) -> Outcome:
    """Return how a step ended, of which the agent said it."""
    if told.error:
        return Outcome(Ending.NOT_STARTED, told.exit_code, f"it could not be started: {told.error}")
    if told.out_of_memory:
        return Outcome(Ending.OUT_OF_MEMORY, told.exit_code, "it needed more memory than it may have")
    if told.timed_out:
        return Outcome(Ending.TIMED_OUT, told.exit_code, "its time was over")
    if told.signal is not None:
        return Outcome(Ending.SIGNALED, told.exit_code, f"ended by signal {told.signal}")
    return Outcome(Ending.EXITED, told.exit_code, f"exit code {told.exit_code}")


def _by_code(code: int | None) -> Outcome:
    if code is None:
        return Outcome(Ending.LOST, None, "Slurm does not say how it ended")
    if code > SIGNAL_BASE:
        return Outcome(Ending.SIGNALED, code, f"ended by signal {code - SIGNAL_BASE}")
    return Outcome(Ending.EXITED, code, f"exit code {code}")


def _lost(told: Told) -> Outcome:
    where = f"it was started on {', '.join(told.nodes)}" if told.started and told.nodes else "it was submitted"
    return Outcome(Ending.LOST, None, f"{where}, and neither Slurm nor its accounting knows it any more")
