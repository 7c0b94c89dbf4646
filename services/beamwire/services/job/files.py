"""The files of a job: what goes to its directory and comes from there, and nothing of what lies outside of it.

A job may put links into its directory that lead anywhere. So a path is walked from the directory's descriptor, one name
after the other, and no link is followed.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.job.shares import Share

log = logging.getLogger(__name__)

MAX_PATH_BYTES: Final = 1024
MAX_PIECE_BYTES: Final = 1024 * 1024
READ_BYTES: Final = 256 * 1024
MOST_COUNTED: Final = 1_000_000
"""Files of one job whose sizes are added up: a job that has more must not keep the service walking."""
# Beside `files/`, so that the job never sees a part of a file.
UPLOADS: Final = "uploads"
ASIDE: Final = "."
"""With which the name of the directory of a job that is being removed begins, and no id does."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_ESCAPES: Final = frozenset({errno.ELOOP, errno.ENOTDIR})


@dataclass(frozen=True)
class FileEntry:
    """A file of a job: its path relative to the job's directory, its size in bytes, and when it was written last."""

    path: str
    size: int
    update_time: datetime
    executable: bool


def check_path(field: str, path: str) -> str:
    """Return a path, if it can be that of a file in a job's directory; INVALID_FIELD otherwise."""
    parts = path.split("/")
    if len(path.encode()) > MAX_PATH_BYTES:
        raise invalid_field(field, f"must have at most {MAX_PATH_BYTES} bytes")
    if not path.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise invalid_field(field, f"must be relative to the job's directory, without . and .., not {path[:100]!r}")
    return path


def check_sha256(field: str, text: str) -> str:
    """Return a SHA-256 in lower case; INVALID_FIELD if it is none."""
    if not _SHA256.fullmatch(text.lower()):
        raise invalid_field(field, f"must be 64 hexadecimal digits, as sha256sum prints them, not {text[:100]!r}")
    return text.lower()


class JobFiles:
    """The files of one job.

    Args:
        job_directory: the job's own; the files are in `files/`.
    """

    def __init__(self, job_directory: Path) -> None:
        self._files = job_directory / "files"
        self._uploads = job_directory / UPLOADS

    def upload(self, path: str, *, size: int, sha256: str, executable: bool, room: int, share: Share) -> Upload:
        """Begin to write a file, of which nobody sees anything before it is there whole.

        Args:
            path: where, relative to the job's directory.
            size: how many bytes it will have; 0 if that is not known.
            sha256: its checksum.
            executable: whether it may be executed.
            room: how many bytes the job's files may have altogether.
            share: what all files of its owner may have.
        """
        for directory in (self._files, self._uploads):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        left = room - self.used()
        if size > left:
            raise _too_large(room)
        share.take(size)
        try:
            return Upload(self._files, self._uploads, path, size, sha256, executable, size or left, room, share)
        except BaseException:
            share.close()
            raise

    def used(self) -> int:
        """Return how many bytes the files have altogether, MOST_COUNTED of them at the most."""
        return sum(entry.size for entry in islice(self._walk(), MOST_COUNTED))

    def list(self, after: str, limit: int) -> list[FileEntry]:
        """Return the first files whose paths come after `after`, in the order of their paths."""
        entries = [entry for entry in self._walk() if entry.path > after]
        return sorted(entries, key=lambda entry: entry.path)[:limit]

    def _walk(self) -> Iterator[FileEntry]:
        if not self._files.is_dir():
            return
        for root, _, names, fd in os.fwalk(self._files):
            for name in names:
                with suppress(OSError):
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield _entry(os.path.relpath(Path(root) / name, self._files), status)

    async def read(self, path: str, offset: int) -> AsyncIterator[tuple[FileEntry, int, bytes, str]]:
        """Yield a file in pieces: the file, where the piece begins, the piece, and with the last, empty one the SHA-256
        of all bytes from the beginning of the file.

        Raises:
            BeamwireError: RESOURCE_NOT_FOUND, or INVALID_FIELD for what is no file or leads out of the directory.
        """
        fd = await asyncio.to_thread(self._open, path)
        try:
            entry = _entry(path, os.fstat(fd))
            if offset > entry.size:
                raise invalid_field("offset_bytes", f"{path} has {entry.size} bytes only")
            digest, position = hashlib.sha256(), 0
            while piece := await asyncio.to_thread(os.pread, fd, READ_BYTES, position):
                digest.update(piece)
                shown = piece[max(0, offset - position) :]
                position += len(piece)
                if shown:
                    yield entry, position - len(shown), shown, ""
            yield _entry(path, os.fstat(fd), position), position, b"", digest.hexdigest()
        finally:
            os.close(fd)

    def _open(self, path: str) -> int:
        return open_file(self._files, path)


