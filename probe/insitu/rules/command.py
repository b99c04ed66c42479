"""`insitu rules`: which rules the ranks of a run follow, and changing them without a restart."""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from insitu.cli import ExitCode
from insitu.config_show import BadConfig, load_for_command
from insitu.credentials import CredentialError, Credentials
from insitu.destinations import scheme_of
from insitu.rules.options import BadRules, read_rules, rule_options
from insitu.rules.rule import Rule
from insitu.rules.text import parse_toml, rule_text, to_toml
from insitu.segments.retention import parse_age
from insitu.wire.address import SCHEMES, Address

if TYPE_CHECKING:
    import grpc

    from insitu.wire.insitu_pb2 import RankRules, RulesAnswer, RunRules
    from insitu.wire.insitu_pb2_grpc import CollectorStub

SCHEMA: Final = "insitu.rules/1"
USUAL: Final = "127.0.0.1:4317"
TIMEOUT_S: Final = 10.0
"""A collector asks its ranks twice, and waits 2 s for each answer."""

Command = TypeVar("Command", bound=Callable[..., Any])
Ask = Callable[["CollectorStub"], "RulesAnswer"]


class Unreachable(click.ClickException):
    """No collector is there: one line, and the exit status that says so."""

    exit_code = ExitCode.UNREACHABLE


def collector_options(command: Command) -> Command:
    """Add --at, --run and --json to a command."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help=f"Print one JSON document ({SCHEMA})."),
        click.option("--run", default="", metavar="RUN", help="First digits of the run, where there are several."),
        click.option(
            "--at",
            metavar="HOST:PORT",
            help=f"The collector; with TLS grpcs://HOST:PORT.  [default: INSITU_TO or {USUAL}]",
        ),
    ):
        command = option(command)
    return command


@click.group()
def rules() -> None:
    """Show which rules the ranks of a run follow, and change them without a restart.

    The collector hands them down to ranks that were attached with to=grpc://..., and writes into `events` who set what.
    Only sites that were attached can be named; docs/probe.md says what a rule may say.

    \b
    insitu rules show --at 127.0.0.1:4317
    insitu rules for 60s --rule '*,requests=all,rows=last' --at 127.0.0.1:4317
    """


@rules.command()
@collector_options
@click.pass_context
def show(ctx: click.Context, at: str | None, run: str, as_json: bool) -> None:
    """Print for each rank which version is in force, and for how long still.

    Exit status 5 when a rank does not answer.

    \b
    insitu rules show --at 127.0.0.1:4317
    insitu rules show --at 127.0.0.1:4317 --json | python -m json.tool
    """
    from insitu.wire.insitu_pb2 import RulesQuery

    _print(ctx, *_call(at, lambda stub: stub.ShowRules(RulesQuery(run=run), timeout=TIMEOUT_S)), as_json)


@rules.command(name="set")
@rule_options
@click.option("--none", "nothing", is_flag=True, help="No rule: only what is always taken.")
@collector_options
@click.pass_context
def set_(
    ctx: click.Context,
    file: str | None,
    texts: tuple[str, ...],
    nothing: bool,
    at: str | None,
    run: str,
    as_json: bool,
) -> None:
    """Let all ranks of a run follow these rules instead, from their next step on, until others are set.

    Rules that one rank cannot follow, or that name a site on none, are refused, and nothing changes.

    \b
    insitu rules set --rule '*,requests=0.01,rows=last,cast=bf16' --at 127.0.0.1:4317
    insitu rules set --rule '*,take=summary,every=64' --at 127.0.0.1:4317 --json | python -m json.tool
    """
    _set(ctx, _chosen(file, texts, nothing), None, at, run, as_json)


@rules.command(name="for")
@click.argument("duration", metavar="TIME")
@rule_options
@click.option("--none", "nothing", is_flag=True, help="No rule: only what is always taken.")
@collector_options
@click.pass_context
def for_(
    ctx: click.Context,
    duration: str,
    file: str | None,
    texts: tuple[str, ...],
    nothing: bool,
    at: str | None,
    run: str,
    as_json: bool,
) -> None:
    """Let all ranks of a run follow these rules for a time; then those before are in force again.

    TIME is like 60s, 5m or 2h. Each rank ends it by itself, whatever becomes of the collector.

    \b
    insitu rules for 60s --rule '*,requests=all,rows=last' --at 127.0.0.1:4317
    insitu rules for 2m --rule '*,take=summary,every=1' --at 127.0.0.1:4317 --json | python -m json.tool
    """
    try:
        for_s = parse_age(duration)
    except ValueError as error:
        raise BadRules(str(error)) from None
    if for_s is None:
        raise BadRules("`none` is no time; `insitu rules set` follows rules until others are set")
    _set(ctx, _chosen(file, texts, nothing), for_s, at, run, as_json)


def _chosen(file: str | None, texts: Sequence[str], nothing: bool) -> tuple[Rule, ...]:
    found = read_rules(file, texts)
    if bool(found) == nothing:
        raise BadRules("give --rule or --rules, or --none for no rule")
    return found


def _set(
    ctx: click.Context, chosen: Sequence[Rule], for_s: float | None, at: str | None, run: str, as_json: bool
) -> None:
    from insitu.wire.insitu_pb2 import RulesOrder

    who = f"{_user()}@{socket.gethostname()} (process {os.getpid()})"
    order = RulesOrder(
        run=run, toml=to_toml(chosen).encode(), for_ms=0 if for_s is None else max(1, round(for_s * 1e3)), who=who
    )
    target, answer = _call(at, lambda stub: stub.SetRules(order, timeout=TIMEOUT_S))
    for line in _never_followed(answer):
        click.echo(f"insitu: {line}", err=True)
    _print(ctx, target, answer, as_json)


def _never_followed(answer: RulesAnswer) -> list[str]:
    """Return a line about each rule that no rank of those that answered follows at a site, since earlier ones are."""
    reports = [rank.report for run in answer.runs for rank in run.ranks if rank.HasField("report")]
    lines = {place: line for report in reports for place, line in report.unfollowed.items()}
    nowhere = (p for p in sorted(lines) if all(p in report.unfollowed or p in report.unnamed for report in reports))
    return [lines[place] for place in nowhere]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        return f"uid {os.getuid()}"


def _call(at: str | None, ask: Ask) -> tuple[str, RulesAnswer]:
    """Return the collector's address and its answer. Raises ClickException, one line."""
    import grpc

    from insitu.wire.channel import open_channel
    from insitu.wire.insitu_pb2_grpc import CollectorStub

    address, credentials = _collector(at)
    try:
        with open_channel(address, credentials, [("grpc.enable_retries", 0)]) as channel:
            return address.target, ask(CollectorStub(channel))
    except CredentialError as error:
        raise BadConfig(str(error)) from None
    except grpc.RpcError as error:
        raise _failure(address, error) from None


