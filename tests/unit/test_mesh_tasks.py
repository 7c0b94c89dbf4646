"""Long-running tasks: failures, signals, kept tasks, and that none is left."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator

import pytest

from beamwire.mesh import tasks
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
    started, kept = Sleeper(), Sleeper()
    async with TaskRunner() as runner:
        runner.start("one", started)
        runner.keep("two", kept)
        await started.running.wait()
        await kept.running.wait()
        assert runner.kept() == ["two"]
    assert started.cancelled
    assert kept.cancelled
    assert runner.kept() == []


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


async def test_work_that_fails_is_logged_and_begun_again_and_harms_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "FIRST_PAUSE", 0.01)
    attempts = 0
    other = Sleeper()

    async def third_time_lucky() -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            await fail()

    with caplog.at_level(logging.ERROR):
        async with TaskRunner() as runner:
            runner.keep("other", other)
            runner.keep("failing", third_time_lucky)
            await asyncio.wait_for(runner.wait("failing"), 5)
            assert not other.cancelled
            assert runner.kept() == ["other"]
    assert attempts == 3
    assert caplog.text.count("failing failed") == 2
    assert "broken" in caplog.text


async def test_one_task_a_name() -> None:
    first, second, third = Sleeper(), Sleeper(), Sleeper()
    async with TaskRunner() as runner:
        runner.keep("a", first)
        runner.keep("a", second)
        await first.running.wait()
        await runner.cancel("a")
        runner.keep("a", third)
        await third.running.wait()
        await runner.cancel("none")
    assert not second.running.is_set()


async def test_what_is_awaited_to_the_end_ends_before_the_cancellation_goes_on() -> None:
    done: list[str] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def action() -> None:
        begun.set()
        await go.wait()
        done.append("action")

    task = asyncio.create_task(tasks.to_the_end(action(), 5))
    await begun.wait()
    task.cancel()
    # Comes after the cancellation.
    asyncio.get_running_loop().call_soon(go.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["action"]


async def test_what_does_not_end_is_cancelled_after_a_while() -> None:
    endless = Sleeper()
    task = asyncio.create_task(tasks.to_the_end(endless(), 0.01))
    await endless.running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert endless.cancelled


async def test_cancelling_one_waits_for_its_end() -> None:
    ended: list[str] = []

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            # A task that takes a while to end.
            await asyncio.sleep(0.01)
            ended.append("tidied")

    async with TaskRunner() as runner:
        runner.keep("a", slow_to_end)
        await asyncio.sleep(0)
        await runner.cancel("a")
        assert ended == ["tidied"]
        assert runner.kept() == []


async def test_a_task_cancelled_before_it_began_leaves_no_warning() -> None:
    async with TaskRunner() as runner:
        runner.keep("a", Sleeper())
        runner.start("b", Sleeper())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    kept, drained = Sleeper(), False
    async with TaskRunner() as runner:
        runner.keep("a", kept)

        async def drain() -> None:
            nonlocal drained
            assert not kept.cancelled
            with pytest.raises(BeamwireError) as caught:
                runner.keep("late", Sleeper())
            assert caught.value.reason is Reason.DRAINING
            drained = True

        asyncio.get_running_loop().call_later(0.02, os.kill, os.getpid(), number)
        await runner.run_until_signal(drain)
    assert drained
    assert kept.cancelled
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
