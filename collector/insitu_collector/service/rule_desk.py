"""Which rules the ranks of each run follow, and changing them: all ranks are asked first, and one that refuses stops
the change.

What was handed down is kept in memory: a rank that connects later gets it. After a restart of the collector nothing is
handed down until somebody sets rules again; ranks keep what they follow, and newer versions go on from theirs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import grpc

from insitu.exporters.rules import FOLLOWS_RULES, NO_MODEL
from insitu.rules.rule import RuleError, check_time
from insitu.rules.text import parse_toml, rule_text
from insitu.wire.insitu_pb2 import (
    RankRules,
    Rules,
    RulesAnswer,
    RulesOrder,
    RulesReport,
    RunRules,
)

EVERYBODY: Final = ""
"""Who has no tenant is the collector's owner, and sees the runs of all."""
ANSWER_S: Final = 2.0
"""A probe answers from a thread that also takes acknowledgements: later than this, its process is stuck."""


class _Name(NamedTuple):
    """A run, which two tenants may call the same."""

    tenant: str
    run: str


class RulesRefused(Exception):
    """Nothing changes; one line says why, and what to do."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Rank(Protocol):
    """What the desk needs of a connection."""

    source: Mapping[str, str]
    epoch: int | None
    tenant: str

    def ask(self, question: Rules) -> None: ...


@dataclass
class _Run:
    """What was handed down to a run."""

    base: Rules | None = None
    temporary: Rules | None = None
    deadline: float = 0.0

    def standing(self, now: float) -> list[Rules]:
        """Return what a rank that connects now is to follow: the rules without an end, then those with one."""
        found = [self.base] if self.base is not None else []
        left_ms = int((self.deadline - now) * 1e3)
        if self.temporary is not None and left_ms > 0:
            left = Rules()
            left.CopyFrom(self.temporary)
            left.for_ms = left_ms
            found.append(left)
        return found

    @property
    def last_version(self) -> int:
        return max((rules.version for rules in (self.base, self.temporary) if rules is not None), default=0)


class RuleDesk:
    """Knows the ranks that follow rules. Safe for several threads; one question is on its way at a time."""

    def __init__(
        self,
        tell: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
        answer_s: float = ANSWER_S,
    ) -> None:
        """tell: takes kind and text of an event, and raises OSError where it cannot be stored. clock: seconds."""
        self._tell = tell
        self._clock = clock
        self._answer_s = answer_s
        self._runs: dict[_Name, _Run] = {}
        self._ranks: dict[Rank, None] = {}
        self._answers: dict[Rank, RulesReport] = {}
        self._number = 0
        self._changed = threading.Condition()
        self._one_question = threading.Lock()

    # -- what connections call -------------------------------------------------------------------------------------

    def joined(self, rank: Rank) -> None:
        """A process connected; a rank that follows rules is given those of its run."""
        if FOLLOWS_RULES not in rank.source or rank.source.get("role") != "rank":
            return
        with self._changed:
            for old in [other for other in self._ranks if other.epoch == rank.epoch]:  # it came back before its end
                del self._ranks[old]
            self._ranks[rank] = None
            standing = self._run_of(rank).standing(self._clock())
        for rules in standing:
            rank.ask(rules)

    def reported(self, rank: Rank, report: RulesReport) -> None:
        """A rank answers."""
        with self._changed:
            if report.number == self._number:
                self._answers[rank] = report
                self._changed.notify_all()

    def left(self, rank: Rank) -> None:
        """A connection is over."""
        with self._changed:
            self._ranks.pop(rank, None)
            self._changed.notify_all()

    # -- what commands call ----------------------------------------------------------------------------------------

    def show(self, run: str = "", tenant: str = EVERYBODY) -> RulesAnswer:
        """Return how the rules stand in each run of a tenant whose name begins so. Raises RulesRefused for none."""
        with self._one_question:
            ranks = {name: ranks for name, ranks in self._by_run(tenant).items() if name.run.startswith(run)}
            if not ranks:
                raise RulesRefused(grpc.StatusCode.NOT_FOUND, self._nobody(run, tenant))
            everyone = [rank for of_run in ranks.values() for rank in of_run]
            reports = self._ask(everyone, Rules())
            return RulesAnswer(runs=[self._account(name, of_run, reports) for name, of_run in ranks.items()])

    def set(self, order: RulesOrder, peer: str, tenant: str = EVERYBODY) -> RulesAnswer:
        """Hand rules down to a run of a tenant, if no rank refuses; return how they stand then. Raises RulesRefused."""
        try:
            asked = "; ".join(map(rule_text, parse_toml(order.toml))) or "no rule"
            check_time(order.for_ms / 1e3 if order.for_ms else None)
        except RuleError as error:
            raise RulesRefused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        with self._one_question:
            name, ranks = self._one_run(order.run, tenant)
            reports = self._ask(ranks, Rules(toml=order.toml, who=order.who, only_check=True))
            _check(name.run, reports)
            seen = [max(report.version, report.next_version) for report in reports.values()]
            rules = Rules(toml=order.toml, for_ms=order.for_ms, who=order.who)
            rules.version = 1 + max(self._runs[name].last_version, *seen)
            how_long = f" for {order.for_ms / 1e3:g} s" if order.for_ms else ""
            before = ", ".join(map(str, sorted({report.version for report in reports.values()})))
            changed = f"version {before} -> {rules.version} of run {name.run}"
            self._write(f"{changed} by {order.who}, {peer}{how_long}: {asked}")
            ranks = self._hand_down(name, rules)
            return RulesAnswer(runs=[self._account(name, ranks, self._ask(ranks, rules))])

    # -- inside ----------------------------------------------------------------------------------------------------

    def _hand_down(self, name: _Name, rules: Rules) -> list[Rank]:
        """Remember the rules for those that connect later; return those that are connected."""
        with self._changed:
            run = self._runs[name]
            if rules.for_ms:
                run.temporary, run.deadline = rules, self._clock() + rules.for_ms / 1e3
            else:
                run.base, run.temporary = rules, None
            return [rank for rank in self._ranks if _name_of(rank) == name]

    def _ask(self, ranks: Sequence[Rank], question: Rules) -> dict[Rank, RulesReport]:
        """Ask, and return what was answered in time."""
        with self._changed:
            self._number += 1
            self._answers = {}
        numbered = Rules()
        numbered.CopyFrom(question)
        numbered.number = self._number
        for rank in ranks:
            rank.ask(numbered)
        with self._changed:
            self._changed.wait_for(
                lambda: all(rank in self._answers or rank not in self._ranks for rank in ranks), self._answer_s
            )
            return dict(self._answers)

    def _account(self, name: _Name, ranks: Sequence[Rank], reports: Mapping[Rank, RulesReport]) -> RunRules:
        run = self._runs[name]
        standing = run.standing(self._clock())
        last = standing[-1] if standing else Rules()
        return RunRules(
            run=name.run,
            version=last.version,
            toml=last.toml,
            base_version=run.base.version if run.base is not None else 0,
            left_ms=last.for_ms,
            ranks=[_rank_rules(rank, reports.get(rank)) for rank in sorted(ranks, key=_place)],
        )

    def _run_of(self, rank: Rank) -> _Run:
        return self._runs.setdefault(_name_of(rank), _Run())

    def _by_run(self, tenant: str) -> dict[_Name, list[Rank]]:
        found: dict[_Name, list[Rank]] = {}
        with self._changed:
            for rank in self._ranks:
                if tenant in (EVERYBODY, rank.tenant):
                    found.setdefault(_name_of(rank), []).append(rank)
        return found

    def _one_run(self, run: str, tenant: str) -> tuple[_Name, list[Rank]]:
        found = [(name, ranks) for name, ranks in self._by_run(tenant).items() if name.run.startswith(run)]
        if not found:
            raise RulesRefused(grpc.StatusCode.NOT_FOUND, self._nobody(run, tenant))
        if len(found) > 1:
            names = ", ".join(name.run for name, _ in found)
            text = f"ranks of several runs are connected ({names}); say which with --run"
            raise RulesRefused(grpc.StatusCode.FAILED_PRECONDITION, text)
        return found[0]

    def _nobody(self, run: str, tenant: str) -> str:
        others = ", ".join(name.run for name in self._by_run(tenant))
        return (
            f"no rank{f' of run {run}' if run else ''} is connected to this collector"
            f"{f' (of run {others} there are)' if others else ''}; rules are for models attached with to=grpc://..."
        )

    def _write(self, text: str) -> None:
        try:
            self._tell("rules_set", text)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            text = f"the store takes no records ({why}), and no change goes unrecorded; make room there"
            raise RulesRefused(grpc.StatusCode.UNAVAILABLE, text) from None


def _check(name: str, reports: Mapping[Rank, RulesReport]) -> None:
    """Raise RulesRefused where a rank refuses the rules, or one names a site on none of them."""
    if not reports:
        text = f"no rank of run {name} answered; nothing changes. See whether its processes are stuck: insitu stalls"
        raise RulesRefused(grpc.StatusCode.UNAVAILABLE, text)
    for rank, report in sorted(reports.items(), key=lambda item: _place(item[0])):
        if report.refused:
            text = f"rank {rank.source.get('rank', '?')}: {report.refused}"
            raise RulesRefused(grpc.StatusCode.INVALID_ARGUMENT, text)
    first, *others = (report.unnamed for report in reports.values())
    for number in sorted(set(first).intersection(*others)):
        why = {report.unnamed[number] for report in reports.values()}
        text = f"rule {number + 1}: {min(why - {NO_MODEL}, default=NO_MODEL)}"
        raise RulesRefused(grpc.StatusCode.INVALID_ARGUMENT, text)


def _name_of(rank: Rank) -> _Name:
    return _Name(rank.tenant, rank.source.get("run", ""))


def _place(rank: Rank) -> tuple[int, int, int]:
    return int(rank.source.get("replica", 0)), int(rank.source.get("rank", 0)), rank.epoch or 0


def _rank_rules(rank: Rank, report: RulesReport | None) -> RankRules:
    replica, number, epoch = _place(rank)
    stage = int(rank.source.get("stage", 0))
    return RankRules(epoch=epoch, replica=replica, rank=number, stage=stage, report=report)
