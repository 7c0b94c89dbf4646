"""Which datasets a caller may have read for it: the policy's word, and the places that nobody may name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.patterns import Patterns
from beamwire.mesh.policy import FILE_NAME

# What is there is no data of the facility's, and some of it is about the services themselves.
SYSTEM: Final = (Path("/proc"), Path("/sys"), Path("/dev"))


@dataclass(frozen=True)
class Dataset:
    """Something that a request would read.

    `field` is where the request says so, `named` what it is called as it is written there, `found` the names of all
    that this leads to.
    """

    field: str
    named: str
    found: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """Who wants to read: the caller, and the rule of the policy with the datasets that it gives to it."""

    identity: str
    rule: str
    datasets: Patterns


class Datasets:
    """Decides about datasets.

    Args:
        forbidden: directories below which nobody may name anything.
    """

    def __init__(self, forbidden: Iterable[Path] = ()) -> None:
        self._forbidden = tuple(str(path) for each in (*SYSTEM, *forbidden) for path in {each, each.resolve()})

    def check(self, datasets: Sequence[Dataset], reader: Reader) -> None:
        """Let a reader read some datasets, or refuse.

        Raises:
            BeamwireError: POLICY_REFUSED naming each dataset that is refused as the request wrote it, so that the
                answer does not tell what there is.
        """
        refused = {dataset: why for dataset in datasets if (why := self._why_not(dataset, reader))}
        if not refused:
            return
        violations = [FieldViolation(dataset.field, why) for dataset, why in refused.items()]
        raise BeamwireError(
            Reason.POLICY_REFUSED,
            "; ".join(violation.description for violation in violations),
            metadata={"dataset": next(iter(refused)).named, "rule": reader.rule, "check": "policy"},
            violations=violations,
        )

    def _why_not(self, dataset: Dataset, reader: Reader) -> str:
        if any(map(self._is_forbidden, dataset.found)):
            return f"{dataset.named} is, or leads to, a place that no request may read"
        if all(map(reader.datasets.matches, dataset.found)):
            return ""
        what = f"where {dataset.named} leads to" if reader.datasets.matches(dataset.named) else dataset.named
        rule = f"the rule {reader.rule!r} of the policy here" if reader.rule else "the policy here"
        return (
            f"{reader.identity} may not read {what}; {rule} lets it read: {reader.datasets}; "
            f"an operator of this facility can change that in {FILE_NAME}"
        )

    def _is_forbidden(self, name: str) -> bool:
        path = name.removeprefix("path:")
        return path != name and any(path == root or path.startswith(f"{root}/") for root in self._forbidden)
