"""Whatever happens to a transfer, in whatever order, and whenever its service dies: its history is one of the machine.

Hypothesis makes up what the buffer, the streamer, the caller and the service do; at the end everything must have
come to an end, once.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from beamwire.mesh.errors import BeamwireError
from beamwire.services.request import saga
from beamwire.services.request.model import TRANSFER_STATES, TransferRecord, TransferState
from tests.integration.requestplay import World

NAME, BUFFER, JOB = "transfers/t1", "buffers/of-t1", "jobs/of-t1"
# Seconds that the saga is given after each step; it may be in the middle of anything when the next one comes.
MOMENT = 0.003


class TransferMachine(RuleBasedStateMachine):
    """One transfer, and everything that can happen to it."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(prefix="machine-")
        self._runner = asyncio.Runner()
        self._settle, saga.SETTLE_TIMEOUT = saga.SETTLE_TIMEOUT, 0.2
        self._ending, saga.ENDING_TIMEOUT = saga.ENDING_TIMEOUT, 0.5
        self.seen: list[TransferRecord] = []

    @initialize(ready=st.booleans(), remote=st.booleans())
    def create(self, ready: bool, remote: bool) -> None:
        self.world = World(Path(self._directory.name) / "request.sqlite")
        self.world.buffers.ready_at_once = ready
        self.world.jobs.output = b"answer"
        self._runner.run(self.world.start())
        self.run(self.world.create(lease=60, placement={"backend": "slurm"} if remote else {}))

    def run(self, work) -> object:
        async def do() -> object:
            result = await work
            await asyncio.sleep(MOMENT)
            self.seen.append(await self.world.store.require(NAME))
            return result

        return self._runner.run(do())

    async def nothing(self) -> None: ...

    @rule()
    def wait(self) -> None:
        self.run(self.nothing())

    @rule()
    def cancel(self) -> None:
        self.run(self.world.transfers.cancel(NAME))

    @rule(seconds=st.integers(1, 3600))
    def extend(self, seconds: int) -> None:
        before = self.seen[-1]
        with suppress(BeamwireError):
            self.run(self.world.transfers.extend(NAME, timedelta(seconds=seconds)))
        after = self.seen[-1]
        assert after.expire_time >= before.expire_time

    @rule()
    def expire(self) -> None:
        """Its time is over: as if it had been created long ago."""

        async def shorten() -> None:
            long_ago = self.seen[0].create_time - timedelta(seconds=1)
            await self.world.store.change(NAME, lambda r: {} if r.ended else {"expire_time": long_ago})

        self.run(shorten())

    # What is there depends on time: a step that cannot be taken now is left out.
    @rule(step=st.sampled_from(["ready", "draining", "finish", "fail"]))
    def buffer(self, step: str) -> None:
        buffers = self.world.buffers
        if BUFFER not in buffers.buffers or buffers.buffers[BUFFER].view.ended:
            return
        if step == "draining":
            buffers.change(BUFFER, state="DRAINING", end_cause="DONE")
        elif step != "finish" or buffers.buffers[BUFFER].view.connect_string:
            getattr(buffers, step)(BUFFER)
        self.run(self.nothing())

    @rule(newest=st.booleans(), state=st.sampled_from(["ACTIVE", "COMPLETED", "FAILED", "CANCELED"]))
    def job(self, newest: bool, state: str) -> None:
        if not self.world.jobs.created:
            return
        name = self.world.jobs.created[-1 if newest else 0]
        if not self.world.jobs.jobs[name].view.ended:
            self.world.jobs.become(name, state, "it broke" if state == "FAILED" else "")
            self.run(self.nothing())

    @rule()
    def die_and_come_back(self) -> None:
        self.run_twice(self.world.stop, self.world.start)

    def run_twice(self, stop, start) -> None:
        async def both() -> None:
            await stop()
            await start()

        self.run(both())

    @invariant()
    def the_history_is_one_of_the_machine(self) -> None:
        states = [TransferState(line.state) for line in self.seen[-1].transitions] if self.seen else []
        for before, after in itertools.pairwise(states):
            if before != after:
                TRANSFER_STATES.check(before, after)

    @invariant()
    def an_end_is_an_end(self) -> None:
        ended = [record for record in self.seen if record.ended]
        assert all(record.etag == ended[0].etag for record in ended)

    @invariant()
    def nothing_is_started_twice_or_before_its_time(self) -> None:
        if not self.seen:
            return
        for started in (self.world.buffers.created, self.world.jobs.created):
            assert len(started) == len(set(started))
        if JOB in self.world.jobs.created:
            assert BUFFER in self.world.buffers.buffers, "the buffer is created before the streamer"

    def teardown(self) -> None:
        try:
            if self.seen:
                self.run(self.come_to_an_end())
                self._runner.run(self.world.stop())
        finally:
            self._runner.close()
            self._directory.cleanup()
            saga.SETTLE_TIMEOUT, saga.ENDING_TIMEOUT = self._settle, self._ending

    async def come_to_an_end(self) -> None:
        """The caller gives up: whatever has happened before, nothing is left that runs."""
        await self.world.transfers.cancel(NAME)
        ended = await self.world.until(lambda record: record.ended)
        self.seen.append(ended)
        assert all(buffer.view.ended for buffer in self.world.buffers.buffers.values())
        assert all(job.view.ended for job in self.world.jobs.jobs.values())
        assert (ended.error is not None) == (ended.state in ("FAILED", "EXPIRED"))
        assert ended.receipt is not None or ended.state != "SUCCEEDED"


TestTransferMachine = TransferMachine.TestCase
TestTransferMachine.settings = settings(
    max_examples=60,
    stateful_step_count=16,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    # A history that is wrong is told as it is: to shorten it takes longer than the test may.
    phases=(Phase.explicit, Phase.generate),
)
