"""``pgkeep demo``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgkeep.cli import render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.domain import names
from pgkeep.errors import IntegrityError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table

    from pgkeep.demo.run import Outcome, Step

_LOG_WIDTH = 110
_INDENT = 4
_RESULTS = {
    "start": "",
    "fill": "{tables} tables and materialized views",
    "backup": "{raw_bytes} of data sealed in {size_bytes}",
    "attack": "{refused} of {attacks} refused",
    "verify": "{size_bytes} read back and checked",
    "restore": "{tables} tables, {rows} rows, counted",
    "compare": "{objects} objects, digests of all rows",
    "restore_table": "{tables} partitions, {rows} rows, equal",
}


@click.command()
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Leave the vault in DIR, which must be new or empty, to look at it.",
)
@common_options
@pass_context
def command(context: Context, keep: Path | None) -> int:
    """Show all of it: a backup is made, attacked, verified and restored, on a PostgreSQL server of its own.

    Needs no configuration and touches no database of yours: the server listens on a private socket only, and is
    gone afterwards with everything else. As root the sealed files are immutable; otherwise they are read-only.

    \b
    Examples:
      pgkeep demo
      sudo pgkeep demo --keep /var/tmp/vault
      pgkeep demo --json | jq .seconds

    Exits with 7 if an attack succeeds, the verification fails, or the restored database differs.
    """
    from pgkeep.demo.run import run

    narrator = _Narrator()
    try:
        outcome = run(keep, narrator)
    finally:
        narrator.close()
    narrator.conclude(outcome)
    if context.json:
        render.print_json(_object(outcome))
    return 0 if outcome.ok else IntegrityError.exit_code


class _Narrator:
    """Tells the story on stderr: in colour with a spinner on a terminal, in plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        width = None if sys.stderr.isatty() else _LOG_WIDTH
        self._console: Console = Console(stderr=True, highlight=False, emoji=False, width=width)
        self._status: Status | None = None
        self._title = ""
        encoding = (self._console.encoding or "").lower()
        self._good, self._bad = ("✓", "✗") if encoding.startswith("utf") else ("ok:", "FAILED:")

    def opened(self, outcome: Outcome) -> None:
        server, place = outcome.server, outcome.place
        self._say()
        self._say("pgkeep demo", "bold")
        self._say("A database is backed up, attacked, restored and compared. Nothing is staged.", "dim")
        self._say()
        self._say(f"server   PostgreSQL {server.version} in {server.directory} ({server.source})")
        self._say(f"vault    {place.root} on {place.filesystem}")
        self._say()

    def begins(self, title: str) -> None:
        self._title = title
        if self._console.is_terminal:
            self.close()
            self._status = self._console.status(title)
            self._status.start()

    def ends(self, step: Step, outcome: Outcome) -> None:
        self.close()
        mark, style = (self._bad, "bold red") if outcome.problems else (self._good, "bold green")
        self._say_marked(mark, style, step.title)
        if step.name == "start" and outcome.copied_reason:
            self._say(f"  with a copy of its programs: {outcome.copied_reason}", "dim")
        elif step.name == "backup":
            self._show_files(outcome)
        elif step.name == "attack":
            self._show_attacks(outcome)

    def leaves(self) -> None:
        self.begins("Clear up")

    def step(self, name: str) -> None:
        pass

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        if self._status is not None:
            of = f" of about {render.size(total_bytes)}" if total_bytes else ""
            self._status.update(f"{self._title}: {render.size(done_bytes)}{of}")

    def note(self, text: str) -> None:
        if self._status is not None:
            self._status.update(f"{self._title}: {render.printable(text)}")

    def warn(self, text: str) -> None:
        self._say(f"  {text}", "yellow")

    def close(self) -> None:
        """Take the spinner off the screen."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def conclude(self, outcome: Outcome) -> None:
        """The table of what happened, the verdict in one sentence, and where the vault is if it was kept."""
        self.close()
        self._say()
        table = _table(("what happened", "", "seconds"), _summary(outcome), right=(2,))
        table.add_row("Total", "", f"{outcome.seconds['total']:.1f}", style="bold")
        self._print(table)
        self._say()
        for problem in outcome.problems:
            self._say(f"{self._bad} {render.printable(problem)}", "red")
        self._say(_verdict(outcome), "bold green" if outcome.ok else "bold red")
        if outcome.kept is not None:
            self._show_kept(outcome, outcome.kept)
        else:
            self._say("Server, databases and vault are gone again.", "dim")
        self._say()

    def _show_files(self, outcome: Outcome) -> None:
        self._print(_table(("sealed, in active/", "size", "mode", "flag"), _files(outcome), right=(1,)))
        self._say()

    def _show_attacks(self, outcome: Outcome) -> None:
        assert outcome.onslaught is not None, "the step made it"
        self._print(_table(*_matrix(outcome)))
        self._say(f"    The attacks were made as {outcome.onslaught.by}.", "dim")
        for line in _protection(outcome).splitlines():
            self._say(f"    {line}", "" if outcome.place.protection == "chattr" else "yellow")
        self._say()

    def _show_kept(self, outcome: Outcome, kept: Path) -> None:
        where = shlex.quote(str(kept))
        immutable = outcome.place.protection == "chattr"
        self._say()
        self._say(f"The vault stays in {kept}. To look at it:")
        self._say(f"    pgkeep --root {where} list")
        self._say(f"    pgkeep --root {where} verify latest")
        self._say(f"    {'lsattr' if immutable else 'ls -l'} -R {where}/active")
        self._say("To remove it:")
        self._say(f"    {'chattr -R -i -a' if immutable else 'chmod -R u+w'} {where} && rm -r {where}")

    def _say_marked(self, mark: str, style: str, title: str) -> None:
        from rich.text import Text

        self._console.print(Text.assemble((mark, style), " ", (title, "bold")), soft_wrap=True)

    def _say(self, text: str = "", style: str = "") -> None:
        from rich.text import Text

        self._console.print(Text(text, style=style), soft_wrap=True)

    def _print(self, table: Table) -> None:
        from rich.padding import Padding

        self._console.print(Padding(table, (0, 0, 0, _INDENT), expand=False))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """No frame; what failed stands out."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number in right else "left", overflow="fold")
    styles = {"refused": "green", "NOT REFUSED": "bold red", "immutable": "green"}
    for row in rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    return table


