"""Authorities on disk: one follows the other, whatever is interrupted; keys elsewhere; parents that are not ours."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import new_key_and_csr
from beamwire.mesh.identity.generations import Generations, Phase, State
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.identity.keys import KeyFiles, key_holder
from beamwire.mesh.identity.revocation import Revocation, RevocationList
from beamwire.mesh.identity.signing import Signer, load_certificate
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.identity.verifier import Verifier

DOMAIN = "facility.test"
ALICE = SpiffeId(DOMAIN, "user/alice")
HOUR = timedelta(hours=1)
ROTATION = (Phase.ANNOUNCED, Phase.ACTIVATED, Phase.STABLE)


def issue(authority: Authority) -> list[x509.Certificate]:
    issued = authority.issue(new_key_and_csr()[1], ALICE, [], HOUR)
    return x509.load_pem_x509_certificates(issued.chain_pem)


def believed(roots_pem: bytes, chain: list[x509.Certificate]) -> bool:
    try:
        return Verifier(Trust.of(DOMAIN, roots_pem)).verify(chain[0], chain[1:]) == ALICE
    except BeamwireError as error:
        if error.metadata["check"] != "chain":
            raise
        return False


def test_what_is_trusted_overlaps(tmp_path: Path) -> None:
    generations = Generations.create(tmp_path / "authority", DOMAIN)
    old = issue(generations.authority)
    verdicts, signers = [], []
    for phase in ROTATION:
        generations.move(phase)
        generations = Generations.load(tmp_path / "authority")
        new = issue(generations.authority)
        verdicts.append((believed(generations.roots_pem, old), believed(generations.roots_pem, new)))
        signers.append(generations.state.generation)
    assert verdicts == [(True, True), (True, True), (False, True)]
    assert signers == [1, 2, 2]
    assert generations.state == State(Phase.STABLE, 2, (2,))


def test_the_root_that_signs_comes_first(tmp_path: Path) -> None:
    generations = Generations.create(tmp_path / "authority", DOMAIN)
    for phase in ROTATION:
        generations.move(phase)
        first = x509.load_pem_x509_certificates(generations.roots_pem)[0]
        assert first == generations.authority.root


def test_an_announcement_can_be_given_up(tmp_path: Path) -> None:
    generations = Generations.create(tmp_path / "authority", DOMAIN)
    before = generations.roots_pem
    generations.move(Phase.ANNOUNCED)
    announced = generations.roots_pem
    generations.move(Phase.STABLE)
    assert (generations.roots_pem, generations.state.generation) == (before, 1)
    assert not list((tmp_path / "authority" / "2").glob("*key.pem"))
    generations.move(Phase.ANNOUNCED)
    assert generations.state.trusted == (1, 3)
    assert generations.roots_pem != announced


@pytest.mark.parametrize(
    ("done", "step"),
    [
        ((), Phase.ACTIVATED),
        ((), Phase.STABLE),
        ((Phase.ANNOUNCED,), Phase.ANNOUNCED),
        ((Phase.ANNOUNCED, Phase.ACTIVATED), Phase.ANNOUNCED),
        ((Phase.ANNOUNCED, Phase.ACTIVATED), Phase.ACTIVATED),
    ],
)
def test_steps_out_of_turn_are_refused(tmp_path: Path, done: tuple[Phase, ...], step: Phase) -> None:
    generations = Generations.create(tmp_path / "authority", DOMAIN)
    for phase in done:
        generations.move(phase)
    before = generations.state
    with pytest.raises(BeamwireError, match="what may follow") as refused:
        generations.move(step)
    assert refused.value.reason is Reason.ILLEGAL_STATE
    assert Generations.load(tmp_path / "authority").state == before


def test_keys_are_private_and_go_with_their_generation(tmp_path: Path) -> None:
    generations = Generations.create(tmp_path / "authority", DOMAIN)
    generations.move(Phase.ANNOUNCED)
    keys = sorted((tmp_path / "authority").rglob("*key.pem"))
    assert [str(key.relative_to(tmp_path / "authority")) for key in keys] == [
        "1/issuing-key.pem",
        "1/root-key.pem",
        "2/issuing-key.pem",
        "2/root-key.pem",
    ]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert {stat.S_IMODE(key.parent.stat().st_mode) for key in keys} == {0o700}
    generations.move(Phase.ACTIVATED)
    generations.move(Phase.STABLE)
    assert not list((tmp_path / "authority" / "1").glob("*key.pem"))
    assert load_certificate(tmp_path / "authority" / "1" / "root.pem")


# Takes a step again and again, and is killed each time a little later in it, until it is not.
KILLER = """
    import os, shutil, signal, sys
    from pathlib import Path
    from beamwire.mesh.identity.generations import Generations, Phase
    source, work, step = Path(sys.argv[1]), Path(sys.argv[2]), Phase(sys.argv[3])
    before = Generations.load(source).state
    points = 0
    while True:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)
        child = os.fork()
        if not child:
            generations, seen = Generations.load(work), 0
            def hook(event, arguments):
                global seen
                if event in ("open", "os.rename", "os.mkdir", "os.remove") and str(work) in str(arguments[0]):
                    seen += 1
                    if seen > points:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            generations.move(step)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        generations = Generations.load(work)
        generations.tidy()
        trusted = set(generations.state.trusted)
        for key in work.rglob("*key.pem"):
            assert int(key.parent.name) in trusted, (points, key)
        if generations.state == before:
            generations.move(step)
        assert generations.state.phase is step, (points, generations.state)
        for rest in list(Phase)[list(Phase).index(step) + 1 :] if step is not Phase.STABLE else []:
            generations.move(rest)
        if generations.state.phase is not Phase.STABLE:
            generations.move(Phase.STABLE)
        assert Generations.load(work).state.phase is Phase.STABLE
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        points += 1
    print(points)
