"""What is told of who was refused and of what changed: rows of `events` of kind `audit`, and lines of the log."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

AGAIN_S: Final = 60.0
"""How often one reason is told of one host."""
MOST_COUNTED: Final = 256
"""Pairs of reason and host that are told apart; those beyond are counted as of `others`."""
MOST_OWED: Final = 1024
HANDSHAKE_S: Final = 20.0
"""A connection of which no call has come so long after its handshake began has failed in it."""
MOST_PEERS: Final = 4096
OTHERS: Final = "others"
UNTOLD: Final = "hosts that gRPC does not tell"

_log = logging.getLogger("insitu")


class Why(StrEnum):
    """Why somebody was refused."""

    NO_TOKEN = "no_token"
    UNKNOWN_TOKEN = "unknown_token"
    EXPIRED = "expired"
    UNKNOWN_CERTIFICATE = "unknown_certificate"
    ROLE = "role"
    OTHER_TENANT = "other_tenant"
    REVOKED = "revoked"
    TLS_HANDSHAKE = "tls_handshake"


@dataclass(slots=True)
class _Count:
    num: int = 0
    told_s: float | None = None
    """When it was told last; None: never."""

    def is_due(self, now: float, is_last: bool) -> bool:
        return self.num > 0 and (is_last or self.told_s is None or now - self.told_s >= AGAIN_S)


class Audit:
    """Counts refusals, keeps what is to be told, and tells it in `look`. Safe for several threads.

    A refusal costs its caller's thread no disk; a host that tries again and again makes a row a minute, with the count.
    """

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """tell: stores the text of an event; raises OSError where it cannot now. clock: seconds."""
        self._tell = tell
        self._clock = clock
        self._lock = threading.Lock()
        self._owed: deque[str] = deque(maxlen=MOST_OWED)
        self._counts: dict[tuple[str, str], _Count] = {}

    def note(self, text: str) -> None:
        """Something has changed."""
        _log.warning("insitu: %s", text)
        with self._lock:
            self._owed.append(text)

    def refused(self, why: Why, host: str, num: int = 1) -> None:
        """Somebody was refused."""
        with self._lock:
            key = (str(why), host)
            if key not in self._counts and len(self._counts) >= MOST_COUNTED:
                key = (str(why), OTHERS)
            self._counts.setdefault(key, _Count()).num += num

    def look(self, is_last: bool = False) -> None:
        """Tell what is due. What the store does not take is told later. is_last: everything is due."""
        with self._lock:
            now = self._clock()
            try:
                while self._owed:
                    self._tell(self._owed[0])
                    self._owed.popleft()
                for (why, host), count in self._counts.items():
                    if count.is_due(now, is_last):
                        text = f"refused {count.num} of {host}: {why}"
                        self._tell(text)
                        _log.warning("insitu: %s", text)
                        count.num, count.told_s = 0, now
            except OSError:
                return
            over = [key for key, each in self._counts.items() if not each.num and now - (each.told_s or 0) > AGAIN_S]
            for key in over:
                del self._counts[key]


class Handshakes:
    """Which connections have failed in their TLS handshake. gRPC says nothing of those: only that one began, and
    whose calls came. Pure.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, int]] = deque()
        """When so many began of which no call has come."""
        self._peers: OrderedDict[str, None] = OrderedDict()
        self._num_arrived = 0
        self._lock = threading.Lock()

    def called(self, peer: str) -> None:
        """A call came over TLS from this address and port."""
        with self._lock:
            self._num_arrived += peer not in self._peers
            self._peers[peer] = None
            self._peers.move_to_end(peer)
            while len(self._peers) > MOST_PEERS:
                self._peers.popitem(last=False)

    def failed(self, num_begun: Callable[[], int], now: float) -> int:
        """Return how many have failed since the last call. num_begun: gives how many began since it."""
        with self._lock:
            arrived, self._num_arrived = self._num_arrived, 0
            self._waiting.append((now, num_begun()))  # read last: whatever has arrived is among them
            while self._waiting and arrived:
                began_s, num = self._waiting.popleft()
                if num > arrived:
                    self._waiting.appendleft((began_s, num - arrived))
                arrived = max(0, arrived - num)
            num_failed = 0
            while self._waiting and (now - self._waiting[0][0] >= HANDSHAKE_S or not self._waiting[0][1]):
                num_failed += self._waiting.popleft()[1]
            return num_failed
