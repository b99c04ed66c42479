"""Rows of a store as columns: the recent past, one run, one window."""
