"""What `insitu load` sends, and when: all of it follows from a seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

CAPTURED_SHARE: Final = 0.1
STREAMED_SHARE: Final = 0.5
MAX_TOKENS: Final = (8, 48)
PROMPT_WORDS: Final = (2, 40)

TEXT: Final = (
    "The morning train left the harbour late, and everybody on it knew why. A bridge had been raised for one small "
    "boat, and the man who should have lowered it was drinking coffee with the captain. Nobody complained, since the "
    "sun was warm and the water very still. In the second carriage an old woman told her grandson how the town had "
    "looked before the bridge was built: there were ferries then, four of them, and each had its own bell. You could "
    "hear from your bed which one had come in. The boy asked what had become of the bells. She thought for a while. "
    "One hangs in the school, she said, one in the church, and one was lost in the flood. The fourth is the bell you "
    "hear now. And indeed, far away and rather thin, a bell was ringing, and the bridge began to come down."
)


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send: when (seconds after the start), what, and how."""

    at_s: float
    prompt: str
    max_tokens: int
    stream: bool
    capture: bool


def cut_prompt(rng: random.Random, words: Sequence[str]) -> str:
    """Return a stretch of a text, short ones as likely as long ones."""
    length = min(len(words), rng.randint(*PROMPT_WORDS))
    start = rng.randrange(len(words) - length + 1)
    return " ".join(words[start : start + length])


def plan(seed: int, rate: float, seconds: float, prompts: Sequence[str] = ()) -> list[Planned]:
    """Return the requests of a run in order of time; arrivals are Poisson with `rate` a second.

    `prompts` are drawn whole; without any, prompts are cut from a text of our own.
    """
    rng = random.Random(seed)
    planned: list[Planned] = []
    at_s = rng.expovariate(rate)
    while at_s < seconds:
        planned.append(draw(rng, at_s, prompts))
        at_s += rng.expovariate(rate)
    return planned


def draw(rng: random.Random, at_s: float, prompts: Sequence[str] = ()) -> Planned:
    """Return one request to send at `at_s`."""
    return Planned(
        at_s,
        prompt=rng.choice(prompts) if prompts else cut_prompt(rng, TEXT.split()),
        max_tokens=rng.randint(*MAX_TOKENS),
        stream=rng.random() < STREAMED_SHARE,
        capture=rng.random() < CAPTURED_SHARE,
    )


def endless(seed: int, prompts: Sequence[str] = ()) -> Iterator[Planned]:
    """Yield the requests of a closed loop, each to be sent when somebody is free to."""
    rng = random.Random(seed)
    while True:
        yield draw(rng, 0.0, prompts)
