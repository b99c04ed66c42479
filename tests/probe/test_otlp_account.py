"""Each row is durable, on its way, or dropped under one reason, whatever comes in whatever order."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu.drain.outbox import Outbox
from insitu.exporters.base import Ack, Batch, Level
from insitu.exporters.otlp.account import Account
from insitu.records import schema_of, table_spec
from insitu.vocabulary import DropReason

STREAM = table_spec("events").stream
QUOTA, INVALID = DropReason.REFUSED_QUOTA, DropReason.REFUSED_INVALID


def test_a_batch_is_durable_once_all_its_rows_and_all_before_it_are() -> None:
    account = Account()
    account.begin((3, 0), 5)
    account.begin((3, 1), 2)
    account.deliver({(3, 1): 2})
    assert account.durable(3) == -1
    account.deliver({(3, 0): 4})
    assert account.durable(3) == -1
    assert account.num_open == 1
    account.deliver({(3, 0): 1})
    assert account.durable(3) == 1
    assert account.is_settled


def test_a_refusal_holds_its_batch_back_until_it_is_told() -> None:
    account = Account()
    account.begin((3, 0), 5)
    account.refuse({(3, 0): 5}, QUOTA)
    assert (account.durable(3), account.num_open, account.is_settled) == (-1, 0, False)
    assert account.take_refused() == [(3, 0, QUOTA)]
    assert account.take_refused() == []
    assert (account.durable(3), account.is_settled) == (0, True)


def test_rows_refused_out_of_a_batch_leave_it_durable() -> None:
    account = Account()
    account.begin((3, 0), 5)
    account.refuse({(3, 0): 2}, INVALID)
    account.deliver({(3, 0): 3})
    assert account.take_refused() == []
    assert account.take_partly_refused() == [(3, 2, INVALID)]
    assert account.durable(3) == 0


def test_what_is_given_up_ignores_what_comes_later() -> None:
    account = Account()
    account.begin((3, 0), 5)
    account.refuse({(3, 0): 2}, INVALID)
    account.give_up(DropReason.SHUTDOWN)
    account.deliver({(3, 0): 3})
    assert [told[:2] for told in account.take_refused()][:1] == [(3, 0)]
    account.deliver({(3, 0): 3})
    assert account.is_settled


class Scripted:
    """An exporter that does to rows what the test drew."""

    def __init__(self) -> None:
        self.account = Account()

    def export(self, batch: Batch) -> Ack:
        self.account.begin((batch.stream, batch.seq), batch.num_rows)
        return Ack(batch.stream, batch.seq, Level.PENDING)

    def durable(self, stream: int) -> int:
        return self.account.durable(stream)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        return self.account.take_refused()

    def partly_refused(self) -> list[tuple[int, int, DropReason]]:
        return self.account.take_partly_refused()

    def flush(self, timeout_s: float) -> bool:
        return self.account.is_settled

    def close(self, timeout_s: float) -> None:
        self.account.give_up(DropReason.SHUTDOWN)


fates = st.sampled_from(["deliver", QUOTA, INVALID])


@settings(deadline=None)  # the first one imports pandas, if there is one
@given(st.lists(st.lists(fates, min_size=1, max_size=6), min_size=1, max_size=6), st.randoms(), st.integers(0, 36))
def test_the_outbox_adds_up_at_any_time(batches: list[list[object]], random: object, num_settled: int) -> None:
    exporter = Scripted()
    outbox = Outbox(7, exporter)
    rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": 0, "t_ns": 0, "kind": "k", "text": ""}]
    for batch in batches:
        outbox.put("events", pa.RecordBatch.from_pylist(rows * len(batch), schema=schema_of("events")))
    outbox.ship()
    fate_of = [((STREAM, seq), fate) for seq, batch in enumerate(batches) for fate in batch]
    random.shuffle(fate_of)  # type: ignore[attr-defined]
    total = len(fate_of)
    for key, fate in fate_of[:num_settled]:
        if isinstance(fate, DropReason):
            exporter.account.refuse({key: 1}, fate)
        else:
            exporter.account.deliver({key: 1})
        outbox.settle()
        assert sum(outbox.durable.values()) + outbox.num_pending + outbox.num_dropped == total
    exporter.close(0.0)
    outbox.settle()
    assert outbox.num_pending == 0
    assert sum(outbox.durable.values()) + outbox.num_dropped == total
    if num_settled >= total:
        told = Counter(fate for _, fate in fate_of)
        assert outbox.durable["events"] == told["deliver"]
        assert outbox.dropped["events"] == {str(r): told[r] for r in (QUOTA, INVALID) if told[r]}
