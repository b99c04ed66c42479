"""What was asked for: arguments, then `INSITU_*` variables, then `insitu.toml`, then defaults. Loads nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from insitu import settings_file
from insitu.credentials import Credentials
from insitu.destinations import scheme_of
from insitu.flight.settings import Flight, flight_text, parse_flight
from insitu.intake import IntakeLimits, Quotas, limits_text, parse_limits, parse_quotas, quotas_text
from insitu.segments.retention import DEFAULT_AGE_S, DEFAULT_BYTES, Keep, age_text, bytes_text
from insitu.setting_values import (
    as_age,
    as_axes,
    as_budget,
    as_bytes,
    as_count,
    as_destination,
    as_folder,
    as_names,
    as_queue_bytes,
    as_run,
    as_text,
    as_tier,
    as_urls,
    is_on,
    without_secret,
    without_secrets,
)
from insitu.settings_file import SettingsFile

if TYPE_CHECKING:
    from insitu.exporters import Exporter

PREFIX: Final = "INSITU_"
NOT_FOR_PEOPLE: Final = ("INSITU_ENGINE_", "INSITU_CHILD_")
"""How the engine's processes, and `insitu run` and what it starts, speak to each other; no settings."""
STAGE_VARIABLE: Final = "INSITU_CHILD_STAGE"
"""How `insitu run --stage` reaches the processes it starts: a number, or "rank"."""
MODEL_VARIABLE: Final = "INSITU_CHILD_MODEL"
"""And `--model`: a glob of class names."""
DEFAULT_TO: Final = "file://./insitu-store"
DEFAULT_MAX_ROWS: Final = 2048
DEFAULT_BUDGET: Final = 0.01
"""Of step time: what nobody notices in a latency. A server that must show more sets more."""
DEFAULT_QUEUE_BYTES: Final = 64 << 20


class ConfigError(ValueError):
    """A setting that cannot be used: one line that names it and what it may be."""


