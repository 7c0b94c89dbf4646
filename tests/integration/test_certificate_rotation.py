"""While an authority follows another: a member that was away and knows the old root alone is not cut off."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import ROOT_KEY_FILE
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.generations import Generations, Phase
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.identity.renewal import is_superseded
from beamwire.mesh.identity.trust import Trust
from beamwire.testing.handshakes import check_health, shake_hands

DOMAIN = "facility.test"
ALICE = SpiffeId(DOMAIN, "user/alice")


class Rotation:
    """A facility whose authority is rotated, and its members."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.generations = Generations.create(directory / "authority", DOMAIN)

    def move(self, *phases: Phase) -> None:
        for phase in phases:
            self.generations.move(phase)
        self.generations = Generations.load(self._directory / "authority")

    def member(self, path: str) -> Credentials:
        """A member that was let in, or renewed, now."""
        key, csr = new_key_and_csr()
        issued = self.generations.authority.issue(csr, SpiffeId(DOMAIN, path), ["localhost"], timedelta(hours=1))
        directory = self._directory / path.replace("/", "-") / str(self.generations.state.phase.value)
        directory.mkdir(parents=True)
        return Credentials.save(directory, key, issued.chain_pem, self.generations.roots_pem)


@pytest.fixture
def rotation(tmp_path: Path) -> Rotation:
    return Rotation(tmp_path)


async def test_a_member_that_was_away_is_served_and_renews(rotation: Rotation):
    away = rotation.member("user/alice")
    rotation.move(Phase.ANNOUNCED, Phase.ACTIVATED)
    service = rotation.member("service/facility")
    assert await check_health(service, away) == health_pb2.HealthCheckResponse.SERVING
    assert shake_hands(rotation.member("cache/c"), away) == ALICE
    back = rotation.member("user/alice")
    away.save_trust(Trust.of(DOMAIN, rotation.generations.roots_pem))
    assert is_superseded(away)
    assert not is_superseded(back)


async def test_the_old_root_counts_until_the_rotation_is_finished(rotation: Rotation):
    away = rotation.member("user/alice")
    rotation.move(Phase.ANNOUNCED, Phase.ACTIVATED)
    back = rotation.member("user/alice")
    rotation.move(Phase.STABLE)
    service = rotation.member("service/facility")
    assert await check_health(service, back) == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(BeamwireError) as refused:
        await check_health(service, away)
    assert refused.value.reason is Reason.CERTIFICATE_INVALID


def test_without_the_key_of_the_old_root_the_new_one_stands_alone(
    rotation: Rotation, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rotation.move(Phase.ANNOUNCED)
    (tmp_path / "authority" / "1" / ROOT_KEY_FILE).unlink()
    rotation.move(Phase.ACTIVATED)
    assert rotation.generations.authority.cross is None
    assert ROOT_KEY_FILE in caplog.text
    assert shake_hands(rotation.member("cache/c"), rotation.member("user/alice")) == ALICE
