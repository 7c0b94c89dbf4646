"""A Python that has imported what a program needs before it is told to run it.

Run as `python -P -m beamwire.mesh.warm MODULE [IMPORT…]`: it imports, says `ready` on standard output, and waits on
standard input for one line of JSON, its order: the `argv` of the program, whose module is run as `python -m MODULE`
would, the `env` it has, its `cwd`, and where its `stdin`, `stdout` and `stderr` are, if they are not this process's
own. Without an order it ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from typing import Final

READY: Final = b"ready\n"
_APPEND: Final = os.O_CREAT | os.O_WRONLY | os.O_APPEND


def order_of(command: Sequence[str], env: Mapping[str, str], cwd: str) -> bytes:
    """Return the line that has `python -m MODULE ARGUMENTS…` run with the streams that there are."""
    return json.dumps({"argv": list(command[2:]), "env": dict(env), "cwd": cwd, "files": {}}).encode() + b"\n"


def main() -> None:
    """Import, wait, and become the program."""
    module, *imports = sys.argv[1:]
    for name in imports:
        importlib.import_module(name)
    # None of it will ever be garbage.
    gc.collect()
    gc.freeze()
    # Who keeps this one may be gone, which the end of the input says too.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, READY)
    line = _line()
    if not line:
        return
    order = json.loads(line)
    _open(order["files"])
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.argv[:] = order["argv"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _line() -> bytes:
    """Return the first line of standard input, and not a byte of what follows: that is the program's."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


def _open(files: Mapping[str, str]) -> None:
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", _APPEND), (2, "stderr", _APPEND)):
        if name in files:
            opened = os.open(files[name], flags, 0o600)
            os.dup2(opened, number)
            os.close(opened)


if __name__ == "__main__":
    main()
