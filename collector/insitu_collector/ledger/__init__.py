"""The rank ledger: one class for each nanosecond of a rank."""
