"""The names and numbers that are stored. Every process and every stored file depends on them: only append.

Plain Python, so that any part can import it for nothing. See docs/format.md, "Names and numbers".
"""

import re
from enum import IntEnum, StrEnum


class IntervalClass(IntEnum):
    """What a rank's step thread was doing during an interval (`intervals.cls`)."""

    IDLE = 0
    """Blocked for work, and there was none."""
    SCHEDULE = 1
    """Choosing what runs next."""
    RECV_WAIT = 2
    """Waiting for a peer that has not sent yet (`peer` says which rank; -1 is the driver)."""
    RECV_XFER = 3
    """The peer has sent; bytes are on their way."""
    COMPUTE = 4
    """The model's forward pass."""
    COLLECTIVE_WAIT = 5
    """Inside a collective of the tensor- or expert-parallel group."""
    HOST = 6
    """Preparing inputs and reading outputs around the forward pass."""
    SAMPLE = 7
    """Turning logits into token ids."""
    SEND_WAIT = 8
    """Waiting for a peer to accept what an earlier send holds (back-pressure)."""
    SEND_XFER = 9
    """Handing bytes to the transport."""
    GC = 10
    """Python's cyclic garbage collector ran and held the interpreter."""
    COMPILE = 11
    """Compiling or capturing a graph."""


class Phase(IntEnum):
    """What a step or a row of it computes (`steps.phase`)."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2


class Variant(IntEnum):
    """Which of the two step variants ran (`steps.variant`)."""

    QUIET = 0
    """T0 only."""
    FULL = 1
    """T0, T1 and rows."""


class RequestEvent(IntEnum):
    """What happened to a request (`requests.event`)."""

    ARRIVED = 0
    QUEUED = 1
    SCHEDULED = 2
    FIRST_TOKEN = 3
    TOKEN = 4
    PREEMPTED = 5
    RESUMED = 6
    FINISHED = 7
    FAILED = 8
    KV_WAIT = 9
    """From here on it would run if there were key/value memory for it (`num_tokens`: positions it needs room for)."""


class Role(StrEnum):
    """What a process is (`sources.role`)."""

    DRIVER = "driver"
    RANK = "rank"
    CLIENT = "client"


class DropReason(StrEnum):
    """Why a produced row is not stored. What sampling left out is not dropped."""

    SLAB_FULL = "slab_full"
    RING_FULL = "ring_full"
    QUEUE_FULL = "queue_full"
    SPOOL_FULL = "spool_full"
    COLLECTOR_UNREACHABLE = "collector_unreachable"
    REFUSED_QUOTA = "refused_quota"
    REFUSED_MEMORY = "refused_memory"
    REFUSED_INVALID = "refused_invalid"
    DISK_FULL = "disk_full"
    SHUTDOWN = "shutdown"
    TORN_TAIL = "torn_tail"
    EXPIRED_UNSENT = "expired_unsent"
    PROBE_ERROR = "probe_error"
    STORE_FAILED = "store_failed"
    """The store cannot be written, and not for want of room."""


class FrameDefect(StrEnum):
    """What is wrong with a frame that is refused as invalid."""

    TOO_LONG = "too_long"
    CHECKSUM = "checksum"
    COMPRESSED = "compressed"
    NOT_A_BATCH = "not_a_batch"
    UNKNOWN_SCHEMA = "unknown_schema"
    NUM_ROWS = "num_rows"
    IDENTITY = "identity"
    """Nulls where none may be (`insitu.records.NEEDED`), rows of another process, a negative `row_seq`."""
    SEQ = "seq"
    UNKNOWN_KIND = "unknown_kind"
    """A message that this version does not know."""


class HangUp(StrEnum):
    """Why a collector ended a stream, or did not let it begin."""

    STARTING = "starting"
    """It recovers its store."""
    NUM_STREAMS = "num_streams"
    """As many as may be are connected already."""
    MADE_ROOM = "made_room"
    """It was silent, and another had no place."""
    HANDSHAKE = "handshake"
    """No Hello in time."""
    IDLE = "idle"
    PROTOCOL = "protocol"
    """Another version, or not the order of messages that the protocol asks for."""
    LABELS = "labels"
    """Too many, or too large."""
    REVOKED = "revoked"
    """What let its caller in stands no longer."""
    OTHER_TENANT = "other_tenant"
    """The process is another tenant's."""
    REFUSALS = "refusals"
    """So many frames were refused, and it did not read that."""


EXPIRED = "expired"
"""`gaps.reason` of rows that were stored and have gone by age or size since: kept for a while, not lost."""
ERASED = "erased"
"""`gaps.reason` of rows that were stored and have been erased because somebody asked for it: not lost either."""
NOT_LOST = frozenset({EXPIRED, ERASED})
"""Reasons of `gaps` that say that somebody wanted it so."""
CORRUPT = "corrupt"
"""`gaps.reason` of a stretch of a file whose bytes changed after they were written."""
DAMAGED = frozenset({str(DropReason.TORN_TAIL), CORRUPT})
"""Reasons of `gaps` of what a store could not read any more."""
SENT_AGAIN = "sent_again"
"""`gaps.reason` of a batch that an earlier row tells as lost: it came again after all, and that row counts no more."""


