"""Follows one model: each of its forwards is a step already, and here that step learns whose rows it computes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import nn

from insitu.guard import Guard
from insitu.session.request_names import Named, named_here
from insitu.session.row_map import Rows
from insitu.session.stated import NOTHING, Stated
from insitu.transformers import versions
from insitu.transformers.batching import Packed, packed_batch, packed_of, running
from insitu.transformers.calls import Call, call_of
from insitu.transformers.generating import Function, around_criteria, around_generate, wrap
from insitu.transformers.given import Given, Inputs
from insitu.transformers.rows import Batch, row_map

if TYPE_CHECKING:
    from insitu.session.live import Session

logger = logging.getLogger("insitu")

_followers: Final[WeakKeyDictionary[nn.Module, Follower]] = WeakKeyDictionary()


def watch_calls() -> None:
    """Let calls of `generate` and continuous batching be known from now on, in this process. Says what it misses."""
    if versions.why_unknown() or "transformers.generation.utils" not in sys.modules:
        return
    for owner, name, around in (
        (versions.find("generation.utils", "GenerationMixin"), "generate", around_generate),
        (versions.find("generation.stopping_criteria", "StoppingCriteriaList"), "__call__", around_criteria),
        (versions.find("generation.continuous_batching.model_runner", "ModelRunner"), "compute_batch", _around_batch),
    ):
        if not wrap(owner, name, around):
            versions.say_unknown(f"has no {name} where it is looked for")


def follow(session: Session, model: nn.Module, *, is_axis_given: bool) -> None:
    """Let a session's steps state their row maps. The model is one that `can_generate`.

    is_axis_given: whether the code that attaches says itself where logits lie, and so in each row map whose they are.
    """
    session.has_all_logits = not is_axis_given
    if why := versions.why_unknown():
        logger.warning("insitu: transformers %s %s; steps go on without row maps of it", versions.version(), why)
    elif not any(site.layer is not None for site in session.sites()):
        logger.warning("insitu: no layers of %s are known, so its rows are nobody's", type(model).__name__)
    else:
        watch_calls()
        follower = _followers[model] = Follower(session, model)
        session.follow(follower.state)
        session.on_detach(lambda: _forget(model))


def _forget(model: nn.Module) -> None:
    _followers.pop(model, None)


class Follower:
    """What is known of one model's calls."""

    def __init__(self, session: Session, model: nn.Module) -> None:
        self.session = session
        self._model = type(model).__name__
        self._inputs = Inputs(model)
        self._numbers = count()
        self._said: set[str] = set()
        self._guard = Guard("row maps", "steps go on, and their rows are nobody's", are_several=True)

    def state(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Stated:
        """Say what a forward that is about to begin computes. Raises nothing."""
        if self._guard.num_errors:
            return NOTHING
        try:
            if (packed := packed_of(model)) is not None:
                return _stated(packed)
            call, named = call_of(model), named_here()
            if call is None and named is None:
                return NOTHING
            given = self._inputs.bind(args, kwargs)
            if given is None:
                return NOTHING
            return self._of_call(given, call) if call is not None else self._of_names(given, named or Named(()))
        except Exception as error:
            self._guard.contain(error)
            return NOTHING

    def _of_call(self, given: Given, call: Call) -> Stated:
        """Say what a forward of `generate` computes."""
        is_new = not call.refused and not call.names
        if is_new and (wrong := call.name(given.num_sequences, next(self._numbers))):
            self._say_once(f"{self._model}.generate: {wrong}")
        if not call.refused and len(call.names) != given.num_sequences:
            call.refused = f"a forward of {given.num_sequences} sequences, of which {len(call.names)} are known"
        if call.refused:
            self._say_once(f"{self._model}.generate: {call.refused}; the rows of such calls are nobody's")
            return NOTHING
        call.has_drafts = call.has_drafts or (given.num_tokens > 1 and call.num_tokens > 0)
        is_known = given.num_tokens == 1 and len(call.positions) > 0 and not call.has_drafts
        is_counted = is_known and not given.is_on_host
        batch = given.counted(call.positions) if is_counted else given.read(call.positions)
        call.positions = [runs[-1].next_position if runs else 0 for runs in batch.runs]
        return _of_batch(batch, row_map(batch, call.names, call.phase, call.ended, call.opts_in), given)

    def _of_names(self, given: Given, named: Named) -> Stated:
        """Say what a forward computes that no call of `generate` made, and that has names around it."""
        if (num_names := len(named.names)) != given.num_sequences:
            self._say_once(
                f"session.requests names {num_names}, and {self._model} was given {given.num_sequences} sequences"
            )
            return NOTHING
        batch, phase = given.read(()), "decode" if given.num_tokens == 1 else "prefill"
        return _of_batch(batch, row_map(batch, named.names, phase, (), named.capture), given)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("insitu: %s", text)


def _of_batch(batch: Batch, rows: Sequence[Rows], given: Given) -> Stated:
    end = max((entry.start + entry.count for entry in rows), default=0)
    return Stated(rows, given.num_sequences * given.num_tokens - end, batch.has_all_logits)


def _stated(packed: Packed) -> Stated:
    return NOTHING if packed.rows is None else Stated(packed.rows, packed.num_padded, packed.has_all_logits)


def _around_batch(compute_batch: Function) -> Function:
    """Return `ModelRunner.compute_batch` with the batch known; a replay of a graph in it is a step, too."""

    def call_compute_batch(self: Any, model: Any, batch_data: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as block:
            try:
                packed = packed_batch(self, model, batch_data)
                follower = _followers.get(model)
            except Exception as error:
                versions.say_unknown(f"keeps its batches in another way ({type(error).__name__}: {error})")
            else:
                block.enter_context(running(packed))
                if follower is not None and any(self.cb_config.cuda_graph_booleans):
                    block.enter_context(_on_stream(self.inputs_and_outputs.compute_stream))
                    block.enter_context(follower.session.step_stating(_stated(packed)))
            return compute_batch(self, model, batch_data, *args, **kwargs)

    return call_compute_batch


def _on_stream(stream: Any) -> Any:
    """Return the block in which a device works on a stream: when a step is over is asked of the current one."""
    return torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else ExitStack()
