"""insitu: see inside a model while it serves.

    import insitu

    session = insitu.attach(model, to="grpc://127.0.0.1:4317")
    with session.step(rows=[insitu.Rows("req-1", start=0, count=5)], phase="prefill"):
        model(x)
    session.close()

Importing this package loads neither torch nor pyarrow nor grpc; the first verb that needs them does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from insitu.config import Config
    from insitu.flight.settings import Flight
    from insitu.rules.rule import Rule
    from insitu.session.live import Session
    from insitu.session.row_map import Rows
    from insitu.session.trace_context import RequestContext, request_context
    from insitu.verbs import attach, interval, observe, off, start, tap

__all__ = [
    "Config",
    "Flight",
    "RequestContext",
    "Rows",
    "Rule",
    "Session",
    "attach",
    "interval",
    "observe",
    "off",
    "request_context",
    "start",
    "tap",
]

_HOMES = {
    "Config": "insitu.config",
    "Flight": "insitu.flight.settings",
    "Rows": "insitu.session.row_map",
    "Rule": "insitu.rules.rule",
    "Session": "insitu.session.live",
    **dict.fromkeys(("RequestContext", "request_context"), "insitu.session.trace_context"),
    **dict.fromkeys(("attach", "interval", "observe", "off", "start", "tap"), "insitu.verbs"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'insitu' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
