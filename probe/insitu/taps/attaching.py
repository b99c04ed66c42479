"""What attaching does to a model: an observer with its taps, a session, and a forward that is a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.compiler import is_exporting

from insitu.arguments import source_of
from insitu.config import Config, Origin
from insitu.flight.settings import Flight
from insitu.identity import current_run
from insitu.rules.first_match import never_followed
from insitu.rules.rule import Rule
from insitu.session.live import Session
from insitu.sites.catalogue import Catalogue, catalogue
from insitu.sites.site import SiteError, is_named
from insitu.slabs.slab import Plan
from insitu.taps.compiled import Graphs
from insitu.taps.compilers import leave_out, look_again, put_aside
from insitu.taps.eager import is_traced
from insitu.taps.forwards import forward_of, give_forward, is_observed
from insitu.taps.observer import Observer
from insitu.taps.root import tap_root
from insitu.taps.transforms import Transformed, is_transformed
from insitu.taps.wrappers import check_exported, check_made, unwrapped
from insitu.transformers.following import follow
from insitu.transformers.models import can_generate

logger = logging.getLogger("insitu")


def check_model(model: Any) -> None:
    """Raise ValueError, one line, for what is no module, and for one of which no module would be called."""
    if isinstance(model, type):
        raise ValueError(f"{model.__name__} is a class; attach to one made of it, or decorate it: @insitu.observe")
    check_exported(model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{model!r:.80} is no model; attach to a torch.nn.Module")
    check_made(unwrapped(model))


def attach_with(
    config: Config, model: nn.Module, rules: Sequence[Rule], role: str, *, name: str | None = None, **source: Any
) -> tuple[Session, Observer]:
    """Attach as settled. name: the model's, its class if not told; `source`: further fields of `Source`.

    Raises what `insitu.attach` does; the model is then as it was.
    """
    wrapper, model = model, unwrapped(model)
    session, observer = observed(config, model, rules, role, name=name, **source)
    if can_generate(model):
        follow(session, model, is_axis_given="samples" in (config.axes or {}).values())
    session.on_detach(lambda: look_again(wrapper))
    try:
        session.on_detach(_enter_forward(model, session, observer))
    except TypeError:
        session.close()
        raise ValueError(f"a {type(model).__name__} cannot be observed: its class allows no subclass") from None
    look_again(wrapper)
    _say_unfollowed(observer.plan, rules, config.flight)
    session.dump_on_signal()
    return session, observer


def observed(
    config: Config,
    model: nn.Module,
    rules: Sequence[Rule],
    role: str,
    *,
    name: str | None = None,
    sites: Catalogue | None = None,
    **source: Any,
) -> tuple[Session, Observer]:
    """Return a session with taps in the model, whose steps the caller opens himself. sites: where he knows them.

    Raises what `insitu.attach` does; the model is then as it was.
    """
    if is_observed(model):
        raise ValueError(f"this {type(model).__name__} is already attached; detach its session first")
    if sites is None:
        sites = catalogue(model, config.axes)
        _check_axes(config, sites)
    flight, run = config.flight, source.get("run") or current_run()
    armed = [flight.rule] if flight is not None and flight.rule is not None else []
    taken, budget, t0 = [*rules, *armed], config.overhead_budget, config.t0
    observer = Observer(model, taken, config.max_rows, config.axes, run, budget, t0, config.fused_taps, sites)
    identity = source_of(
        role,
        model=name or type(model).__name__,
        plan_digest=observer.plan.digest,
        param_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        **source,
    )
    try:
        session = Session(
            identity, config.to, config.keep, flight, config.max_queue_bytes, config.spool, config.credentials
        )
    except (OSError, ValueError):
        observer.taps.remove()
        raise
    session.observe_with(observer, model)
    return session, observer


def _check_axes(config: Config, sites: Catalogue) -> None:
    """Raise SiteError for a glob of the argument `axes` that means no site; of a file, read for all models, say it."""
    for error in sites.not_axes(config.axes):
        if config.origin("axes") is Origin.ARGUMENT:
            raise SiteError(f"axes: {error}")
        logger.warning("insitu: axes in %s: %s", config.file, error)


def _say_unfollowed(plan: Plan, rules: Sequence[Rule], flight: Flight | None) -> None:
    """Say which rules take nothing, and which sites the flight recorder was asked for and has no rows of.

    One rule takes the rows of a site, the first.
    """
    for line in never_followed(rules, plan.sites).values():
        logger.warning("insitu: %s", line)
    glob = None if flight is None else flight.rows
    named = [site for site in plan.sites if glob is not None and is_named(glob, site)]
    if taken := [site.name for site in named if site.number not in plan.held_sites]:
        logger.warning("insitu: no rows for the flight recorder of %s: a rule takes them", ", ".join(taken))


def _enter_forward(model: nn.Module, session: Session, observer: Observer) -> Callable[[], None]:
    """Let the model's outermost forward be a step, timed as compute unless an interval is open; return the undo."""
    inner, root_tap = forward_of(model), observer.root_tap
    graphs, on_cuda = Graphs(type(model), inner, session, observer), observer.device.type == "cuda"
    transformed = Transformed(inner, session, observer.current)
    observer.taps.on_transformed = transformed.say

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_traced() or is_exporting():  # inside of another graph, which has no place where a step could begin
            return inner(self, *args, **kwargs)
        compiler = put_aside(None)
        if is_transformed():
            return transformed.run(compiler, (self, *args), kwargs)
        if compiler is not None:
            return graphs.run(compiler, self, args, kwargs)
        if on_cuda and torch.cuda.is_current_stream_capturing():
            return graphs.capture(self, args, kwargs)
        if session.in_step:
            return compute(self, *args, **kwargs)
        with session.step_of(self, args, kwargs) as step:
            if step.is_observed:
                return compute(self, *args, **kwargs)
            return inner(self, *args, **kwargs)

    def compute(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if session.in_interval:  # the caller says itself where its time goes
            output = inner(self, *args, **kwargs)
        else:
            with session.interval("compute", step_id=session.step_id):
                output = inner(self, *args, **kwargs)
        tap_root(root_tap, observer, output)
        return output

    undo = give_forward(model, forward)
    leave_out(forward.__code__)
    return undo
