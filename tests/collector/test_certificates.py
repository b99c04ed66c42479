"""The collector's certificate: tried before it is used, read again when its files change."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
from access_kit import LONG_AGO, write, write_pair

from insitu_collector.access.certificates import BadCertificate, Certificates, TlsFiles, load


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, ca: trustme.CA) -> TlsFiles:
    leaf = ca.issue_cert("localhost", not_after=datetime(2099, 5, 6, tzinfo=UTC))
    return TlsFiles(*write_pair(tmp_path, "server", leaf), write(tmp_path / "ca.pem", ca.cert_pem.bytes()))


def test_a_good_pair_is_taken_and_says_until_when(files: TlsFiles) -> None:
    assert load(files).until == "May  6 00:00:00 2099 GMT"
    assert len(load(files).contents) == 3


def test_an_intermediate_authority_is_no_obstacle(tmp_path: Path, ca: trustme.CA) -> None:
    cert, key = write_pair(tmp_path, "deep", ca.create_child_ca().issue_cert("localhost"))
    assert load(TlsFiles(cert, key)).contents[0].count(b"BEGIN CERTIFICATE") == 2


def test_what_no_client_would_take_is_refused_at_once(tmp_path: Path, files: TlsFiles, ca: trustme.CA) -> None:
    write_pair(tmp_path, "server", ca.issue_cert("localhost", not_after=LONG_AGO))
    with pytest.raises(BadCertificate, match="is no certificate that others take: certificate has expired; renew it"):
        load(files)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, files: TlsFiles, ca: trustme.CA) -> None:
    write(files.key, ca.issue_cert("localhost").private_key_pem.bytes())
    with pytest.raises(BadCertificate, match=f"{files.key} is not the key of {files.cert}; give the two that"):
        load(files)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_there_or_no_pem_is_named(files: TlsFiles, place: int) -> None:
    path = files.paths[place]
    path.write_text("no PEM")
    with pytest.raises(BadCertificate, match=str(path)):
        load(files)
    path.unlink()
    with pytest.raises(BadCertificate, match=f"{path} cannot be read: no such file"):
        load(files)


def test_files_that_change_are_read_again_and_a_broken_pair_is_said_once(
    tmp_path: Path, files: TlsFiles, ca: trustme.CA
) -> None:
    certificates = Certificates(files)
    assert certificates.look() == ""
    leaf = ca.issue_cert("localhost")
    write(files.cert, leaf.cert_chain_pems[0].bytes())
    assert certificates.look().startswith("certificate not changed, the old one is used on: ")
    assert certificates.look() == ""
    write(files.key, leaf.private_key_pem.bytes())
    assert "changed; the new one is good until" in certificates.look()
    assert certificates.look() == ""
    write(files.key, files.key.read_bytes())
    assert certificates.look() == "", "the same again"
    files.key.unlink()
    assert "cannot be read" in certificates.look()


def test_handshakes_are_counted_and_given_what_changed_once(files: TlsFiles, ca: trustme.CA, tmp_path: Path) -> None:
    certificates = Certificates(files)
    assert certificates._fetch() is None
    write_pair(tmp_path, "server", ca.issue_cert("localhost"))
    certificates.look()
    assert certificates._fetch() is not None
    assert certificates._fetch() is None
    assert (certificates.take_handshakes(), certificates.take_handshakes()) == (3, 0)
