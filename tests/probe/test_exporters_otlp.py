"""`otlp://`: real receivers get spans, links, metrics, exemplars; the model goes on whatever they do."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import grpc
import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from otlp_kit import Inbox, attributes, attributes_of, grpc_receiver, http_receiver

import insitu
from insitu.exporters import open_exporter
from insitu.exporters.otlp import exporter as otlp
from insitu.exporters.otlp import ship as otlp_ship
from insitu.exporters.otlp.spans import trace_id_of
from insitu.identity import Source
from insitu.session.accounts import Stats
from insitu.session.live import Session
from insitu.testing import oracle_model, oracle_values, origin_of

ASKED = insitu.request_context({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
SILENT = insitu.request_context({"traceparent": f"00-{'c' * 32}-{'d' * 16}-00"})
ROWS = [insitu.Rows("one", 0, 3, trace=SILENT), insitu.Rows("two", 3, 2, trace=ASKED), insitu.Rows("three", 5, 1)]
RULES = [insitu.Rule(sites="L*.mlp_out", take="summary", every=1)]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of this machine's; attempts that fail at once, and are made again soon."""
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.4")
    monkeypatch.setattr(otlp_ship, "PAUSE_S", 0.05)
    monkeypatch.setattr(otlp, "RETRY_S", 0.02)


@pytest.fixture(params=["grpc", "http"])
def receiver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Inbox]:
    if request.param == "http":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with (grpc_receiver if request.param == "grpc" else http_receiver)() as inbox:
        yield inbox


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with grpc_receiver() as found:
        yield found


def step(model: Any, session: Session, rows: Sequence[insitu.Rows] | None = ROWS) -> None:
    with torch.no_grad(), session.step(rows=rows, phase="decode"), session.interval("compute", mb=1):
        model(torch.ones(6, 4))


def run(to: str, num_steps: int = 5, timeout_s: float = 5.0, rows: Sequence[insitu.Rows] | None = ROWS) -> Stats:
    """Run a model of three layers and return the session's account after it has closed."""
    model = oracle_model()
    session = insitu.attach(model, to=to, rules=RULES, rank=3, stage=1, model_name="oracle")
    for _ in range(num_steps):
        step(model, session, rows=rows)
    session.close(timeout_s)
    return check(session.stats())


def check(stats: Stats) -> Stats:
    """Assert that each row that was produced is durable or dropped."""
    for table, produced in stats.produced.items():
        dropped = sum(stats.dropped.get(table, {}).values())
        assert produced == stats.durable.get(table, 0) + dropped, (table, stats)
    return stats


def dropped(stats: Stats) -> dict[str, int]:
    """Return rows by reason, but for those of tables that OTLP has no form for."""
    found: dict[str, int] = {}
    for table, reasons in stats.dropped.items():
        for reason, number in reasons.items():
            if table not in ("events", "clocks"):
                found[reason] = found.get(reason, 0) + number
    return found


def sizes_of(inbox: Inbox) -> list[int]:
    """Return how many spans each request had."""
    requests = [got.request for got in inbox.got("traces")]
    return [sum(len(scope.spans) for each in found.resource_spans for scope in each.scope_spans) for found in requests]


def values_of(site: str, layer: int) -> torch.Tensor:
    """Return all that a site of the model has in `run`: float64[5, 6, 4]."""
    return torch.stack([oracle_values(site, layer, number, 6, 4) for number in range(5)]).double()


def steps_of(inbox: Inbox) -> set[int]:
    """Return the steps that have a compute span: one, or several where a collection struck."""
    return {attributes(span)["insitu.step"] for span in inbox.spans() if span.name == "insitu.compute"}


def of_site(points: list[Any], site: str) -> list[Any]:
    return [point for point in points if attributes(point).get("insitu.site") == site]


# -- what arrives ----------------------------------------------------------------------------------------------------


