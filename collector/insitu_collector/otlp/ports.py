"""Where OTLP/HTTP is listened for."""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

DEFAULT_PORT: Final = 4318
OFF: Final = "off"
BACKLOG: Final = 1024


def http_listener(said: str | None, host: str, collector_port: int) -> tuple[socket.socket | None, str]:
    """Return the socket that the option asks for, and one sentence where there is none though nobody said so.

    said: a port, 0 for any that is free, `off`; None for the usual port where it is free, and for none where the
    collector's own is any. Raises OSError when a port that was said cannot be had.
    """
    if said == OFF or (said is None and collector_port == 0):
        return None, ""
    if said is not None:
        return listener(host, int(said)), ""
    try:
        return listener(host, DEFAULT_PORT), ""
    except OSError as error:
        reason = f"{host}:{DEFAULT_PORT}: {error.strerror}"
        return None, f"no OTLP over HTTP, {reason}; choose another port with --otlp-http-port"


def listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises OSError, with the reason in lower case."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        code = error.errno or errno.EADDRNOTAVAIL
        # Python adds words to the system's; of names that are not found there are only its own.
        reason = str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(code)
        raise OSError(code, reason.lower(), f"{host}:{port}") from None
