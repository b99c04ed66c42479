"""The collector's certificate: read, tried, and read again when its files change."""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from insitu.pem import BadPem, load_pair, try_authorities, try_server


class BadCertificate(ValueError):
    """Files that no server can use: one line that names them and what to do."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where certificate, key and, if callers are to show certificates, their authority's lie. All PEM."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.cert, self.key, self.client_ca) if path is not None)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the files held, tried."""

    contents: tuple[bytes, ...]
    until: str
    """When the certificate ends."""
    server: ssl.SSLContext
    """The same for a port that is not gRPC's."""

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Return it as gRPC takes it."""
        cert, key, *client_ca = self.contents
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca[0] if client_ca else None)


def load(files: TlsFiles) -> Loaded:
    """Return what the files hold. Raises BadCertificate for what cannot be read, does not belong together or is over.

    What changes meanwhile is refused too: half of a new pair is none.
    """
    contents = _contents(files)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        load_pair(server, files.cert, files.key)
        until = try_server(server, files.cert)
    except BadPem as error:
        raise BadCertificate(f"{error} (--tls-cert, --tls-key)") from None
    try:
        if files.client_ca is not None:
            try_authorities(server, files.client_ca)
    except BadPem as error:
        raise BadCertificate(f"{error} (--tls-client-ca)") from None
    if _contents(files) != contents:
        raise BadCertificate(f"{files.cert} and {files.key} are being written; they are read again")
    if files.client_ca is not None:
        server.verify_mode = ssl.CERT_REQUIRED  # only now: the trial above shows none
    return Loaded(contents, until, server)


def _contents(files: TlsFiles) -> tuple[bytes, ...]:
    found = []
    for path in files.paths:
        try:
            found.append(path.read_bytes())
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BadCertificate(f"{path} cannot be read: {reason}; give files that are there") from None
    return tuple(found)


class Certificates:
    """What new connections are shown. `look` reads the files again; a handshake never waits for a disk."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises BadCertificate."""
        self._files = files
        self._lock = threading.Lock()
        self._loaded = load(files)
        self._next: grpc.ServerCertificateConfiguration | None = None
        self._seen = _stamps(files)
        self._said = ""
        self._num_handshakes = 0

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a port is opened with."""
        asks = self._files.client_ca is not None
        fetch: Any = self._fetch  # the types of gRPC do not know that it may return None: nothing has changed
        return grpc.dynamic_ssl_server_credentials(self._loaded.configuration(), fetch, asks)

    def context(self) -> ssl.SSLContext:
        """Return the same for a port that is not gRPC's: there, too, each handshake counts, and gets the latest."""
        context = load(self._files).server
        context.sni_callback = self._begun
        return context

    def _begun(self, connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        with self._lock:
            self._num_handshakes += 1
            connection.context = self._loaded.server

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what has changed since the last handshake. Runs at the beginning of each, on a thread of gRPC's."""
        with self._lock:
            self._num_handshakes += 1
            found, self._next = self._next, None
        return found

    def take_handshakes(self) -> int:
        """Return how many were begun since the last call."""
        with self._lock:
            found, self._num_handshakes = self._num_handshakes, 0
        return found

    def look(self) -> str:
        """Read the files again if they have changed; return what is to be told, or nothing. Raises nothing."""
        stamps = _stamps(self._files)
        if stamps == self._seen:
            return ""
        try:
            loaded = load(self._files)
        except BadCertificate as error:
            said, self._said = self._said, str(error)  # and it is tried again: perhaps half of a pair is there yet
            return "" if said == self._said else f"certificate not changed, the old one is used on: {error}"
        self._seen, self._said = stamps, ""
        if loaded.contents == self._loaded.contents:
            return ""
        with self._lock:
            self._loaded = loaded
            self._next = loaded.configuration()
        return f"certificate of {self._files.cert} changed; the new one is good until {loaded.until}"


def _stamps(files: TlsFiles) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(stamp(path) for path in files.paths)


def stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
