"""Long-running tasks: failures, signals, tracked tasks, and that none is left."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.tasks import TaskRunner, stop_on_signals


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Sleeper:
    """Runs until it is cancelled, and says that it was."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.cancelled = False

    async def __call__(self) -> None:
        self.running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def fail() -> None:
    raise ValueError("broken")


async def test_leaving_the_block_ends_what_runs() -> None:
    started, tracked = Sleeper(), Sleeper()
    async with TaskRunner() as runner:
        runner.start("one", started)
        runner.track("two", tracked())
        await started.running.wait()
        await tracked.running.wait()
        assert runner.tracked() == ["two"]
    assert started.cancelled
    assert tracked.cancelled
    assert runner.tracked() == []


async def test_the_first_failure_ends_the_rest_and_is_raised() -> None:
    other = Sleeper()

    async def run() -> None:
        async with TaskRunner() as runner:
            runner.start("other", other)
            await other.running.wait()
            runner.start("failing", fail)
            await asyncio.Event().wait()

    with pytest.raises(ValueError, match="broken"):
        await run()
    assert other.cancelled


async def test_an_error_of_the_block_ends_the_rest_and_is_raised() -> None:
    other = Sleeper()

    async def run() -> None:
        async with TaskRunner() as runner:
            runner.start("other", other)
            await other.running.wait()
            await fail()

    with pytest.raises(ValueError, match="broken"):
        await run()
    assert other.cancelled


async def test_a_tracked_failure_is_logged_told_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[str, str]] = []
    other = Sleeper()
    with caplog.at_level(logging.ERROR):
        async with TaskRunner() as runner:
            runner.track("other", other())
            task = runner.track("failing", fail(), on_failure=lambda name, error: told.append((name, str(error))))
            await asyncio.wait([task])
            assert not other.cancelled
            assert runner.tracked() == ["other"]
    assert told == [("failing", "broken")]
    assert "task failing failed" in caplog.text
    assert "broken" in caplog.text


async def test_one_task_a_name() -> None:
    async with TaskRunner() as runner:
        runner.track("a", Sleeper()())
        with pytest.raises(BeamwireError) as caught:
            runner.track("a", Sleeper()())
        assert caught.value.reason is Reason.ILLEGAL_STATE
        await runner.cancel("a")
        runner.track("a", Sleeper()())
        await runner.cancel("none")


async def test_cancelling_one_waits_for_its_end() -> None:
    ended: list[str] = []

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.append("tidied")

    async with TaskRunner() as runner:
        runner.track("a", slow_to_end())
        await asyncio.sleep(0)
        await runner.cancel("a")
        assert ended == ["tidied"]
        assert runner.tracked() == []


async def test_a_task_cancelled_before_it_began_leaves_no_warning() -> None:
    async with TaskRunner() as runner:
        runner.track("a", Sleeper()())
        runner.start("b", Sleeper())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    tracked, drained = Sleeper(), False
    async with TaskRunner() as runner:
        runner.track("a", tracked())

        async def drain() -> None:
            nonlocal drained
            assert not tracked.cancelled
            with pytest.raises(BeamwireError) as caught:
                runner.track("late", Sleeper()())
            assert caught.value.reason is Reason.DRAINING
            drained = True

        asyncio.get_running_loop().call_later(0.02, os.kill, os.getpid(), number)
        await runner.run_until_signal(drain)
    assert drained
    assert tracked.cancelled
    assert signal.getsignal(number) is before


async def test_a_failure_ends_the_wait_for_a_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)

    async def run() -> None:
        async with TaskRunner() as runner:
            runner.start("failing", fail)
            await runner.run_until_signal()

    with pytest.raises(ValueError, match="broken"):
        await run()
    assert signal.getsignal(signal.SIGTERM) is before


async def test_handlers_of_others_are_put_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(stop.wait(), 5)
        assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
