"""A rank's side of the driver: one socket, read and written by blocking."""

from __future__ import annotations

import socket
from typing import BinaryIO

from insitu_engine.messages import HEAD_LENGTH, Idle, StepPlan, Stop, ToDriver, Traffic, frame, read_length, to_rank


class DriverGone(Exception):
    """The driver's end of the socket is closed."""


class Link:
    """This rank's end of its socket to the driver. Blocking."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader: BinaryIO = end.makefile("rb")

    def read(self) -> StepPlan | Idle | Traffic | Stop:
        """Wait for the next message. Raises DriverGone."""
        body = self._take(read_length(self._take(HEAD_LENGTH)))
        message: StepPlan | Idle | Traffic | Stop = to_rank.decode(body)
        return message

    def _take(self, num_bytes: int) -> bytes:
        data = self._reader.read(num_bytes)
        if len(data) < num_bytes:
            raise DriverGone
        return data

    def send(self, message: ToDriver) -> None:
        try:
            self._socket.sendall(frame(message))
        except OSError:
            raise DriverGone from None
