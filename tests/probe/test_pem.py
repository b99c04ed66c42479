"""Certificates and keys in PEM files: what cannot be used is one line that names the file and the remedy."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from insitu.pem import BadPem, load_authorities, load_pair, try_authorities, try_client, try_server

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
NO_CERT = (
    "has no certificate in PEM; give a file that has one, -----BEGIN CERTIFICATE----- to -----END CERTIFICATE-----"
)


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def expired_ca() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "of old")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, datetime(2019, 1, 1, tzinfo=UTC), LONG_AGO)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM)


@pytest.fixture
def pair(tmp_path: Path, ca: trustme.CA) -> tuple[Path, Path]:
    return written(tmp_path, ca.issue_cert("localhost"))


def written(folder: Path, leaf: trustme.LeafCert) -> tuple[Path, Path]:
    cert, key = folder / "leaf.pem", folder / "leaf.key"
    cert.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    return cert, key


def refused(attempt: Callable[[], object]) -> str:
    with pytest.raises(BadPem) as error:
        attempt()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def server_context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def test_a_good_pair_is_taken_at_both_ends(pair: tuple[Path, Path]) -> None:
    try_client(*pair)
    server = server_context()
    load_pair(server, *pair)
    assert try_server(server, pair[0]).endswith("GMT")


def test_an_intermediate_authority_is_no_obstacle(tmp_path: Path, ca: trustme.CA) -> None:
    try_client(*written(tmp_path, ca.create_child_ca().issue_cert("localhost")))


def test_a_key_of_another_certificate_is_named(pair: tuple[Path, Path], ca: trustme.CA) -> None:
    cert, key = pair
    told = f"{key} is not the key of {cert}; give the two that were made together"
    key.write_bytes(ca.issue_cert("localhost").private_key_pem.bytes())
    assert refused(lambda: try_client(cert, key)) == told
    key.write_bytes(ca.issue_cert("localhost", key_type=trustme.KeyType.RSA).private_key_pem.bytes())
    assert refused(lambda: try_client(cert, key)) == told, "of another kind"


@pytest.mark.parametrize("kind", [b"", b"no PEM\n", bytes(range(256)), "part", "swapped"])
def test_the_file_without_a_certificate_is_named(pair: tuple[Path, Path], kind: bytes | str) -> None:
    cert, key = pair
    if kind == "swapped":
        cert, key = key, cert
    else:
        cert.write_bytes(cert.read_bytes()[:200] if isinstance(kind, str) else kind)
    assert refused(lambda: try_client(cert, key)) == f"{cert} {NO_CERT}"
    assert refused(lambda: load_authorities(server_context(), cert)) == f"{cert} {NO_CERT}"


@pytest.mark.parametrize("kind", [b"", b"no PEM\n", bytes(range(256))])
def test_the_file_without_a_key_is_named(pair: tuple[Path, Path], kind: bytes) -> None:
    cert, key = pair
    key.write_bytes(kind)
    told = f"{key} has no private key in PEM; give a file that has one, below -----BEGIN PRIVATE KEY-----"
    assert refused(lambda: try_client(cert, key)) == told


def test_a_key_with_a_password_is_named_and_nobody_is_asked(pair: tuple[Path, Path]) -> None:
    cert, key = pair
    secret = load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))
    said = refused(lambda: try_client(cert, key))
    assert said == f"{key} has a password; give one without, as `openssl pkey -in {key} -out FILE` writes it"


def test_what_has_expired_is_named_at_both_ends(tmp_path: Path, ca: trustme.CA) -> None:
    cert, key = written(tmp_path, ca.issue_cert("localhost", not_after=LONG_AGO))
    told = f"{cert} is no certificate that others take: certificate has expired; renew it"
    assert refused(lambda: try_client(cert, key)) == told
    server = server_context()
    load_pair(server, cert, key)
    assert refused(lambda: try_server(server, cert)) == told


def test_what_is_not_there_is_named(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    cert, key = pair
    gone = tmp_path / "gone"
    told = f"{gone} cannot be read: no such file or directory; give a file that is there"
    assert refused(lambda: try_client(gone, key)) == told
    assert refused(lambda: try_client(cert, gone)) == told
    assert refused(lambda: load_authorities(server_context(), gone)) == told


def test_authorities_are_believed_as_long_as_one_is_good(tmp_path: Path, ca: trustme.CA, expired_ca: bytes) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(expired_ca + ca.cert_pem.bytes())
    try_authorities(server_context(), path)
    path.write_bytes(expired_ca)
    said = refused(lambda: try_authorities(server_context(), path))
    assert said == f"{path} has no certificate of an authority that has not expired; renew it"
    load_authorities(server_context(), path)
