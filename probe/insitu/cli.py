"""The `insitu` command: one word each, loaded only when it is asked for.

Our own commands stand in a table, so that `insitu --help` imports nothing but click; the entry-point group
`insitu.commands` is scanned only for a word the table does not hold, since a scan is slow in a full environment.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from enum import IntEnum
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

from insitu.interrupts import ending_at_once, raising_again

with ending_at_once():
    import click

ENTRY_POINTS: Final = "insitu.commands"


class ExitCode(IntEnum):
    """What a command's exit status means."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    PROBLEMS_FOUND = 3
    UNREACHABLE = 4
    PARTIAL = 5
    """The data is partial, or too noisy to judge."""
    INTERRUPTED = 130


class StorePath(click.Path):
    """A store as commands are given it: a folder or an address. An empty one would be the folder we stand in."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("an empty path is no folder; write the store's", param, ctx)
        return super().convert(value, param, ctx)


class Entry(NamedTuple):
    """Where a command lives, what it is for, and which extra brings what it imports (None: the core does)."""

    target: str
    help: str
    extra: str | None = None
    hidden: bool = False


COMMANDS: Final[dict[str, Entry]] = {
    "demo": Entry(
        "insitu_engine.demo:demo", "Serve a real model, slow one stage, and see the verdict name it.", "engine"
    ),
    "serve": Entry("insitu_engine.serve:serve", "Serve a Hugging Face decoder over HTTP on pipeline stages.", "engine"),
    "run": Entry(
        "insitu.run.command:run", "Run your own server with insitu attached to its model; its code stays as it is."
    ),
    "load": Entry("insitu_engine.load:load", "Send prompts at random times to a server.", "engine", hidden=True),
    "collect": Entry(
        "insitu_collector.service.command:collect", "Receive records and store them as Arrow files.", "collector"
    ),
    "token": Entry("insitu_collector.access.command:token", "Say who may call a collector.", "collector"),
    "judge": Entry(
        "insitu_collector.judge.command:judge", "Judge a store once a second and append verdicts.", "collector"
    ),
    "dashboard": Entry(
        "insitu_dashboard.dashboard:dashboard", "Show a store in a browser, live while it is written.", "dashboard"
    ),
    "top": Entry("insitu_dashboard.top:top", "Show a store in a terminal, live while it is written.", "top"),
    "stalls": Entry("insitu_collector.views.stalls:stalls", "Say what a store's verdicts and ledger say.", "collector"),
    "incidents": Entry(
        "insitu_collector.flight.command:incidents",
        "List what flight recorders kept, or show one incident.",
        "collector",
    ),
    "compare": Entry(
        "insitu_collector.compare.command:command",
        "Say how one run, rank or stretch of time differs from another.",
        "collector",
    ),
    "forward": Entry(
        "insitu.forwarding.command:forward", "Send the store of a machine without a connection to a collector."
    ),
    "subscribe": Entry(
        "insitu_collector.subscriber.command:subscribe",
        "Send what a store holds on as OTLP, live.",
        "collector",
    ),
    "export": Entry(
        "insitu_collector.export.command:export", "Write a run for Perfetto, or its tables as files.", "collector"
    ),
    "store": Entry(
        "insitu_collector.keeping.command:store",
        "Keep a store: see what is in it and was sent on, check, repair, merge, expire, copy, erase, replay.",
        "collector",
    ),
    "simulate": Entry(
        "insitu_collector.simulate.command:simulate",
        "Write a store as a run would have left it.",
        "collector",
    ),
    "sites": Entry(
        "insitu.sites.command:sites", "Show where a model can be observed, from its config alone.", "engine"
    ),
    "plan": Entry(
        "insitu.plan.command:plan", "Say what rules would take of a model, and cost, before they do.", "engine"
    ),
    "rules": Entry("insitu.rules.command:rules", "Show and change what the ranks of a run take, without a restart."),
    "config": Entry("insitu.config_show:config", "Show every setting, its value, and where it came from."),
    "plugins": Entry(
        "insitu.plugins.command:plugins", "Say what other packages add, and try whether it does what it should."
    ),
    "doctor": Entry("insitu.doctor:doctor", "Check this machine and environment, and say what to fix."),
}


OWN_EXTRAS: Final = {"perfetto": "perfetto", "altair": "notebook"}
"""Packages that an extra of their own brings, whichever command wants them."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, entry in COMMANDS.items() if not entry.hidden]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return _from_entry_points(cmd_name)
        module, _, attribute = entry.target.partition(":")
        try:
            with ending_at_once():
                command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise _missing(error, cmd_name) from error
        assert isinstance(command, click.Command), f"{entry.target} is not a click command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if not word.startswith("-") and self.get_command(ctx, word) is None:
            raise click.UsageError(f"no command {word!r}; the commands are {', '.join(self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own words on a handshake or a port are beside our line
        try:
            with raising_again():
                return super().invoke(ctx)
        except ModuleNotFoundError as error:  # a command may import its heavy parts only when it runs
            raise _missing(error, ctx.invoked_subcommand or "insitu") from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # who read what is printed has gone: click ends quietly
                raise
            raise click.ClickException(_of_system(error)) from error
        except ValueError as error:
            raise _of_settings(error) from error
        except KeyboardInterrupt:
            raise SystemExit(ExitCode.INTERRUPTED) from None


def _from_entry_points(name: str) -> click.Command | None:
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS, name=name):
        command = entry.load()
        if not isinstance(command, click.Command):
            raise click.ClickException(f"the plug-in command {name!r} ({entry.value}) is not a click command")
        return command
    return None


