"""Small disks, which a test can fill. Need root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def disks_missing() -> str:
    """Why no file system can be mounted here, for a test to skip with; empty if one can."""
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no file system can be mounted here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """A file system of its own at a directory, of a size such as `32M`."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
