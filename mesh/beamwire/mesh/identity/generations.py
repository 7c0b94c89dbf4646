"""The authorities of a trust domain, one after the other: which is trusted, which signs, and how one follows another.

What is so stands in one small file that is replaced whole. Whatever a step makes it makes before, so that a step that
is interrupted at any point has either happened or not.
"""

from __future__ import annotations

import enum
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import (
    CROSS_FILE,
    ISSUING_FILE,
    ISSUING_KEY_FILE,
    ROOT_FILE,
    ROOT_KEY_FILE,
    Authority,
)
from beamwire.mesh.identity.credentials import PUBLIC, write_file
from beamwire.mesh.identity.ids import Clock, utcnow
from beamwire.mesh.identity.keys import KeyFiles, KeyHolder
from beamwire.mesh.identity.signing import Signer, cross_sign, load_certificate, to_pem
from beamwire.mesh.states import StateMachine

STATE_FILE: Final = "state.json"
REQUEST_FILE: Final = "request.pem"
_log = logging.getLogger(__name__)

_KEY_FILES: Final = (ROOT_KEY_FILE, ISSUING_KEY_FILE)
_CERTIFICATE_FILES: Final = (ROOT_FILE, ISSUING_FILE)


class Phase(enum.Enum):
    """How far a rotation is: none is going on, the next root is trusted too, or the next authority signs already."""

    STABLE = "STABLE"
    ANNOUNCED = "ANNOUNCED"
    ACTIVATED = "ACTIVATED"


MACHINE: Final = StateMachine(
    "the authority",
    {
        Phase.STABLE: [Phase.ANNOUNCED],
        Phase.ANNOUNCED: [Phase.ACTIVATED, Phase.STABLE],
        Phase.ACTIVATED: [Phase.STABLE],
    },
)


