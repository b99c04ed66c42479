"""The desk asks every rank before it hands rules down, and changes nothing where one refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import grpc
import pytest

from insitu.rules.rule import Rule
from insitu.rules.text import parse_toml, to_toml
from insitu.wire.insitu_pb2 import Rules, RulesOrder, RulesReport
from insitu_collector.service.rule_desk import RuleDesk, RulesRefused

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"
ALL = Rule(sites="*")
Answer = Callable[[Rules], RulesReport | None]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeRank:
    """A connected rank that answers at once."""

    def __init__(self, desk: RuleDesk, rank: int = 0, run: str = RUN, answer: Answer | None = None) -> None:
        self.source: Mapping[str, str] = {
            "role": "rank",
            "run": run,
            "rank": str(rank),
            "stage": str(rank),
            "rules": "1",
        }
        self.epoch: int | None = rank + 1
        self.tenant = ""
        self.asked: list[Rules] = []
        self._desk, self._answer = desk, answer
        self._version, self._toml = 0, b""

    def ask(self, question: Rules) -> None:
        self.asked.append(question)
        report = self._answer(question) if self._answer is not None else RulesReport()
        if report is None:
            return
        if question.version and not question.only_check and not report.refused:
            self._version, self._toml = max(self._version, question.version), question.toml
        report.number, report.version, report.toml = question.number, self._version, self._toml
        report.next_version = self._version
        self._desk.reported(self, report)

    @property
    def handed_down(self) -> list[Rules]:
        return [question for question in self.asked if question.version and not question.only_check]


class Told(list[tuple[str, str]]):
    def __call__(self, kind: str, text: str) -> None:
        self.append((kind, text))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(told: Told, clock: Clock) -> RuleDesk:
    return RuleDesk(told, clock, answer_s=0.05)


def joined(desk: RuleDesk, rank: int = 0, run: str = RUN, answer: Answer | None = None) -> FakeRank:
    made = FakeRank(desk, rank, run, answer)
    desk.joined(made)
    return made


def order(*rules: Rule, run: str = "", for_ms: int = 0) -> RulesOrder:
    return RulesOrder(run=run, toml=to_toml(rules).encode(), for_ms=for_ms, who="me")


def refused(desk: RuleDesk, asked: RulesOrder) -> RulesRefused:
    with pytest.raises(RulesRefused) as raised:
        desk.set(asked, "here")
    assert "\n" not in raised.value.text
    return raised.value


def test_every_rank_of_the_run_gets_rules_and_an_event_says_so(desk: RuleDesk, told: Told) -> None:
    ranks = [joined(desk, number) for number in (1, 0)]
    (run,) = desk.set(order(ALL), "ipv4:127.0.0.1:5").runs
    assert (run.run, run.version, run.base_version, run.left_ms) == (RUN, 1, 1, 0)
    assert parse_toml(run.toml) == (ALL,)
    assert [(rank.rank, rank.report.version) for rank in run.ranks] == [(0, 1), (1, 1)]
    assert [[rules.version for rules in rank.handed_down] for rank in ranks] == [[1], [1]]
    assert told == [("rules_set", f"version 0 -> 1 of run {RUN} by me, ipv4:127.0.0.1:5: *")]


def test_a_rank_that_connects_later_gets_what_stands(desk: RuleDesk, clock: Clock) -> None:
    joined(desk)
    desk.set(order(ALL), "here")
    desk.set(order(for_ms=60_000), "here")
    clock.now += 45.0
    late = joined(desk, 1)
    assert [(rules.version, rules.for_ms) for rules in late.handed_down] == [(1, 0), (2, 15_000)]
    clock.now += 15.0
    later = joined(desk, 2)
    assert [rules.version for rules in later.handed_down] == [1]
    desk.set(order(), "here")
    assert [rules.version for rules in joined(desk, 3).handed_down] == [3], "and that has ended the other for good"


def test_versions_go_on_from_the_newest_that_a_rank_knows(desk: RuleDesk) -> None:
    joined(desk)
    rank = joined(desk, 1)
    rank._version = 41  # this collector was started anew
    assert desk.set(order(ALL), "here").runs[0].version == 42


def test_one_rank_that_refuses_stops_the_change(desk: RuleDesk, told: Told) -> None:
    ranks = [joined(desk), joined(desk, 1, answer=lambda question: RulesReport(refused="too wide"))]
    failure = refused(desk, order(ALL))
    assert (failure.code, failure.text) == (grpc.StatusCode.INVALID_ARGUMENT, "rank 1: too wide")
    assert [rank.handed_down for rank in ranks] == [[], []]
    assert told == []
    assert desk.show().runs[0].version == 0


def test_a_rule_may_name_sites_of_one_rank_and_has_to_name_one(desk: RuleDesk) -> None:
    joined(desk, 0, answer=lambda question: RulesReport(unnamed={1: "no site 'logits'"}))
    joined(desk, 1, answer=lambda question: RulesReport(unnamed={0: "no site 'embed'"}))
    desk.set(order(ALL, ALL), "here")
    joined(desk, 0, answer=lambda question: RulesReport(unnamed={0: "b", 1: "no site 'logits'"}))
    assert refused(desk, order(ALL, ALL)).text == "rule 1: b"


def test_what_is_no_rule_is_refused_before_anybody_is_asked(desk: RuleDesk) -> None:
    rank = joined(desk)
    assert refused(desk, RulesOrder(toml=b"[[rules]]\nsite='*'")).text.startswith("rule 1: no key 'site'")
    assert rank.asked == []


def test_a_rank_that_does_not_answer_is_shown_and_waits_for_what_comes(desk: RuleDesk) -> None:
    joined(desk)
    silent = joined(desk, 1, answer=lambda question: None)
    (run,) = desk.set(order(ALL), "here").runs
    assert [rank.HasField("report") for rank in run.ranks] == [True, False]
    assert [rules.version for rules in silent.handed_down] == [1], "it is there when it wakes"


def test_nothing_changes_where_nobody_answers_or_nobody_is(desk: RuleDesk, told: Told) -> None:
    assert refused(desk, order(ALL)).text.startswith("no rank is connected to this collector; rules are for models ")
    joined(desk, answer=lambda question: None)
    assert refused(desk, order(ALL)).text.startswith(f"no rank of run {RUN} answered; nothing changes. ")
    assert refused(desk, order(ALL, run="ffff")).text.startswith(
        f"no rank of run ffff is connected to this collector (of run {RUN} there are); "
    )
    with pytest.raises(RulesRefused):
        desk.show("ffff")
    assert told == []


def test_of_several_runs_one_has_to_be_named(desk: RuleDesk) -> None:
    mine, other = joined(desk), joined(desk, 1, OTHER)
    assert refused(desk, order(ALL)).text == (
        f"ranks of several runs are connected ({RUN}, {OTHER}); say which with --run"
    )
    desk.set(order(ALL, run="fe"), "here")
    assert (len(mine.handed_down), len(other.handed_down)) == (0, 1)
    assert [run.run for run in desk.show().runs] == [RUN, OTHER]
    assert [run.version for run in desk.show("01").runs] == [0]


def test_a_run_of_another_tenant_is_neither_shown_nor_changed(desk: RuleDesk, told: Told) -> None:
    mine, other = FakeRank(desk), FakeRank(desk, 1)
    mine.tenant, other.tenant = "a", "b"
    for rank in (mine, other):
        desk.joined(rank)
    desk.set(order(ALL), "here", "a")
    assert (len(mine.handed_down), len(other.handed_down)) == (1, 0), "though both runs have one name"
    assert [len(run.ranks) for run in desk.show("", "b").runs] == [1]
    assert [run.version for run in desk.show("", "b").runs] == [0]
    with pytest.raises(RulesRefused, match=r"no rank is connected to this collector; rules"):
        desk.show("", "c")
    late = FakeRank(desk, 2)
    late.tenant = "b"
    desk.joined(late)
    assert late.handed_down == []
    assert len(desk.show().runs) == 2, "the collector's owner sees all"


def test_processes_without_a_rank_and_older_probes_are_left_alone(desk: RuleDesk) -> None:
    for source in ({"role": "driver", "run": RUN, "rules": "1"}, {"role": "rank", "run": RUN, "rank": "0"}):
        rank = FakeRank(desk)
        rank.source = source
        desk.joined(rank)
        desk.left(rank)
    assert refused(desk, order(ALL)).text.startswith("no rank is connected")


def test_a_rank_that_comes_back_before_its_old_connection_ended_is_one_rank(desk: RuleDesk) -> None:
    joined(desk, answer=lambda question: None)
    joined(desk)
    (run,) = desk.set(order(ALL), "here").runs
    assert [rank.report.version for rank in run.ranks] == [1]


def test_no_change_goes_unrecorded(clock: Clock) -> None:
    def full(kind: str, text: str) -> None:
        raise OSError(28, "No space left on device")

    desk = RuleDesk(full, clock, answer_s=0.05)
    rank = joined(desk)
    text = refused(desk, order(ALL)).text
    assert text.startswith("the store takes no records (no space left on device), and no change goes unrecorded")
    assert rank.handed_down == []


def test_an_answer_to_an_older_question_is_no_answer(desk: RuleDesk) -> None:
    late: list[Rules] = []

    def slow(question: Rules) -> RulesReport | None:
        late.append(question)
        return None

    rank = joined(desk, answer=slow)
    refused(desk, order(ALL))
    desk.reported(rank, RulesReport(number=late[0].number))
    assert refused(desk, order(ALL)).code is grpc.StatusCode.UNAVAILABLE
