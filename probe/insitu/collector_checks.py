"""What `insitu doctor` asks a collector: is it there, can it store, what did it refuse, what was lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from insitu.credentials import NONE, Credentials
from insitu.doctor import MIN_FREE_BYTES, Check, Status
from insitu.vocabulary import DAMAGED, NOT_LOST, SENT_AGAIN
from insitu.wire.address import Address

if TYPE_CHECKING:
    from insitu.wire.insitu_pb2 import HealthAnswer

ANSWER_S: Final = 3.0
CHECK: Final = "collector"


def collector_checks(url: str, credentials: Credentials = NONE, timeout_s: float = ANSWER_S) -> list[Check]:
    """Ask the collector at `grpc://HOST:PORT`, or `grpcs://`, and return what it says; raises nothing."""
    import grpc

    from insitu.wire.channel import open_channel
    from insitu.wire.insitu_pb2 import HealthQuery
    from insitu.wire.insitu_pb2_grpc import CollectorStub

    try:
        with open_channel(Address.of(url), credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            answer = CollectorStub(channel).Health(HealthQuery(), timeout=timeout_s)
    except ValueError as error:  # the address, or a credential
        why, _, fix = str(error).partition("; ")
        return [Check(CHECK, Status.PROBLEM, why, fix or "name another with --collector URL")]
    except grpc.RpcError as error:
        return [_unreachable(url, error)]
    return checks_of(url, answer)


def _unreachable(url: str, error: Any) -> Check:
    """error: what a call raised, which is itself the call."""
    from insitu.wire.refusals import why_refused

    code = error.code().name
    if code == "UNAVAILABLE" and (said := why_refused(Address.of(url), error.code(), error.details() or "")):
        why, _, fix = said.partition("; ")
        return Check(CHECK, Status.PROBLEM, why, fix or "name another with --collector URL")
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        why, _, fix = str(error.details()).partition("; ")
        return Check(CHECK, Status.PROBLEM, f"{url} lets this caller not ask: {why}", fix or "use another token")
    if code == "UNIMPLEMENTED":
        why = f"{url} answers, and is no collector of this version: another program listens there, or an older one"
        return Check(CHECK, Status.WARN, why, "update it, or name another with --collector URL")
    why = f"no collector answers at {url} ({code.lower()})"
    fix = f"insitu collect --store DIR --port {url.rpartition(':')[2]}"
    return Check(CHECK, Status.PROBLEM, why, fix)


def checks_of(url: str, answer: HealthAnswer) -> list[Check]:
    """Return what an answer tells."""
    checks = [_ready(url, answer), *_space(answer)]
    refused, dropped = dict(answer.refused_frames), dict(answer.dropped_rows)
    lost = _lost(answer.gap_rows)
    checks.append(_counted("collector refused", "frames", refused, "nothing was refused"))
    checks.append(_counted("collector ended", "streams", dict(answer.ended_streams), "no stream was ended"))
    checks.append(_counted("rows dropped", "rows", dropped, "its probes dropped nothing"))
    checks.append(_counted("rows lost", "rows", lost, "nothing that it had is lost"))
    return checks


def _lost(gap_rows: Mapping[str, int]) -> dict[str, int]:
    """Return what is lost by reason, less what was told as lost and came again."""
    lost = {reason: num_rows for reason, num_rows in gap_rows.items() if reason not in NOT_LOST}
    num_back = lost.pop(SENT_AGAIN, 0)
    for reason in sorted(DAMAGED & lost.keys(), reverse=True):
        back = min(num_back, lost[reason])
        lost[reason], num_back = lost[reason] - back, num_back - back
    return {reason: num_rows for reason, num_rows in lost.items() if num_rows}


def _ready(url: str, answer: HealthAnswer) -> Check:
    seen = f"{url}, {answer.version}, up {answer.up_s:.0f} s, {answer.num_streams} streams"
    if not answer.ready:
        what, _, remedy = answer.text.partition("; ")
        return Check(CHECK, Status.PROBLEM, f"{seen}; not ready ({answer.reason}): {what}", remedy or "wait")
    return Check(CHECK, Status.OK, f"{seen}; ready: it can store durably")


def _space(answer: HealthAnswer) -> list[Check]:
    if not answer.HasField("free_bytes"):
        return []
    seen = f"{answer.free_bytes / 2**30:.1f} GiB free where its store lies"
    if answer.free_bytes < MIN_FREE_BYTES:
        return [Check("collector disk", Status.WARN, seen, "make room there, or keep less (--keep-bytes)")]
    return [Check("collector disk", Status.OK, seen)]


def _counted(name: str, unit: str, counts: Mapping[str, int], none: str) -> Check:
    found = ", ".join(f"{reason} {num}" for reason, num in sorted(counts.items()) if num)
    if not found:
        return Check(name, Status.OK, none)
    why = f"{unit} by reason, since it started: {found}"
    return Check(name, Status.WARN, why, 'see "Limits" and "Health" in docs/collector.md')
