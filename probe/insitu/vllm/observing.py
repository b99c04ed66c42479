"""The session of one rank of vLLM: the sites of its model, which rows requests may ask for, what is not observed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

import insitu
from insitu.rules.rule import RuleError
from insitu.session.live import Session
from insitu.settled import settings, settled
from insitu.sites.catalogue import Catalogue
from insitu.sites.site import SiteError
from insitu.taps.attaching import observed
from insitu.verbs import remember
from insitu.vllm.compiled import OneGraph, put_into
from insitu.vllm.hooks import NotThere
from insitu.vllm.place import Place
from insitu.vllm.sites import catalogue_of, stage_of, whole_catalogue
from insitu.vllm.versions import CAPTURES, TENSORS, Limit
from insitu.vocabulary import Role

EAGER_ROWS: Final = ("L*.resid_post", "logits")
"""Sites whose rows requests may ask for, where nobody says which. In a graph there is none: what is in it is paid for
in every step."""


def observe(worker: Any, place: Place, limits: Sequence[Limit]) -> tuple[Session, OneGraph | None, list[Limit]]:
    """Start a rank's session; return it, its graph where the model is compiled, and all that is not observed."""
    found = list(limits)
    if not found and not settled().disabled:
        try:
            return _with_taps(worker, place)
        except NotThere as error:
            found.append(Limit(TENSORS, str(error)))
    model = worker.model_runner.model
    fields: dict[str, Any] = place.fields
    session = insitu.start(role=Role.RANK, model=_name(worker), param_bytes=_num_bytes(model), **fields)
    return session, None, found


def _with_taps(worker: Any, place: Place) -> tuple[Session, OneGraph | None, list[Limit]]:
    """As `observe`, with taps. Raises NotThere where there can be none; the model is then as it was."""
    model, config = worker.model_runner.model, worker.vllm_config
    stage = stage_of(model)
    if stage is None:
        raise NotThere(f"nobody has verified where the sites of a {type(model).__name__} are")
    graph = OneGraph.of(model, config)
    asked = settings(max_rows=config.scheduler_config.max_num_batched_tokens)
    globs = asked.vllm_rows if asked.vllm_rows is not None else () if graph else EAGER_ROWS
    dtype = worker.model_config.dtype
    sites = catalogue_of(stage, str(dtype).removeprefix("torch."), dict(model.named_modules()))
    taken = [glob for glob in globs if _why_none(glob, sites) is None] if place.tp_rank == 0 else []
    rules = [insitu.Rule(sites=glob) for glob in taken]
    session, observer = observed(asked, model, rules, Role.RANK, name=_name(worker), sites=sites, **place.fields)
    hidden, vocabulary = worker.model_config.get_hidden_size(), worker.model_config.get_vocab_size()
    shapes = {s.number: (vocabulary if s.name == "logits" else hidden, dtype) for s in observer.plan.sites}
    observer.learn(shapes)
    if graph is not None:
        try:
            put_into(graph, observer, config)
        except NotThere:
            session.close()
            raise
    remember(session)
    session.wait_for_traffic()
    return session, graph, list(rows_not_taken(globs, whole_catalogue(stage), asked.vllm_rows is None))


def rows_not_taken(globs: Sequence[str], whole: Catalogue, nobody_asked: bool) -> Iterator[Limit]:
    """Yield of which sites rows are taken for nobody, and why. whole: of all stages."""
    wrong = {glob: why for glob in globs if (why := _why_none(glob, whole)) is not None}
    if not globs and nobody_asked:
        yield Limit(
            CAPTURES, "in the one graph that vLLM makes they cost every step; INSITU_VLLM_ROWS=L*.resid_post takes them"
        )
    elif not globs:
        yield Limit(CAPTURES, "INSITU_VLLM_ROWS names no site")
    for glob, why in wrong.items():
        which = CAPTURES if len(wrong) == len(globs) else f"{CAPTURES} at {glob}"
        yield Limit(which, f"INSITU_VLLM_ROWS: {why}")


def _why_none(glob: str, sites: Catalogue) -> str | None:
    """Return what is wrong with a glob that means no site, and the nearest; None of one that means some."""
    try:
        sites.find(glob)
    except (SiteError, RuleError) as error:
        return str(error)
    return None


def _name(worker: Any) -> str:
    return str(worker.model_config.model)


def _num_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
