"""A bit that flips in what a segment says of itself: every `insitu store` command goes on without it, and names it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from store_kit import events, rows_in, run, seal

from insitu.records import schema_of
from insitu.segments.layout import QUARANTINE, SEALED, SegmentName, list_segments
from insitu.segments.reader import batch_heads
from insitu.segments.whole import NotWhole, WholeSegment

SCHEMA_AT = 16
"""Where the metadata of the first message begin."""


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.chmod(0o600)
    path.write_bytes(data)


def broken_store(store: Path, where: str) -> SegmentName:
    """Seal three segments; break the second's root offset in its schema or in its batch."""
    names = seal(store, *(events(n) for n in range(3)))
    path = names[1].path(store, SEALED)
    at = SCHEMA_AT
    if where == "batch":
        data = path.read_bytes()
        at = data.index(b"\xff\xff\xff\xff", SCHEMA_AT) + 8
    flip(path, at, 2)
    return names[1]


@pytest.mark.parametrize("where", ["schema", "batch"])
def test_every_command_goes_on_without_it_and_names_it(tmp_path: Path, where: str) -> None:
    store = tmp_path / "s"
    name = broken_store(store, where)
    found = run("verify", store)
    assert found.exit_code == 3 and f"damaged      {name}" in found.output
    listed = json.loads(run("ls", store, "--json").stdout)["segments"]
    assert [each["state"] for each in listed] == ["sealed", "damaged", "sealed"]
    assert f"{name.file}: damaged" in run("ls", store).stdout
    found = run("expire", store, "--keep-for", "24h")
    assert found.exit_code == 3 and name.file in found.output
    assert run("erase", store, "--request", "nobody").exit_code == 0
    found = run("compact", store)
    assert found.exit_code == 3 and name.file in found.output
    found = run("export", store, (tmp_path / "there").as_uri())
    assert found.exit_code == 5 and name.file in found.output
    assert run("repair", store).exit_code == 0
    assert list_segments(store, QUARANTINE) == [name]
    assert run("verify", store).exit_code == 0
    assert len(rows_in(store, "events")) == (9 if where == "schema" else 6), "what is whole of it is kept"


def test_whichever_bit_flips_a_segment_is_whole_or_not_and_nothing_else(tmp_path: Path) -> None:
    (name,) = seal(tmp_path, events(0))
    path = name.path(tmp_path, SEALED)
    whole = path.read_bytes()
    draw = random.Random(6)
    for at in draw.sample(range(len(whole)), 400):
        flip(path, at, draw.randrange(8))
        try:
            segment = WholeSegment(path, "events")
            assert segment.replaces == segment.replaced_before == frozenset()
            assert [batch.data.num_rows for batch in segment.batches()] == [3]
            assert segment.schema == schema_of("events")
        except NotWhole:
            pass
        batch_heads(path)
        path.write_bytes(whole)
