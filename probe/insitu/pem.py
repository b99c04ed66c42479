"""Certificates and keys in PEM files: tried before use, so that the file at fault is named, and the remedy."""

from __future__ import annotations

import os
import ssl
import time
from pathlib import Path
from typing import Final

_MOST_FLIGHTS: Final = 10
_MISMATCHES: Final = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
"""The last is what OpenSSL calls a key of another kind."""
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"
_END: Final = "-----END CERTIFICATE-----"
_KEY: Final = "-----BEGIN PRIVATE KEY-----"

PemPath = str | os.PathLike[str]


class BadPem(ValueError):
    """A file that cannot be used: one line that names it and what to do, never what is in it."""


def load_pair(context: ssl.SSLContext, cert: PemPath, key: PemPath) -> None:
    """Let a context show a chain of certificates and hold its key. Raises BadPem."""
    _check_certificate(cert)
    _read(key)  # what is not there is not what does not fit
    try:
        context.load_cert_chain(cert, key, _no_password)
    except _HasPassword:
        remedy = f"give one without, as `openssl pkey -in {key} -out FILE` writes it"
        raise BadPem(f"{key} has a password; {remedy}") from None
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            raise BadPem(f"{key} is not the key of {cert}; give the two that were made together") from None
        if error.reason:
            raise BadPem(f"{cert} cannot be used: {_words(error)}; renew it") from None
        raise BadPem(f"{key} has no private key in PEM; give a file that has one, below {_KEY}") from None


def load_authorities(context: ssl.SSLContext, path: PemPath) -> None:
    """Let a context believe whom these certificates have signed. Raises BadPem."""
    _check_certificate(path)
    try:
        context.load_verify_locations(cadata=_read(path))
    except ssl.SSLError as error:
        raise BadPem(f"{path} cannot be used: {_words(error)}; renew it") from None


def try_authorities(context: ssl.SSLContext, path: PemPath) -> None:
    """Load them, and see that not all have expired. Raises BadPem."""
    load_authorities(context, path)
    ends = [ssl.cert_time_to_seconds(str(ca["notAfter"])) for ca in context.get_ca_certs()]
    if ends and max(ends) < time.time():
        raise BadPem(f"{path} has no certificate of an authority that has not expired; renew it")


def try_client(cert: PemPath, key: PemPath) -> None:
    """See that a server that believes in this certificate would take it of a client. Raises BadPem."""
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    load_pair(client, cert, key)
    load_pair(server, cert, key)  # it needs one, and nobody looks at it
    _believe(server, cert)
    server.verify_mode = ssl.CERT_REQUIRED
    _try(client, server, cert)


def try_server(server: ssl.SSLContext, cert: PemPath) -> str:
    """See that a client that believes in this certificate would take it of a server; return when it ends.

    server: has been loaded with it. Raises BadPem.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    _believe(client, cert)
    shown = _try(client, server, cert).getpeercert() or {}
    return str(shown.get("notAfter", "an unknown time"))


def _check_certificate(path: PemPath) -> None:
    try:
        _believe(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path)
    except ssl.SSLError:
        raise BadPem(f"{path} has no certificate in PEM; give a file that has one, {_BEGIN} to {_END}") from None


def _read(path: PemPath) -> str:
    try:
        return Path(path).read_text("ascii", "ignore")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadPem(f"{path} cannot be read: {reason}; give a file that is there") from None


class _HasPassword(Exception):
    pass


def _no_password() -> str:
    raise _HasPassword


def _first(chain: str) -> str:
    """Return the first certificate of a chain, in PEM."""
    return chain[chain.find(_BEGIN) : chain.find(_END) + len(_END)] + "\n"


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> ssl.SSLObject:
    """Let two contexts shake hands in memory; return the client's end. Raises SSLError where they do not agree."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True))
    for _ in range(_MOST_FLIGHTS):
        done = [_is_done(end) for end in ends]  # each has its turn
        if all(done):
            break
    return ends[0]


def _is_done(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _believe(context: ssl.SSLContext, cert: PemPath) -> None:
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=_first(_read(cert)))


def _try(client: ssl.SSLContext, server: ssl.SSLContext, cert: PemPath) -> ssl.SSLObject:
    try:
        return _shake_hands(client, server)
    except ssl.SSLError as error:
        raise BadPem(f"{cert} is no certificate that others take: {_words(error)}; renew it") from None


def _words(error: ssl.SSLError) -> str:
    """Return OpenSSL's reason in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.reason or "OpenSSL cannot read it").replace("_", " ").lower()