class VerdictKind(StrEnum):
    """What a verdict says. `SEVERITY` gives the order in which views list them."""

    HEALTHY = "healthy"
    INCONCLUSIVE = "inconclusive"
    STAGE_LIMITS = "stage_limits"
    PIPELINE_UNDERFILLED = "pipeline_underfilled"
    STRAGGLER_RANK = "straggler_rank"
    GC_PAUSE = "gc_pause"
    KV_STARVED = "kv_starved"
    PREFILL_DELAYS_DECODE = "prefill_delays_decode"
    STUCK = "stuck"
    FAIL_SLOW = "fail_slow"
    FIRST_NONFINITE = "first_nonfinite"
    EXPERT_IMBALANCE = "expert_imbalance"
    SITE_NEVER_FIRED = "site_never_fired"
    RECORDS_DROPPED = "records_dropped"
    HOST_CONTENDED = "host_contended"
    CLOCK_UNCERTAIN = "clock_uncertain"


SEVERITY: tuple[VerdictKind, ...] = (
    VerdictKind.STUCK,
    VerdictKind.FIRST_NONFINITE,
    VerdictKind.STAGE_LIMITS,
    VerdictKind.STRAGGLER_RANK,
    VerdictKind.FAIL_SLOW,
    VerdictKind.GC_PAUSE,
    VerdictKind.KV_STARVED,
    VerdictKind.PREFILL_DELAYS_DECODE,
    VerdictKind.PIPELINE_UNDERFILLED,
    VerdictKind.EXPERT_IMBALANCE,
    VerdictKind.HOST_CONTENDED,
    VerdictKind.RECORDS_DROPPED,
    VerdictKind.SITE_NEVER_FIRED,
    VerdictKind.CLOCK_UNCERTAIN,
    VerdictKind.INCONCLUSIVE,
    VerdictKind.HEALTHY,
)
"""Most severe first: wrong or missing output, then speed, then the quality of the record, then the rest."""

_KINDS = {str(kind): kind for kind in VerdictKind}


def kind_of(text: str) -> str:
    """Return the `VerdictKind` of a stored name, or the name itself: a plug-in's, or one of a later version."""
    return _KINDS.get(text, text)


def severity(kind: str) -> int:
    """Return a kind's place in `SEVERITY`, 0 the most severe; a kind that is not there comes after all that are."""
    known = _KINDS.get(kind)
    return len(SEVERITY) if known is None else SEVERITY.index(known)


class Reason(StrEnum):
    """What made a flight recorder ship what it holds (`incidents.reason`)."""

    NONFINITE = "nonfinite"
    """A boundary held a NaN or an infinity."""
    SLOW_STEP = "slow_step"
    """A step took many times what steps of its shape take."""
    EXCEPTION = "exception"
    """An exception left a step (`text`: its type)."""
    SIGNAL = "signal"
    ASKED = "asked"
    """`session.dump` (`text`: why)."""
    VERDICT = "verdict"
    """The judge said that the run is stuck (`text`: its sentence)."""


class IncidentState(StrEnum):
    """What a row of `incidents` says of an incident."""

    OPENED = "opened"
    """Something triggered, here."""
    ANSWERED = "answered"
    """This process has shipped what it held of the window."""
    CLOSED = "closed"
    """The collector asked every rank; who answered, and who did not."""


class LedgerClass(StrEnum):
    """Where a rank's wall time went: exactly one class for each nanosecond of a window."""

    COMPUTE = "compute"
    HOST = "host"
    GC = "gc"
    COMPILE = "compile"
    COLLECTIVE = "collective"
    WAIT_UPSTREAM = "wait_upstream"
    WAIT_DOWNSTREAM = "wait_downstream"
    TRANSFER = "transfer"
    NO_DEMAND = "no_demand"
    CONTENDED = "contended"
    UNRECORDED = "unrecorded"
    OTHER = "other"


class RequestClass(StrEnum):
    """Where a request's time went: exactly one class for each nanosecond from its arrival to its end."""

    QUEUE = "queue"
    """Arrived, and not scheduled."""
    KV_WAIT = "kv_wait"
    """Not scheduled because there was no key/value memory for it."""
    PREFILL = "prefill"
    """A rank worked on a step that computed its prompt."""
    DECODE = "decode"
    """A rank worked on a step that computed its next token."""
    INTERFERENCE = "interference"
    """The part of such a step that the prompts of others in it added."""
    PREEMPTED = "preempted"
    """Its memory was taken away, and it had not resumed."""
    PIPELINE_WAIT = "pipeline_wait"
    """Its micro-batch waited for a rank that did something else."""
    OTHER = "other"
    """The rest: on its way to or from the driver, or the record does not say."""


NAMESPACED = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
"""How a plug-in's verdicts and statistics are called: with a namespace, so that none is ever taken for one of ours."""


class Numbers(dict[str, int]):
    """The numbers that names of a kind are stored as. Looking up another raises KeyError with those there are."""

    def __init__(self, kinds: type[IntEnum], what: str) -> None:
        """what: of what kind the names are, for people."""
        super().__init__({kind.name.lower(): int(kind) for kind in kinds})
        self._what = what

    def __missing__(self, name: str) -> int:
        raise KeyError(f"{name!r} is no {self._what}; it may be {', '.join(self)}")


NO_RANK = -1
"""Rank or stage of a process that has none (driver, client), and `peer` of the driver."""
HIGHEST_RANK = 2**15 - 1
"""Or stage: records keep both as int16."""
