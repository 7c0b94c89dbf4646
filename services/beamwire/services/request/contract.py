"""What consumers need of a stream, held against what the streamer would send."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np

from beamwire.mesh import contracts
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.services.request.model import Contract, ContractArray
from beamwire.services.request.ports import Fitness, SentArray
from beamwire.stream.v1.frame_pb2 import Field

FIELD = "transfer.contract"


def check_contract(contract: Contract) -> None:
    """Raise BeamwireError INVALID_FIELD if a contract means nothing."""
    if contract.bridge and contract.bridge not in contracts.known():
        raise invalid_field(
            f"{FIELD}.bridge", f"there is no bridge {contract.bridge[:40]!r}; there is: {', '.join(contracts.known())}"
        )
    if contract.batch_size < 0:
        raise invalid_field(f"{FIELD}.batch_size", "must not be negative; 0 is any number")
    for index, array in enumerate(contract.arrays):
        field = f"{FIELD}.arrays[{index}]"
        if array.scalar and array.shape:
            raise invalid_field(f"{field}.shape", "is for arrays, and this one is a scalar; leave one of them out")
        if any(length < -1 for length in array.shape):
            raise invalid_field(f"{field}.shape", "has a negative length; -1 is any")
        try:
            np.dtype(array.dtype or "u1")
        except TypeError:
            raise invalid_field(
                f"{field}.dtype", f"{array.dtype[:40]!r} is no type; numpy's names are: uint16, float32, …"
            ) from None


def hold_to(contract: Contract | None, fitness: Fitness) -> None:
    """Raise BeamwireError INVALID_FIELD naming each field of a contract that does not fit what would be sent."""
    violations = mismatches(contract, fitness) if contract is not None else []
    if violations:
        told = "; ".join(violation.description for violation in violations)
        raise BeamwireError(Reason.INVALID_FIELD, f"{FIELD}: {told}", violations=violations)


def mismatches(contract: Contract, fitness: Fitness) -> list[FieldViolation]:
    """Return what does not fit, with the field of the contract that asks for it."""
    found = [FieldViolation(f"{FIELD}.bridge", what) for what in _bridge_problems(contract.bridge, fitness.arrays)]
    there = {array.name: array for array in fitness.arrays}
    for index, wanted in enumerate(contract.arrays):
        field = f"{FIELD}.arrays[{index}]"
        sent = there.get(wanted.name)
        if sent is not None:
            found += [FieldViolation(f"{field}.{part}", what) for part, what in _differences(wanted, sent)]
        elif not wanted.optional:
            found.append(FieldViolation(f"{field}.field", _missing(wanted.name, list(there))))
    # Of a stream with fewer events than a batch nobody can tell.
    if contract.batch_size and fitness.batch_size not in (0, contract.batch_size):
        found.append(
            FieldViolation(
                f"{FIELD}.batch_size",
                f"batches have {fitness.batch_size} events, not {contract.batch_size}; set batch_size of the stage "
                "BatchProcessingPipeline",
            )
        )
    return found


def _bridge_problems(bridge: str, arrays: Sequence[SentArray]) -> list[str]:
    if not bridge:
        return []
    fields = [Field(name=a.name, dtype=np.dtype(a.dtype).str, shape=a.shape, unit=a.unit) for a in arrays]
    return contracts.problems(bridge, fields)


def _missing(name: str, there: list[str]) -> str:
    near = get_close_matches(name, there, 1)
    hint = f"; did you mean {near[0]}?" if near else "; add a data source of that name"
    return f"there is no array {name}, only {', '.join(sorted(there)) or 'none'}{hint}"


def _differences(wanted: ContractArray, sent: SentArray) -> list[tuple[str, str]]:
    found = []
    if wanted.dtype and np.dtype(wanted.dtype).name != sent.dtype:
        found.append(("dtype", f"{wanted.name} has elements of type {sent.dtype}, not {wanted.dtype}"))
    if wanted.scalar and sent.shape:
        found.append(("scalar", f"{wanted.name} has the shape {sent.shape} for one event, and is no single number"))
    fits = len(wanted.shape) == len(sent.shape) and all(
        want in (-1, have) for want, have in zip(wanted.shape, sent.shape, strict=False)
    )
    if wanted.shape and not fits:
        found.append(("shape", f"{wanted.name} has the shape {sent.shape} for one event, not {wanted.shape}"))
    return found
