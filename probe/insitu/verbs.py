"""The verbs: attach to a model, start without one, observe by decorator, tap and time by name."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from insitu.arguments import check_arguments, rules_of, source_of, text
from insitu.config import Config
from insitu.exporters import Exporter
from insitu.flight.settings import Flight
from insitu.rules.rule import Rule
from insitu.session.intervals import Interval
from insitu.session.live import Session
from insitu.session.silent import SilentSession
from insitu.settled import settled, switch, tell
from insitu.vocabulary import Role

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.pipelining import PipelineStage

    from insitu.identity import Source

logger = logging.getLogger("insitu")

T = TypeVar("T")
_sessions: list[weakref.ref[Session]] = []
"""Those that live, in the order they were made; `tap` and `interval` speak to one. Weak: owners let go of them."""
_unasked: list[Session] = []
"""Sessions that no code asked for (`insitu run`). They give way to the first one that code asks for."""
_by_code = False
_is_traced: Callable[[], bool] = bool
"""Tells a function that a compiler traces it: torch's, once a session was made and torch is there; until then False."""


def is_attached_by_code() -> bool:
    """Tell whether code of this process has attached a model, or started a rank's session."""
    return _by_code


def _give_way() -> None:
    """Close what no code asked for: a rank has one account of its time."""
    global _by_code
    _by_code = True
    while _unasked:
        logger.warning("insitu: the code attaches by itself, so what `insitu run` attached gives way")
        _unasked.pop().close()


def off() -> Session:
    """Return the session that does nothing: no thread, no hook, the same methods, none of which raises."""
    return SilentSession()


def start(
    *,
    to: str | Exporter | None = None,
    spool: str | None = None,
    role: str | None = None,
    model: str | None = None,
    rank: int | None = None,
    stage: int | None = None,
    **source: Any,
) -> Session:
    """Start a session for a process without a model: a driver, a judge, or a rank that times itself.

    to, spool: as of `attach`. role: "client" if not told, "rank" where `rank` is given. model: its name, for people.
    rank: its place among all ranks, at `stage` (0 if not told); without one both are -1. `source` sets further fields
    of `insitu.identity.Source` (`tp_rank`, `replica`).
    Raises ValueError for a bad destination or a stage without a rank, OSError for what cannot be written.
    """
    if rank is None and stage is not None:
        raise ValueError(f"stage {stage} needs a rank: insitu.start(rank=..., stage={stage})")
    config = settled(to=to, spool=spool)
    if config.disabled:
        tell(config)
        logger.warning("insitu: %s is set; nothing is observed", switch(config))
        return off()
    check_arguments("start", source)
    if rank is None:
        identity = source_of(role or Role.CLIENT, model=model, **source)
    else:
        identity = source_of(role or Role.RANK, rank=rank, stage=stage or 0, model=model, **source)
    tell(config)
    if rank is not None:
        _give_way()
    return remember(_session(identity, config))


def attach(
    model: nn.Module | PipelineStage,
    *,
    to: str | Exporter | None = None,
    spool: str | None = None,
    rules: Sequence[Rule] = (),
    role: str = "rank",
    rank: int | None = None,
    stage: int = 0,
    model_name: str | None = None,
    max_rows: int | None = None,
    axes: Mapping[str, str] | None = None,
    flight: Flight | None = None,
    overhead_budget: float | None = None,
    t0: str | None = None,
    **source: Any,
) -> Session:
    """Observe an existing model; every outermost forward is a step unless the caller opens `session.step(...)`.

    model: any module, or a stage of torch.distributed.pipelining, which says its rank and stage; its outputs stay the
    same bits. to: one destination, a URL or an `Exporter`; INSITU_TO, or
    file://./insitu-store, if not told. spool: a folder for what a collector that is away cannot take.
    rules: what to take beside canaries (`Rule`). role, rank, stage: its place in the grid; the rank is what
    torch.distributed or its launcher says (RANK), 0 without one, if not told. model_name: its class if not told.
    `source` sets further fields of `insitu.identity.Source` (`tp_rank`, `replica`).
    max_rows: most rows of one step whose per-row statistics and raw rows are kept (a slab's size follows from it);
    2048 if not told, here or in `insitu config show`.
    axes: site glob -> "tokens" | "samples" | "batch", where the default is wrong (`{"logits": "samples"}`).
    flight: what is kept of the last seconds, and shipped when something triggers (docs/probe.md, "Flight recorder").
    overhead_budget: share of step time in (0, 1] that the probe may take, 0.01 if not told: statistics, and rows that
    nobody asked for by name, are taken in fewer steps to keep it.
    t0: "boundary" takes canaries at stage boundaries only.
    Raises ValueError for a bad rule, setting or destination (a rule whose sites resolve nowhere lists the nearest),
    OSError for a destination that cannot be written; never after that.
    """
    config = settled(
        to=to, spool=spool, max_rows=max_rows, axes=axes, flight=flight, overhead_budget=overhead_budget, t0=t0
    )
    if config.disabled:
        tell(config)
        logger.warning("insitu: %s is set; the model stays untouched", switch(config))
        return off()
    from insitu.pipelining.stages import stage_of
    from insitu.run.places import global_rank
    from insitu.taps.attaching import attach_with, check_model

    of_a_stage, module = stage_of(model), cast("nn.Module", model)
    if of_a_stage is not None:
        module, place = of_a_stage.module, of_a_stage.place
        rank, stage, source = place["rank"], place["stage"], {"pp_rank": place["pp_rank"], **source}
    check_model(module)
    check_arguments("attach", source)
    if model_name is not None:
        text("model_name", model_name)
    rank = (global_rank(os.environ) or 0) if rank is None else rank
    rules = rules_of(rules)
    source_of(role, rank=rank, stage=stage, **source)
    tell(config)
    _give_way()
    session, _ = attach_with(config, module, rules, role, name=model_name, rank=rank, stage=stage, **source)
    if of_a_stage is not None:
        session.on_detach(of_a_stage.follow(session))
    return remember(session)


