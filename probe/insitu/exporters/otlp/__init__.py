"""Records as OpenTelemetry: spans, metrics, and every name in them (`docs/otel.md`)."""
