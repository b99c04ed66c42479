"""A rank's side of the driver: one socket, read and written by blocking."""

from __future__ import annotations

import socket
from typing import BinaryIO

from insitu_engine.messages import Idle, StepPlan, Stop, ToDriver, Traffic, frame, read_length, to_rank


class DriverGone(Exception):
    """The driver's end of the socket is closed."""


class Link:
    """This rank's end of its socket to the driver. Blocking."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader: BinaryIO = end.makefile("rb")

    def read(self) -> StepPlan | Idle | Traffic | Stop:
        """Wait for the next message. Raises DriverGone."""
        head = self._reader.read(4)
        body = self._reader.read(read_length(head)) if len(head) == 4 else b""
        if not body:
            raise DriverGone
        message: StepPlan | Idle | Traffic | Stop = to_rank.decode(body)
        return message

    def send(self, message: ToDriver) -> None:
        try:
            self._socket.sendall(frame(message))
        except OSError:
            raise DriverGone from None
