"""``pgkeep``: finds the verb, runs it, and maps what goes wrong to a message and an exit code."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from pgkeep import __version__
from pgkeep.cli.context import Context, common_options
from pgkeep.errors import PgkeepError

_VERBS = (
    "backup",
    "list",
    "show",
    "diff",
    "verify",
    "restore",
    "fetch",
    "destination",
    "audit",
    "cleanup",
    "agent",
    "vault",
    "extractor",
    "doctor",
    "audit",
    "config",
    "health",
    "uninstall",
    "demo",
)
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130


class _LazyGroup(click.Group):
    """Imports a verb's module only when that verb is asked for: ``--version`` takes 40 ms instead of 200."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = importlib.import_module(f"pgkeep.cli.{cmd_name}").command
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pgkeep")
@common_options
def cli() -> None:
    """PostgreSQL backups that nobody can alter or delete before their time, and that are known to restore.

    \b
    Start here:
      pgkeep demo                 see all of it, without a PostgreSQL of your own
      pgkeep doctor               what is missing before the first backup
      pgkeep backup daily         dump, check and seal
      pgkeep list                 what there is
      pgkeep restore latest --to 'dbname=restored' --create

    Data goes to stdout, everything for people to stderr. Exit code 0 means done and true; docs/operations.md
    lists the others.
    """


def main() -> NoReturn:
    """The console script. Never returns: exits with 0 or an error's code."""
    for number in _ENDING_SIGNALS:
        # What was ignored before stays so: nohup, and Ctrl-C for a shell's background jobs.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    context = Context()
    try:
        result = cli.main(prog_name="pgkeep", standalone_mode=False, obj=context)
        sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has left; nothing more can be said there.
        sys.stderr.close()
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        if context.debug:
            raise
        _fail(context, *_explained(error))


def _explained(error: BaseException) -> tuple[str, str, int]:
    """Message, hint and exit code."""
    match error:
        case KeyboardInterrupt() | click.Abort():
            return "interrupted", "", INTERRUPTED
        case click.ClickException():
            usage = isinstance(error, click.UsageError) and error.ctx
            return error.format_message(), f"see `{usage.command_path} --help`" if usage else "", error.exit_code
        case PgkeepError():
            return error.message, error.hint, error.exit_code
        case OSError(errno=int()):
            from pgkeep.adapters.durable import storage_error

            known = storage_error(error, str(error.filename or "a file"), "reading or writing")
            return known.message, known.hint, known.exit_code
    return f"internal error: {type(error).__name__}: {error}", "run it again with --debug and report this", 1


def _fail(context: Context, message: str, hint: str, exit_code: int) -> NoReturn:
    if context.json:
        document = {"ok": False, "error": message, "hint": hint, "exit_code": exit_code}
        click.echo(json.dumps(document))
    _say(f"pgkeep: {message}")
    if hint:
        _say(f"        {hint}")
    sys.exit(exit_code)


def _say(text: str) -> None:
    """Lines for people. A name in them may hold anything: it steers no terminal, and begins no line of its own."""
    from pgkeep.cli import render

    first, *others = text.split("\n")
    for line in (first, *(f"        {other}" for other in others)):
        click.echo(render.printable(line), err=True)


def _end(number: int, _: FrameType | None) -> NoReturn:
    """As an exception, so that children are stopped, flags restored and half-made files removed on the way out.

    That is not interrupted in its turn: only the first signal counts.
    """
    for each in _ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
