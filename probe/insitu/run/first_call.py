"""Attaching in the middle of a model's first call, which becomes its first step: no code is there to attach before."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn

from insitu import verbs
from insitu.run.module_hooks import arguments_of
from insitu.settled import settings
from insitu.taps.attaching import attach_with
from insitu.taps.root import tap_root
from insitu.vocabulary import Role

if TYPE_CHECKING:
    from insitu.run.places import Place
    from insitu.session.live import Session
    from insitu.taps.observer import Observer


def attach_in_call(model: nn.Module, called: nn.Module, place: Place) -> Session:
    """Attach from inside a forward pre-hook of `called`: the model, or a wrapper that is about to call it.

    The session gives way to one that code asks for. Raises what `insitu.attach` raises, and ValueError for a model
    whose forward was replaced on the instance (accelerate's hooks), since what is in its class is never called.
    """
    if "forward" in vars(model):
        raise ValueError(f"the forward of this {type(model).__name__} was replaced on the instance")
    with torch.inference_mode(False), torch.no_grad():  # slabs outlive this call and the mode it is in
        session, observer = attach_with(
            settings(), model, (), Role.RANK, rank=place.rank, stage=place.stage, replica=place.replica
        )
    verbs.take_unasked(session)
    if called is model:  # else the wrapper will find the new forward
        _make_first_step(model, session, observer)
    return session


def _make_first_step(model: nn.Module, session: Session, observer: Observer) -> None:
    """Let the call that is under way be a step: torch looked its forward up before it was ours."""
    with ExitStack() as entering:
        entering.enter_context(session.step_of(model, *arguments_of(model)))
        entering.enter_context(session.interval("compute"))
        step = entering.pop_all()

    def end(_: nn.Module, __: object, output: object) -> None:
        if sys.exc_info()[0] is None:  # after an error torch walks through the hooks, which must stay as they are
            handle.remove()
        if session.in_step:
            tap_root(observer.root_tap, observer, output)
        step.close()

    handle = model.register_forward_hook(end, always_call=True)
