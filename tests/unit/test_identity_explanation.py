"""An explanation says what the verifier decides, of every certificate there is a verdict of, and what to do."""

from __future__ import annotations

from datetime import timedelta

import pytest

from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import new_key_and_csr
from beamwire.mesh.identity.explanation import CHECKS, explain
from beamwire.mesh.identity.ids import SpiffeId, utcnow
from beamwire.mesh.identity.revocation import Revocation
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.testing.corpus import POSSESSION, Case, Corpus

CORPUS = Corpus()
ALICE = SpiffeId("facility.test", "user/alice")


@pytest.mark.parametrize("case", [pytest.param(c, id=name.replace(" ", "-")) for name, c in CORPUS.cases.items()])
def test_it_says_what_is_decided(case: Case):
    said = explain(case.chain_pem, CORPUS.trust(), CORPUS.policy)
    # Whether somebody has the key, no certificate tells.
    assert said.accepted == (case.accepted or case.check == POSSESSION)
    names = [check.check for check in said.checks]
    assert names == list(CHECKS[: len(names)])
    assert all(check.passed for check in said.checks[:-1])
    assert all(check.detail for check in said.checks)
    if not said.accepted:
        assert said.checks[-1].check == case.check


def chain_of(authority: Authority, lifetime: timedelta = timedelta(hours=1)) -> bytes:
    return authority.issue(new_key_and_csr()[1], ALICE, [], lifetime).chain_pem


def test_without_a_policy_that_is_left_open():
    authority = Authority.create("facility.test")
    said = explain(chain_of(authority), Trust.of("facility.test", authority.roots_pem))
    assert [check.check for check in said.checks] == list(CHECKS[:-1])
    assert said.accepted


def test_the_first_that_fails_is_said():
    """Ended and revoked: the time comes first. Ended and of nobody: that it is of nobody."""
    past = utcnow() - timedelta(days=2)
    authority = Authority.create("facility.test", clock=lambda: past)
    chain = chain_of(authority)
    serial = int(authority.issue(new_key_and_csr()[1], ALICE, [], timedelta(hours=1)).serial_hex, 16)
    revoked = authority.sign_revocations([Revocation(serial, past)], 1)
    trust = Trust(DomainTrust("facility.test", authority.roots_pem, revoked=revoked))
    assert explain(chain, trust).checks[-1].check == "time"
    stranger = Trust.of("facility.test", Authority.create("facility.test").roots_pem)
    assert explain(chain, stranger).checks[-1].check == "chain"


@pytest.mark.parametrize("text", [b"", b"rubbish", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_said_to_be_none(text: bytes):
    said = explain(text, CORPUS.trust())
    assert (said.accepted, said.identity, [check.check for check in said.checks]) == (False, "", ["name"])


def test_a_chain_without_end_is_not_looked_at():
    pem = chain_of(Authority.create("facility.test"))
    assert "a chain of" in explain(pem * 20, CORPUS.trust()).checks[0].detail
    assert "bytes" in explain(pem * 200, CORPUS.trust()).checks[0].detail
