"""The driver's side of its ranks: their sockets, and the news of a rank's end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Final

from insitu_engine.launcher import RankProcess
from insitu_engine.messages import Failed, Frames, ToDriver, ToRank, frame, to_driver

SETTLE_S: Final = 0.5
"""How long to wait for the rank that caused it, when one only reports that another is gone."""


class RankLink(asyncio.Protocol):
    """One rank: send it messages, get its messages, learn why it ended."""

    def __init__(self, rank: RankProcess, on_message: Callable[[int, ToDriver], None]) -> None:
        self.rank = rank.rank
        self.process = rank.process
        self.failed: Failed | None = None
        self._end = rank.end
        self._on_message = on_message
        self._frames = Frames(to_driver)
        self._transport: asyncio.Transport | None = None

    async def open(self, on_exit: Callable[[RankLink], None]) -> None:
        """Start listening to the rank, and watch its process."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=self._end)

        def exited() -> None:
            loop.remove_reader(self.process.sentinel)
            self.process.join()
            # What the rank said last is still in the socket: read it before judging.
            loop.call_later(0.05, on_exit, self)

        loop.add_reader(self.process.sentinel, exited)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            if isinstance(message, Failed):
                self.failed = message
            self._on_message(self.rank, message)

    def send(self, message: ToRank) -> None:
        self.write(frame(message))

    def write(self, data: bytes) -> None:
        """Send an encoded message; to a rank that is gone, nothing happens: its end is told otherwise."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def cause_of_end(link: RankLink) -> str:
    """Return, as the end of a sentence, why a rank is no more."""
    name = f"rank {link.rank} (stage {link.rank})"
    if link.failed is not None:
        return f"{name} failed: {link.failed.reason}"
    code = link.process.exitcode
    if code is not None and code < 0:
        return f"{name} was killed by {_signal_name(-code)}"
    return f"{name} exited with status {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def end_ranks(links: list[RankLink], within_s: float) -> None:
    """Wait for every rank to exit; kill what is left when the time is over."""
    deadline = asyncio.get_running_loop().time() + within_s
    while any(_alive(link.process) for link in links) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.02)
    for link in links:
        if _alive(link.process):
            link.process.kill()
        link.process.join()
        asyncio.get_running_loop().remove_reader(link.process.sentinel)
        link.close()


def _alive(process: BaseProcess) -> bool:
    return process.exitcode is None
