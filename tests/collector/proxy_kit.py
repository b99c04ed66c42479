"""A network between a probe and its collector, that a test slows, silences or cuts."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

PIECE: Final = 16 << 10


class _Wire:
    """One connection through the proxy: two sockets, and a thread for each direction."""

    def __init__(self, proxy: Proxy, near: socket.socket, far: socket.socket) -> None:
        self._proxy = proxy
        self.ends = (near, far)
        self.is_silent = threading.Event()
        self._threads = [
            threading.Thread(target=self._pump, args=pair, daemon=True) for pair in ((near, far), (far, near))
        ]
        for thread in self._threads:
            thread.start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(PIECE):
                self._proxy.pace(len(data))
                if not self.is_silent.is_set():
                    target.sendall(data)
        if not self.is_silent.is_set():  # nobody hears of an end in a network that is away
            self.cut()

    def cut(self) -> None:
        """End the connection, and let both sides know."""
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in self.ends:
            end.close()


class Proxy:
    """Passes TCP connections on to a port; `port` is its own."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.bytes_per_s: float | None = None
        """As much goes through in a second; None: all of it."""
        self.num_connections = 0
        self._is_away = False
        self._wires: list[_Wire] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for wire in self._wires:
            wire.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to_port))
                with self._lock:
                    self.num_connections += 1
                    wire = _Wire(self, near, far)
                    if self._is_away:
                        wire.is_silent.set()
                    self._wires.append(wire)

    def pace(self, num_bytes: int) -> None:
        """Wait as long as so many bytes take."""
        rate = self.bytes_per_s
        if rate is not None:
            self._over.wait(num_bytes / rate)

    def silence(self) -> None:
        """From now on nothing goes through, and nobody is told: connections there are stay open for ever."""
        with self._lock:
            self._is_away = True
            for wire in self._wires:
                wire.is_silent.set()

    def heal(self) -> None:
        """Pass new connections on again; those from before stay silent."""
        with self._lock:
            self._is_away = False

    def cut(self) -> None:
        """End every connection."""
        with self._lock:
            for wire in self._wires:
                wire.cut()