"""


@pytest.mark.parametrize(
    ("done", "step"),
    [
        ((), "ANNOUNCED"),
        (("ANNOUNCED",), "ACTIVATED"),
        (("ANNOUNCED", "ACTIVATED"), "STABLE"),
        (("ANNOUNCED",), "STABLE"),
    ],
)
def test_a_step_that_is_killed_has_happened_or_has_not(tmp_path: Path, done: tuple[str, ...], step: str) -> None:
    generations = Generations.create(tmp_path / "authority", DOMAIN)
    for phase in done:
        generations.move(Phase(phase))
    directories = (str(tmp_path / "authority"), str(tmp_path / "work"))
    command = [sys.executable, "-c", textwrap.dedent(KILLER), *directories, step]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert killed.returncode == 0, killed.stderr
    assert int(killed.stdout) >= 3


@pytest.mark.parametrize(
    "text", ["", "[]", '{"phase": "STABLE"}', '{"phase": "STABLE", "generation": 2, "trusted": [1]}', "\x00"]
)
def test_a_broken_state_is_named(tmp_path: Path, text: str) -> None:
    Generations.create(tmp_path / "authority", DOMAIN)
    (tmp_path / "authority" / "state.json").write_text(text)
    with pytest.raises(BeamwireError, match=r"state\.json") as refused:
        Generations.load(tmp_path / "authority")
    assert refused.value.reason is Reason.CERTIFICATE_INVALID


# Keys under a passphrase, and keys that are elsewhere.


def test_keys_under_a_passphrase(tmp_path: Path) -> None:
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("correct horse\n")
    keys = key_holder("files", passphrase)
    Generations.create(tmp_path / "authority", DOMAIN, keys=keys)
    for path in (tmp_path / "authority").rglob("*key.pem"):
        assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    generations = Generations.load(tmp_path / "authority", keys=key_holder("files", passphrase))
    generations.move(Phase.ANNOUNCED)
    generations.move(Phase.ACTIVATED)
    assert believed(generations.roots_pem, issue(generations.authority))
    for wrong in (KeyFiles(), KeyFiles(b"battery staple")):
        with pytest.raises(BeamwireError, match=r"issuing-key\.pem cannot be read") as refused:
            Generations.load(tmp_path / "authority", keys=wrong)
        assert "horse" not in str(refused.value)
        assert "staple" not in str(refused.value)


def test_a_passphrase_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for name in ("missing", "empty"):
        with pytest.raises(BeamwireError, match=name):
            key_holder("files", tmp_path / name)


def test_an_unknown_holder_is_named() -> None:
    with pytest.raises(BeamwireError, match="there is no 'hsm'; there is: files"):
        key_holder("hsm")


AGENT = """
    import socketserver, sys
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                word, _, data = line.decode().strip().partition(" ")
                if word == "sign":
                    answer = key.sign(bytes.fromhex(data), ec.ECDSA(hashes.SHA256()))
                else:
                    spki = serialization.PublicFormat.SubjectPublicKeyInfo
                    answer = key.public_key().public_bytes(serialization.Encoding.DER, spki)
                self.wfile.write(answer.hex().encode() + b"\\n")
    with socketserver.ThreadingUnixStreamServer(sys.argv[1], Handler) as server:
        print("ready", flush=True)
        server.serve_forever()
