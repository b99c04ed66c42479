"""A forked child's call to its collector, made by a program of its own, the relay.

gRPC cannot be relied on in a child of a process that had used it: a new channel works there, or hangs, or ends the
child, by what threads of the parent were in the middle of. The relay is started anew and takes part in no fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import grpc

from insitu.credentials import CredentialError, Credentials
from insitu.exporters.relay_frames import Kind, read_frame, write_frame
from insitu.wire.address import Address
from insitu.wire.insitu_pb2 import ToCollector, ToProbe


class NoRelay(OSError):
    """No process is to be had."""


class RelayError(grpc.RpcError):
    """The call ended with another status than OK."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        return self._code

    def details(self) -> str:
        """Return what it says."""
        return self._details


class RelayedCall:
    """One call of `Ship`: iterate over its replies. Raises NoRelay."""

    def __init__(
        self,
        address: Address,
        credentials: Credentials,
        options: Sequence[tuple[str, Any]],
        messages: Iterator[ToCollector],
    ) -> None:
        found = os.pathsep.join(each for each in sys.path if each)  # what is found here; not what lies where it starts
        ours, theirs = os.pipe()  # not its stdout, which what a site runs at every start may write to
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "insitu.exporters.relay_program", str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs],
                env={**os.environ, "PYTHONPATH": found},
                start_new_session=True,  # Ctrl-C is for the child, which may have something left to say
            )
        except OSError as error:
            os.close(ours)
            raise NoRelay(str(error)) from None
        finally:
            os.close(theirs)
        self._replies = os.fdopen(ours, "rb")
        asked = {"address": str(address), "credentials": asdict(credentials), "options": list(options)}
        self._messages = messages
        self._asked = json.dumps(asked).encode()
        threading.Thread(target=self._write, name="insitu-relay", daemon=True).start()

    def __iter__(self) -> Iterator[ToProbe]:
        """Yield replies. Raises RpcError, or CredentialError, one line."""
        with self._replies as pipe:
            while (frame := read_frame(pipe)) is not None:
                kind, body = frame
                if kind is Kind.BARRED:
                    raise CredentialError(body.decode())
                if kind is Kind.END:
                    return self._end(**json.loads(body))
                yield ToProbe.FromString(body)
        raise RelayError(grpc.StatusCode.INTERNAL, "the process that ships for this forked one has ended")

    def _end(self, code: str, details: str) -> None:
        if code != grpc.StatusCode.OK.name:
            raise RelayError(grpc.StatusCode[code], details)

    def cancel(self) -> None:
        """End it. Safe to call twice, and from any thread."""
        self._process.kill()
        self._process.wait()

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None, "it was asked for"
        with suppress(OSError), pipe:  # where it has ended, whoever reads its replies finds that
            write_frame(pipe, Kind.CALL, self._asked)  # type: ignore[arg-type]
            for message in self._messages:
                write_frame(pipe, Kind.MESSAGE, message.SerializeToString())  # type: ignore[arg-type]
