"""The collector's certificate: read, tried, and read again when its files change."""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

_MOST_FLIGHTS: Final = 10


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
        server.load_cert_chain(files.cert, files.key, password=_no_password)
    except (ssl.SSLError, ValueError, OSError) as error:
        raise BadCertificate(f"{files.cert} and {files.key} are no certificate and its key: {_words(error)}") from None
    if files.client_ca is not None:
        try:
            server.load_verify_locations(files.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise BadCertificate(f"{files.client_ca} has no certificate of an authority: {_words(error)}") from None
    until = _tried(server, contents[0], files.cert)
    if _contents(files) != contents:
        raise BadCertificate(f"{files.cert} and {files.key} are being written; they are read again")
    if files.client_ca is not None:
        server.verify_mode = ssl.CERT_REQUIRED  # only now: the trial above shows none
    return Loaded(contents, until, server)


def _no_password() -> str:
    raise ValueError("the key has a password; give one without")


def _contents(files: TlsFiles) -> tuple[bytes, ...]:
    found = []
    for path in files.paths:
        try:
            found.append(path.read_bytes())
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BadCertificate(f"{path} cannot be read: {reason}; give files that are there") from None
    return tuple(found)


def _tried(server: ssl.SSLContext, chain: bytes, path: Path) -> str:
    """Shake hands with a client that trusts the certificate itself; return when it ends.

    So what every client would refuse (a certificate that is over, or not for servers) is known before it is used.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        client.load_verify_locations(cadata=_first(chain))
        ends = (
            client.wrap_bio(to_client, to_server),
            server.wrap_bio(to_server, to_client, server_side=True),
        )
        for _ in range(_MOST_FLIGHTS):
            done = [_is_done(end) for end in ends]  # each has its turn
            if all(done):
                break
        return str((ends[0].getpeercert() or {}).get("notAfter", "an unknown time"))
    except (ssl.SSLError, ValueError) as error:
        raise BadCertificate(f"{path} is no certificate that clients take: {_words(error)}; renew it") from None


def _is_done(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _first(chain: bytes) -> str:
    text, end = chain.decode("ascii", "ignore"), "-----END CERTIFICATE-----"
    return text[text.find("-----BEGIN CERTIFICATE-----") : text.find(end) + len(end)] + "\n"


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return str((isinstance(error, ssl.SSLError) and error.reason) or error).replace("_", " ").lower()


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
