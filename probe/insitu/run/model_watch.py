"""Finds the model that a program serves and attaches to it: what `insitu run` does where the code says nothing.

Until the first model is found, torch's own hook for calls of any module looks at each; it is taken away with that call,
and from then on no call of anything is watched. Which further models there are is told by what is put into `eval` mode,
off the path of any call: such a model has one hook of its own, which goes with its first call.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from threading import Lock
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from insitu.config import MODEL_VARIABLE
from insitu.run.after_import import after_import
from insitu.run.endings import close_in_workers, close_on_sigterm
from insitu.run.module_hooks import callers, is_traced, tell_of_calls, tell_of_eval
from insitu.run.places import Place, claim_replica, place_of
from insitu.taps.wrappers import unwrapped
from insitu.transformers.following import watch_calls

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from insitu.session.live import Session

MAX_MODELS: Final = 4
"""Models of one process that are observed. Each takes a thread, slabs and a connection; the others are counted."""


def say(text: str) -> None:
    """Write one line for the person at the terminal; a process without stderr is told nothing."""
    try:
        print(f"insitu: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


class ModelWatch:
    """Watches one process. Every entry from torch contains its own errors: the first one ends the watch with a line."""

    def __init__(self, glob: str) -> None:
        """glob: of class names; a module of another class is no model, whatever it contains."""
        self._glob = glob
        self._roots: list[weakref.ref[nn.Module]] = []
        self._sessions: list[Session] = []
        self._places: list[Place] = []
        self._in_eval: list[weakref.ref[nn.Module]] = []
        self._hooks: dict[int, tuple[weakref.ref[nn.Module], RemovableHandle]] = {}
        self._passed_over: dict[str, str] = {}
        self._num_beyond = 0
        self._pid = os.getpid()
        self._is_over = False
        self._busy = Lock()
        self._unwatch_calls: Callable[[], None] = lambda: None
        self._unwatch_eval: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Watch from now on."""
        after_import("transformers.generation.utils", self._on_transformers)
        self._unwatch_calls = tell_of_calls(self._on_call)
        self._unwatch_eval = tell_of_eval(self._on_eval)
        atexit.register(self._say_at_exit)

    def stop(self) -> None:
        """Look at nothing any more. Sessions go on."""
        self._is_over = True
        self._unwatch_calls()
        self._unwatch_eval()
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self._in_eval.clear()

    # -- called by torch -----------------------------------------------------------------------------------------

    def _on_call(self, module: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or self._is_over:  # first, so that a compiler that traces this sees nothing
            return
        try:
            self._look(module)
        except Exception as error:
            self._give_up(error)

    def _on_transformers(self) -> None:
        """Know of calls of `generate` before the first is made: the first call of the model is inside of it."""
        if self._is_over:
            return
        try:
            watch_calls()
        except Exception as error:
            say(f"steps go on without row maps of transformers: {type(error).__name__}: {error}")

    def _on_eval(self, module: nn.Module) -> None:
        if self._is_over:
            return
        try:
            if self._sessions:
                self._expect(module)
            elif all(ref() is not module for ref in self._in_eval):
                self._in_eval = [ref for ref in self._in_eval if ref() is not None]
                self._in_eval.append(weakref.ref(module))
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.stop()
        which = "no further model" if self._sessions else "no model"
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "  # else it says it itself
        say(f"{which} of process {os.getpid()} is observed: {kind}{error}")

    # -- which module is the model -------------------------------------------------------------------------------

    def _look(self, module: nn.Module) -> None:
        """Attach to a module that is called now, if it is the outermost that can be meant."""
        if module.training and torch.is_grad_enabled():
            self._pass_over(module, "in training mode with gradients")
        elif not self._is_wanted(module):
            if not _is_here(unwrapped(module)):
                self._pass_over(module, "before its parameters were there (offloaded, or lazy)")
            elif self._glob != "*":
                self._pass_over(module, f"and --model {self._glob} means another")
        elif not is_traced() and not any(map(self._is_wanted, callers(module))) and self._busy.acquire(blocking=False):
            try:
                self._take(unwrapped(module), module)
            finally:
                self._busy.release()

    def _is_wanted(self, module: nn.Module) -> bool:
        """Tell whether a module has parameters, real ones, and a name that is asked for."""
        module = unwrapped(module)
        return _is_here(module) and fnmatchcase(type(module).__name__, self._glob)

    def _pass_over(self, module: nn.Module, why: str) -> None:
        name = type(unwrapped(module)).__name__
        if not self._sessions and name not in self._passed_over and next(module.parameters(), None) is not None:
            self._passed_over[name] = why

    def _take(self, model: nn.Module, called: nn.Module) -> None:
        from insitu import verbs
        from insitu.settled import settings

        if any(ref() is model for ref in self._roots):
            return
        if verbs.is_attached_by_code() or settings().disabled:
            self.stop()
        elif len(self._sessions) < MAX_MODELS:
            self._attach(model, called)
        else:
            self._num_beyond += 1
            self._roots.append(weakref.ref(model))
            if self._num_beyond == 1:
                say(f"{MAX_MODELS} models of this process are observed; {type(model).__name__} and others are not")

    def _attach(self, model: nn.Module, called: nn.Module) -> None:
        from insitu.identity import current_run
        from insitu.run.first_call import attach_in_call

        place = place_of(len(self._sessions), current_run())
        session = attach_in_call(model, called, place)
        self._roots.append(weakref.ref(model))
        self._sessions.append(session)
        self._places.append(place)
        say(
            f"attached to {type(model).__name__}: {len(session.sites())} sites, rank {place.rank}, stage {place.stage}"
            f"{f', replica {place.replica}' if place.replica else ''}, to {session.to}"
        )
        if len(self._sessions) == 1:
            self._unwatch_calls()
            self._expect_others(model)

    # -- further models ------------------------------------------------------------------------------------------

    def _expect_others(self, model: nn.Module) -> None:
        """Expect what `eval` was called on so far; of a module that holds the model, its other parts too."""
        for module in [module for ref in self._in_eval if (module := ref()) is not None]:
            self._expect(module)
            if any(inner is model for inner in module.modules()):
                for child in module.children():
                    self._expect(child)
        self._in_eval.clear()

    def _expect(self, module: nn.Module) -> None:
        """Give a module that may be a model of its own a hook that goes with its first call for inference."""
        known = self._hooks.get(id(module))
        if (known is not None and known[0]() is module) or not self._is_wanted(module) or self._is_ours(module):
            return
        handle = module.register_forward_pre_hook(self._on_first_call)
        self._hooks[id(module)] = weakref.ref(module), handle

    def _is_ours(self, module: nn.Module) -> bool:
        roots = [root for ref in self._roots if (root := ref()) is not None]
        return any(inner is unwrapped(module) for root in roots for inner in root.modules())

    def _on_first_call(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling() or (module.training and torch.is_grad_enabled()):
            return
        _, handle = self._hooks.pop(id(module), (None, None))
        if handle is not None:
            handle.remove()
        self._on_call(module, args)

    # -- ends ----------------------------------------------------------------------------------------------------

    def move_in_child(self) -> None:
        """After a fork: the child's sessions are replicas of their own, unless it is one rank of many."""
        for session, place in zip(self._sessions, self._places, strict=True):
            if place.is_alone:
                session.source = replace(session.source, replica=claim_replica(session.source.run, place.stage))

    def _say_at_exit(self) -> None:
        if os.getpid() != self._pid:  # a forked child, which has its parent's memory of what was called
            return
        if self._num_beyond:
            say(f"{self._num_beyond} more models were called and not observed; `insitu run --model` chooses")
        if not self._sessions and not self._is_over and self._passed_over:
            name, why = next(iter(self._passed_over.items()))
            say(f"nothing was observed: no model was called for inference; the {name} was called {why}")


def _is_here(module: nn.Module) -> bool:
    """Tell whether a module has parameters, and they have values; `module` is no wrapper."""
    parameter = next(module.parameters(), None)
    return parameter is not None and parameter.device.type != "meta" and not nn.parameter.is_lazy(parameter)


_watch: ModelWatch | None = None


def start() -> None:
    """Watch this process; once."""
    global _watch
    if _watch is None:
        _watch = ModelWatch(os.environ.get(MODEL_VARIABLE) or "*")
        _watch.start()
        close_on_sigterm()
        close_in_workers()


def _move_in_child() -> None:
    if _watch is not None:
        _watch.move_in_child()


os.register_at_fork(after_in_child=_move_in_child)  # before sessions start over in the child, which are imported later
