"""The collector: receives, stores, judges, answers. `open_store(path)` is the way in for readers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from insitu_collector.store import open_store

__all__ = ["open_store"]


def __getattr__(name: str) -> Any:
    if name == "open_store":
        from insitu_collector.store import open_store

        return open_store
    raise AttributeError(f"module 'insitu_collector' has no attribute {name!r}")
