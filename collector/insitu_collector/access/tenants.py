"""Whose the records of each process are: the tenant's that said Hello for it first."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu_collector.store import Store

TENANT: Final = "tenant"
"""The column that says it, of the tables that have one."""


def owners_in(store: Store) -> dict[int, str]:
    """Return whose each process is that the store has a row of `sources` of."""
    rows = store.table("sources").select(["epoch", "tenant"])
    owners: dict[int, str] = {}
    for epoch, tenant in zip(rows["epoch"].to_pylist(), rows["tenant"].to_pylist(), strict=True):
        owners.setdefault(epoch, tenant or "")
    return owners


def with_tenant(batch: Batch, tenant: str) -> Batch:
    """Return a batch with the tenant that the collector knows, whatever the sender wrote, where its table has one."""
    place = batch.spec.schema.get_field_index(TENANT)
    if place < 0:
        return batch
    column = pa.array([tenant or None] * batch.num_rows, pa.utf8())
    data = batch.data.set_column(place, batch.spec.schema.field(place), column)
    return Batch(batch.epoch, batch.seq, data, batch.table)


class Tenants:
    """An epoch belongs to who said Hello for it first. Safe for several threads."""

    def __init__(self, owners: Mapping[int, str] | None = None) -> None:
        """owners: of processes that came before a restart."""
        self._owners = dict(owners or {})
        self._lock = threading.Lock()

    def claim(self, epoch: int, tenant: str) -> bool:
        """Return whether a caller of this tenant may send records of the process."""
        with self._lock:
            return self._owners.setdefault(epoch, tenant) == tenant
