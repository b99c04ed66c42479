"""Certificates, tokens and a collector that asks for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from wait_kit import until

from insitu.credentials import Credentials
from insitu.exporters import Batch
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.records import schema_of
from insitu.wire.address import Address
from insitu.wire.channel import open_channel
from insitu.wire.insitu_pb2_grpc import CollectorStub
from insitu_collector.access.certificates import TlsFiles
from insitu_collector.access.gate import Access
from insitu_collector.access.roles import Role
from insitu_collector.access.token_file import append_entry
from insitu_collector.access.tokens import Entry, digest_of, new_token
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def events(seq: int, *, epoch: int = 7, text: str = "") -> Batch:
    rows = [{"epoch": epoch, "rank": 0, "stage": 0, "row_seq": seq, "t_ns": 0, "kind": "incident", "text": text}]
    return Batch(epoch, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


def sources(source: Source, **more: Any) -> Batch:
    row = {**source.row(), "row_seq": 0, **more}
    return Batch(source.epoch, 0, pa.RecordBatch.from_pylist([row], schema=schema_of("sources")), "sources")


def write(path: Path, *parts: bytes) -> Path:
    """Write a file as a rotation does: a reader finds the old one or the new."""
    draft = path.with_suffix(".draft")
    draft.write_bytes(b"".join(parts))
    os.replace(draft, path)
    return path


def write_pair(folder: Path, name: str, leaf: trustme.LeafCert) -> tuple[Path, Path]:
    """Write certificate and key of a leaf; return their paths."""
    chain = [pem.bytes() for pem in leaf.cert_chain_pems]
    return write(folder / f"{name}.pem", *chain), write(folder / f"{name}.key", leaf.private_key_pem.bytes())


def leaf_with_uri(ca: trustme.CA, uri: str) -> trustme.LeafCert:
    """Return a client's certificate of an authority that names it by a URI."""
    signer = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer, key = x509.load_pem_x509_certificate(ca.cert_pem.bytes()), ec.generate_private_key(ec.SECP256R1())
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(LONG_AGO)
        .not_valid_after(datetime(2099, 1, 1, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return trustme.LeafCert(private, made.public_bytes(pem), [])


class Rig:
    """An authority, a server's certificate, a tokens file, and credentials for callers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.ca_file = write(folder / "ca.pem", self.ca.cert_pem.bytes())
        self.cert, self.key = write_pair(folder, "server", self.ca.issue_cert("127.0.0.1", "localhost"))
        self.tokens = folder / "tokens.toml"

    def entry(self, name: str, *roles: Role, token: str | None = None, **more: Any) -> str:
        """Add an entry to the tokens file; return its token."""
        token = token or new_token()
        known_by: dict[str, Any] = {} if "san" in more else {"sha256": digest_of(token)}
        append_entry(self.tokens, Entry(name, frozenset(roles or (Role.SHIP,)), **known_by, **more))
        return token

    def replace_entries(self, *entries: Entry) -> None:
        """Let the file have these entries instead."""
        write(self.tokens, *(entry.toml().encode() for entry in entries))
        self.tokens.chmod(0o600)

    def token_file(self, token: str, name: str = "token") -> str:
        return str(write(self.folder / name, token.encode() + b"\n"))

    def with_token(self, token: str, name: str = "token") -> Credentials:
        return Credentials(self.token_file(token, name), str(self.ca_file))

    def with_leaf(self, leaf: trustme.LeafCert, name: str = "client") -> Credentials:
        cert, key = write_pair(self.folder, name, leaf)
        return Credentials(None, str(self.ca_file), str(cert), str(key))

    def access(self, *, tls: bool = True, client_ca: bool = False, tokens: bool = True) -> Access:
        files = TlsFiles(self.cert, self.key, self.ca_file if client_ca else None)
        return Access(files if tls else None, self.tokens if tokens else None)

    @contextmanager
    def serving(self, store: Path | None = None, **access: bool) -> Iterator[CollectorServer]:
        with CollectorServer(store or self.folder / "store", port=0, access=self.access(**access)) as server:
            yield server


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr("insitu_collector.access.gate.LOOK_S", 0.0)  # files are looked at at each commit
    monkeypatch.setattr("insitu_collector.service.due.IDLE_TICK_S", 0.05)
    return Rig(tmp_path)


@contextmanager
def shipping(server: CollectorServer, credentials: Credentials, epoch: int = 7) -> Iterator[CollectorExporter]:
    exporter = CollectorExporter(server.address, Source(epoch=epoch), credentials=credentials)
    try:
        yield exporter
    finally:
        exporter.close(0.0)


def refused(server: CollectorServer, credentials: Credentials, epoch: int = 7) -> str:
    """Ship a row that nobody takes; return why."""
    with shipping(server, credentials, epoch) as exporter:
        exporter.export(events(0, epoch=epoch))
        return until(lambda: exporter.barred, "the collector to refuse")


@contextmanager
def calling(server: CollectorServer, credentials: Credentials) -> Iterator[CollectorStub]:
    with open_channel(Address.of(server.address), credentials) as channel:
        yield CollectorStub(channel)


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    status: Any = error  # what a call raises is itself the call
    return status.code(), status.details()


def audits(store: Path) -> list[str]:
    """Return the texts of the audit events of a store."""
    rows = open_store(store).table("events").to_pylist()
    return [row["text"] for row in rows if row["kind"] == "audit"]


def texts(store: Path) -> list[str]:
    """Return the texts of the events that probes sent, in the order of their rows."""
    rows = open_store(store).table("events").to_pylist()
    return [row["text"] for row in sorted(rows, key=lambda row: row["row_seq"]) if row["kind"] == "incident"]