"""


class AgentKey(ec.EllipticCurvePrivateKey):
    """A key that lives in another process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _ask(self, question: str) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._path))
            connection.sendall(question.encode() + b"\n")
            return bytes.fromhex(connection.makefile().readline())

    def public_key(self) -> ec.EllipticCurvePublicKey:
        key = serialization.load_der_public_key(self._ask("public"))
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return key

    def sign(self, data, signature_algorithm) -> bytes:
        assert isinstance(signature_algorithm.algorithm, hashes.SHA256)
        return self._ask(f"sign {bytes(data).hex()}")

    @property
    def curve(self) -> ec.EllipticCurve:
        return ec.SECP256R1()

    @property
    def key_size(self) -> int:
        return 256

    def exchange(self, algorithm, peer_public_key) -> bytes:
        raise UnsupportedAlgorithm("it signs only")

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        raise UnsupportedAlgorithm("it does not come out")

    def private_bytes(self, encoding, format, encryption_algorithm) -> bytes:  # noqa: A002 - the name it has there
        raise UnsupportedAlgorithm("it does not come out")

    def __copy__(self) -> AgentKey:
        return self

    def __deepcopy__(self, memo: dict) -> AgentKey:
        return self


class Agent:
    """The holder of keys of another process; here it has one for all."""

    def __init__(self, path: Path) -> None:
        self._key = AgentKey(path)
        self.removed: list[str] = []

    def make(self, path: Path) -> ec.EllipticCurvePrivateKey:
        return self._key

    def load(self, path: Path) -> ec.EllipticCurvePrivateKey:
        return self._key

    def remove(self, path: Path) -> None:
        self.removed.append(path.parent.name)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    path = tmp_path / "agent"
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(AGENT), path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Agent(path)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_keys_may_be_in_another_process(tmp_path: Path, agent: Agent) -> None:
    generations = Generations.create(tmp_path / "authority", DOMAIN, keys=agent)
    for phase in ROTATION:
        generations.move(phase)
    generations = Generations.load(tmp_path / "authority", keys=agent)
    chain = issue(generations.authority)
    assert believed(generations.roots_pem, chain)
    revocation = Revocation(chain[0].serial_number, datetime.now(UTC))
    signed = generations.authority.sign_revocations([revocation], 1)
    read = RevocationList.read(signed.der, signed.issuer_der, generations.roots_pem)
    assert read.revocations.keys() == {chain[0].serial_number}
    assert not list((tmp_path / "authority").rglob("*key.pem"))
    assert set(agent.removed) == {"1"}


# Parents: an authority that an institution has already.


