"""Who calls, by certificate and policy: foreign roles must fool neither the methods' access nor ownership."""

from __future__ import annotations

from pathlib import Path

import pytest

from beamwire.certificate.v1 import certificate_service_pb2 as certificate_pb
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import Role
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.policy import Policy, read_policy
from beamwire.mesh.rpc.access import Caller, Gate, admit, check_owner, current_caller, owner_filter
from beamwire.request.v1 import request_service_pb2 as request_pb
from beamwire.testing.facility import Facility

# The descriptors are found once they are imported.
assert all((certificate_pb.DESCRIPTOR, job_pb.DESCRIPTOR, request_pb.DESCRIPTOR))
GET = "/beamwire.request.v1.RequestService/GetTransfer"
CREATE = "/beamwire.request.v1.RequestService/CreateTransfer"
ALL_OF_B = '[[rule]]\nname = "b"\nidentities = ["spiffe://b.test/**"]\n'


@pytest.fixture
def own(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "a", "a.test")


@pytest.fixture
def other(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "b", "b.test")


@pytest.fixture
def server(own: Facility, other: Facility) -> Credentials:
    """The credentials of a service that believes both."""
    credentials = own.member("service/request")
    credentials.save_trust(credentials.trust.believe(DomainTrust(other.trust_domain, other.roots_pem)))
    return credentials


def context(credentials: Credentials) -> dict[str, list[bytes]]:
    """What gRPC says of a connection."""
    chain = credentials.chain_pem
    end = b"-----END CERTIFICATE-----\n"
    return {"x509_pem_cert": [chain.partition(end)[0] + end], "x509_pem_cert_chain": [chain]}


def policy(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return read_policy(path, "a.test")


@pytest.fixture
def gate(server: Credentials, tmp_path: Path) -> Gate:
    return Gate(server, policy(tmp_path, ALL_OF_B))


def refused(reason: Reason, call, *arguments) -> BeamwireError:
    with pytest.raises(BeamwireError) as error:
        call(*arguments)
    assert error.value.reason is reason, error.value
    return error.value


def test_a_foreign_service_or_operator_does_not_see_what_belongs_to_others(gate, own, other):
    for path, role in (("service/request", Role.PARTNER), ("operator/root", Role.USER)):
        caller = gate.identify(context(other.member(path)))
        assert (caller.role, caller.unlimited) == (role, False)
        admit("/beamwire.job.v1.JobService/GetJob", caller)
        refused(Reason.NOT_OWNER, check_owner, str(own.id("user/alice")), "job", "jobs/x")
        refused(Reason.NOT_OWNER, check_owner, None, "job", "jobs/x")
        refused(Reason.NOT_OWNER, check_owner, str(own.id(path)), "job", "jobs/x")
        assert owner_filter() == str(other.id(path))
        check_owner(str(other.id(path)), "job", "jobs/x")


def test_own_services_and_operators_see_everything(gate, own):
    for path in ("service/request", "operator/root"):
        admit(GET, gate.identify(context(own.member(path))))
        check_owner("spiffe://b.test/user/alice", "transfer", "transfers/x")
        assert owner_filter() is None
        refused(Reason.RESOURCE_NOT_FOUND, check_owner, None, "transfer", "transfers/x")


def test_users_of_the_same_name_are_not_the_same(gate, own, other):
    ours, theirs = own.member("user/alice"), other.member("user/alice")
    admit(GET, gate.identify(context(theirs)))
    assert str(current_caller()) == "spiffe://b.test/user/alice"
    refused(Reason.NOT_OWNER, check_owner, str(ours.identity), "transfer", "transfers/x")
    check_owner(str(theirs.identity), "transfer", "transfers/x")
    admit(GET, gate.identify(context(ours)))
    refused(Reason.NOT_OWNER, check_owner, str(theirs.identity), "transfer", "transfers/x")


def test_a_foreign_member_without_a_rule_is_refused_whatever_it_is(server, other):
    gate = Gate(server)
    for path in ("user/alice", "operator/root", "service/request", "job/1", "cache/1"):
        error = refused(Reason.POLICY_REFUSED, gate.identify, context(other.member(path)))
        assert error.metadata["check"] == "policy"


def test_a_rule_narrows_the_methods_and_gives_none_that_the_role_lacks(server, own, other, tmp_path):
    more = 'methods = ["RequestService/Get*", "CertificateService/RevokeMember"]\n'
    gate = Gate(server, policy(tmp_path, ALL_OF_B + more + '[[rule]]\nname = "u"\nidentities = ["user/*"]\n' + more))
    for member in (other.member("user/bob"), own.member("user/alice")):
        caller = gate.identify(context(member))
        admit(GET, caller)
        error = refused(Reason.POLICY_REFUSED, admit, CREATE, caller)
        assert "RequestService/Get*" in error.message
        refused(Reason.ROLE_NOT_ALLOWED, admit, "/beamwire.certificate.v1.CertificateService/RevokeMember", caller)


def test_a_partner_reaches_no_method_that_is_not_for_partners(gate, other):
    caller = gate.identify(context(other.member("service/request")))
    refused(Reason.ROLE_NOT_ALLOWED, admit, CREATE, caller)
    refused(Reason.ROLE_NOT_ALLOWED, admit, "/beamwire.certificate.v1.CertificateService/CreateJoinToken", caller)


def test_an_impostor_of_a_facility_is_not_verified_by_anothers_roots(gate, tmp_path, own):
    evil = Facility(tmp_path / "evil", "b.test")
    refused(Reason.CERTIFICATE_INVALID, gate.identify, context(evil.member("user/bob")))
    impostor = Facility(tmp_path / "impostor", "a.test")
    refused(Reason.CERTIFICATE_INVALID, gate.identify, context(impostor.member("operator/root")))


def test_a_change_of_the_policy_counts_for_the_next_call(server, other, tmp_path):
    first, second = policy(tmp_path, ALL_OF_B), Policy("a.test")

    class Changing:
        current = first

    source = Changing()
    gate = Gate(server, source)
    bob = context(other.member("user/bob"))
    assert gate.identify(bob).grant == first.grant(other.id("user/bob"))
    source.current = second
    refused(Reason.POLICY_REFUSED, gate.identify, bob)


def test_somebody_without_a_grant_is_who_the_contract_says(own):
    admit(GET, Caller(own.id("user/alice"), Role.USER))
    assert owner_filter() == str(own.id("user/alice"))


def test_a_token_is_refused_where_nobody_reads_tokens(gate, own):
    refused(Reason.TOKEN_REFUSED, gate.identify, context(own.member("user/alice")), "a token")
