"""Webhooks: an alert as a JSON document, POSTed to a URL."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import ssl
import threading
from contextlib import suppress
from typing import Final
from urllib.parse import SplitResult, urlsplit

from insitu.identity import package_version
from insitu_collector.notify.alerts import Alert
from insitu_collector.notify.delivery import Unsent

ATTEMPT_S: Final = 5.0
"""From the first byte of a connection to the status line; a receiver that is slower is tried again."""
LONGEST_RETRY_AFTER_S: Final = 60.0
_LATER: Final = frozenset({408, 425, 429})
"""Refusals that are worth another attempt, beside all 5xx."""


class Webhook:
    """One URL. Redirects are not followed: they would carry the document to somebody who was not named."""

    def __init__(self, url: str, attempt_s: float = ATTEMPT_S) -> None:
        """Raises ValueError for what is no http or https URL."""
        self._url = split(url)
        self._attempt_s = attempt_s
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None
        self._closed = False
        self.target = name_of(url)

    def send(self, alert: Alert) -> None:
        body = json.dumps(alert.to_json(), allow_nan=False).encode()
        connection = self._connect()
        late = threading.Event()
        timer = threading.Timer(self._attempt_s, _cut, [connection, late])
        timer.daemon = True
        timer.start()  # a socket's own timeout starts anew with each byte
        try:
            connection.request("POST", _path(self._url), body, self._headers())
            status, after_s = _status(connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            raise Unsent(_reason(error, late), again=True) from None
        finally:
            timer.cancel()
            connection.close()
        if late.is_set():  # the head ended because it was cut, which reads like its end
            raise Unsent(_reason(TimeoutError(), late), again=True)
        if not 200 <= status < 300:
            raise Unsent(f"HTTP {status}", again=status >= 500 or status in _LATER, after_s=after_s)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._connection is not None:
                _cut(self._connection, threading.Event())

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        with self._lock:
            if self._closed:
                raise Unsent("the judge ends", again=True)
            if self._url.scheme == "https":
                context = ssl.create_default_context()
                self._connection = http.client.HTTPSConnection(host, port, timeout=self._attempt_s, context=context)
            else:
                self._connection = http.client.HTTPConnection(host, port, timeout=self._attempt_s)
            return self._connection

    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", "User-Agent": f"insitu/{package_version()}", "Connection": "close"}


def split(url: str) -> SplitResult:
    """Return the parts of a webhook's URL. Raises ValueError, one line, for what is no http or https URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{shown(url)!r} is no http:// or https:// URL")
    if parts.username or parts.password:
        raise ValueError(f"a webhook's URL holds no user or password: {shown(url)!r}; put a token in its path")
    _ = parts.port  # raises ValueError for what is no port
    if any(ord(letter) <= 32 or ord(letter) > 126 for letter in url):
        raise ValueError(f"the URL of {shown(url)!r} has characters that must be percent-encoded")
    return parts


def shown(url: str) -> str:
    """Return an address without what may be secret in it: its path, its query, a user."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def name_of(url: str) -> str:
    """Return what a receiver is called in rows and lines: where it is, and a digest of the rest."""
    return f"{shown(url)} ({hashlib.sha256(url.encode()).hexdigest()[:8]})"


def _path(url: SplitResult) -> str:
    return (url.path or "/") + (f"?{url.query}" if url.query else "")


def _status(response: http.client.HTTPResponse) -> tuple[int, float]:
    after = response.headers.get("Retry-After", "")
    return response.status, min(LONGEST_RETRY_AFTER_S, float(after)) if after.isdecimal() else 0.0


def _cut(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    late.set()
    sock = connection.sock
    if sock is not None:
        with suppress(OSError):  # it has ended meanwhile
            sock.shutdown(socket.SHUT_RDWR)


def _reason(error: Exception, late: threading.Event) -> str:
    if isinstance(error, TimeoutError) or late.is_set():
        return "no answer in time"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__
