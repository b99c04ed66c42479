"""Everything that a subscriber of one receiver is made of, opened and closed in order."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from insitu.exporters.otlp.ends import unwanted
from insitu.forwarding.cursor import Cursor
from insitu_collector.subscriber.account import Account
from insitu_collector.subscriber.dead import DeadLetters
from insitu_collector.subscriber.delivery import Delivery, Tell, Wait
from insitu_collector.subscriber.ends import open_end
from insitu_collector.subscriber.pace import Pace
from insitu_collector.subscriber.subscriber import Lease, Subscriber
from insitu_collector.subscriber.target import parse_target


@contextmanager
def opened(
    store: Path,
    to: str,
    bytes_per_s: int | None,
    wait: Wait,
    tell: Tell,
    give_up_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Subscriber]:
    """Give a subscriber that goes on where the last one stopped. give_up_s: as of `Delivery`. clock: seconds.

    Raises Busy where another process sends there, ValueError for a URL that cannot be used, OSError.
    """
    target = parse_target(to, os.environ)
    with Lease(store, to), closing(open_end(target)) as end:
        cursor = Cursor(store, to)
        account = Account.from_json(cursor.account)
        delivery = Delivery(
            to,
            end,
            DeadLetters(store, to),
            account,
            pace=Pace(bytes_per_s),
            wait=wait,
            tell=tell,
            give_up_s=give_up_s,
            unwanted=unwanted(os.environ),
        )
        with Subscriber(store, to, cursor, account, delivery, clock=clock) as subscriber:
            delivery.changed = subscriber.save
            yield subscriber
