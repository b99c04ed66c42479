"""Asking a store: rows by time, place and request, tensors, SQL; little is read for a small question."""
