"""Whose the records of a process are."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from access_kit import sources
from hypothesis import given
from hypothesis import strategies as st

from insitu.exporters import Batch
from insitu.identity import Source
from insitu.records import schema_of
from insitu.segments.shard import ShardWriter
from insitu_collector.access.tenants import Tenants, owners_in, with_tenant
from insitu_collector.store import Store

SOURCE = Source(epoch=7)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "a", "b"]))))
def test_who_comes_first_is_the_only_one(claims: list[tuple[int, str]]) -> None:
    tenants, first = Tenants(), dict[int, str]()
    for epoch, tenant in claims:
        assert tenants.claim(epoch, tenant) == (first.setdefault(epoch, tenant) == tenant)


def test_owners_are_kept_in_the_store(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "collector")
    writer.append(with_tenant(sources(SOURCE), "team-a"))
    writer.append(with_tenant(sources(Source(epoch=8)), ""))
    writer.close()
    owners = owners_in(Store(tmp_path))
    assert owners == {7: "team-a", 8: ""}
    assert not Tenants(owners).claim(7, "team-b") and Tenants(owners).claim(7, "team-a")


@pytest.mark.parametrize(("tenant", "stored"), [("team-a", "team-a"), ("", None)])
def test_the_tenant_is_the_collectors_word_whatever_was_claimed(tenant: str, stored: str | None) -> None:
    claimed = sources(SOURCE, tenant="forged")
    found = with_tenant(claimed, tenant)
    assert found.data.column("tenant").to_pylist() == [stored]
    assert found.data.drop_columns(["tenant"]).equals(claimed.data.drop_columns(["tenant"]))
    assert (found.epoch, found.seq, found.crc32 == claimed.crc32) == (7, 0, False)
    assert pa.ipc.read_record_batch(found.body, schema_of("sources")).equals(found.data)


def test_a_batch_without_rows_is_no_matter() -> None:
    empty = Batch(7, 0, sources(SOURCE).data.slice(0, 0), "sources")
    assert with_tenant(empty, "team-a").num_rows == 0