def _missing(error: ModuleNotFoundError, name: str) -> Exception:
    """Turn a missing dependency into one line with the remedy; a missing module of ours is a bug and stays one."""
    package = (error.name or "").partition(".")[0]
    entry = COMMANDS.get(name)
    if package.startswith("insitu") or not package or entry is None:
        return error
    extra = OWN_EXTRAS.get(package, entry.extra)
    remedy = f"pip install 'insitu[{extra}]'" if extra else "pip install --force-reinstall insitu"
    return click.ClickException(f"`insitu {name}` needs the package {package}, which is not installed: {remedy}")


def _of_system(error: OSError) -> str:
    """Return what the system refused in the middle of a command, as one line."""
    reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
    what = f"{error.filename}: {reason}" if error.filename else reason
    if error.errno is None:  # a library's word, not the system's
        return what
    return f"{what}; see that it is there, that it is yours, and that its disk has room"


def _of_settings(error: ValueError) -> Exception:
    """Turn a setting, or a credential, that cannot be used into its one line; another error is a bug and stays one."""
    from insitu.config import ConfigError
    from insitu.config_show import BadConfig
    from insitu.credentials import CredentialError

    return BadConfig(str(error)) if isinstance(error, ConfigError | CredentialError) else error


def command_name() -> str:
    """Return what a person types for this command: `insitu` where their path has it, else what this process was."""
    import shutil

    called = sys.argv[0]
    if shutil.which("insitu"):
        return "insitu"
    return called if called.rpartition("/")[2] == "insitu" else "python -m insitu"


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from insitu.identity import package_version

        click.echo(f"insitu {package_version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 problems found, 4 unreachable, 5 partial data or too noisy.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print it.")
@click.pass_context
def insitu(ctx: click.Context) -> None:
    """See inside a model while it serves: which pipeline stage stalls and why, which rank and layer fails first.

    \b
    insitu demo                      # everything at once, on this machine
    insitu stalls ./insitu-store     # what a store says
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. Raises SystemExit with an `ExitCode`."""
    try:
        with ending_at_once():
            insitu.main(args=None if args is None else list(args), prog_name="insitu")
    finally:
        if args is None:  # the process ends: a signal now would only tear up its last steps
            signal.signal(signal.SIGINT, signal.SIG_IGN)
