"""What callers may do. Pure."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What a caller may do."""

    SHIP = "ship"
    """Send records."""
    READ = "read"
    """Read the store."""
    ADMIN = "admin"
    """Change rules, look at them, and erase."""
