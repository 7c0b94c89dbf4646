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


@pytest.mark.parametrize("fault", [ValueError("broken"), TimeoutError("slow"), asyncio.CancelledError("of another")])
async def test_a_fault_of_a_background_task_ends_nothing(
    fault: BaseException, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "FIRST_PAUSE", 0.01)
    again = asyncio.Event()
    other = Sleeper()
    faults = [fault, fault]

    async def failing() -> None:
        if faults:
            raise faults.pop()
        again.set()
        await asyncio.Event().wait()

    with caplog.at_level(logging.ERROR):
        async with TaskRunner() as runner:
            runner.start("other", other)
            await other.running.wait()
            runner.start("trust of caches", failing)
            async with asyncio.timeout(5):
                await again.wait()
            assert not other.cancelled
    assert caplog.text.count("trust of caches") == 2
    assert type(fault).__name__ in caplog.text


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


async def test_what_hangs_when_it_is_cancelled_is_named_and_cut_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "STOP_PATIENCE", 0.05)
    tidying = Sleeper()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await tidying()
            raise

    async with asyncio.timeout(5), TaskRunner() as runner:
        runner.keep("buffers/b", endless)
        await asyncio.sleep(0)
    assert tidying.cancelled
    assert caplog.text.count("buffers/b has not ended 0.05 s after it was cancelled") == 1


async def test_what_ignores_every_cancellation_is_left_to_the_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "STOP_PATIENCE", 0.05)
    monkeypatch.setattr(tasks, "STOP_MARGIN", 0.05)
    released = asyncio.Event()

    async def deaf() -> None:
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await released.wait()

    try:
        async with asyncio.timeout(5), TaskRunner() as runner:
            runner.start("deaf", deaf)
            await asyncio.sleep(0)
        assert caplog.text.count("deaf has not ended") == 2
    finally:
        released.set()
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=5)


async def test_what_fails_when_it_is_cancelled_is_not_begun_again(caplog: pytest.LogCaptureFixture) -> None:
    began = 0

    async def failing() -> None:
        nonlocal began
        began += 1
        try:
            await asyncio.Event().wait()
        finally:
            await fail()

    async with TaskRunner() as runner:
        runner.keep("a", failing)
        await asyncio.sleep(0)
    assert began == 1
    assert "a failed as it was ended" in caplog.text


async def test_a_task_cancelled_before_it_began_leaves_no_warning() -> None:
    async with TaskRunner() as runner:
        runner.keep("a", Sleeper())
        runner.start("b", Sleeper())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    kept, of_last_call = Sleeper(), Sleeper()
    async with TaskRunner() as runner:
        runner.keep("a", kept)

        async def drain() -> None:
            assert not kept.cancelled
            runner.keep("b", of_last_call)
            await of_last_call.running.wait()

        asyncio.get_running_loop().call_later(0.02, os.kill, os.getpid(), number)
        await runner.run_until_signal(drain)
        with pytest.raises(BeamwireError) as caught:
            runner.keep("late", Sleeper())
        assert caught.value.reason is Reason.DRAINING
    assert kept.cancelled
    assert of_last_call.cancelled
    assert signal.getsignal(number) is before


async def test_what_fails_while_the_process_drains_is_raised() -> None:
    before = signal.getsignal(signal.SIGTERM)

    async def run() -> None:
        async with TaskRunner() as runner:
            asyncio.get_running_loop().call_later(0.02, os.kill, os.getpid(), signal.SIGTERM)
            await runner.run_until_signal(fail)

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
