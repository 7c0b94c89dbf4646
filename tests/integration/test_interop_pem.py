"""The PEM files of a member in programs that know nothing of us: openssl, curl, grpcurl, keytool."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2

from beamwire.mesh.identity.credentials import BUNDLE_FILE, CHAIN_FILE, KEY_FILE
from beamwire.mesh.identity.ids import services_name
from beamwire.testing.corpus import OWN, Corpus
from beamwire.testing.ports import free_port
from tests.conftest import LiveFacility

GRPCURL = Path(__file__).resolve().parent.parent / "interop" / "grpcurl"
SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: object, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
    # What comes over the wire after a handshake is no text.
    how = {"text": True, "errors": "replace"} if options.get("text", True) else {}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, timeout=60, check=False, **{**how, **options}
    )
    if check:
        assert done.returncode == 0, f"{command}: {done.stdout!r} {done.stderr!r}"
    return done


@pytest.fixture(scope="module")
def files(live_facility: LiveFacility) -> Path:
    """The directory of alice's key.pem, chain.pem and bundle.pem."""
    return live_facility.config_dir / "facilities" / live_facility.trust_domain


@pytest.fixture(scope="module")
def grpcurl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("grpcurl") / "grpcurl"
    command = [tool("go"), "build", "-o", str(binary), "github.com/fullstorydev/grpcurl/cmd/grpcurl"]
    built = subprocess.run(command, cwd=GRPCURL, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return binary


def s_client(live_facility: LiveFacility, files: Path, *more: object, certificate: bool = True):
    own = ("-cert", files / CHAIN_FILE, "-cert_chain", files / CHAIN_FILE, "-key", files / KEY_FILE)
    return run(
        tool("openssl"), "s_client", "-connect", live_facility.address, "-CAfile", files / BUNDLE_FILE, "-alpn", "h2",
        "-verify_hostname", services_name(live_facility.trust_domain), "-verify_return_error",
        *(own if certificate else ()), *more,
        check=False, input="",
    )  # fmt: skip


def test_openssl_verifies_a_chain(files: Path) -> None:
    openssl = tool("openssl")
    done = run(openssl, "verify", "-CAfile", files / BUNDLE_FILE, "-untrusted", files / CHAIN_FILE, files / CHAIN_FILE)
    assert done.stdout.endswith("OK\n")
    text = run(openssl, "x509", "-in", files / CHAIN_FILE, "-noout", "-ext", "subjectAltName").stdout
    assert "URI:spiffe://facility.test/user/alice" in text


def test_openssl_shakes_hands(live_facility: LiveFacility, files: Path) -> None:
    done = s_client(live_facility, files)
    assert "Verify return code: 0 (ok)" in done.stdout
    assert "ALPN protocol: h2" in done.stdout
    assert "Verified peername: services.facility.test" in done.stdout
    # TLS 1.3 says only afterwards what became of a client's certificate, and 1.2 at once.
    assert s_client(live_facility, files, "-tls1_2", certificate=False).returncode != 0


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


def write(directory: Path, **parts: bytes) -> list[Path]:
    paths = [directory / f"{name}.pem" for name in parts]
    for path, part in zip(paths, parts.values(), strict=True):
        path.write_bytes(part)
    return paths


@pytest.mark.parametrize("name", ["good", "revoked"])
def test_openssl_heeds_our_revocation_list(corpus: Corpus, tmp_path: Path, name: str) -> None:
    crl = x509.load_der_x509_crl(corpus.trust().own.revoked.der).public_bytes(serialization.Encoding.PEM)
    chain_pem = corpus.cases[name].chain_pem
    roots, revoked, chain = write(tmp_path, roots=corpus.own.roots_pem, revoked=crl, chain=chain_pem)
    done = run(
        tool("openssl"), "verify", "-CAfile", roots, "-crl_check", "-CRLfile", revoked, "-untrusted", chain, chain,
        check=False,
    )  # fmt: skip
    assert done.returncode == (2 if name == "revoked" else 0)
    assert ("certificate revoked" in done.stderr) is (name == "revoked")


@pytest.mark.parametrize(("name", "verdict"), [("good", True), ("expired", False), ("partner as us", False)])
def test_openssl_agrees(corpus: Corpus, tmp_path: Path, name: str, verdict: bool) -> None:
    roots, chain = write(tmp_path, roots=corpus.own.roots_pem, chain=corpus.cases[name].chain_pem)
    done = run(tool("openssl"), "verify", "-CAfile", roots, "-untrusted", chain, chain, check=False)
    assert (done.returncode == 0) is verdict


def test_an_issuing_authority_can_be_the_anchor(corpus: Corpus, tmp_path: Path) -> None:
    """Programs that want a self-signed root must be told that a part of the chain will do."""
    issuing = corpus.own.issuing.certificate.public_bytes(serialization.Encoding.PEM)
    anchor, chain = write(tmp_path, anchor=issuing, chain=corpus.cases["good"].chain_pem)
    openssl = tool("openssl")
    assert run(openssl, "verify", "-CAfile", anchor, chain, check=False).returncode != 0
    assert run(openssl, "verify", "-partial_chain", "-CAfile", anchor, chain).stdout.endswith("OK\n")


def curl(live_facility: LiveFacility, files: Path, *more: object, **options):
    """A health check by curl: gRPC is a POST over HTTP/2 with a length in front of each message."""
    name, port = services_name(live_facility.trust_domain), live_facility.address.rpartition(":")[2]
    body = b"\0" + struct.pack(">I", 0)
    return run(
        tool("curl"), "--silent", "--show-error", "--http2", "--cacert", files / BUNDLE_FILE,
        "--resolve", f"{name}:{port}:127.0.0.1",
        "--header", "content-type: application/grpc", "--header", "te: trailers",
        "--data-binary", "@-", "--dump-header", "-", "--max-time", "20", *more,
        f"https://{name}:{port}/grpc.health.v1.Health/Check",
        input=body, text=False, **options,
    )  # fmt: skip


def test_curl_calls_the_health_service(live_facility: LiveFacility, files: Path) -> None:
    done = curl(live_facility, files, "--cert", files / CHAIN_FILE, "--key", files / KEY_FILE)
    answer = SERVING.SerializeToString()
    assert done.stdout.startswith(b"HTTP/2 200")
    assert b"\0" + struct.pack(">I", len(answer)) + answer in done.stdout
    assert b"grpc-status: 0" in done.stdout


def test_curl_without_a_certificate_is_refused(live_facility: LiveFacility, files: Path) -> None:
    done = curl(live_facility, files, check=False)
    assert done.returncode != 0
    assert b"HTTP/2 200" not in done.stdout


def test_grpcurl_calls_with_reflection(live_facility: LiveFacility, files: Path, grpcurl: Path) -> None:
    base = (grpcurl, "-cacert", files / BUNDLE_FILE, "-authority", services_name(live_facility.trust_domain))
    own = ("-cert", files / CHAIN_FILE, "-key", files / KEY_FILE)
    listed = run(*base, *own, live_facility.address, "list").stdout.split()
    assert "beamwire.request.v1.RequestService" in listed
    who = run(*base, *own, live_facility.address, "beamwire.certificate.v1.CertificateService/WhoAmI").stdout
    assert '"identity": "spiffe://facility.test/user/alice"' in who
    request = "beamwire.certificate.v1.CertificateService/RevokeMember"
    refused = run(
        *base,
        *own,
        "-d",
        '{"identity": "spiffe://facility.test/user/alice"}',
        live_facility.address,
        request,
        check=False,
    )
    assert "PermissionDenied" in refused.stderr
    assert "ROLE_NOT_ALLOWED" in refused.stderr
    assert run(*base, live_facility.address, "list", check=False).returncode != 0


@pytest.fixture
def under_a_parent(tmp_path: Path) -> Iterator[LiveFacility]:
    """A facility whose root is signed by an authority of others, and is believed where that is not."""
    parent, key = tmp_path / "parent.pem", tmp_path / "parent-key.pem"
    run(
        tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-keyout", key, "-out", parent, "-subj", "/CN=Grid", "-days", "4000",
        "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip
    live = LiveFacility(tmp_path / "facility", tmp_path / "alice", f"127.0.0.1:{free_port()}")
    live.beamwired(
        "facility", "init", str(live.directory), "--address", live.address,
        "--enroll-address", f"127.0.0.1:{free_port()}", "--parent-certificate", str(parent), "--parent-key", str(key),
    )  # fmt: skip
    live.start()
    try:
        live.enroll("user/alice", live.config_dir)
        yield live
    finally:
        live.stop()


def test_a_root_that_a_parent_signed(under_a_parent: LiveFacility, grpcurl: Path, tmp_path: Path) -> None:
    live = under_a_parent
    files = live.config_dir / "facilities" / live.trust_domain
    (root,) = x509.load_pem_x509_certificates((files / BUNDLE_FILE).read_bytes())
    assert root.issuer != root.subject, "its root is not self-signed"
    own = ("-cert", files / CHAIN_FILE, "-key", files / KEY_FILE)
    assert s_client(live, files).returncode != 0, "openssl must be told"
    assert "Verify return code: 0 (ok)" in s_client(live, files, "-partial_chain").stdout
    assert b"grpc-status: 0" in curl(live, files, "--cert", files / CHAIN_FILE, "--key", files / KEY_FILE).stdout
    name = services_name(live.trust_domain)
    listed = run(grpcurl, "-cacert", files / BUNDLE_FILE, "-authority", name, *own, live.address, "list").stdout
    assert "beamwire.job.v1.JobService" in listed
    script = """
        const tls = require("tls"), fs = require("fs"), [host, port, dir, name] = process.argv.slice(1);
        const file = (name) => fs.readFileSync(`${dir}/${name}.pem`);
        const options = { host, port, servername: name, ALPNProtocols: ["h2"], allowPartialTrustChain: true,
          ca: file("bundle"), cert: file("chain"), key: file("key") };
        const socket = tls.connect(options, () => { console.log(socket.authorized); socket.end(); });
    """
    assert run(tool("node"), "-e", script, *live.address.split(":"), files, name).stdout == "true\n"


def test_java_reads_a_converted_key_store(files: Path, tmp_path: Path) -> None:
    openssl, keytool = tool("openssl"), tool("keytool")
    environment = {**os.environ, "STORE_PASSWORD": "for-this-test"}
    run(
        openssl, "pkcs12", "-export", "-name", "beamwire", "-in", files / CHAIN_FILE, "-inkey", files / KEY_FILE,
        "-out", tmp_path / "keys.p12", "-passout", "env:STORE_PASSWORD", env=environment,
    )  # fmt: skip
    run(
        keytool, "-importcert", "-noprompt", "-alias", OWN, "-file", files / BUNDLE_FILE, "-storetype", "PKCS12",
        "-keystore", tmp_path / "trust.p12", "-storepass:env", "STORE_PASSWORD", env=environment,
    )  # fmt: skip
    for store, said in (("keys.p12", "PrivateKeyEntry"), ("trust.p12", "trustedCertEntry")):
        listed = run(
            keytool, "-list", "-v", "-keystore", tmp_path / store, "-storepass:env", "STORE_PASSWORD", env=environment
        )
        assert said in listed.stdout
    assert "spiffe://facility.test/user/alice" in run(
        keytool, "-list", "-v", "-keystore", tmp_path / "keys.p12", "-storepass:env", "STORE_PASSWORD", env=environment
    ).stdout  # fmt: skip
