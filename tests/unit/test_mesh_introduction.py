"""Introductions: what is signed is what is read, and anything else is refused."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import new_key_and_csr
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.identity.introduction import MAX_LENGTH, PREFIX, Introduction, check_fingerprint, fingerprint

NOW = datetime.now(UTC).replace(microsecond=0)


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("a.test", clock=lambda: NOW)


@pytest.fixture(scope="module")
def introduction(authority: Authority) -> Introduction:
    return Introduction(
        trust_domain="a.test",
        address="a.example:7443,job=a.example:7445",
        enroll_address="a.example:7444",
        roots=(authority.root_der,),
        sequence=7,
        expire_time=NOW + timedelta(days=1),
    )


@pytest.fixture(scope="module")
def document(authority: Authority, introduction: Introduction) -> str:
    return authority.sign_introduction(introduction)


def refused(document: str, match: str, now: datetime = NOW) -> None:
    with pytest.raises(BeamwireError, match=match) as caught:
        Introduction.read(document, now)
    assert caught.value.reason is Reason.INVALID_INTRODUCTION


def test_what_is_signed_is_what_is_read(authority: Authority, introduction: Introduction, document: str) -> None:
    assert Introduction.read(document, NOW) == introduction
    assert introduction.roots_pem == authority.roots_pem
    assert document.isascii()
    assert " " not in document
    assert len(document) < MAX_LENGTH / 4


def test_every_changed_character_is_refused(document: str) -> None:
    for position in range(len(document)):
        other = "A" if document[position] != "A" else "B"
        with pytest.raises(BeamwireError) as caught:
            Introduction.read(document[:position] + other + document[position + 1 :], NOW)
        assert caught.value.reason is Reason.INVALID_INTRODUCTION, position


def test_what_is_cut_or_longer_is_refused(document: str) -> None:
    for text in ("", ".", PREFIX, document[:-1], document + ".", document + ".AA", document[1:], f" {document}"):
        refused(text, "cannot be used")
    refused("x" * (MAX_LENGTH + 1), f"more than {MAX_LENGTH}")
    refused(document + "=", "damaged")


def test_it_ends(document: str) -> None:
    refused(document, "that of a.test ended", NOW + timedelta(days=1))


def test_a_stranger_cannot_sign_it(introduction: Introduction) -> None:
    stranger = Authority.create("a.test", clock=lambda: NOW)
    refused(stranger.sign_introduction(introduction), "no root in it vouches for its signer")


def test_a_member_cannot_sign_it(authority: Authority, introduction: Introduction) -> None:
    _, csr = new_key_and_csr()
    issued = authority.issue(csr, SpiffeId("a.test", "service/request"), (), timedelta(hours=1))
    leaf = x509.load_pem_x509_certificates(issued.chain_pem)[0]
    refused(introduction.sign(leaf, ec.generate_private_key(ec.SECP256R1())), "not signed by an authority")


def signed(fields: object, authority: Authority, *, spaced: bool = False) -> str:
    """A document that our own authority signed over fields of another's making."""
    separators = (", ", ": ") if spaced else (",", ":")
    payload = json.dumps(fields, sort_keys=True, separators=separators).encode()
    said = f"{PREFIX}.{encode(payload)}.{encode(authority.issuing.public_bytes(Encoding.DER))}"
    return f"{said}.{encode(authority._key.sign(said.encode(), ec.ECDSA(hashes.SHA256())))}"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"trust_domain": "A.test"}, "not a trust domain"),
        ({"trust_domain": "а.test"}, "not a trust domain"),  # noqa: RUF001 - a Cyrillic letter
        ({"trust_domain": ""}, "not a trust domain"),
        ({"trust_domain": "a.test/user"}, "not a trust domain"),
        ({"address": "nowhere"}, "not host:port"),
        ({"enroll_address": "a:1,b"}, "not host:port"),
        ({"enroll_address": "dns://1.2.3.4/a:1"}, "not host:port"),
        ({"address": "unix:/run/a:1"}, "not host:port"),
        ({"address": "a:1" + "0" * 2000}, "out of bounds"),
        ({"roots": []}, "from 1 to 8 roots"),
        ({"roots": [1]}, "from 1 to 8 roots"),
        ({"roots": ["AAAA"]}, "a root in it is none"),
        ({"sequence": -1}, "out of bounds"),
        ({"sequence": True}, "does not say"),
        ({"sequence": "1"}, "does not say"),
        ({"expire_time": 2**60}, "out of bounds"),
        ({"more": 1}, "does not say"),
    ],
)
def test_fields_are_read_strictly(authority: Authority, document: str, changes: dict[str, object], match: str) -> None:
    fields = json.loads(decode(document.split(".")[1]))
    refused(signed({**fields, **changes}, authority), match)


def test_there_is_one_spelling_only(authority: Authority, document: str) -> None:
    fields = json.loads(decode(document.split(".")[1]))
    assert Introduction.read(signed(fields, authority), NOW).sequence == 7
    refused(signed(fields, authority, spaced=True), "does not say")
    refused(signed([fields], authority), "does not say")
    refused(signed({"trust_domain": "a.test"}, authority), "does not say")


def test_a_name_that_no_file_can_have_is_refused(authority: Authority, introduction: Introduction) -> None:
    long = replace(introduction, trust_domain="b" * 201)
    refused(authority.sign_introduction(long), "longer than 200 characters")


def test_too_many_roots_are_refused(authority: Authority, introduction: Introduction) -> None:
    many = replace(introduction, roots=introduction.roots * 9)
    refused(authority.sign_introduction(many), "from 1 to 8 roots")


def test_the_fingerprint_is_compared_as_people_write_it(document: str) -> None:
    shown = fingerprint(document)
    groups = shown.split()
    assert len(groups) == 16
    assert all(len(group) == 4 for group in groups)
    for written in (shown, shown.upper(), "".join(groups), ":".join(groups), "-".join(groups), f" {shown}\n"):
        check_fingerprint(document, written)


@pytest.mark.parametrize("wrong", ["", "0" * 64, "abcd"])
def test_another_fingerprint_is_refused(document: str, wrong: str) -> None:
    with pytest.raises(BeamwireError, match="not the one that was given") as caught:
        check_fingerprint(document, wrong)
    assert caught.value.reason is Reason.INVALID_INTRODUCTION


def test_a_part_of_the_fingerprint_is_not_enough(document: str) -> None:
    for part in (fingerprint(document)[:-1], fingerprint(document)[:39]):
        with pytest.raises(BeamwireError, match="all 64 digits"):
            check_fingerprint(document, part)
