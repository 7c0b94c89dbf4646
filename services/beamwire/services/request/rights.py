"""What the one who asked for a transfer may read now: the policy may have changed while the transfer waited."""

from __future__ import annotations

from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.policy import PolicySource
from beamwire.mesh.store import Store
from beamwire.services.request.datasets import Datasets, Reader
from beamwire.services.request.model import Rights, TransferRecord
from beamwire.services.request.ports import JobPort, Preflight


class PresentRights:
    """Holds transfers to the policy as it is now.

    Args:
        store: where transfers are kept.
        policy: what the facility allows.
        datasets: decides who may read what.
        preflight: says what a request would read.
        jobs: the Job service, which has what the check on a backend found.
    """

    def __init__(
        self,
        store: Store[TransferRecord],
        policy: PolicySource,
        datasets: Datasets,
        preflight: Preflight,
        jobs: JobPort,
    ) -> None:
        self._store = store
        self._policy = policy
        self._datasets = datasets
        self._preflight = preflight
        self._jobs = jobs

    def reader(self, record: TransferRecord) -> Reader:
        """Return who reads for a transfer, with what it may read now; POLICY_REFUSED if nothing at all."""
        identity = record.rights.identity or record.owner
        grant = self._policy.current.grant(SpiffeId.parse(identity))
        return Reader(identity, grant.rule, grant.datasets)

    async def look(self, record: TransferRecord) -> None:
        """Let a transfer go on if it may still read what it asked for; POLICY_REFUSED naming each dataset otherwise.

        What it reads is looked at again only if its rights are not those by which that was decided before.
        """
        reader = self.reader(record)
        if reader.datasets.texts == record.rights.datasets:
            return
        if record.check_job:
            printed = await self._jobs.printed(record.check_job)
            self._preflight.conclude(printed, lambda found: self._datasets.check(found, reader))
        else:
            await self._preflight.check(record.config, lambda found: self._datasets.check(found, reader))
        await self._store.change(record.name, lambda _: {"rights": rights_of(reader)})


def rights_of(reader: Reader) -> Rights:
    """Return what is stored of a reader."""
    return Rights(identity=reader.identity, rule=reader.rule, datasets=reader.datasets.texts)
