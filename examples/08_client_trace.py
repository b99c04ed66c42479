"""A client with the OpenTelemetry SDK and nothing of insitu: its span is the parent of what the ranks do for it.

insitu collect --store ./insitu-store & insitu serve --stages 2 --to grpc://127.0.0.1:4317 &
python examples/08_client_trace.py && insitu stalls ./insitu-store

Each prompt is a span, whose context goes along as W3C headers (`traceparent`, and `baggage`, which opts in to raw
rows), and a value of the histogram `shop.completion.duration`, whose exemplars are these traces. Both go where
OTEL_EXPORTER_OTLP_ENDPOINT says: the collector, which OpenTelemetry's default is. docs/integrations.md asks on.
"""

import argparse
import json
import time
import urllib.request

from opentelemetry import baggage, propagate
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, format_trace_id

PROMPTS = [
    "Once there was a brave farmer",
    "One morning, Tom found a red kite near the bridge and",
    "Where is the mill?",
]


def ask(url: str, prompt: str, max_tokens: int) -> str:
    """Return the completion of a prompt; the span that is current goes along."""
    headers = {"content-type": "application/json"}
    propagate.inject(headers, baggage.set_baggage("insitu", "capture=rows"))
    body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of `insitu serve`")
    parser.add_argument("--max-tokens", type=int, default=16)
    asked = parser.parse_args()
    resource = Resource.create({"service.name": "shop"})
    tracers = TracerProvider(resource=resource)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(insecure=True)))
    meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter(insecure=True))], resource=resource)
    tracer = tracers.get_tracer("shop")
    latency = meters.get_meter("shop").create_histogram("shop.completion.duration", unit="s")
    for prompt in PROMPTS:
        with tracer.start_as_current_span("ask the model", kind=SpanKind.CLIENT) as span:
            began = time.perf_counter()
            text = ask(asked.url, prompt, asked.max_tokens)
            latency.record(time.perf_counter() - began)
        print(format_trace_id(span.get_span_context().trace_id), repr(text))
    tracers.shutdown()  # what was not sent yet goes now
    meters.shutdown()


if __name__ == "__main__":
    main()
