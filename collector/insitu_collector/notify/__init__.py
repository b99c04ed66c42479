"""Alerts, and the ways to who is told of them (`docs/alerts.md`)."""
