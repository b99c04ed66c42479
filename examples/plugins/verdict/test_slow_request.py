"""The verdict keeps its contract: the same each time it is asked, and what it finds can be stored."""

from acme_insitu import SlowRequest

from insitu_collector.check_verdict import check_verdict


def test_it_keeps_the_contract() -> None:
    assert "the same each time" in check_verdict(SlowRequest)
