"""The request ledger: one class for each nanosecond of a request, and what requests felt."""
