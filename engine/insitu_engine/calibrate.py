"""Warm-up: real requests over the shapes a server sees, before it says that it is ready.

They take the normal path through every rank, under names that begin with `warmup-`, so the judge can fit how long a
healthy stage takes for a step of a given shape before any traffic comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from insitu_engine.blocks import BLOCK_SIZE
from insitu_engine.driver import Driver, End, Ticket
from insitu_engine.errors import EngineError
from insitu_engine.request import Request
from insitu_engine.scheduler import Limits

PREFIX = "warmup-"


def waves(limits: Limits, max_len: int, vocab_size: int) -> Iterator[list[Request]]:
    """Yield groups of requests to run one group after another.

    First prompts alone, from a full token budget down to a few rows; then full slots whose requests end one by one,
    so that every number of decoding rows from `max_batch` to 1 is seen at mixed context lengths.
    """
    longest = min(max_len, limits.num_blocks * BLOCK_SIZE)
    numbers = count(1)

    def request(length: int, max_tokens: int) -> Request:
        number, max_tokens = next(numbers), min(max_tokens, longest - 1)
        length = min(length, longest - max_tokens)
        prompt = [(7 * number + 3 * at) % vocab_size for at in range(length)]
        return Request(name=f"{PREFIX}{number}", prompt=prompt, max_tokens=max_tokens)

    budget = limits.token_budget
    for length in (budget, budget // 2, budget // 4, budget // 8, 4):
        yield [request(max(1, length), 1) for _ in range(limits.num_slots)]
    lengths = [4 + 12 * (at % 4) for at in range(limits.max_batch)]
    # Nobody ends before the last prompt is in.
    first_end = 2 + sum(lengths) // (budget - limits.max_batch)
    yield [request(length, first_end + at) for at, length in enumerate(lengths) for _ in range(limits.num_slots)]


async def warm_up(driver: Driver, max_len: int, vocab_size: int) -> int:
    """Run all waves; return the number of steps they took. Raises EngineError when a request does not finish."""
    first = driver.scheduler.next_step
    for wave in waves(driver.scheduler.limits, max_len, vocab_size):
        tickets: list[Ticket] = []
        for request in wave:
            if driver.scheduler.queue_is_full:
                await _finished(tickets)
            tickets.append(driver.submit(request))
        await _finished(tickets)
    return driver.scheduler.next_step - first


async def _finished(tickets: list[Ticket]) -> None:
    """Wait for every ticket's end and forget the tickets."""
    for ticket in tickets:
        while not isinstance(update := await ticket.updates.get(), End):
            pass
        if update.error is not None:
            raise EngineError(f"warm-up failed: {update.error}")
    tickets.clear()
