"""``pgkeep show``: one backup for people, and the stock commands that check and restore it."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgkeep.cli import elsewhere, render
from pgkeep.cli.context import Context, common_options, pass_context
from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.errors import NotFoundError

if TYPE_CHECKING:
    from pgkeep.domain.catalog import SealedBackup
    from pgkeep.domain.manifest import DatabaseFacts, Manifest
    from pgkeep.restore.copies import Copy

TABLES_SHOWN = 20
_NEW_DATABASE = "restored"
# Roles and a database may have been dumped in the same second: their files then have the same name.
_ROLES_DIRECTORY = "roles"
# Since the releases of 2025-08-14 (CVE-2025-8714) plain dumps begin with \restrict, which older psqls don't know.
_FIRST_RESTRICTED_MINOR = {13: 22, 14: 19, 15: 14, 16: 10, 17: 6}
_PSQL_THAT_READS_IT = "13.22, 14.19, 15.14, 16.10, 17.6 or 18"


@dataclasses.dataclass(frozen=True, slots=True)
class Outside:
    """A copy at a destination: as it was named, how that calls itself, and the roles that were dumped with it."""

    source: str
    label: str
    copy: Copy
    roles: Copy | None


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A backup: where its dump lies (or will, once it is fetched), what its manifest says, and its place in the vault
    or at a destination if it is there."""

    path: Path
    manifest: Manifest
    backup: SealedBackup | None
    outside: Outside | None = None

    @property
    def protection_in_force(self) -> bool | None:
        """None: not looked at, because the file lies elsewhere or a part of it is missing."""
        if self.backup is None or self.outside is not None or self.backup.state == "incomplete":
            return None
        return self.backup.state != "unprotected"

    @property
    def ratio(self) -> float | None:
        """Compressed bytes for each byte of SQL and rows."""
        return self.manifest.size_bytes / self.manifest.raw_bytes if self.manifest.raw_bytes else None


@dataclasses.dataclass(frozen=True, slots=True)
class StockCommand:
    """A line for a shell, and what it does."""

    purpose: str
    command: str


@click.command()
@click.argument("reference", metavar="ID|latest|PATH", default="latest")
@click.option("--all-tables", is_flag=True, help=f"Every table, not only the {TABLES_SHOWN} largest.")
@click.option("--database", metavar="NAME", help="Whose latest, where the vault holds several.")
@elsewhere.FROM
@common_options
@pass_context
def command(context: Context, reference: str, all_tables: bool, database: str | None, source: str | None) -> None:
    """Show everything about one backup (default: the latest), and the stock commands that check and restore it.

    \b
    Examples:
      pgkeep show
      pgkeep show 20260131T00 --all-tables
      pgkeep show latest --json | jq -r '.commands[].command'
      pgkeep show latest --from s3://backups/db1

    Only the manifest is read: `pgkeep verify` reads the dump. Exits with 7 if the backup is not whole or not
    protected as it was.
    """
    found = find(context, reference, database) if source is None else _find_copy(context, source, reference, database)
    commands = list(_stock_commands(context, found))
    if context.json:
        render.print_json(_document(context, found, commands))
    else:
        _print_facts(found)
        _print_tables(found.manifest, None if all_tables else TABLES_SHOWN)
        _print_commands(found, commands)
    problems = found.backup.problems if found.backup else ()
    for problem in problems:
        click.echo(f"pgkeep: warning: {render.printable(problem)}", err=True)
    if problems:
        raise click.exceptions.Exit(7)


def find(context: Context, reference: str, database: str | None) -> Found:
    """The backup that a person means, with its manifest. Raises ``NotFoundError``, ``UsageError``, ``FormatError``."""
    path, backup = context.services.locate(reference, database)
    path = path.absolute()
    backup = backup or _in_vault(context, path)
    if backup is not None:
        return Found(path, backup.manifest, backup)
    sidecar = path.with_name(path.name + names.MANIFEST_SUFFIX)
    if not sidecar.is_file():
        raise NotFoundError(
            f"{path} has no {sidecar.name} beside it, which describes it",
            "copy it too; `pgkeep verify` and `pgkeep restore` read the dump without it",
        )
    return Found(path, manifests.decode(sidecar.read_bytes()), None)


def _find_copy(context: Context, source: str, reference: str, database: str | None) -> Found:
    """As :func:`find`, at a destination; its day's roles are looked for beside it."""
    from pgkeep.restore import copies

    destination = elsewhere.destination(context, source)
    with render.progress(quiet=True) as progress, destination.opened(to_read=True) as place:
        copy, defects = copies.find(place, reference, database, progress)
        elsewhere.warn((*place.warnings, *defects))
        manifest = copy.backup.manifest
        day = copy.path.split("/")[1]
        beside = copies.read_copies(place, progress, [f"{names.GLOBALS_DIRECTORY}/{day}"]).found
    roles = _nearest_roles([each.backup for each in beside if each.is_first], manifest)
    nearest = next((each for each in beside if each.backup is roles), None)
    return Found(Path(manifest.filename), manifest, copy.backup, Outside(source, destination.label, copy, nearest))