def _collector(at: str | None) -> tuple[Address, Credentials]:
    """Return where it is, and what it is shown."""
    config = load_for_command()
    if at is None:
        to = str(config.to)
        at = to if scheme_of(to) in SCHEMES else USUAL
    try:
        return Address.of(at), config.credentials
    except ValueError as error:
        raise click.UsageError(f"--at {at}: {error}") from None


def _failure(address: Address, error: grpc.RpcError) -> click.ClickException:
    import grpc

    from insitu.wire.refusals import why_refused

    status: Any = error  # what a call raises is itself the call
    code, details, target = status.code(), status.details(), address.target
    why = why_refused(address, code, details)
    if why is not None:
        is_answer = code is not grpc.StatusCode.UNAVAILABLE
        return click.ClickException(why) if is_answer else Unreachable(why)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        text = f"what listens at {target} changes no rules; it is an older insitu, or an OpenTelemetry collector"
        return click.ClickException(text)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return BadRules(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED or "failed to connect" in details:
        text = f"no collector answers at {target}; say where it is with --at, or start one: insitu collect --store DIR"
        return Unreachable(text)
    return click.ClickException(details)


def _print(ctx: click.Context, target: str, answer: RulesAnswer, as_json: bool) -> None:
    found = document(target, answer)
    click.echo(json.dumps(found, indent=1) if as_json else text_of(found))
    ranks = [rank for run in found["runs"] for rank in run["ranks"]]
    if any(rank["refused"] for rank in ranks):
        ctx.exit(ExitCode.PROBLEMS_FOUND)
    if not all(rank["answered"] for rank in ranks):
        ctx.exit(ExitCode.PARTIAL)


def document(target: str, answer: RulesAnswer) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {"schema": SCHEMA, "collector": target, "runs": [_run(run) for run in answer.runs]}


def _run(run: RunRules) -> dict[str, Any]:
    return {
        "run": run.run,
        "version": run.version,
        "rules": _texts(run.toml),
        "base_version": run.base_version,
        "left_s": run.left_ms / 1e3 or None,
        "ranks": [_rank(rank) for rank in run.ranks],
    }


def _rank(rank: RankRules) -> dict[str, Any]:
    report = rank.report
    return {
        "replica": rank.replica,
        "rank": rank.rank,
        "stage": rank.stage,
        "epoch": rank.epoch,
        "answered": rank.HasField("report"),
        "version": report.version,
        "next_version": report.next_version,
        "rules": _texts(report.toml),
        "left_s": report.left_ms / 1e3 or None,
        "refused": report.refused or None,
    }


def _texts(toml: bytes) -> list[str]:
    return [rule_text(rule) for rule in parse_toml(toml)]


def text_of(found: dict[str, Any]) -> str:
    """Return the document as a person reads it."""
    lines = []
    for run in found["runs"]:
        given = f"version {run['version']}" if run["version"] else "no rules"
        left = f", for {run['left_s']:.0f} s more" if run["left_s"] else ""
        lines.append(f"run {run['run']}: {given} handed down by the collector at {found['collector']}{left}")
        lines += [f"  {text}" for text in run["rules"]]
        lines += [_rank_text(rank) for rank in run["ranks"]]
    return "\n".join(lines)


def _rank_text(rank: dict[str, Any]) -> str:
    name = f"rank {rank['rank']} stage {rank['stage']}" + (f" replica {rank['replica']}" if rank["replica"] else "")
    if not rank["answered"]:
        return f"{name}: no answer"
    said = f"{name}: version {rank['version']}{' (of attach)' if not rank['version'] else ''}"
    if rank["next_version"] != rank["version"]:
        said += f", {rank['next_version']} from its next step on"
    elif rank["left_s"]:
        said += f", for {rank['left_s']:.0f} s more"
    said += f": {'; '.join(rank['rules']) or 'no rule'}"
    return said if rank["refused"] is None else f"{said}. It refused what was handed down: {rank['refused']}"
