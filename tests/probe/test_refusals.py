"""Why a collector does not let a caller in: one line with the remedy, of what gRPC says. Real ones: test_access.py."""

from __future__ import annotations

import grpc
import pytest

from insitu.credentials import CredentialError, Credentials
from insitu.wire.address import Address
from insitu.wire.channel import open_channel
from insitu.wire.refusals import why_refused

SECURE, PLAIN = Address("there:4317", True), Address("there:4317", False)
FAILED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.7:4317: "


@pytest.mark.parametrize(
    ("address", "details", "said"),
    [
        (SECURE, "Tls handshake failed: CERTIFICATE_VERIFY_FAILED: certificate has expired: OK", "has expired; renew"),
        (SECURE, "Tls handshake failed: CERTIFICATE_VERIFY_FAILED: self signed: OK", "with INSITU_CA_FILE"),
        (SECURE, "Custom verification check failed: Hostname Verification Check failed.", "not for that name"),
        (SECURE, "SSL_ERROR_SSL: WRONG_VERSION_NUMBER: OK", "speaks no TLS; write grpc://there:4317"),
        (SECURE, "Socket closed", "set INSITU_CLIENT_CERT and INSITU_CLIENT_KEY"),
        (SECURE, "recvmsg:Connection reset by peer", "set INSITU_CLIENT_CERT and INSITU_CLIENT_KEY"),
        (PLAIN, "connection attempt timed out before receiving SETTINGS frame", "does not answer: see whether"),
        (SECURE, "Handshake read failed (Endpoint closing)", "does not answer: see whether"),
        (PLAIN, "Socket closed", "if it has TLS, write grpcs://there:4317"),
    ],
)
def test_a_handshake_that_fails_is_explained(address: Address, details: str, said: str) -> None:
    text = why_refused(address, grpc.StatusCode.UNAVAILABLE, FAILED + details)
    assert text is not None and said in text and len(text.splitlines()) == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_what_the_collector_answers_is_passed_on(code: grpc.StatusCode) -> None:
    assert why_refused(SECURE, code, "no token") == "collector there:4317 refuses this caller: no token"


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.UNAVAILABLE, FAILED + "connect: Connection refused (111)"),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
        (grpc.StatusCode.UNIMPLEMENTED, ""),
        (None, ""),
    ],
)
def test_other_troubles_are_others(code: grpc.StatusCode | None, details: str) -> None:
    assert why_refused(SECURE, code, details) is None


def test_a_token_does_not_leave_the_host_in_the_clear(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text("secret")
    shown = Credentials(token_file=str(path))
    with pytest.raises(CredentialError) as error:
        open_channel(Address.of("grpc://collector.example.com:4317"), shown)
    assert str(error.value) == (
        "a token does not go over the network in the clear; write grpcs://collector.example.com:4317"
    )
    open_channel(Address.of("grpc://localhost:1"), shown).close()
    open_channel(Address.of("grpcs://collector.example.com:1"), shown).close()
