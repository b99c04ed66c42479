"""Requests of OTLP are cut in half without losing, repeating or changing an item."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.subscriber.payloads import REQUESTS, Payload, halves, payload_of

NUMBERS = st.lists(st.integers(0, 4), max_size=4)
GROUPS = st.lists(NUMBERS, min_size=1, max_size=4)


def request_of(signal: str, groups: list[list[int]]) -> Any:
    """Return a request with so many items in each scope of each resource; each item has a name of its own."""
    request, number = REQUESTS[signal](), 0
    for scopes in groups:
        resource = getattr(
            request, {"traces": "resource_spans", "metrics": "resource_metrics"}.get(signal, "resource_logs")
        ).add()
        resource.schema_url = f"resource {len(scopes)}"
        for size in scopes:
            if signal == "traces":
                scope = resource.scope_spans.add()
                for _ in range(size):
                    number += 1
                    scope.spans.add(name=f"span {number}")
            elif signal == "logs":
                scope = resource.scope_logs.add()
                for _ in range(size):
                    number += 1
                    scope.log_records.add(event_name=f"record {number}")
            else:
                metric = resource.scope_metrics.add().metrics.add(name=f"metric {number}", unit="s")
                for _ in range(size + 1):
                    number += 1
                    metric.sum.data_points.add(as_int=number)
    return request


def items_of(payload: Payload) -> list[tuple[str, str, bytes]]:
    """Return where each item is and what it is."""
    request = REQUESTS[payload.signal].FromString(payload.body)
    found = []
    for resource in getattr(request, request.DESCRIPTOR.fields[0].name):
        for scope in getattr(resource, resource.DESCRIPTOR.fields_by_number[2].name):
            for item in getattr(scope, scope.DESCRIPTOR.fields_by_number[2].name):
                if payload.signal == "metrics":
                    found += [(resource.schema_url, item.name, p.SerializeToString()) for p in item.sum.data_points]
                else:
                    found.append((resource.schema_url, "", item.SerializeToString()))
    return found


@given(st.sampled_from(sorted(REQUESTS)), GROUPS)
def test_halves_hold_each_item_once_in_order_with_what_stands_around_it(signal: str, groups: list[list[int]]) -> None:
    whole = payload_of(signal, request_of(signal, groups).SerializeToString())
    assert whole.num_items == len(items_of(whole))
    parts = [whole]
    while any(part.num_items > 1 for part in parts):
        parts = [piece for part in parts for piece in (halves(part) if part.num_items > 1 else (part,))]
        assert [item for part in parts for item in items_of(part)] == items_of(whole)
        assert all(part.num_items == len(items_of(part)) for part in parts)
