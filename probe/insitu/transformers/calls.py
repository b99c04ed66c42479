"""A call of `generate` while it lasts: who its sequences are, and how far they have come."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

from insitu.session.request_names import Named, named_here

_CALL: Final[ContextVar[Call | None]] = ContextVar("insitu_generate_call", default=None)


@dataclass(slots=True)
class Call:
    """One call of `generate`. Its forwards, and what it asks its stopping criteria, tell the rest."""

    model: weakref.ref[Any]
    num_beams: int
    """Beams of one prompt: they change places, and all are the prompt's."""
    num_returned: int
    """Sequences of one prompt that go on side by side, without beams."""
    refused: str = ""
    """Why its rows are nobody's; empty: they are somebody's."""
    outer: Call | None = None
    given: Named | None = field(default_factory=named_here)
    """Names of its prompts as the code around it says them."""
    names: Sequence[str] = ()
    """Of its sequences, since the first forward."""
    num_tokens: int = 0
    """Tokens of each sequence that were generated so far."""
    ended: set[int] = field(default_factory=set)
    """Sequences that are over: `generate` feeds them padding until the last one is."""
    positions: Sequence[int] = ()
    """Of each sequence's next token, as far as the host can tell."""
    has_drafts: bool = False
    """Several tokens of a sequence are tried at once, of which some may be taken back."""

    @property
    def opts_in(self) -> bool:
        """Whether its requests opt in to rules for rows."""
        return self.given is not None and self.given.capture

    @property
    def phase(self) -> str:
        return "decode" if self.num_tokens else "prefill"

    def note_token(self, is_over: Any) -> None:
        """Take in that each sequence has one token more. is_over: bool[num_sequences], which are over.

        Where that lies on a device, `generate` itself reads it next, and waits for it: reading it here adds no wait.
        """
        self.num_tokens += 1
        if self.num_beams == 1 and len(self.names) > 1:
            self.ended.update(at for at, over in enumerate(is_over.tolist()) if over)

    def name(self, num_sequences: int, number: int) -> str:
        """Name the sequences, now that it is known how many there are; return what is wrong, or nothing.

        number: which call of its model's this is.
        """
        many = max(self.num_beams, self.num_returned)
        num_prompts, left = divmod(num_sequences, many)
        if left:
            return f"{num_sequences} sequences are not {many} of each prompt"
        prompts: Sequence[str] | None = self.given and self.given.names
        wrong = ""
        if prompts is not None and len(prompts) != num_prompts:
            wrong = f"session.requests names {len(prompts)}, and there are {num_prompts} prompts: they have other names"
            prompts = None
        prompts = prompts or [f"generate-{number}/{at}" for at in range(num_prompts)]
        if self.num_beams > 1 or many == 1:
            self.names = [name for name in prompts for _ in range(many)]
        else:
            self.names = [f"{name}#{nth}" for name in prompts for nth in range(many)]
        return wrong


def call_of(model: Any) -> Call | None:
    """Return the innermost call of `generate` of a model that is under way here."""
    call = _CALL.get()
    while call is not None and call.model() is not model:
        call = call.outer
    return call


def current_call() -> Call | None:
    """Return the innermost call of `generate` that is under way here, whatever model's."""
    return _CALL.get()


@contextmanager
def calling(call: Call) -> Iterator[None]:
    """Let a call be under way in this block."""
    call.outer = _CALL.get()
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)
