"""What a person is told when something fails, and the exit code a script gets."""

from __future__ import annotations

import errno
import sys
import traceback
from dataclasses import asdict

import click

from beamwire.mesh.errors import BeamwireError, Reason

FAILED = 1
INVALID = 2
REFUSED = 3
INTERRUPTED = 130
TERMINATED = 143

EXIT_CODES = """Exit codes: 0 done; 1 the transfer failed or events were lost; 2 the command or the request is wrong;
3 the facility cannot be reached or does not permit it; 130 interrupted (143 by SIGTERM)."""

_INVALID = frozenset(
    {
        Reason.INVALID_FIELD,
        Reason.INVALID_PAGE_TOKEN,
        Reason.REQUEST_ID_REUSED,
        Reason.RESOURCE_NOT_FOUND,
        Reason.DATASET_NOT_FOUND,
        Reason.RESOURCE_EXISTS,
        Reason.ILLEGAL_STATE,
        Reason.UNSUPPORTED,
    }
)
_REFUSED = frozenset(
    {
        Reason.INVALID_JOIN_TOKEN,
        Reason.INVALID_INTRODUCTION,
        Reason.CERTIFICATE_INVALID,
        Reason.CERTIFICATE_EXPIRED,
        Reason.CERTIFICATE_REVOKED,
        Reason.ROLE_NOT_ALLOWED,
        Reason.POLICY_REFUSED,
        Reason.NOT_OWNER,
        Reason.TOKEN_REFUSED,
        Reason.ACCESS_UNDECLARED,
        Reason.LIMIT_REACHED,
        Reason.SERVICE_UNAVAILABLE,
        Reason.DRAINING,
        Reason.TIMED_OUT,
        Reason.OVERLOADED,
    }
)
_LOG_KEYS = ("log", "log_tail", "stderr")


class TerminatedError(KeyboardInterrupt):
    """SIGTERM arrived; everything that minds Ctrl-C minds it alike."""


def exit_code(error: BaseException) -> int:
    """Return the exit code that an error means."""
    if isinstance(error, TerminatedError):
        return TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BeamwireError) and error.reason in _INVALID:
        return INVALID
    if isinstance(error, BeamwireError) and error.reason in _REFUSED:
        return REFUSED
    return FAILED


def explain(error: BaseException, *, verbose: bool = False) -> None:
    """Print what was wrong, where, and what to do, to standard error; the traceback only if asked for."""
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    click.echo("\n".join(_lines(error)), err=True)


def error_document(error: BaseException) -> dict[str, object]:
    """Return an error for programs: `reason`, `message`, and `violations` and `notes` where there are some.

    The reason is one of the contract's, the name of the system's error (`ENOSPC`), INTERRUPTED, or INTERNAL.
    """
    document: dict[str, object] = {"reason": _reason(error), "message": _message(error)}
    if isinstance(error, BeamwireError) and error.violations:
        document["violations"] = [asdict(violation) for violation in error.violations]
    if notes := getattr(error, "__notes__", []):
        document["notes"] = list(notes)
    return document


def _reason(error: BaseException) -> str:
    if isinstance(error, BeamwireError):
        return error.reason.name
    if isinstance(error, KeyboardInterrupt):
        return "INTERRUPTED"
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, Reason.INTERNAL.name)
    return Reason.INTERNAL.name


def _message(error: BaseException) -> str:
    if isinstance(error, BeamwireError):
        return error.message
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return _os_message(error) if isinstance(error, OSError) else repr(error)


def _lines(error: BaseException) -> list[str]:
    notes = [f"  {note}" for note in getattr(error, "__notes__", [])]
    if isinstance(error, KeyboardInterrupt):
        return ["interrupted", *notes]
    if isinstance(error, OSError):
        return [f"error: {_os_message(error)}", *notes]
    if not isinstance(error, BeamwireError):
        return [f"error: {error!r}; this is a fault of beamwire, run again with -v and report it", *notes]
    lines = [f"error: {error.message}"]
    if len(error.violations) > 1 or (error.violations and error.violations[0].description not in error.message):
        lines += [f"  {violation.field}: {violation.description}" for violation in error.violations]
    if error.quota:
        lines.append(f"  limit: {error.quota}")
    if error.retry_after is not None:
        lines.append(f"  try again in {error.retry_after:g} s")
    for key in _LOG_KEYS:
        tail = error.metadata.get(key, "")
        if tail and tail not in error.message:
            lines += [f"  | {line}" for line in tail.splitlines()]
    return lines + notes


def _os_message(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{name}{error.strerror}; free some space, or write elsewhere with -o"
    return f"{name}{error.strerror or error}"