def _in_vault(context: Context, path: Path) -> SealedBackup | None:
    """The sealed backup, where the path leads into the vault."""
    services = context.services
    if not services.layout.exists or not path.resolve().is_relative_to(services.layout.active.resolve()):
        return None
    inside = str(path.resolve().relative_to(services.layout.active.resolve()))
    return next((each for each in services.catalog().backups if each.path_in_vault == inside), None)


def _document(context: Context, found: Found, commands: list[StockCommand]) -> dict[str, Any]:
    manifest = found.manifest
    active = context.services.layout.active
    if found.outside is not None:
        summary = elsewhere.copy_object(found.outside.copy, found.outside.label)
    else:
        summary = render.backup_object(found.backup, active) if found.backup else {"path": str(found.path.absolute())}
    return {
        **summary,
        "protection_in_force": found.protection_in_force,
        "ratio": found.ratio,
        "manifest": manifest,
        "commands": commands,
        "command_notes": list(_notes(manifest)),
    }


def _print_facts(found: Found) -> None:
    for name, value in _facts(found):
        click.echo(f"{name:<12}{render.printable(value)}")


def _facts(found: Found) -> Iterator[tuple[str, str]]:
    manifest = found.manifest
    yield "id", manifest.id
    yield "database", manifest.database if manifest.kind == "database" else "(roles and tablespaces)"
    yield "tier", manifest.type.value
    yield "file", _place(found)
    yield "sha256", manifest.sha256
    yield "dumped", f"{render.moment(manifest.created_at)}, in {manifest.dump_seconds:.1f} s"
    yield "sealed", render.moment(manifest.sealed_at)
    yield "kept until", render.moment(manifest.retain_until)
    if found.outside is None:
        yield "protection", f"{manifest.protection}, {_IN_FORCE[found.protection_in_force]}"
    if found.backup is not None:
        yield "state", found.backup.state if found.outside is None else elsewhere.state(found.outside.copy)
    ratio = f" ({found.ratio:.1%})" if found.ratio else ""
    yield "size", f"{render.size(manifest.size_bytes)} of {render.size(manifest.raw_bytes)}{ratio}"
    if manifest.kind == "database":
        yield "content", f"{len(manifest.tables)} tables, {manifest.rows} rows, {manifest.large_objects} large objects"
    pgkeep = f"pgkeep {manifest.pgkeep_version}"
    yield "versions", f"server {manifest.server_version}, pg_dump {manifest.dump_version}, {pgkeep}"
    yield "cluster", manifest.system_identifier
    if manifest.facts is not None:
        yield "made with", _described(manifest.facts)
    yield from (("setting", f"{f'{role}: ' if role else ''}{name} = {value}") for role, name, value in _settings(found))
    if manifest.recipients:
        yield "encrypted", ", ".join(manifest.recipients)
    yield from (("finding", finding) for finding in manifest.findings)
    yield from (("note", note) for note in manifest.notes)


def _place(found: Found) -> str:
    outside = found.outside
    return str(found.path) if outside is None else elsewhere.place_of(outside.label, outside.copy)


_IN_FORCE = {True: "in force", False: "NO LONGER in force", None: "as it was when sealed (not looked at)"}


def _settings(found: Found) -> tuple[tuple[str, str, str], ...]:
    return found.manifest.facts.settings if found.manifest.facts else ()


def _described(facts: DatabaseFacts) -> str:
    text = f"{facts.encoding}, collation {facts.collate}, character type {facts.ctype}, {facts.locale_provider}"
    extensions = ", ".join(f"{name} {version}" for name, version in facts.extensions)
    return f"{text}{f' {facts.icu_locale}' if facts.icu_locale else ''}; extensions: {extensions or 'none'}"


def _print_tables(manifest: Manifest, limit: int | None) -> None:
    tables = sorted(manifest.tables, key=lambda table: (-table.raw_bytes, table.schema, table.name))
    rows = [
        (f"{each.schema}.{each.name}", str(each.rows), render.size(each.raw_bytes), render.size(each.compressed_bytes))
        for each in tables[:limit]
    ]
    if rows:
        click.echo()
        render.print_table(("TABLE", "ROWS", "RAW", "COMPRESSED"), rows, frozenset({1, 2, 3}))
    if len(rows) < len(tables):
        click.echo(f"and {len(tables) - len(rows)} smaller ones (--all-tables)")


def _print_commands(found: Found, commands: list[StockCommand]) -> None:
    for each in commands:
        click.echo(f"\n# {each.purpose}\n{each.command}")
    for note in _notes(found.manifest):
        click.echo(f"\nnote: {render.printable(note)}")


