"""The board: sequences go on over restarts, watchers are told the newest, nothing goes back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.revocation import Revocation
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.store import Store
from beamwire.services.certificate.board import SYNCHRONIZED, Change, TrustBoard
from beamwire.services.certificate.model import TrustRecord

A = Authority.create("a.test")
B = Authority.create("b.test")
OWN = DomainTrust("a.test", A.roots_pem, address="a:1", enroll_address="a:2")
OTHER = DomainTrust("b.test", B.roots_pem, sequence=7, address="b:1")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(tmp_path / "certificate.sqlite")
    yield database
    await database.close()


async def open_board(database: Database, own: DomainTrust = OWN) -> TrustBoard:
    # At the beginning of time sequences count by one.
    ticks = itertools.count(1)
    return await TrustBoard.open(
        Store(database, TrustRecord), own, clock=lambda: datetime.fromtimestamp(next(ticks) / 1e6, UTC)
    )


async def test_a_board_that_lost_its_memory_does_not_go_back(database: Database):
    """Whoever follows a facility believes nothing that is older than what it knows."""
    board = await TrustBoard.open(Store(database, TrustRecord), OWN)
    assert board.trust.own.sequence == pytest.approx(datetime.now(UTC).timestamp(), abs=60)


async def test_a_restart_goes_on_with_the_same_sequences(database: Database):
    board = await open_board(database)
    assert board.trust.own == replace(OWN, sequence=1)
    revoked = A.sign_revocations([Revocation(5, datetime.now(UTC))], 1)
    await board.publish_own(revoked=revoked, token_root=bytes(32), revoked_tokens=frozenset({"ab"}))
    await board.believe(OTHER)
    again = await open_board(database)
    assert again.trust.own.sequence == 2
    assert again.trust.own.revoked.revocations.keys() == {5}
    assert again.trust == board.trust
    moved = await open_board(database, replace(OWN, address="a:9"))
    assert (moved.trust.own.sequence, moved.trust.own.address) == (3, "a:9")
    assert moved.trust.own.token_root == bytes(32)


async def test_what_does_not_change_is_not_counted(database: Database):
    board = await open_board(database)
    assert (await board.publish_own(address="a:1")).sequence == 1
    assert await board.believe(OTHER)
    assert not await board.believe(OTHER)
    assert await board.disbelieve("b.test")
    assert not await board.disbelieve("b.test")


async def test_other_facilities_do_not_go_back(database: Database):
    board = await open_board(database)
    await board.believe(OTHER)
    with pytest.raises(BeamwireError, match="went back from 7 to 6") as refused:
        await board.believe(replace(OTHER, sequence=6))
    assert refused.value.reason is Reason.ILLEGAL_STATE
    for attempt in (board.believe(replace(OWN, sequence=99)), board.disbelieve("a.test")):
        with pytest.raises(BeamwireError, match=r"a\.test is this facility itself"):
            await attempt
    # Who was removed may come again as he likes.
    await board.disbelieve("b.test")
    assert await board.believe(replace(OTHER, sequence=1))


async def test_freshness_is_known(database: Database):
    board = await open_board(database)
    await board.believe(OTHER)
    first = board.records["b.test"].refresh_time
    await board.refreshed("b.test", "b:2 cannot be reached")
    assert board.records["b.test"].refresh_error == "b:2 cannot be reached"
    assert board.records["b.test"].refresh_time == first
    await board.refreshed("b.test")
    assert board.records["b.test"].refresh_error == ""
    assert board.records["b.test"].refresh_time > first
    await board.refreshed("c.test")
    assert "c.test" not in board.records


async def test_a_watcher_is_told_everything_then_every_change(database: Database):
    board = await open_board(database)
    await board.believe(OTHER)
    async with aclosing(board.watch()) as watch:
        first = [await anext(watch) for _ in range(3)]
        assert {change.trust_domain for change in first[:2]} == {"a.test", "b.test"}
        assert first[2] == SYNCHRONIZED
        waiting = asyncio.ensure_future(anext(watch))
        await board.publish_own(address="a:5")
        changed = await asyncio.wait_for(waiting, 5)
        assert changed.domain == board.trust.own
        waiting = asyncio.ensure_future(anext(watch))
        await board.disbelieve("b.test")
        assert await asyncio.wait_for(waiting, 5) == Change("b.test")


async def test_a_slow_watcher_is_told_the_newest(database: Database):
    board = await open_board(database)
    async with aclosing(board.watch()) as watch:
        assert [await anext(watch) for _ in range(2)][1] == SYNCHRONIZED
        for number in range(50):
            await board.publish_own(address=f"a:{number + 10}")
        await board.believe(OTHER)
        await board.disbelieve("b.test")
        told = await asyncio.wait_for(anext(watch), 5)
        assert told.domain is not None
        assert (told.domain.sequence, told.domain.address) == (51, "a:59")
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