def test_intervals_arrive_as_spans_with_links_to_sampled_traces(receiver: Inbox) -> None:
    stats = run(f"otlp://{receiver.target}")
    assert dropped(stats) == {}
    assert stats.durable["intervals"] == len(receiver.spans())
    assert steps_of(receiver) == set(range(5))
    run_id = receiver.resources()[0]["insitu.run"]
    for span in receiver.spans():
        if span.name != "insitu.compute":
            continue
        number = attributes(span)["insitu.step"]
        assert [(link.trace_id.hex(), link.span_id.hex()) for link in span.links] == [("a" * 32, "b" * 16)]
        assert int.from_bytes(span.trace_id, "big") == trace_id_of(run_id, 0, number)
        assert span.parent_span_id == b""
        assert span.end_time_unix_nano > span.start_time_unix_nano > 1.7e18
        told = attributes(span)
        cpu_ns = told.pop("insitu.cpu_ns", 0)
        assert 0 <= cpu_ns <= 1e10
        assert told == {
            "insitu.rank": 3,
            "insitu.stage": 1,
            "insitu.class": "compute",
            "insitu.step": number,
            "insitu.mb": 1,
            "insitu.num_traces": 1,
        }
    assert len({span.span_id for span in receiver.spans()}) == len(receiver.spans())


def test_values_arrive_as_metrics_by_site_with_exemplars(receiver: Inbox) -> None:
    run(f"otlp://{receiver.target}")
    (absmax,) = of_site(receiver.points("insitu.site.absmax"), "L2.resid_post")
    assert attributes(absmax)["insitu.rank"] == 3
    assert attributes(absmax)["insitu.stage"] == 1
    assert attributes(absmax)["insitu.layer"] == 2
    assert origin_of(absmax.as_double) == ("resid_post", 2, 4, 5)  # the last row of the last step
    (exemplar,) = absmax.exemplars
    assert (exemplar.trace_id.hex(), exemplar.span_id.hex()) == ("a" * 32, "b" * 16)
    assert exemplar.as_double == absmax.as_double
    assert attributes_of(exemplar.filtered_attributes) == {"insitu.step": 4}
    (rms,) = of_site(receiver.points("insitu.statistics.rms"), "L1.mlp_out")
    assert rms.as_double == pytest.approx(float(values_of("mlp_out", 1).square().mean().sqrt()))
    steps = receiver.points("insitu.steps")
    assert sum(point.as_int for point in steps) == 5
    assert {attributes(point)["insitu.phase"] for point in steps} == {"decode"}
    assert sum(point.as_int for point in receiver.points("insitu.step.rows")) == 30
    (period,) = receiver.points("insitu.sampling.period")
    assert (attributes(period)["insitu.take"], attributes(period)["insitu.every"]) == ("summary", 1)
    assert period.as_double >= 1.0
    times = {attributes(point)["insitu.class"]: point.as_double for point in receiver.points("insitu.interval.time")}
    assert 0 < times["compute"] < 10