def make_parent(
    key=None, *, path_length: int | None = None, ca: bool = True, sign: bool = True, days: tuple[int, int] = (-1, 100)
) -> Signer:
    key = key or ec.generate_private_key(ec.SECP384R1())
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "corporate")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length if ca else None), critical=True)
        .add_extension(x509.KeyUsage(not sign, False, False, False, False, sign, sign, False, False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    return Signer(key, certificate)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["p256", "rsa"],
)
def test_the_root_counts_and_its_parent_does_not(tmp_path: Path, key) -> None:
    parent = make_parent(key)
    generations = Generations.create(tmp_path / "authority", DOMAIN, parent=parent)
    generations.authority.root.verify_directly_issued_by(parent.certificate)
    assert generations.authority.root.not_valid_after_utc <= parent.certificate.not_valid_after_utc
    assert believed(generations.roots_pem, issue(generations.authority))
    sibling = Authority.create(DOMAIN, parent=parent)
    chain = issue(sibling)
    assert not believed(generations.roots_pem, chain)
    assert not believed(generations.roots_pem, [*chain, sibling.root, parent.certificate])


@pytest.mark.parametrize(
    ("parent", "said"),
    [
        (make_parent(path_length=1), "path length is 1"),
        (make_parent(path_length=0), "path length is 0"),
        (make_parent(ca=False), "CA:FALSE"),
        (make_parent(sign=False), "key usage"),
        (make_parent(days=(-10, -1)), "valid from"),
        (make_parent(days=(1, 10)), "valid from"),
    ],
    ids=["path-1", "path-0", "leaf", "usage", "ended", "early"],
)
def test_a_parent_that_may_not_is_refused(tmp_path: Path, parent: Signer, said: str) -> None:
    with pytest.raises(BeamwireError, match=said) as refused:
        Generations.create(tmp_path / "authority", DOMAIN, parent=parent)
    assert refused.value.reason is Reason.CERTIFICATE_INVALID


def test_a_parent_with_the_wrong_key_is_refused(tmp_path: Path) -> None:
    parent = make_parent()
    (tmp_path / "ca.pem").write_bytes(parent.certificate.public_bytes(serialization.Encoding.PEM))
    KeyFiles(b"secret").write(tmp_path / "other.pem", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(BeamwireError, match=r"ca\.pem does not belong to other\.pem"):
        Signer.load(tmp_path / "ca.pem", tmp_path / "other.pem", b"secret")


def sign_request(
    parent: Signer, pem: bytes, *, path_length: int | None = 1, ca: bool = True, bare: bool = False
) -> x509.Certificate:
    """What the people of another authority do with a request."""
    request = x509.load_pem_x509_csr(pem)
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "they name it as they like")]))
        .issuer_name(parent.certificate.subject)
        .public_key(request.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(days=50))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length if ca else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(request.public_key()), critical=False)
    )
    if not bare:
        parent_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(parent.key.public_key())
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        certificate = certificate.add_extension(usage, critical=True).add_extension(parent_key, critical=False)
    return certificate.sign(parent.key, hashes.SHA256())


def test_a_root_that_was_signed_elsewhere_is_the_next(tmp_path: Path) -> None:
    generations = Generations.create(tmp_path / "authority", DOMAIN)
    old = issue(generations.authority)
    request = generations.request()
    assert x509.load_pem_x509_csr(request).is_signature_valid
    # Asked for again, after a restart, it is the same one.
    assert Generations.load(tmp_path / "authority").request() == request
    Generations.load(tmp_path / "authority").tidy()
    parent = make_parent()
    root = sign_request(parent, request)
    assert generations.complete(root) == 2
    assert generations.complete(root) == 2
    for phase in (Phase.ANNOUNCED, Phase.STABLE, *ROTATION[:2]):
        generations.move(phase)
    generations = Generations.load(tmp_path / "authority")
    assert generations.authority.root == root
    assert generations.trust_domain == DOMAIN
    assert believed(generations.roots_pem, old)
    assert believed(generations.roots_pem, issue(generations.authority))
    sibling = Authority.create(DOMAIN, parent=parent)
    assert not believed(generations.roots_pem, issue(sibling))
    with pytest.raises(BeamwireError, match="a rotation of the authority goes on"):
        generations.request()


def test_an_answer_to_another_request_is_refused(tmp_path: Path) -> None:
    generations = Generations.create(tmp_path / "authority", DOMAIN)
    parent = make_parent()
    with pytest.raises(BeamwireError, match="no signing request waits"):
        generations.complete(parent.certificate)
    other = Generations.create(tmp_path / "other", DOMAIN)
    with pytest.raises(BeamwireError, match="have the request signed that was made here"):
        generations.request()
        generations.complete(sign_request(parent, other.request()))
    request = generations.request()
    for signed in (sign_request(parent, request, path_length=0), sign_request(parent, request, ca=False)):
        with pytest.raises(BeamwireError, match="cannot be the authority"):
            generations.complete(signed)
    with pytest.raises(BeamwireError, match=r"would be believed.*key identifiers of itself and of its issuer"):
        generations.complete(sign_request(parent, request, bare=True))
    generations.move(Phase.ANNOUNCED)
    assert generations.state.trusted == (1, 3)


def test_a_holder_is_plugged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever installs a distribution with an entry point of the group has its holder to choose."""
    (tmp_path / "vault.py").write_text(
        "class Vault:\n    def __init__(self, passphrase):\n        self.passphrase = passphrase\n"
    )
    metadata = tmp_path / "vault-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vault\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[beamwire.keys]\nvault = vault:Vault\n")
    (tmp_path / "passphrase").write_text("open\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    holder = key_holder("vault", tmp_path / "passphrase")
    assert (type(holder).__name__, holder.passphrase) == ("Vault", b"open")  # type: ignore[attr-defined]
    with pytest.raises(BeamwireError, match="there is: files, vault"):
        key_holder("hsm")
