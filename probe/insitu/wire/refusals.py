"""Why a collector does not let a caller in, as one line with the remedy. Pure."""

from __future__ import annotations

from typing import Final

import grpc

from insitu.wire.address import Address

_NO_CONNECTION: Final = "failed to connect"
_CLOSED: Final = ("Socket closed", "onnection reset", "SETTINGS")
"""How gRPC says that the other end hung up during the handshake; why it did, it never says."""


def why_refused(address: Address, code: grpc.StatusCode | None, details: str) -> str | None:
    """Return what stands between this caller and the collector; None where it is something else.

    details: of the status of the call that failed.
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
