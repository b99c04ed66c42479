"""What an erasure leaves of a request of OTLP that was kept. Pure.

A kept request is a copy, and its rows are in the store. So an item goes whole where it says a name anywhere: nobody
else loses a record by that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from google.protobuf.message import DecodeError

from insitu.exporters.otlp import names
from insitu.segments.erasure import Erased
from insitu_collector.otlp.signals import LOGS, SIGNALS
from insitu_collector.otlp.wire import Malformed
from insitu_collector.subscriber.payloads import Origin, Part, Payload, without

_SIGNAL: Final = {signal.name: signal for signal in SIGNALS}


def left_of(payload: Payload, erased: Erased) -> Payload:
    """Return what may be kept of a request: the same object where that is all of it; without items: nothing.

    What cannot be read is not kept: nobody can tell whether it is to be erased.
    """
    if not erased:
        return payload
    nothing = replace(payload, body=b"", num_items=0)
    if payload.of is not None and _was_sent(payload.of, erased):
        return nothing
    try:
        return without(payload, lambda part, data: _is_gone(payload.signal, part, data, erased))
    except (Malformed, DecodeError):
        return nothing


def _was_sent(of: Origin, erased: Erased) -> bool:
    return erased.has_process(of.epoch) or erased.has_sent(of.table, of.epoch, of.row_seq, of.tenant)


def _is_gone(signal: str, part: Part, data: bytes, erased: Erased) -> bool:
    if erased.is_said_in(data):
        return True
    if part is Part.RESOURCE:
        said = _attributes(_SIGNAL[signal].group.FromString(data).resource)
        return _is_of_process(said, erased)
    if part is Part.RECORD and signal == LOGS.name:
        return erased.has_verdict(_attributes(LOGS.record.FromString(data)).get(names.VERDICT, ""))
    return False


def _is_of_process(said: dict[str, str], erased: Erased) -> bool:
    """Tell whether a resource is that of an erased process, as `insitu.exporters.otlp.ends.resource_of` makes it.

    One of ours that was given another name may be any process's.
    """
    try:
        return erased.has_process(int(said.get(names.SERVICE_INSTANCE, ""), 16))
    except ValueError:
        return said.get(names.DISTRO_NAME) == "insitu" and erased.has_processes


def _attributes(of: Any) -> dict[str, str]:
    """Return the attributes of a message that are text."""
    return {each.key: each.value.string_value for each in of.attributes if each.value.HasField("string_value")}