def open_file(directory: Path, path: str) -> int:
    """Open a file below a directory that a job can write to, and return its descriptor.

    Raises:
        BeamwireError: RESOURCE_NOT_FOUND, or INVALID_FIELD for what is no file or leads out of the directory.
    """
    # Not to wait for the writer of a pipe that the job made.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _parent(directory, path, make=False) as (parent, name), _explained(path):
        fd = os.open(name, flags, dir_fd=parent)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise invalid_field("path", f"{path} is no file")
    return fd


class Upload:
    """A file that is being written; `finish` puts it in its place."""

    def __init__(
        self,
        files: Path,
        uploads: Path,
        path: str,
        size: int,
        sha256: str,
        executable: bool,
        most: int,
        room: int,
        share: Share,
    ) -> None:
        self._share = share
        self._files = files
        self._path = path
        self._size = size
        self._sha256 = sha256
        self._executable = executable
        self._most = most
        self._room = room
        self._part = uploads / secrets.token_hex(8)
        self._digest = hashlib.sha256()
        self._written = 0
        self._fd = os.open(self._part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes) -> None:
        """Add the next bytes."""
        if len(data) > MAX_PIECE_BYTES:
            raise invalid_field("data", f"a piece has at most {MAX_PIECE_BYTES} bytes")
        if self._written + len(data) > self._most:
            if self._size:
                raise invalid_field("data", f"there are more than the {self._size} bytes that start.size_bytes says")
            raise _too_large(self._room)
        if not self._size:
            self._share.take(len(data))
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._digest.update(data)
        self._written += len(data)

    def finish(self) -> FileEntry:
        """Put the file in its place, on the disk, if it is what was announced; INVALID_FIELD if not."""
        if self._size and self._written != self._size:
            raise invalid_field("start.size_bytes", f"{self._written} bytes came, not {self._size}; send it again")
        found = self._digest.hexdigest()
        if found != self._sha256:
            raise invalid_field("start.sha256", f"what came has the SHA-256 {found}; send it again")
        # Others may have come meanwhile, each of which had room when it began.
        if JobFiles(self._files.parent).used() + self._written > self._room:
            raise _too_large(self._room)
        os.fchmod(self._fd, 0o700 if self._executable else 0o600)
        os.fsync(self._fd)
        with _parent(self._files, self._path, make=True) as (parent, name), _explained(self._path):
            os.rename(self._part, name, dst_dir_fd=parent)
            os.fsync(parent)
        return _entry(self._path, os.fstat(self._fd))

    def close(self) -> None:
        """Let go of the file; what was not finished is gone."""
        os.close(self._fd)
        self._part.unlink(missing_ok=True)
        self._share.close()


def remove(path: Path) -> None:
    """Remove a file, or whatever a job has put in its place, with all that is in it."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def put_aside(directory: Path, aside: Path) -> None:
    """Let a directory make room for another of its name; one that is gone has, and one that cannot is emptied."""
    try:
        directory.rename(aside)
    except FileNotFoundError:
        pass
    except OSError:
        # A full disk may have no room for another name.
        shutil.rmtree(directory, ignore_errors=True)


def remove_aside(jobs: Path) -> None:
    """Remove what was put aside by whoever had no time to remove it."""
    for directory in jobs.glob(f"{ASIDE}*"):
        shutil.rmtree(directory, ignore_errors=True)


def adopt(jobs: Path) -> None:
    """Make what an earlier release left of jobs the first of their steps: each ran in the job's directory itself."""
    for claim in jobs.glob("*/process.json"):
        first = claim.parent / "steps" / "1"
        try:
            if not first.exists():
                first.parent.mkdir(mode=0o700, exist_ok=True)
                first.symlink_to("..")
        except OSError as error:
            # It is no job of that release, and one job must not keep the service from being served.
            log.warning("%s is left as it is: %s", claim.parent, error)


@contextmanager
def _parent(files: Path, path: str, *, make: bool) -> Iterator[tuple[int, str]]:
    """The directory that a path is in, as a descriptor, and the last name of the path."""
    *parents, name = path.split("/")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with _explained(path):
        fd = os.open(files, flags)
    try:
        for part in parents:
            with _explained(path):
                if make:
                    _make(part, fd)
                below = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd, name
    finally:
        os.close(fd)


def _make(name: str, parent: int) -> None:
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
        os.fsync(parent)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"the job has no file {path}", metadata={"path": path}) from None
    except IsADirectoryError:
        raise invalid_field("path", f"{path} is a directory of the job") from None
    except OSError as error:
        if error.errno in _ESCAPES:
            raise invalid_field("path", f"{path} is, or goes through, a link or what is no directory") from None
        raise


def _entry(path: str, status: os.stat_result, size: int | None = None) -> FileEntry:
    written = datetime.fromtimestamp(status.st_mtime, UTC)
    return FileEntry(path, status.st_size if size is None else size, written, bool(status.st_mode & stat.S_IXUSR))


def _too_large(room: int) -> BeamwireError:
    return BeamwireError(
        Reason.LIMIT_REACHED,
        f"the files of a job may have {room} bytes altogether, which is the limit job_file_bytes of the facility; "
        "an operator can raise it in facility.toml",
        quota="job_file_bytes",
    )