def _stock_commands(context: Context, found: Found) -> Iterator[StockCommand]:
    """In the order in which they are to be run. All can be pasted into bash as they are."""
    path, manifest = found.path, found.manifest
    checksum = path.name + names.CHECKSUM_SUFFIX
    if found.outside is not None:
        yield StockCommand("bring it here", _fetch_command(context, found.outside, manifest))
    there = "" if found.outside is not None else f"cd {quoted(str(path.parent))} && "
    yield StockCommand("check the file", f"{there}sha256sum -c {quoted(checksum)}")
    if manifest.kind == "globals":
        # Roles that are there already are errors that mean nothing.
        yield StockCommand("restore roles and tablespaces", f"gunzip -c {quoted(str(path))} | psql -X -d postgres")
        return
    roles = _globals_beside(context, found)
    if roles is not None:
        if found.outside is not None and found.outside.roles is not None:
            roles_manifest = found.outside.roles.backup.manifest
            fetch_roles = _fetch_command(context, found.outside, roles_manifest, _ROLES_DIRECTORY)
            yield StockCommand("bring the roles here", fetch_roles)
        roles_command = f"gunzip -c {quoted(str(roles))} | psql -X -d postgres"
        yield StockCommand("on a new server: roles and tablespaces first", roles_command)
    if manifest.facts is not None:
        yield StockCommand("make an equal, empty database", createdb_command(manifest.facts, manifest.server_version))
    load = f"gunzip -c {quoted(str(path))} | psql -X -v ON_ERROR_STOP=1 -d {_NEW_DATABASE}"
    yield StockCommand("restore into it with stock tools", load)
    yield StockCommand("or, in parallel and with every row counted", _restore_command(context, found))


def createdb_command(facts: DatabaseFacts, server_version: str) -> str:
    """``createdb`` with the recorded encoding and locale; template0, because only it takes any of them."""
    options = [("template", "template0"), ("encoding", facts.encoding)]
    options += [("lc-collate", facts.collate), ("lc-ctype", facts.ctype)]
    if _version(server_version)[0] >= 15:
        options.append(("locale-provider", facts.locale_provider))
    if facts.icu_locale is not None:
        options.append(("builtin-locale" if facts.locale_provider == "builtin" else "icu-locale", facts.icu_locale))
    if facts.icu_rules is not None:
        options.append(("icu-rules", facts.icu_rules))
    return " ".join(["createdb", *(f"--{name}={quoted(value)}" for name, value in options), _NEW_DATABASE])


def _restore_command(context: Context, found: Found) -> str:
    target = f"--to dbname={_NEW_DATABASE} --create"
    if found.outside is not None:
        return f"pgkeep restore {quoted(found.manifest.id)}{_from(context, found.outside)} {target}"
    if found.backup is None:
        return f"pgkeep restore {quoted(str(found.path))} {target}"
    given = context.loaded.origins["root"] != "default"
    root = f" --root {quoted(str(context.services.layout.root.absolute()))}" if given else ""
    return f"pgkeep restore{root} {quoted(found.manifest.id)} {target}"


def _fetch_command(context: Context, outside: Outside, manifest: Manifest, directory: str = ".") -> str:
    return f"pgkeep fetch {quoted(manifest.id)}{_from(context, outside)} --to {directory}"


def _from(context: Context, outside: Outside) -> str:
    file = f" --config {quoted(str(context.file.absolute()))}" if context.file is not None else ""
    return f"{file} --from {quoted(outside.source)}"


def _globals_beside(context: Context, found: Found) -> Path | None:
    """The roles that were dumped closest in time on the same cluster: where they lie, or will once they are fetched."""
    if found.outside is not None:
        roles = found.outside.roles
        return None if roles is None else Path(_ROLES_DIRECTORY, roles.backup.manifest.filename)
    if not context.services.layout.exists:
        return None
    nearest = _nearest_roles(context.services.catalog().backups, found.manifest)
    return None if nearest is None else (context.services.layout.active / nearest.path_in_vault).absolute()


def _nearest_roles(backups: Iterable[SealedBackup], manifest: Manifest) -> SealedBackup | None:
    fitting = [
        backup
        for backup in backups
        if backup.manifest.kind == "globals" and backup.manifest.system_identifier == manifest.system_identifier
    ]
    return min(fitting, key=lambda backup: abs(backup.manifest.created_at - manifest.created_at), default=None)


def _notes(manifest: Manifest) -> Iterator[str]:
    if writes_restrict(manifest.dump_version):
        yield f"psql must be {_PSQL_THAT_READS_IT}, or newer: an older one stops at the dump's \\restrict"
    if manifest.kind == "database" and manifest.facts is not None and manifest.facts.settings:
        yield "the settings above (ALTER DATABASE … SET) are not in the dump: `pgkeep restore --create` sets them"


def writes_restrict(dump_version: str) -> bool:
    r"""Whether this version's pg_dump puts ``\restrict`` into plain dumps."""
    major, minor = _version(dump_version)
    return major >= 18 or minor >= _FIRST_RESTRICTED_MINOR.get(major, minor + 1)


def _version(text: str) -> tuple[int, int]:
    """Major and minor of ``15.20``; a beta (``18beta1``) has the minor 0."""
    major, _, minor = text.partition(".")
    digits = "".join(char for char in major[:2] if char.isdigit())
    return int(digits or 0), int(minor) if minor.isdigit() else 0


def quoted(text: str) -> str:
    """For a shell: plain where it can be, else as bash's ``$'…'``, so that nothing of it steers the terminal."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(text)) + "'"
