from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Level(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PENDING: _ClassVar[Level]
    RECEIVED: _ClassVar[Level]
    DURABLE: _ClassVar[Level]
PENDING: Level
RECEIVED: Level
DURABLE: Level

class HealthQuery(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthAnswer(_message.Message):
    __slots__ = ("ready", "reason", "text", "version", "up_s", "free_bytes", "num_streams", "in_flight_bytes", "refused_frames", "ended_streams", "dropped_rows", "gap_rows", "num_sync_failures")
    class RefusedFramesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class EndedStreamsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class DroppedRowsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class GapRowsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UP_S_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FRAMES_FIELD_NUMBER: _ClassVar[int]
    ENDED_STREAMS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_ROWS_FIELD_NUMBER: _ClassVar[int]
    GAP_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_SYNC_FAILURES_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    reason: str
    text: str
    version: str
    up_s: float
    free_bytes: int
    num_streams: int
    in_flight_bytes: int
    refused_frames: _containers.ScalarMap[str, int]
    ended_streams: _containers.ScalarMap[str, int]
    dropped_rows: _containers.ScalarMap[str, int]
    gap_rows: _containers.ScalarMap[str, int]
    num_sync_failures: int
    def __init__(self, ready: _Optional[bool] = ..., reason: _Optional[str] = ..., text: _Optional[str] = ..., version: _Optional[str] = ..., up_s: _Optional[float] = ..., free_bytes: _Optional[int] = ..., num_streams: _Optional[int] = ..., in_flight_bytes: _Optional[int] = ..., refused_frames: _Optional[_Mapping[str, int]] = ..., ended_streams: _Optional[_Mapping[str, int]] = ..., dropped_rows: _Optional[_Mapping[str, int]] = ..., gap_rows: _Optional[_Mapping[str, int]] = ..., num_sync_failures: _Optional[int] = ...) -> None: ...

class ClockQuery(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClockReading(_message.Message):
    __slots__ = ("boot_id", "came_ns", "left_ns")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    CAME_NS_FIELD_NUMBER: _ClassVar[int]
    LEFT_NS_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    came_ns: int
    left_ns: int
    def __init__(self, boot_id: _Optional[str] = ..., came_ns: _Optional[int] = ..., left_ns: _Optional[int] = ...) -> None: ...

class ToCollector(_message.Message):
    __slots__ = ("hello", "frame", "rules")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    frame: Frame
    rules: RulesReport
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., rules: _Optional[_Union[RulesReport, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "epoch", "source", "schemas")
    class SourceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SCHEMAS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    epoch: int
    source: _containers.ScalarMap[str, str]
    schemas: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, protocol: _Optional[int] = ..., epoch: _Optional[int] = ..., source: _Optional[_Mapping[str, str]] = ..., schemas: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("stream", "seq", "schema", "num_rows", "crc32", "body")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    stream: int
    seq: int
    schema: int
    num_rows: int
    crc32: int
    body: bytes
    def __init__(self, stream: _Optional[int] = ..., seq: _Optional[int] = ..., schema: _Optional[int] = ..., num_rows: _Optional[int] = ..., crc32: _Optional[int] = ..., body: _Optional[bytes] = ...) -> None: ...

class ToProbe(_message.Message):
    __slots__ = ("ack", "refusal", "rules", "dump")
    ACK_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    DUMP_FIELD_NUMBER: _ClassVar[int]
    ack: Ack
    refusal: Refusal
    rules: Rules
    dump: Dump
    def __init__(self, ack: _Optional[_Union[Ack, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., rules: _Optional[_Union[Rules, _Mapping]] = ..., dump: _Optional[_Union[Dump, _Mapping]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("stream", "seq", "level", "window_bytes")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BYTES_FIELD_NUMBER: _ClassVar[int]
    stream: int
    seq: int
    level: Level
    window_bytes: int
    def __init__(self, stream: _Optional[int] = ..., seq: _Optional[int] = ..., level: _Optional[_Union[Level, str]] = ..., window_bytes: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("stream", "seq", "reason", "retry")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    stream: int
    seq: int
    reason: str
    retry: bool
    def __init__(self, stream: _Optional[int] = ..., seq: _Optional[int] = ..., reason: _Optional[str] = ..., retry: _Optional[bool] = ...) -> None: ...

class Rules(_message.Message):
    __slots__ = ("version", "toml", "for_ms", "who", "only_check", "number")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOML_FIELD_NUMBER: _ClassVar[int]
    FOR_MS_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    ONLY_CHECK_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    version: int
    toml: bytes
    for_ms: int
    who: str
    only_check: bool
    number: int
    def __init__(self, version: _Optional[int] = ..., toml: _Optional[bytes] = ..., for_ms: _Optional[int] = ..., who: _Optional[str] = ..., only_check: _Optional[bool] = ..., number: _Optional[int] = ...) -> None: ...

class RulesReport(_message.Message):
    __slots__ = ("number", "version", "next_version", "toml", "left_ms", "refused", "unnamed", "unfollowed")
    class UnnamedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    class UnfollowedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOML_FIELD_NUMBER: _ClassVar[int]
    LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    UNNAMED_FIELD_NUMBER: _ClassVar[int]
    UNFOLLOWED_FIELD_NUMBER: _ClassVar[int]
    number: int
    version: int
    next_version: int
    toml: bytes
    left_ms: int
    refused: str
    unnamed: _containers.ScalarMap[int, str]
    unfollowed: _containers.ScalarMap[int, str]
    def __init__(self, number: _Optional[int] = ..., version: _Optional[int] = ..., next_version: _Optional[int] = ..., toml: _Optional[bytes] = ..., left_ms: _Optional[int] = ..., refused: _Optional[str] = ..., unnamed: _Optional[_Mapping[int, str]] = ..., unfollowed: _Optional[_Mapping[int, str]] = ...) -> None: ...

class RulesQuery(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class RulesOrder(_message.Message):
    __slots__ = ("run", "toml", "for_ms", "who")
    RUN_FIELD_NUMBER: _ClassVar[int]
    TOML_FIELD_NUMBER: _ClassVar[int]
    FOR_MS_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    run: str
    toml: bytes
    for_ms: int
    who: str
    def __init__(self, run: _Optional[str] = ..., toml: _Optional[bytes] = ..., for_ms: _Optional[int] = ..., who: _Optional[str] = ...) -> None: ...

class RulesAnswer(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunRules]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunRules, _Mapping]]] = ...) -> None: ...

class RunRules(_message.Message):
    __slots__ = ("run", "version", "toml", "base_version", "left_ms", "ranks")
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOML_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    run: str
    version: int
    toml: bytes
    base_version: int
    left_ms: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankRules]
    def __init__(self, run: _Optional[str] = ..., version: _Optional[int] = ..., toml: _Optional[bytes] = ..., base_version: _Optional[int] = ..., left_ms: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankRules, _Mapping]]] = ...) -> None: ...

class RankRules(_message.Message):
    __slots__ = ("epoch", "replica", "rank", "stage", "report")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    replica: int
    rank: int
    stage: int
    report: RulesReport
    def __init__(self, epoch: _Optional[int] = ..., replica: _Optional[int] = ..., rank: _Optional[int] = ..., stage: _Optional[int] = ..., report: _Optional[_Union[RulesReport, _Mapping]] = ...) -> None: ...

class Dump(_message.Message):
    __slots__ = ("incident", "reason", "text", "trigger_unix_ns", "start_unix_ns", "end_unix_ns", "rank", "stage", "step_id", "site")
    INCIDENT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TRIGGER_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    START_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    END_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    incident: str
    reason: str
    text: str
    trigger_unix_ns: int
    start_unix_ns: int
    end_unix_ns: int
    rank: int
    stage: int
    step_id: int
    site: str
    def __init__(self, incident: _Optional[str] = ..., reason: _Optional[str] = ..., text: _Optional[str] = ..., trigger_unix_ns: _Optional[int] = ..., start_unix_ns: _Optional[int] = ..., end_unix_ns: _Optional[int] = ..., rank: _Optional[int] = ..., stage: _Optional[int] = ..., step_id: _Optional[int] = ..., site: _Optional[str] = ...) -> None: ...

class TablesQuery(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TablesAnswer(_message.Message):
    __slots__ = ("tables", "last_written_unix_ns")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    LAST_WRITTEN_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedScalarFieldContainer[str]
    last_written_unix_ns: int
    def __init__(self, tables: _Optional[_Iterable[str]] = ..., last_written_unix_ns: _Optional[int] = ...) -> None: ...

class RowsQuery(_message.Message):
    __slots__ = ("table", "as_stored", "begin_unix_ns", "end_unix_ns", "run", "replica", "rank", "stage", "layer", "site", "request", "begin_step", "end_step", "epoch", "row_seqs", "columns")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    AS_STORED_FIELD_NUMBER: _ClassVar[int]
    BEGIN_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    END_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    BEGIN_STEP_FIELD_NUMBER: _ClassVar[int]
    END_STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROW_SEQS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    table: str
    as_stored: bool
    begin_unix_ns: int
    end_unix_ns: int
    run: str
    replica: int
    rank: int
    stage: int
    layer: int
    site: str
    request: str
    begin_step: int
    end_step: int
    epoch: int
    row_seqs: _containers.RepeatedScalarFieldContainer[int]
    columns: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, table: _Optional[str] = ..., as_stored: _Optional[bool] = ..., begin_unix_ns: _Optional[int] = ..., end_unix_ns: _Optional[int] = ..., run: _Optional[str] = ..., replica: _Optional[int] = ..., rank: _Optional[int] = ..., stage: _Optional[int] = ..., layer: _Optional[int] = ..., site: _Optional[str] = ..., request: _Optional[str] = ..., begin_step: _Optional[int] = ..., end_step: _Optional[int] = ..., epoch: _Optional[int] = ..., row_seqs: _Optional[_Iterable[int]] = ..., columns: _Optional[_Iterable[str]] = ...) -> None: ...

class SqlQuery(_message.Message):
    __slots__ = ("query",)
    QUERY_FIELD_NUMBER: _ClassVar[int]
    query: str
    def __init__(self, query: _Optional[str] = ...) -> None: ...

class Look(_message.Message):
    __slots__ = ("table", "is_final", "since_unix_ns")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    IS_FINAL_FIELD_NUMBER: _ClassVar[int]
    SINCE_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    table: str
    is_final: bool
    since_unix_ns: int
    def __init__(self, table: _Optional[str] = ..., is_final: _Optional[bool] = ..., since_unix_ns: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("schema", "piece", "end")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    schema: bytes
    piece: Piece
    end: End
    def __init__(self, schema: _Optional[bytes] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("body", "is_last", "crc32")
    BODY_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    is_last: bool
    crc32: int
    def __init__(self, body: _Optional[bytes] = ..., is_last: _Optional[bool] = ..., crc32: _Optional[int] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("num_rows", "num_damaged", "hidden", "begun_unix_ns")
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_DAMAGED_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    BEGUN_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    num_rows: int
    num_damaged: int
    hidden: _containers.RepeatedCompositeFieldContainer[Hidden]
    begun_unix_ns: int
    def __init__(self, num_rows: _Optional[int] = ..., num_damaged: _Optional[int] = ..., hidden: _Optional[_Iterable[_Union[Hidden, _Mapping]]] = ..., begun_unix_ns: _Optional[int] = ...) -> None: ...

class Hidden(_message.Message):
    __slots__ = ("epoch", "num_rows")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    num_rows: int
    def __init__(self, epoch: _Optional[int] = ..., num_rows: _Optional[int] = ...) -> None: ...
