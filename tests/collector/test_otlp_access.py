"""Who may send OTLP: over both ports the gate is asked, and rows are of the tenant whose token they came with."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from access_kit import Rig, audits, leaf_with_uri, rig, status_of, write_pair
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpans
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from otlp_in_kit import port_of, spans
from wait_kit import until

from insitu_collector.access.roles import Role
from insitu_collector.otlp.ports import listener
from insitu_collector.otlp.signals import TRACES
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

__all__ = ["rig"]

PROTOBUF = {"Content-Type": "application/x-protobuf"}
URI = "spiffe://example.org/shop"


@contextmanager
def guarded(rig: Rig, **access: bool) -> Iterator[tuple[CollectorServer, int]]:
    """A collector that asks who calls; yields it and its port of OTLP/HTTP."""
    http = listener("127.0.0.1", 0)
    with CollectorServer(rig.folder / "store", port=0, access=rig.access(**access), otlp_http=http) as server:
        yield server, port_of(http)


def post(url: str, token: str | None = None, verify: Any = True) -> httpx.Response:
    """Send a span over HTTP."""
    headers = PROTOBUF if token is None else PROTOBUF | {"Authorization": f"Bearer {token}"}
    body = spans(1).SerializeToString()
    return httpx.post(f"{url}/v1/traces", content=body, headers=headers, verify=verify, timeout=30)


def over_grpc(server: CollectorServer, token: str | None) -> grpc.StatusCode:
    """Send a span over gRPC."""
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary(f"/{TRACES.service}/Export", None, None)
        try:
            call(spans(1).SerializeToString(), metadata=metadata, timeout=30)
        except grpc.RpcError as error:
            return status_of(error)[0]
    return grpc.StatusCode.OK


def test_without_a_good_token_nothing_is_taken_over_either(rig: Rig) -> None:
    reads = rig.entry("reader", Role.READ)
    with guarded(rig, tls=False) as (server, port):
        url = f"http://127.0.0.1:{port}"
        for token, status, code in (
            (None, 401, grpc.StatusCode.UNAUTHENTICATED),
            ("insitu_nobody's", 401, grpc.StatusCode.UNAUTHENTICATED),
            (reads, 403, grpc.StatusCode.PERMISSION_DENIED),
        ):
            answer = post(url, token)
            assert (answer.status_code, over_grpc(server, token)) == (status, code)
            assert Status.FromString(answer.content).code == code.value[0]
            assert "retry-after" not in answer.headers
        assert "tokens file" in Status.FromString(post(url, reads).content).message, "what to do"
    assert open_store(rig.folder / "store").table("spans").num_rows == 0
    told = "; ".join(audits(rig.folder / "store"))
    assert all(why in told for why in ("no_token", "unknown_token", "role"))


def test_rows_are_of_the_tenant_of_the_token(rig: Rig) -> None:
    acme, nobody = rig.entry("a", tenant="acme"), rig.entry("b")
    with guarded(rig, tls=False) as (server, port):
        assert post(f"http://127.0.0.1:{port}", acme).status_code == 200
        assert over_grpc(server, acme) is grpc.StatusCode.OK
        assert over_grpc(server, nobody) is grpc.StatusCode.OK
    assert open_store(rig.folder / "store").table("spans")["tenant"].to_pylist() == ["acme", "acme", None]


def test_an_sdk_sends_over_tls_with_a_token(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # of this machine: to requests they go before what is said
        monkeypatch.delenv(name, raising=False)
    token = rig.entry("shop", tenant="acme")
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    provider.get_tracer("shop").start_span("sold").end()
    bearer = {"authorization": f"Bearer {token}"}
    with guarded(rig) as (server, port):
        credentials = grpc.ssl_channel_credentials(rig.ca_file.read_bytes())
        exporters: list[Any] = [
            GrpcSpans(endpoint=f"https://127.0.0.1:{server.port}", credentials=credentials, headers=bearer),
            HttpSpans(
                endpoint=f"https://127.0.0.1:{port}/v1/traces", certificate_file=str(rig.ca_file), headers=bearer
            ),
        ]
        for exporter in exporters:
            assert exporter.export(kept.get_finished_spans()).name == "SUCCESS"
            exporter.shutdown()
        with pytest.raises(httpx.TransportError):
            post(f"http://127.0.0.1:{port}", token)
    rows = open_store(rig.folder / "store").table("spans").to_pylist()
    assert [(row["name"], row["tenant"]) for row in rows] == [("sold", "acme")] * 2


def trusting(rig: Rig, cert: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(rig.ca_file))
    if cert is not None:
        context.load_cert_chain(*cert)
    return context


def test_a_certificate_that_the_tokens_file_names_lets_in_over_http(rig: Rig) -> None:
    rig.entry("shop", tenant="acme", san=URI)
    named = write_pair(rig.folder, "named", leaf_with_uri(rig.ca, URI))
    other = write_pair(rig.folder, "other", leaf_with_uri(rig.ca, "spiffe://example.org/other"))
    with guarded(rig, client_ca=True) as (_, port):
        url = f"https://127.0.0.1:{port}"
        assert post(url, verify=trusting(rig, named)).status_code == 200
        assert post(url, verify=trusting(rig, other)).status_code == 401
        with pytest.raises(httpx.TransportError):
            post(url, verify=trusting(rig))
    assert open_store(rig.folder / "store").table("spans")["tenant"].to_pylist() == ["acme"]


def test_a_new_certificate_is_shown_to_new_connections_over_http(rig: Rig) -> None:
    token = rig.entry("shop")
    with guarded(rig) as (_, port):
        address = ("127.0.0.1", port)
        first = ssl.get_server_certificate(address)
        write_pair(rig.folder, "server", rig.ca.issue_cert("127.0.0.1"))
        until(lambda: ssl.get_server_certificate(address) != first, "the new certificate")
        assert post(f"https://127.0.0.1:{port}", token, trusting(rig)).status_code == 200