def take_unasked(session: Session) -> None:
    """Speak to a session that no code asked for, until code asks for one."""
    _unasked.append(remember(session))


def _heard() -> Session | None:
    """Return the session whose step is open on this thread, else the last that was made of those not closed."""
    last = None
    for reference in reversed(_sessions):
        session = reference()
        if session is None or session.is_closed:
            continue
        if session.in_step:
            return session
        last = last or session
    return last


def remember(session: Session) -> Session:
    """Let `tap` and `interval` find a session; return it."""
    global _is_traced
    _sessions.append(weakref.ref(session, _sessions.remove))
    if "torch" in sys.modules:
        _is_traced = sys.modules["torch"].compiler.is_dynamo_compiling
    return session


@overload
def observe(target: type[T], /) -> type[T]: ...
@overload
def observe(target: Callable[..., T], /) -> Callable[..., T]: ...
@overload
def observe(**options: Any) -> Callable[[T], T]: ...
def observe(target: Any = None, /, **options: Any) -> Any:
    """Decorate an `nn.Module` class, a factory that returns a module, or a plain step function.

    Instances of the class, or what the factory returns, are attached with `options` (those of `attach`). Each call
    of a plain function is a step, from its second call on: the first tells what it is. The session is
    `instance.insitu`, or `function.insitu` of a step function. target: what is decorated where there are no options.
    Raises nothing here; the first call raises ValueError and OSError as `attach` does.
    """
    if target is None:
        return functools.partial(observe, **options)
    return _observe_class(target, options) if inspect.isclass(target) else _observe_function(target, options)


def _observe_class(cls: Any, options: dict[str, Any]) -> Any:
    original = cls.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls:
            object.__setattr__(self, "insitu", attach(self, **options))

    cls.__init__ = init
    return cls


def _observe_function(function: Any, options: dict[str, Any]) -> Any:
    session: Session | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal session
        if session is None:
            result = function(*args, **kwargs)
            if _is_module(result):
                object.__setattr__(result, "insitu", attach(result, **options))
                return result
            names = {"role": "rank", "rank": 0, "stage": 0, **options}
            session = start_steps(**names)
            call.insitu = session  # type: ignore[attr-defined]
            return result
        with session.step():
            return function(*args, **kwargs)

    return call


def start_steps(
    *,
    to: str | Exporter | None = None,
    spool: str | None = None,
    rank: int = 0,
    stage: int = 0,
    role: str = "rank",
    **source: Any,
) -> Session:
    """Start a session for a step function: steps and intervals, no sites."""
    config = settled(to=to, spool=spool)
    if config.disabled:
        tell(config)
        return off()
    check_arguments("observe", source)
    identity = source_of(role, rank=rank, stage=stage, **source)
    tell(config)
    _give_way()
    return remember(_session(identity, config))


def _session(identity: Source, config: Config) -> Session:
    queue, spool = config.max_queue_bytes, config.spool
    return Session(identity, config.to, config.keep, config.flight, queue, spool, config.credentials)


def _is_module(result: Any) -> bool:
    torch_nn = sys.modules.get("torch.nn")
    return torch_nn is not None and isinstance(result, torch_nn.Module)


def tap(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Observe a tensor inside model code under a name of its own; returns it unchanged.

    Any shape, dtype and device: rows are all dims but the last, [..., width]. Outside a step, inside a compiled graph,
    or where nothing is attached, it does nothing. Raises nothing.
    """
    if not _is_traced() and (session := _heard()) is not None and session.in_step:
        session.explicit_tap(tensor, name)
    return tensor


class interval:
    """Time a stretch of the step thread: `with insitu.interval("host"): ...`, or as a decorator.

    cls and fields are those of `Session.interval`, for the session attached or started last in this process; without
    one it does nothing. Raises KeyError, when it is entered, for a class that is none.
    """

    def __init__(self, cls: str, **fields: int) -> None:
        self._cls = cls
        self._fields = fields
        self._open: list[Interval] = []

    def __enter__(self) -> Interval | None:
        if _is_traced() or (session := _heard()) is None:
            return None
        opened = session.interval(self._cls, **self._fields)
        self._open.append(opened)
        return opened.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._open:
            self._open.pop().__exit__(*error)

    def __call__(self, function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> T:
            with interval(self._cls, **self._fields):
                return function(*args, **kwargs)

        return call