def test_requests_arrive_as_latencies_with_exemplars(receiver: Inbox) -> None:
    session = insitu.start(to=f"otlp://{receiver.target}", role="driver", model="oracle")
    for name, trace, end in (("one", ASKED, "finished"), ("two", SILENT, "failed")):
        session.request("arrived", name, num_tokens=9, trace=trace, t_ns=1_000_000_000)
        session.request("first_token", name, num_tokens=1, t_ns=1_030_000_000)
        session.request(end, name, num_tokens=5, t_ns=1_430_000_000)
    session.close()
    assert "requests" not in check(session.stats()).dropped
    told = {"gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "insitu"}
    told["gen_ai.request.model"] = "oracle"
    for metric, seconds in (
        ("gen_ai.server.time_to_first_token", 0.03),
        ("gen_ai.server.request.duration", 0.43),
        ("gen_ai.server.time_per_output_token", 0.1),
    ):
        points = receiver.points(metric)
        assert sum(point.count for point in points) == 2
        assert all(point.sum == pytest.approx(seconds * point.count) for point in points)
        traces = [exemplar.trace_id.hex() for point in points for exemplar in point.exemplars]
        assert traces == ["a" * 32], metric  # the other one's is not sampled
        kinds = [attributes(point) for point in points]
        assert told in kinds
        assert ({**told, "error.type": "_OTHER"} in kinds) == (metric != "gen_ai.server.time_to_first_token")


def test_a_request_that_has_ended_is_a_span_of_its_own_trace(inbox: Inbox) -> None:
    session = insitu.start(to=f"otlp://{inbox.target}", role="driver", model="oracle")
    for name, trace, end in (("one", ASKED, "finished"), ("two", SILENT, "finished"), ("three", None, "failed")):
        session.request("arrived", name, num_tokens=9, trace=trace, t_ns=1_000)
        session.request("scheduled", name, step_id=7, t_ns=2_000)
        session.request("first_token", name, num_tokens=1, t_ns=3_000)
        session.request("token", name, num_tokens=2, t_ns=4_000)
        session.request(end, name, num_tokens=5, t_ns=5_000)
    session.close()
    assert "requests" not in check(session.stats()).dropped
    spans = [span for span in inbox.spans() if span.name == "text_completion oracle"]
    told = {attributes(span).pop("gen_ai.request.id"): span for span in spans}
    assert set(told) == {"one", "three"}  # the other one's trace is not sampled
    one, three = told["one"], told["three"]
    assert one.span_id != three.span_id
    assert (one.trace_id.hex(), one.parent_span_id.hex()) == ("a" * 32, "b" * 16)
    assert (three.parent_span_id, three.status.code) == (b"", 2)
    assert (one.kind, one.end_time_unix_nano - one.start_time_unix_nano) == (2, 4_000)
    assert attributes(one) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "insitu",
        "gen_ai.request.id": "one",
        "gen_ai.request.model": "oracle",
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 5,
    }
    assert attributes(three)["error.type"] == "_OTHER"
    events = [(event.name, event.time_unix_nano - one.start_time_unix_nano) for event in one.events]
    assert events == [("insitu.request.scheduled", 1_000), ("insitu.request.first_token", 2_000)]
    assert attributes(one.events[0]) == {"insitu.step": 7}


def test_magnitudes_arrive_as_an_exponential_histogram(inbox: Inbox) -> None:
    run(f"otlp://{inbox.target}")
    metric = inbox.metric("insitu.statistics.magnitude")
    (point,) = of_site(metric.exponential_histogram.data_points, "L0.mlp_out")
    assert (point.scale, point.zero_count, point.count) == (0, 0, 5 * 6 * 4)
    first = point.positive.offset
    told = {first + place: count for place, count in enumerate(point.positive.bucket_counts) if count}
    octaves = (values_of("mlp_out", 0).log2().ceil() - 1).int().flatten().tolist()
    assert told == Counter(octaves)  # bucket i: 2^i < x <= 2^(i+1)
    assert len(told) > 1
    assert not point.HasField("sum") and not point.HasField("min")


def test_rows_that_are_not_finite_point_to_whose_they_are(inbox: Inbox) -> None:
    model = oracle_model()
    session = insitu.attach(model, to=f"otlp://{inbox.target}", rank=0, stage=0)
    step(model, session)
    with torch.no_grad(), session.step(rows=ROWS, phase="decode"):
        hidden = torch.ones(6, 4)
        hidden[4, 1] = float("nan")
        model(hidden)
    session.close()
    check(session.stats())
    points = [point for point in inbox.points("insitu.site.nonfinite.rows") if point.as_int]
    assert points
    for point in points:
        assert point.as_int == 1
        assert [exemplar.trace_id.hex() for exemplar in point.exemplars] == ["a" * 32]


def test_the_resource_says_what_the_process_is_and_otel_variables_come_first(
    receiver: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ranker")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=prod,host.name=node-7")
    run(f"otlp://{receiver.target}")
    told = receiver.resources()
    assert len(told) >= 2
    for resource in told:
        assert resource["service.name"] == "ranker"
        assert resource["deployment.environment.name"] == "prod"
        assert resource["host.name"] == "node-7"
        assert resource["dist.world.rank"] == 3
        assert resource["dist.pp.rank"] == 1
        assert resource["gen_ai.request.model"] == "oracle"
        assert resource["insitu.role"] == "rank"
        assert resource["process.pid"] == os.getpid()
        assert resource["telemetry.sdk.language"] == "python"
    assert len({resource["service.instance.id"] for resource in told}) == 1


