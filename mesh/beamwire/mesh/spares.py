"""Interpreters that are kept ready for the programs that a service starts again and again.

Half of what a small transfer takes is Python importing modules. After a program was started another interpreter is
made that has imported the same (see `beamwire.mesh.warm`); the next such program is run by that one. Each runs one
program, so that programs share nothing. One that nobody wanted for ten minutes ends.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from beamwire.mesh import shim
from beamwire.mesh.warm import READY

log = logging.getLogger(__name__)

SHIM: Final = (sys.executable, "-S", "-E", shim.__file__)
# Seconds. What was just started has the processor for itself for a moment.
PAUSE: Final = 5.0
LIFETIME: Final = 600.0
START_TIMEOUT: Final = 30.0
STOP_TIMEOUT: Final = 5.0
# Kinds of programs; of each one interpreter.
MOST: Final = 4
# What differs from one start of a program to the next, and matters to no import.
_PASSING: Final = ("BEAMWIRE_", "TRACEPARENT", "TMPDIR")


@dataclass(frozen=True)
class Program:
    """A module that is run by Python, what it imports, and the environment in which it does."""

    module: str
    imports: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]

    @property
    def command(self) -> list[str]:
        """The command line of an interpreter that waits for it."""
        return [sys.executable, "-P", "-m", "beamwire.mesh.warm", self.module, *self.imports]


class Spare(Protocol):
    """An interpreter that is ready."""

    @property
    def alive(self) -> bool:
        """Whether it still waits."""
        ...

    async def end(self) -> None:
        """End it, unused."""
        ...


S = TypeVar("S", bound=Spare)


class Spares(Generic[S]):
    """Keeps one interpreter for each program that was started in the last minutes.

    Args:
        imports: of the modules that interpreters are kept for, what these will need.
        make: starts an interpreter, and returns once it is ready.
    """

    def __init__(self, imports: Mapping[str, tuple[str, ...]], make: Callable[[Program], Awaitable[S]]) -> None:
        self._imports = imports
        self._make = make
        self._ready: dict[Program, S] = {}
        # When each was last wanted, the latest last; and when the next may be made of those that lack one.
        self._wanted: dict[Program, float] = {}
        self._due: dict[Program, float] = {}
        self._changed = asyncio.Event()

    def take(self, argv: Sequence[str], env: Mapping[str, str]) -> S | None:
        """Return an interpreter for a command line, now the caller's; None if there is none.

        Another is made in a moment, if that is `python -m` of a module whose imports are known.
        """
        if len(argv) < 3 or argv[0] != sys.executable or argv[1] != "-m" or argv[2] not in self._imports:
            return None
        lasting = {name: value for name, value in env.items() if not name.startswith(_PASSING)}
        program = Program(argv[2], self._imports[argv[2]], tuple(sorted(lasting.items())))
        self._wanted.pop(program, None)
        self._wanted[program] = time.monotonic()
        self._due.setdefault(program, time.monotonic() + PAUSE)
        self._changed.set()
        spare = self._ready.get(program)
        if spare is None or not spare.alive:
            return None
        return self._ready.pop(program)

    async def run(self) -> None:
        """Make those that are wanted, and end those that are not any more, until it is cancelled."""
        try:
            while True:
                await self._retire()
                await self._make_next()
                await self._rest()
        finally:
            await asyncio.gather(*(spare.end() for spare in self._ready.values()))
            self._ready.clear()

    async def _retire(self) -> None:
        over = time.monotonic() - LIFETIME
        kept = [program for program, wanted in self._wanted.items() if wanted > over][-MOST:]
        for program in [program for program in self._wanted if program not in kept]:
            del self._wanted[program]
            self._due.pop(program, None)
        for program in [program for program, spare in self._ready.items() if program not in kept or not spare.alive]:
            await self._ready.pop(program).end()

    async def _make_next(self) -> None:
        now = time.monotonic()
        for program in [program for program, due in self._due.items() if due <= now]:
            del self._due[program]
            if program in self._ready:
                continue
            try:
                async with asyncio.timeout(START_TIMEOUT):
                    self._ready[program] = await self._make(program)
            except (OSError, TimeoutError) as error:
                # The program itself is started without, and says what is wrong.
                log.warning("no interpreter could be kept ready for %s: %s", program.module, error or "it took long")
                self._wanted.pop(program, None)

    async def _rest(self) -> None:
        """Wait until something is to be done."""
        now = time.monotonic()
        times = [*self._due.values(), *(wanted + LIFETIME for wanted in self._wanted.values())]
        try:
            async with asyncio.timeout(max(0.0, min(times) - now) if times else None):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()


class PipedSpare:
    """An interpreter with pipes for all it reads and writes, a child of this process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def make(cls, program: Program, *, limit: int) -> PipedSpare:
        """Start one, which may later print lines of `limit` bytes. OSError if it does not become ready."""
        process = await asyncio.create_subprocess_exec(
            *program.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(program.environment),
            cwd="/",
            limit=limit,
        )
        spare = cls(process)
        assert process.stdout is not None
        try:
            said = await process.stdout.readline()
        except BaseException:
            await spare.end()
            raise
        if said != READY:
            await spare.end()
            raise OSError(f"it ended with {process.returncode}")
        return spare

    @property
    def alive(self) -> bool:
        """Whether it still waits."""
        return self.process.returncode is None

    async def end(self) -> None:
        """End it."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


class ShimSpare:
    """An interpreter that waits below a shim of its own; it ends with this process unless a program is run by it."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen

    @classmethod
    async def make(cls, program: Program) -> ShimSpare:
        """Start one. OSError if it does not become ready."""
        spare = cls(_popen(program))
        assert spare.popen.stdout is not None
        try:
            said = await asyncio.to_thread(spare.popen.stdout.readline)
        except BaseException:
            await spare.end()
            raise
        if said != READY:
            await spare.end()
            raise OSError(f"it ended with {spare.popen.returncode}")
        return spare

    @property
    def alive(self) -> bool:
        """Whether it still waits."""
        return self.popen.poll() is None

    async def end(self) -> None:
        """End it."""
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()
        try:
            self.popen.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        # Not before: somebody may wait for what it says.
        self.popen.stdout.close()


def _popen(program: Program) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*SHIM, "--spare", *program.command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(program.environment),
        cwd="/",
        start_new_session=True,
    )
