"""What the Certificate service keeps, as messages."""

from __future__ import annotations

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.rpc.convert import made_once, to_timestamp
from beamwire.services.certificate.model import AuditRecord, CertificateRecord, TrustRecord, bundle_name


@made_once
def to_certificate(record: CertificateRecord) -> pb.Certificate:
    """An entry of the ledger."""
    return pb.Certificate(
        name=record.name,
        identity=record.owner,
        server_names=record.server_names,
        chain_pem=record.chain_pem,
        grant=pb.Certificate.Grant.Value(f"GRANT_{record.grant}"),
        granted_by=record.granted_by,
        create_time=to_timestamp(record.create_time),
        expire_time=to_timestamp(record.expire_time),
        revoke_time=to_timestamp(record.revoke_time),
        revoke_reason=record.revoke_reason,
        authority_generation=record.generation,
    )


def to_bundle(domain: DomainTrust, record: TrustRecord | None, *, with_tokens: bool) -> pb.TrustBundle:
    """What is believed of a domain; which tokens were revoked is for the facility's own members."""
    return pb.TrustBundle(
        name=bundle_name(domain.trust_domain),
        roots_pem=domain.roots_pem.decode(),
        sequence=domain.sequence,
        revocation_list=domain.revoked.der,
        revocation_issuer=domain.revoked.issuer_der,
        token_root=domain.token_root,
        revoked_tokens=sorted(domain.revoked_tokens) if with_tokens else (),
        address=domain.address,
        enroll_address=domain.enroll_address,
        refresh_time=to_timestamp(record.refresh_time) if record else None,
        refresh_error=record.refresh_error if record else "",
        create_time=to_timestamp(record.create_time) if record else None,
    )


def to_audit_record(record: AuditRecord) -> pb.AuditRecord:
    """One thing that was done."""
    return pb.AuditRecord(
        name=record.name,
        actor=record.owner,
        action=record.state,
        subject=record.subject,
        detail=record.detail,
        create_time=to_timestamp(record.create_time),
    )