def test_a_step_without_a_row_map_links_to_the_current_span(inbox: Inbox) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("host")
    with tracer.start_as_current_span("server") as span:
        run(f"otlp://{inbox.target}", num_steps=2, rows=None)
    for found in (span for span in inbox.spans() if span.name == "insitu.compute"):
        (link,) = found.links
        assert int.from_bytes(link.trace_id, "big") == span.get_span_context().trace_id
        assert int.from_bytes(link.span_id, "big") == span.get_span_context().span_id


# -- OTEL_* variables ------------------------------------------------------------------------------------------------


def test_endpoint_headers_compression_and_batch_size_are_those_of_otel_variables(
    receiver: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{receiver.target}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=secret,x-tenant=blue")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "7")
    stats = run("otlp://", num_steps=20)
    assert dropped(stats) == {}
    for got in (*receiver.got("traces"), *receiver.got("metrics")):
        assert got.headers["api-key"] == "secret"
        assert got.headers["x-tenant"] == "blue"
    sizes = sizes_of(receiver)
    assert max(sizes) == 7
    assert sum(sizes) == stats.durable["intervals"] >= 20


def test_http_is_compressed_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    with http_receiver() as inbox:
        run(f"otlp://{inbox.target}")
        assert all(got.num_bytes < got.request.ByteSize() for got in inbox.got("metrics"))


@pytest.mark.parametrize(
    ("sampler", "argument", "rows", "has_spans"),
    [
        ("parentbased_always_off", "", ROWS, True),
        ("parentbased_always_off", "", None, False),
        ("parentbased_always_on", "", [insitu.Rows("one", 0, 6, trace=SILENT)], False),
        ("parentbased_traceidratio", "0", ROWS, True),
        ("traceidratio", "0", ROWS, False),
        ("always_on", "", [insitu.Rows("one", 0, 6, trace=SILENT)], True),
    ],
)
def test_the_sampler_is_asked_with_what_a_step_serves_as_the_parent(
    inbox: Inbox,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    argument: str,
    rows: Sequence[insitu.Rows] | None,
    has_spans: bool,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    stats = run(f"otlp://{inbox.target}", rows=rows)
    assert dropped(stats) == {}  # what sampling left out is not dropped
    assert steps_of(inbox) == (set(range(5)) if has_spans else set())
    (point,) = [p for p in inbox.points("insitu.interval.time") if attributes(p)["insitu.class"] == "compute"]
    assert point.as_double > 0  # and metrics tell of it all


def test_counters_are_cumulative_unless_deltas_are_preferred(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    for preference, values in (("cumulative", [2, 5]), ("delta", [2, 3])):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", preference)
        before = len(inbox.points("insitu.steps"))
        model = oracle_model()
        session = insitu.attach(model, to=f"otlp://{inbox.target}", rules=RULES)
        for num_steps in (2, 3):
            for _ in range(num_steps):
                step(model, session)
            assert session.flush(10.0).pending == 0
        points = inbox.points("insitu.steps")[before:]
        assert {attributes(point)["insitu.variant"] for point in points} == {"full"}
        seen = [point.as_int for point in points]
        assert seen == values, preference
        counts = [p.count for p in of_site(inbox.points("insitu.statistics.magnitude"), "L1.mlp_out")][-2:]
        assert counts == [24 * value for value in values]
        session.close()


def test_gauges_are_of_what_came_since_the_last_export(inbox: Inbox) -> None:
    model = oracle_model()
    session = insitu.attach(model, to=f"otlp://{inbox.target}", rules=RULES)
    step(model, session)
    assert session.flush(10.0).pending == 0
    num_told = len(inbox.points("insitu.site.absmax"))
    assert num_told > 0
    session.event("nothing ran")
    assert session.flush(10.0).pending == 0
    assert len(inbox.points("insitu.site.absmax")) == num_told
    session.close()


def test_exemplars_can_be_switched_off(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXEMPLAR_FILTER", "always_off")
    run(f"otlp://{inbox.target}")
    points = inbox.points("insitu.site.absmax")
    assert points
    assert not any(point.exemplars for point in points)


def test_a_disabled_sdk_leaves_the_model_alone(inbox: Inbox, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "True")
    model = oracle_model()
    kind = type(model)
    with insitu.attach(model, to=f"otlp://{inbox.target}") as session:
        assert type(model) is kind
        step(model, session)
        session.request("arrived", "one", trace=ASKED)
    assert session.stats().produced == {}
    assert inbox.num_asked == 0
    assert "OTEL_SDK_DISABLED is set" in caplog.text
    with insitu.attach(model, to="memory://otel-disabled") as session:  # other destinations are none of its business
        assert session.stats().role == "rank"


def test_a_receiver_of_traces_alone_is_sent_no_metrics(
    receiver: Inbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "None ")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "zstd")  # of a signal that nobody sends
    caplog.set_level(logging.INFO, "insitu")
    session = insitu.attach(oracle_model(), to=f"otlp://{receiver.target}", rules=RULES, rank=3)
    for name in ("arrived", "first_token", "finished"):
        session.request(name, "two", trace=ASKED)
    with session.step(rows=ROWS, phase="decode"), session.interval("compute", mb=1):
        pass
    session.close(5.0)
    stats = check(session.stats())
    assert dropped(stats) == {}
    kinds = [span.name.partition(" ")[0] for span in receiver.spans()]
    assert "text_completion" in kinds and "insitu.compute" in kinds
    assert receiver.got("metrics") == []
    assert sum("OTEL_METRICS_EXPORTER is none" in record.getMessage() for record in caplog.records) == 1


def test_a_receiver_of_metrics_alone_is_sent_no_spans(receiver: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    stats = run(f"otlp://{receiver.target}")
    assert dropped(stats) == {}
    assert stats.durable["intervals"] == stats.produced["intervals"] >= 5
    assert receiver.got("traces") == []
    assert receiver.points("insitu.steps") and receiver.points("insitu.interval.time")


def test_where_neither_signal_is_sent_nobody_is_asked(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    stats = run(f"otlp://{inbox.target}")
    assert dropped(stats) == {}
    assert inbox.num_asked == 0
    assert "OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER are none: nothing is sent" in caplog.text


@pytest.mark.parametrize("value", ["otlp", "", "otlp,console"])
def test_another_exporter_named_there_leaves_a_signal_as_it_is(
    value: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", value)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", value)
    assert dropped(run(f"otlp://{inbox.target}")) == {}
    assert inbox.spans() and inbox.points("insitu.steps")


@pytest.mark.parametrize("signal", ["TRACES", "METRICS"])
def test_what_is_left_out_is_not_dropped_though_the_receiver_is_away(
    signal: str, receiver: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"OTEL_{signal}_EXPORTER", "none")
    receiver.code = grpc.StatusCode.UNAVAILABLE
    stats = run(f"otlp://{receiver.target}", timeout_s=1.0)
    lost = stats.dropped.keys() - {"events", "clocks"}
    told = {table for table, number in stats.produced.items() if number} - {"events", "clocks"}
    assert lost == ({"intervals"} if signal == "METRICS" else told)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "use one of grpc, http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "udp", "'udp'"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "grpc has none, gzip"),
    ],
)
def test_what_there_is_no_exporter_for_is_one_line(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        open_exporter("otlp://127.0.0.1:4317", Source())


def test_compression_none_is_none(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    assert dropped(run(f"otlp://{inbox.target}")) == {}


def test_a_variable_that_is_no_number_is_said_and_left(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "many")
    assert dropped(run(f"otlp://{inbox.target}")) == {}
    assert "OTEL_BSP_MAX_EXPORT_BATCH_SIZE is 'many', which is no number from 1; it is 512" in caplog.text


# -- receivers that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "refused_invalid"),
        (grpc.StatusCode.UNAUTHENTICATED, "refused_invalid"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "refused_quota"),
        (grpc.StatusCode.UNAVAILABLE, "collector_unreachable"),
    ],
)
def test_what_is_refused_is_counted_and_said_once(
    receiver: Inbox, code: grpc.StatusCode, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.code = code
    stats = run(f"otlp://{receiver.target}", timeout_s=1.5)
    assert receiver.num_asked > 0
    assert stats.num_steps == 5
    assert dropped(stats) == {reason: sum(stats.produced.values()) - _without_form(stats)}
    said = [record.getMessage() for record in caplog.records if receiver.target in record.getMessage()]
    assert said
    assert said == [line for line, _ in groupby(said)], "again only after another reason, as of a busy machine"
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


def _without_form(stats: Stats) -> int:
    return sum(stats.produced.get(table, 0) for table in ("events", "clocks"))


def test_one_signal_can_be_refused_and_the_other_taken(receiver: Inbox) -> None:
    receiver.code, receiver.signal = grpc.StatusCode.INVALID_ARGUMENT, "traces"
    stats = run(f"otlp://{receiver.target}")
    assert dropped(stats) == {"refused_invalid": stats.produced["intervals"]}
    assert receiver.points("insitu.steps")


def test_spans_refused_out_of_a_request_are_counted_one_by_one(
    receiver: Inbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    receiver.num_rejected, receiver.signal = 3, "traces"
    stats = run(f"otlp://{receiver.target}", num_steps=20)
    sizes = sizes_of(receiver)
    assert len(sizes) >= 2
    num_refused = sum(min(3, size) for size in sizes)
    assert stats.dropped["intervals"] == {"refused_invalid": num_refused}
    assert stats.durable["intervals"] == stats.produced["intervals"] - num_refused
    assert "refuses 3 of its traces (as told)" in caplog.text


def test_data_points_refused_out_of_a_request_claim_no_row(receiver: Inbox) -> None:
    receiver.num_rejected, receiver.signal = 1, "metrics"
    stats = run(f"otlp://{receiver.target}")
    assert set(dropped(stats)) == {"refused_invalid"}
    assert stats.durable["intervals"] == stats.produced["intervals"]
    assert stats.durable.get("summaries", 0) == 0


def test_nobody_there_costs_the_model_no_step(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        stats = run(f"otlp://127.0.0.1:{held.getsockname()[1]}", timeout_s=1.0)
    assert stats.num_steps == 5
    assert set(dropped(stats)) == {"collector_unreachable"}
    assert "no OTLP receiver takes records at" in caplog.text


def test_a_receiver_that_hangs_costs_the_model_no_step(receiver: Inbox) -> None:
    receiver.is_open.clear()
    model = oracle_model()
    session = insitu.attach(model, to=f"otlp://{receiver.target}", rules=RULES)
    step(model, session)
    session.flush(0.3)
    receiver.wait_for(lambda: receiver.num_asked >= 2)
    for number in range(50):
        step(model, session)
        if number % 8 == 7:  # slabs are read, on a busy machine too
            session.flush(0.0)
    assert not receiver.is_open.is_set()
    session.close(0.5)
    stats = check(session.stats())
    assert stats.num_steps == 51
    assert set(dropped(stats)) == {"collector_unreachable"}


def test_what_waited_for_a_receiver_arrives_once_it_takes_again(receiver: Inbox) -> None:
    receiver.code = grpc.StatusCode.UNAVAILABLE
    model = oracle_model()
    session = insitu.attach(model, to=f"otlp://{receiver.target}", rules=RULES)
    for _ in range(5):
        step(model, session)
    assert session.flush(1.0).pending > 0
    receiver.wait_for(lambda: receiver.num_asked >= 2)
    receiver.code = None
    assert session.flush(10.0).pending == 0
    session.close()
    stats = check(session.stats())
    assert dropped(stats) == {}
    assert steps_of(receiver) == set(range(5))
    assert len({span.span_id for span in receiver.spans()}) == len(receiver.spans())


def test_more_than_the_queue_holds_waits_in_the_outbox(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    inbox.is_open.clear()
    model = oracle_model()
    session = insitu.attach(model, to=f"otlp://{inbox.target}", rules=RULES)
    for _ in range(6):
        for _ in range(5):
            step(model, session)
        session.flush(0.05)
    inbox.is_open.set()
    session.close(10.0)
    stats = check(session.stats())
    assert dropped(stats) == {}
    assert stats.durable["intervals"] == stats.produced["intervals"] >= 30


def test_a_long_outage_is_held_in_bounds(receiver: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "MAX_OPEN", 12)
    receiver.code = grpc.StatusCode.UNAVAILABLE
    model = oracle_model()
    session = insitu.attach(model, to=f"otlp://{receiver.target}", rules=RULES)
    for _ in range(10):
        step(model, session)
        session.flush(0.05)
    exporter = session._exporter.exporter
    assert isinstance(exporter, otlp.OtlpExporter)
    assert 0 < exporter._account.num_open <= 12
    receiver.code = None
    assert session.flush(20.0).pending == 0
    session.close()
    stats = check(session.stats())
    assert dropped(stats) == {}
    assert steps_of(receiver) == set(range(10))
    assert stats.overhead_share > 0


def test_tables_without_a_form_in_otlp_are_counted_and_said_once(
    inbox: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    session = insitu.start(to=f"otlp://{inbox.target}")
    for _ in range(3):
        session.event("incident", "the door is open")
        session.flush(10.0)
    session.close()
    stats = check(session.stats())
    assert stats.dropped["events"] == {"refused_invalid": 3}
    assert caplog.text.count("rows of events have no form in OTLP") == 1


def test_a_setting_the_sdk_cannot_use_drops_rows_and_says_so(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    stats = run(f"otlp://{inbox.target}")
    assert set(dropped(stats)) == {"probe_error"}
    assert stats.num_steps == 5
    assert "otlp:// cannot go on" in caplog.text


def test_a_forked_child_sends_its_own(inbox: Inbox) -> None:
    code = f"""
    import os, insitu, torch
    session = insitu.start(to="otlp://{inbox.target}", rank=0)
    with session.step(), session.interval("host"):
        pass
    assert session.flush(10).pending == 0
    child = os.fork()
    with session.step(), session.interval("compute" if child == 0 else "sample"):
        pass
    report = session.close(10)
    if child == 0:
        os._exit(report.pending + report.dropped)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), report.pending, report.dropped)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout == "0 0 0\n", ran.stderr
    assert {span.name for span in inbox.spans()} - {"insitu.gc"} == {"insitu.host", "insitu.compute", "insitu.sample"}
    assert len({resource["service.instance.id"] for resource in inbox.resources()}) == 2


def ended_at_once(to: str) -> str:
    """Return the stderr of a program that ends after a few steps, and closes nothing."""
    code = f"""
    import insitu, torch
    model = torch.nn.Linear(4, 4)
    insitu.attach(model, to="{to}")
    with torch.inference_mode():
        [model(torch.ones(1, 4)) for _ in range(5)]
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stderr


def test_a_program_that_ends_at_once_has_sent_its_steps(receiver: Inbox) -> None:
    assert ended_at_once(f"otlp://{receiver.target}").splitlines() == []
    assert sum(span.name == "insitu.compute" for span in receiver.spans()) == 5


def test_what_nobody_took_is_said_to_be_lost_when_the_program_ends() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        said = ended_at_once(f"otlp://127.0.0.1:{held.getsockname()[1]}")
    assert "Traceback" not in said
    assert re.search(r"insitu: \d+ rows were not durable at exit and are counted as dropped$", said.rstrip()), said


def test_the_hosts_own_exporters_keep_their_words(caplog: pytest.LogCaptureFixture, inbox: Inbox) -> None:
    run(f"otlp://{inbox.target}")
    logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").error("the host's own export failed")
    assert "the host's own export failed" in caplog.text


def test_what_is_needed_is_imported_before_the_model_steps(receiver: Inbox) -> None:
    code = f"""
    import sys, insitu, torch
    model = torch.nn.Linear(4, 4)
    session = insitu.attach(model, to="otlp://{receiver.target}")
    before = set(sys.modules)
    with torch.inference_mode():
        [model(torch.ones(1, 4)) for _ in range(20)]
    assert session.flush(10.0).durable > 0
    late = set(sys.modules) - before
    session.close()
    print(sorted(late))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout == "[]\n", ran.stderr


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import insitu\n"
        "try: insitu.start(to='otlp://there:4317')\n"
        "except ValueError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "destination 'otlp://there:4317' needs the extra otlp: pip install 'insitu[otlp]'\n"


def test_who_goes_elsewhere_loads_none_of_it() -> None:
    code = (
        "import sys, insitu\n"
        "insitu.start(to='memory://elsewhere').close()\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "[]\n"