@dataclass(frozen=True, slots=True)
class State:
    """Which generation signs, and which are trusted, the one that signs first."""

    phase: Phase
    generation: int
    trusted: tuple[int, ...]

    def to_json(self) -> str:
        """As it stands in the file."""
        document = {"phase": self.phase.value, "generation": self.generation, "trusted": list(self.trusted)}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> State:
        """What stands in a file; CERTIFICATE_INVALID if it cannot be."""
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            state = cls(Phase(document["phase"]), int(document["generation"]), tuple(map(int, document["trusted"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read: {error!r}") from error
        count = 1 if state.phase is Phase.STABLE else 2
        if len(set(state.trusted)) != count or state.trusted[0] != state.generation:
            raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} contradicts itself: {state}")
        return state


class Generations:
    """The authorities in a directory, each in one of its own that has the generation for a name.

    One process at a time may take steps. Make it with `create` or `load`.
    """

    def __init__(self, directory: Path, state: State, authority: Authority, keys: KeyHolder, clock: Clock) -> None:
        self.directory = directory
        self._state = state
        self._authority = authority
        self._keys = keys
        self._clock = clock

    @classmethod
    def create(
        cls,
        directory: Path,
        trust_domain: str,
        *,
        keys: KeyHolder | None = None,
        parent: Signer | None = None,
        clock: Clock = utcnow,
    ) -> Self:
        """The first authority of a domain, in a new directory; RESOURCE_EXISTS if there is one."""
        holder = keys or KeyFiles()
        if (directory / STATE_FILE).exists():
            raise BeamwireError(Reason.RESOURCE_EXISTS, f"{directory} already holds an authority")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = Authority.make(directory / "1", trust_domain, keys=holder, parent=parent, clock=clock)
        state = State(Phase.STABLE, 1, (1,))
        _write_state(directory, state)
        return cls(directory, state, authority, holder, clock)

    @classmethod
    def load(cls, directory: Path, *, keys: KeyHolder | None = None, clock: Clock = utcnow) -> Self:
        """The authorities in a directory; CERTIFICATE_INVALID names the file that is missing or broken."""
        holder = keys or KeyFiles()
        state = State.read(directory / STATE_FILE)
        for generation in state.trusted:
            load_certificate(directory / str(generation) / ROOT_FILE)
        authority = Authority.load(directory / str(state.generation), keys=holder, clock=clock)
        cross = directory / str(state.generation) / CROSS_FILE
        if state.phase is Phase.ACTIVATED and cross.exists():
            authority = authority.crossed(load_certificate(cross))
        return cls(directory, state, authority, holder, clock)

    @property
    def trust_domain(self) -> str:
        """The domain whose authorities these are."""
        return self._authority.trust_domain

    @property
    def state(self) -> State:
        """Which generation signs, and which are trusted."""
        return self._state

    @property
    def authority(self) -> Authority:
        """The authority that signs."""
        return self._authority

    @property
    def roots_pem(self) -> bytes:
        """The roots that are trusted, that of the authority that signs first."""
        return b"".join(map(to_pem, self.roots))

    @property
    def roots(self) -> Sequence[x509.Certificate]:
        """The same, as certificates."""
        return [load_certificate(self.directory / str(number) / ROOT_FILE) for number in self._state.trusted]

    def move(self, phase: Phase) -> None:
        """Take the step to a phase; ILLEGAL_STATE if it may not follow."""
        story = f"generation {self._state.generation} signs"
        MACHINE.check(self._state.phase, phase, story=story)
        if phase is Phase.ANNOUNCED:
            self._announce()
        elif phase is Phase.ACTIVATED:
            self._activate()
        else:
            self._settle()

    def _announce(self) -> None:
        number = self._prepared()
        if number is None:
            number = self._reserve()
            Authority.make(
                self.directory / str(number), self.trust_domain, keys=self._keys, number=number, clock=self._clock
            )
        trusted = (self._state.generation, number)
        self._commit(replace(self._state, phase=Phase.ANNOUNCED, trusted=trusted), self._authority)

    def _activate(self) -> None:
        old, new = self._state.trusted
        authority = Authority.load(self.directory / str(new), keys=self._keys, clock=self._clock)
        authority = authority.crossed(self._cross(old, new, authority.root))
        self._commit(State(Phase.ACTIVATED, new, (new, old)), authority)

    def _cross(self, old: int, new: int, root: x509.Certificate) -> x509.Certificate | None:
        """Have the old root vouch for the new one, for members that know only the old one; None if it cannot."""
        before, path = self.directory / str(old), self.directory / str(new) / CROSS_FILE
        try:
            signer = Signer(self._keys.load(before / ROOT_KEY_FILE), load_certificate(before / ROOT_FILE))
            cross = cross_sign(root, signer, self._clock())
        except BeamwireError as error:
            # A root key that was taken away, or a root whose parent left it no room.
            _log.warning("members that do not know the next root yet will have to enrol again: %s", error)
            return None
        path.unlink(missing_ok=True)
        write_file(path, to_pem(cross), PUBLIC)
        return cross

    def _settle(self) -> None:
        generation = self._state.generation
        self._commit(State(Phase.STABLE, generation, (generation,)), self._authority.crossed(None))
        self.tidy()

    def _commit(self, state: State, authority: Authority) -> None:
        _write_state(self.directory, state)
        self._state, self._authority = state, authority

    def tidy(self) -> None:
        """Forget the keys of generations that are trusted no more, and of those that never came to be trusted.

        A root that waits to be signed elsewhere stays.
        """
        for number in self._numbers():
            directory = self.directory / str(number)
            waiting = number > max(self._state.trusted) and (directory / REQUEST_FILE).exists()
            if number not in self._state.trusted and not waiting:
                for name in _KEY_FILES:
                    self._keys.remove(directory / name)
                (directory / REQUEST_FILE).unlink(missing_ok=True)

    def request(self) -> bytes:
        """A signing request (PEM) for the root of the next generation, to be signed by an authority of others.

        The same as before if there is one that was not taken up. ILLEGAL_STATE while a rotation goes on.
        """
        self._check_stable()
        waiting = self._waiting()
        if waiting is not None:
            return (self.directory / str(waiting) / REQUEST_FILE).read_bytes()
        directory = self.directory / str(self._reserve())
        key = self._keys.make(directory / ROOT_KEY_FILE)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{self.trust_domain} root {directory.name}")])
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .sign(key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )
        write_file(directory / REQUEST_FILE, request, PUBLIC)
        return request

    def complete(self, root: x509.Certificate) -> int:
        """Take the root that was signed elsewhere; the generation that it makes, which the next rotation announces.

        CERTIFICATE_INVALID if it is not of the key that was made here, or may not vouch for an authority.
        """
        self._check_stable()
        waiting = self._waiting()
        if waiting is None:
            raise BeamwireError(
                Reason.ILLEGAL_STATE,
                "no signing request waits for an answer; make one with: beamwired authority request",
            )
        directory = self.directory / str(waiting)
        Authority.complete(directory, self.trust_domain, root, keys=self._keys, number=waiting, clock=self._clock)
        return waiting

    def _check_stable(self) -> None:
        if self._state.phase is not Phase.STABLE:
            raise BeamwireError(
                Reason.ILLEGAL_STATE,
                f"a rotation of the authority goes on ({self._state.phase.name}); finish it first, or give it up",
            )

    def _waiting(self) -> int | None:
        numbers = [n for n in self._numbers() if n > max(self._state.trusted)]
        return next((n for n in numbers if (self.directory / str(n) / REQUEST_FILE).exists()), None)

    def _prepared(self) -> int | None:
        waiting = self._waiting()
        if waiting is None:
            return None
        whole = all((self.directory / str(waiting) / name).exists() for name in _CERTIFICATE_FILES)
        return waiting if whole else None

    def _reserve(self) -> int:
        number = max(self._numbers()) + 1
        (self.directory / str(number)).mkdir(mode=0o700)
        return number

    def _numbers(self) -> list[int]:
        return sorted(int(path.name) for path in self.directory.iterdir() if path.is_dir() and path.name.isdecimal())


def _write_state(directory: Path, state: State) -> None:
    staging = directory / f".{STATE_FILE}"
    staging.unlink(missing_ok=True)
    write_file(staging, state.to_json().encode(), PUBLIC)
    staging.replace(directory / STATE_FILE)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
