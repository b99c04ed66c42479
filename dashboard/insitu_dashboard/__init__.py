"""The dashboard: looks, never writes. Empty for now."""
