"""The thread between the rings and an exporter: rows, batches, a bounded queue, heartbeats."""
