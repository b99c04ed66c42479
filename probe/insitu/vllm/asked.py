"""What a request asks of insitu, and where it stands in its trace: by vLLM's `extra_args` (over HTTP `vllm_xargs`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import insitu
from insitu.session.opt_in import NAME, unknown_word, wants_rows

TRACE: Final = "insitu_trace"
"""In `extra_args`: the headers that say where the request stands in its trace, put there by `insitu.vllm.http`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """capture: whether its rows are asked for by name. wrong: a line, where it asks for what there is not."""

    capture: bool = False
    trace: insitu.RequestContext | None = None
    wrong: str | None = None


def asked_of(params: Any, trace_headers: Mapping[str, str] | None = None) -> Asked:
    """Return what a request asks. params: vLLM's sampling parameters; trace_headers: those vLLM itself passed on."""
    extra: Mapping[str, Any] = getattr(params, "extra_args", None) or {}
    told = extra.get(TRACE)
    headers = {**(trace_headers or {}), **(told if isinstance(told, Mapping) else {})}
    trace = insitu.request_context(headers) if headers else None
    capture = wants_rows(extra.get(NAME)) or (trace is not None and wants_rows(trace.baggage.get(NAME)))
    wrong = None if capture else unknown_word(extra.get(NAME))
    return Asked(capture, trace if trace is not None and trace.trace_id else None, wrong)
