"""Where OTLP goes: URLs and OpenTelemetry's variables."""

from __future__ import annotations

import pytest

from insitu_collector.subscriber.target import Target, parse_target


def parsed(url: str, **environment: str) -> Target:
    return parse_target(url, {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in environment.items()})


@pytest.mark.parametrize(
    ("url", "environment", "protocol", "where"),
    [
        ("http://host:4318", {}, "http/protobuf", "http://host:4318/v1/traces"),
        ("http://host:4318/in/otlp/", {}, "http/protobuf", "http://host:4318/in/otlp/v1/traces"),
        ("https://host", {}, "http/protobuf", "https://host/v1/traces"),
        ("http://host:4317", {"PROTOCOL": "grpc"}, "grpc", "host:4317"),
        ("grpc://host", {}, "grpc", "host:4317"),
        ("grpcs://host:1", {"PROTOCOL": "http/protobuf"}, "grpc", "host:1"),
        ("otlp://host", {}, "grpc", "host:4317"),
        ("otlp://host", {"PROTOCOL": "http/protobuf"}, "http/protobuf", "http://host:4318/v1/traces"),
        ("otlp://[::1]:9", {}, "grpc", "[::1]:9"),
    ],
)
def test_a_url_says_who_and_how(url: str, environment: dict[str, str], protocol: str, where: str) -> None:
    target = parsed(url, **environment)
    assert target.protocol == protocol
    assert (target.place if protocol == "grpc" else target.address("traces")) == where
    assert target.url == url


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://host", "is no OTLP receiver"),
        ("host:4318", "is no OTLP receiver"),
        ("http://", "is no OTLP receiver"),
        ("http://me:secret@host", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("http://host?token=secret", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("grpc://host/path", "has no path"),
        ("http://host:port", "port"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line_without_its_secrets(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        parsed(url)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_signals_own_variable_goes_before_that_of_all() -> None:
    target = parsed(
        "http://host:1",
        HEADERS="authorization=Bearer%20all",
        LOGS_HEADERS="authorization=Bearer%20logs,x-scope=a",
        TIMEOUT="3",
        METRICS_TIMEOUT="0.5",
        COMPRESSION="gzip",
        TRACES_COMPRESSION="none",
        CERTIFICATE="/ca.pem",
    )
    assert target.ways["traces"].headers == {"authorization": "Bearer all"}
    assert target.ways["logs"].headers == {"authorization": "Bearer logs", "x-scope": "a"}
    assert [target.ways[signal].timeout_s for signal in ("traces", "metrics", "logs")] == [3.0, 0.5, 3.0]
    assert [target.ways[signal].compression for signal in ("traces", "logs")] == ["none", "gzip"]
    assert target.ways["metrics"].ca_file == "/ca.pem"
    assert "Bearer" not in repr(target), "a header may be a secret"


@pytest.mark.parametrize(
    ("variable", "value"), [("COMPRESSION", "zstd"), ("TIMEOUT", "soon"), ("TIMEOUT", "0"), ("LOGS_TIMEOUT", "-1")]
)
def test_a_variable_that_asks_for_what_there_is_not_is_named(variable: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"OTEL_EXPORTER_OTLP_.*{value}"):
        parsed("http://host:1", **{variable: value})