def _files(outcome: Outcome) -> list[tuple[str, str, str, str]]:
    """Each directory, and what lies in it, indented."""
    rows = []
    for each in outcome.files:
        path = Path(each.path)
        is_directory = each.path.endswith("/")
        name, size = (f"{path.name}/", "") if is_directory else (f"  {path.name}", render.size(each.size_bytes))
        rows.append((name, size, each.mode, each.flag or "-"))
    return rows


def _matrix(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """An attack a row, a target a column, and what the kernel said."""
    assert outcome.onslaught is not None, "asked for after the attacks"
    made = outcome.onslaught.attacks
    targets = list(dict.fromkeys(attack.target for attack in made))
    rows = []
    for action in dict.fromkeys(attack.action for attack in made):
        found = {attack.target: attack for attack in made if attack.action == action}
        verdicts = {target: "refused" if attack.refused else "NOT REFUSED" for target, attack in found.items()}
        words = "; ".join(dict.fromkeys(attack.words for attack in found.values()))
        rows.append([action, *(verdicts.get(target, "") for target in targets), words])
    return ["attack", *map(_kind, targets), "in the kernel's words"], rows


def _kind(target: str) -> str:
    """The dump, a sidecar by what it is, or the directory."""
    name = Path(target).name
    kinds = {names.MANIFEST_SUFFIX: "manifest", names.CHECKSUM_SUFFIX: "checksum", names.DUMP_SUFFIX: "dump"}
    return next((kind for suffix, kind in kinds.items() if name.endswith(suffix)), f"{name}/")


def _protection(outcome: Outcome) -> str:
    """What the sealed files have, and who could still take it off. Never more than is true."""
    if outcome.place.protection == "chattr":
        return (
            "Protection: chattr. The files are immutable: not even root can change them,\n"
            "unless it takes the flag off first, on purpose (chattr -i)."
        )
    return (
        "Protection: mode. The files are read-only, NOT immutable: their owner (after a\n"
        f"chmod) and root could still change and remove them.{_way_to_more(outcome)}"
    )


def _way_to_more(outcome: Outcome) -> str:
    """Only what would help: a filesystem without the flag stays one for root too."""
    if not outcome.place.capability_missing:
        return ""
    if os.geteuid() == 0:
        return "\nFor immutable ones, this root needs a capability: --cap-add LINUX_IMMUTABLE."
    return "\nRun the demo as root to see immutable ones."


def _summary(outcome: Outcome) -> list[tuple[str, str, str]]:
    return [(step.title, _result(step), f"{step.seconds:.1f}") for step in outcome.steps]


def _result(step: Step) -> str:
    shown = {
        name: render.size(count) if name.endswith("_bytes") else f"{count:,}" for name, count in step.counts.items()
    }
    return _RESULTS[step.name].format(**shown)


def _verdict(outcome: Outcome) -> str:
    if not outcome.ok or outcome.onslaught is None or outcome.backup is None:
        return f"The demo FAILED at: {outcome.steps[-1].title}."
    how = "immutable" if outcome.place.protection == "chattr" else "read-only"
    return (
        f"{outcome.backup.manifest.rows:,} rows were sealed in {how} files, {len(outcome.onslaught.attacks)} attacks"
        f" as {outcome.onslaught.by} were refused, and the restored database equals the original."
    )


def _object(outcome: Outcome) -> dict[str, Any]:
    onslaught = outcome.onslaught
    return {
        "ok": outcome.ok,
        "problems": outcome.problems,
        "protection": outcome.place.protection,
        "protection_why": outcome.place.why,
        "server": {
            "version": outcome.server.version,
            "source": outcome.server.source,
            "directory": str(outcome.server.directory),
        },
        "vault": {"path": str(outcome.place.root), "filesystem": outcome.place.filesystem, "kept": bool(outcome.kept)},
        "backups": [render.backup_object(backup, outcome.place.root / "active") for backup in outcome.sealed],
        "files": outcome.files,
        "attacked_as": onslaught.by if onslaught else None,
        "attacks": onslaught.attacks if onslaught else [],
        "differences": outcome.differences,
        "counts": {step.name: step.counts for step in outcome.steps if step.counts},
        "duration_seconds": outcome.seconds["total"],
        "seconds": outcome.seconds,
    }