class Origin(StrEnum):
    """Where a value came from; the first of these that gives one counts."""

    ARGUMENT = "argument"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that can be set, and by what. `variable` or `key` None: not that way."""

    name: str
    default: Any
    help: str
    parse: Callable[[Any], Any] = as_text
    variable: str | None = None
    key: str | None = None
    show: Callable[[Any], Any] = lambda value: value
    is_checked: bool = False
    """Whether `parse` sees arguments that are no text, too."""


SETTINGS: Final = (
    Setting(
        "to",
        DEFAULT_TO,
        "where records go: grpc://HOST:PORT (grpcs:// with TLS), file://STORE or otlp://HOST:PORT",
        as_destination,
        "INSITU_TO",
        "to",
        is_checked=True,
    ),
    Setting("disabled", False, "true: nothing is observed", is_on, "INSITU_DISABLED", "disabled"),
    Setting("run", None, "16 hex digits all processes of a run share; the first makes them", as_run, "INSITU_RUN"),
    Setting(
        "max_rows",
        DEFAULT_MAX_ROWS,
        "most rows of a step that are kept",
        as_count,
        "INSITU_MAX_ROWS",
        "max_rows",
        is_checked=True,
    ),
    Setting(
        "overhead_budget",
        DEFAULT_BUDGET,
        "share of step time that the probe may take",
        as_budget,
        "INSITU_OVERHEAD_BUDGET",
        "overhead_budget",
        is_checked=True,
    ),
    Setting(
        "t0", "all", "sites with a canary in each step: all or boundary", as_tier, "INSITU_T0", "t0", is_checked=True
    ),
    Setting("fused_taps", True, "one kernel a tap, on CUDA with Triton", is_on, "INSITU_FUSED_TAPS", "fused_taps"),
    Setting("axes", {}, "site glob -> tokens, samples or batch", as_axes, key="axes", is_checked=True),
    Setting(
        "flight",
        None,
        "flight recorder: on, off, or like rows=L*.resid_post,pre_s=5",
        parse_flight,
        "INSITU_FLIGHT",
        "flight",
        flight_text,
        is_checked=True,
    ),
    Setting(
        "keep_bytes",
        DEFAULT_BYTES,
        "most that a shard of a store keeps",
        as_bytes,
        "INSITU_KEEP_BYTES",
        "keep_bytes",
        bytes_text,
    ),
    Setting("keep_for", DEFAULT_AGE_S, "how long it is kept", as_age, "INSITU_KEEP_FOR", "keep_for", age_text),
    Setting(
        "max_queue_bytes",
        DEFAULT_QUEUE_BYTES,
        "most memory of a session's rows on their way",
        as_queue_bytes,
        "INSITU_MAX_QUEUE_BYTES",
        "max_queue_bytes",
        bytes_text,
    ),
    Setting(
        "spool",
        None,
        "folder for what a grpc:// collector that is away cannot take",
        as_folder,
        "INSITU_SPOOL",
        "spool",
        is_checked=True,
    ),
    Setting("token_file", None, "file with the token for a collector", as_text, "INSITU_TOKEN_FILE", "token_file"),
    Setting("ca_file", None, "PEM of who signs collectors' certificates", as_text, "INSITU_CA_FILE", "ca_file"),
    Setting("client_cert", None, "PEM of our certificate for them", as_text, "INSITU_CLIENT_CERT", "client_cert"),
    Setting("client_key", None, "PEM of the key of that", as_text, "INSITU_CLIENT_KEY", "client_key"),
    Setting("tls_cert", None, "collect: PEM of its certificate", as_text, "INSITU_TLS_CERT", "tls_cert"),
    Setting("tls_key", None, "collect: PEM of the key of that", as_text, "INSITU_TLS_KEY", "tls_key"),
    Setting(
        "tls_client_ca",
        None,
        "collect: PEM of who signs callers' certificates",
        as_text,
        "INSITU_TLS_CLIENT_CA",
        "tls_client_ca",
    ),
    Setting("tokens", None, "collect: file that says who may do what", as_text, "INSITU_TOKENS", "tokens"),
    Setting(
        "webhooks",
        (),
        "URLs that are told of incidents",
        as_urls,
        "INSITU_WEBHOOKS",
        "webhooks",
        without_secrets,
    ),
    Setting(
        "otlp_logs",
        None,
        "OTLP endpoint that gets incidents as logs",
        as_text,
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",
        "otlp_logs",
        without_secret,
    ),
    Setting(
        "limits",
        IntakeLimits(),
        "what a collector takes at most: like streams=64,idle=30s",
        parse_limits,
        "INSITU_LIMITS",
        "limits",
        limits_text,
        is_checked=True,
    ),
    Setting(
        "quotas",
        Quotas(),
        "what each tenant may send: like bytes_per_s=8MiB",
        parse_quotas,
        "INSITU_QUOTAS",
        "quotas",
        quotas_text,
        is_checked=True,
    ),
    Setting("enabled", False, "vLLM is observed", is_on, "INSITU_ENABLED"),
    Setting(
        "vllm_rows",
        None,
        "vLLM: sites whose rows requests may ask for, like L*.resid_post,logits",
        as_names,
        "INSITU_VLLM_ROWS",
        "vllm_rows",
        lambda names: None if names is None else list(names),
    ),
    Setting("plugins_off", (), "plug-ins that are not loaded", as_names, "INSITU_PLUGINS_OFF", "plugins_off", list),
)
ONLY_ARGUMENTS: Final = (
    Setting("rules", (), "attach: which rows to take (insitu.Rule)"),
    Setting("role", "rank", "attach, start: rank, driver or client (what start takes if not told)"),
    Setting("rank", None, "attach: what torch.distributed or its launcher says, else 0; -1 for start"),
    Setting("stage", 0, "attach: the stage; -1 for start"),
    Setting("model_name", None, "attach: the model's name (its class if not told); `model` of start"),
)
"""What only the caller of a verb can know."""


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting, and where each came from. What `insitu config show` prints is what attach, start and serve use.

    What each means, and its unit: docs/probe.md, "Settings". `insitu.config.load` makes one, and raises ConfigError, a
    ValueError, for what cannot be used.
    """

    to: str | Exporter = DEFAULT_TO
    disabled: bool = False
    run: str | None = None
    max_rows: int = DEFAULT_MAX_ROWS
    overhead_budget: float = DEFAULT_BUDGET
    t0: str = "all"
    fused_taps: bool = True
    axes: Mapping[str, str] = field(default_factory=dict)
    flight: Flight | None = None
    keep_bytes: int | None = DEFAULT_BYTES
    keep_for: float | None = DEFAULT_AGE_S
    """Seconds."""
    max_queue_bytes: int = DEFAULT_QUEUE_BYTES
    spool: str | None = None
    token_file: str | None = None
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    tokens: str | None = None
    webhooks: tuple[str, ...] = ()
    otlp_logs: str | None = None
    limits: IntakeLimits = field(default_factory=IntakeLimits)
    quotas: Quotas = field(default_factory=Quotas)
    enabled: bool = False
    vllm_rows: tuple[str, ...] | None = None
    """None: what its mode allows."""
    plugins_off: tuple[str, ...] = ()
    """Names of entry points (`insitu plugins list`)."""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """By setting; what is not there is a default."""
    file: Path | None = None
    """The file that was read."""
    unknown: tuple[str, ...] = ()
    """`INSITU_*` variables that mean nothing."""
    unread: str = ""
    """What is wrong with a `pyproject.toml` that may have settings of ours; empty: nothing."""

    @property
    def keep(self) -> Keep:
        """Return what a store of this process keeps."""
        return Keep(self.keep_bytes, self.keep_for)

    @property
    def credentials(self) -> Credentials:
        """Return what this process shows a collector."""
        return Credentials(self.token_file, self.ca_file, self.client_cert, self.client_key)

    def origin(self, name: str) -> Origin:
        """Return where the setting of this name came from. Raises nothing: of a name that is none it is a default."""
        return self.origins.get(name, Origin.DEFAULT)

    def warnings(self) -> list[str]:
        """Return one line for each variable that means nothing, and for a file that sets nothing."""
        known = ", ".join(sorted(setting.variable for setting in SETTINGS if setting.variable))
        lines = [f"the variable {name} means nothing to insitu; those that do are {known}" for name in self.unknown]
        return [*lines, self.unread] if self.unread else lines


