"""Why a collector does not let a caller in, as one line with the remedy. Pure."""

from __future__ import annotations

from typing import Final

import grpc

from insitu.wire.address import Address

_NO_CONNECTION: Final = "failed to connect"
_CLOSED: Final = ("Socket closed", "onnection reset")
"""How gRPC says that the other end hung up during the handshake; why it did, it never says."""
_SILENT: Final = ("timed out before receiving SETTINGS", "Endpoint closing")
"""How it says that the other end took the connection and said nothing for as long as one attempt may take."""


def why_refused(
    address: Address, code: grpc.StatusCode | None, details: str, within_s: float | None = None
) -> str | None:
    """Return what stands between this caller and the collector; None where it is something else.

    details: of the status of the call that failed. within_s: how long an attempt to connect may take, where the caller
    has bounded it.
    """
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return f"collector {address.target} refuses this caller: {details}"
    if code is not grpc.StatusCode.UNAVAILABLE or _NO_CONNECTION not in details:
        return None
    if "CERTIFICATE_VERIFY_FAILED" in details:
        if "certificate has expired" in details:
            return f"the certificate of collector {address.target} has expired; renew what its --tls-cert names"
        return (
            f"the certificate of collector {address.target} is of no authority that is known here; name that one's "
            "certificate with INSITU_CA_FILE"
        )
    if "Hostname Verification" in details:
        return f"the certificate of collector {address.target} is not for that name; use one that it was made for"
    if address.is_secure and "WRONG_VERSION_NUMBER" in details:
        return f"collector {address.target} speaks no TLS; write grpc://{address.target}, or start it with --tls-cert"
    if any(words in details for words in _SILENT):
        limit = "" if within_s is None else f" in {within_s:g} s"
        return f"collector {address.target} takes connections and does not answer{limit}: see whether its process hangs"
    if any(words in details for words in _CLOSED):
        return _hung_up(address)
    return None


def _hung_up(address: Address) -> str:
    if address.is_secure:
        return (
            f"collector {address.target} broke the TLS handshake off: where it asks for certificates "
            "(--tls-client-ca), set INSITU_CLIENT_CERT and INSITU_CLIENT_KEY to one that its authority has signed and "
            "that has not expired"
        )
    return f"collector {address.target} hangs up at once: if it has TLS, write grpcs://{address.target}"