def load(folder: Path | None = None, environment: Mapping[str, str] | None = None, **arguments: Any) -> Config:
    """Return what is set; an argument of None was not given.

    Raises ConfigError for an unknown key in the file, and for a value that cannot be used.
    """
    environment = os.environ if environment is None else environment
    try:
        file = _checked(settings_file.read(folder or Path()))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for setting in SETTINGS:
        found = _find(setting, arguments, environment, file.table)
        if found is not None:
            origins[setting.name], raw = found
            values[setting.name] = _value(setting, origins[setting.name], raw, file.path)
    is_off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_off and scheme_of(values.get("to")) == "otlp":
        values["disabled"], origins["disabled"] = True, Origin.ENVIRONMENT
    known = {setting.variable for setting in SETTINGS}
    ours = {name for name in environment if name.startswith(PREFIX) and not name.startswith(NOT_FOR_PEOPLE)}
    unknown = tuple(sorted(ours - known))
    return Config(**values, origins=origins, file=file.path, unread=file.unread, unknown=unknown)


def _find(
    setting: Setting, arguments: Mapping[str, Any], environment: Mapping[str, str], table: Mapping[str, Any]
) -> tuple[Origin, Any] | None:
    if arguments.get(setting.name) is not None:
        return Origin.ARGUMENT, arguments[setting.name]
    if setting.variable and environment.get(setting.variable):
        return Origin.ENVIRONMENT, environment[setting.variable]
    if setting.key and setting.key in table:
        return Origin.FILE, table[setting.key]
    return None


def _value(setting: Setting, origin: Origin, raw: Any, path: Path | None) -> Any:
    if origin is Origin.ARGUMENT and not isinstance(raw, str) and not setting.is_checked:
        return raw  # the caller's own object
    try:
        return setting.parse(raw)
    except ValueError as error:
        where = {Origin.ENVIRONMENT: setting.variable, Origin.FILE: f"{setting.key} in {path}"}.get(
            origin, setting.name
        )
        raise ConfigError(f"{where}: {error}") from None


def _checked(found: SettingsFile) -> SettingsFile:
    """Return a file as it is. Raises ConfigError where it has a key that is no setting."""
    keys = [setting.key for setting in SETTINGS if setting.key]
    for key in found.table:
        if key not in keys:
            raise ConfigError(f"{found.path}: no setting {key!r}; the settings are {', '.join(keys)}")
    return found
