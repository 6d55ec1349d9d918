"""The configuration: TOML file, environment over it, options over both, to the validated structs of ``settings.py``.

:data:`SETTINGS` is the table of all keys, variables and ranges, but for the destinations', which are in
``destinations.py``; ``docs/configuration.md`` shows both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pgkeep.config import destinations
from pgkeep.configuration_sources import (
    MASK,
    Given,
    InvalidValueError,
    RefusedSettingError,
    Rule,
    Secret,
    Setting,
    Source,
    as_path,
    boolean,
    choice,
    cron,
    environment_source,
    file_source,
    flatten,
    integer,
    libpq_variables,
    names,
    option_source,
    optional,
    path,
    read_secret,
    read_toml,
    secret,
    shown,
    size,
    text,
    timezone,
)
from pgkeep.domain.names import Tier
from pgkeep.errors import ConfigurationError
from pgkeep.settings import (
    Agent,
    Database,
    Dump,
    Extractor,
    Log,
    Retention,
    Schedule,
    Settings,
    Storage,
    Vault,
)

__all__ = [
    "MASK",
    "Agent",
    "Database",
    "Dump",
    "Effective",
    "Extractor",
    "Loaded",
    "Log",
    "Retention",
    "Row",
    "Schedule",
    "Secret",
    "Settings",
    "Storage",
    "Vault",
    "describe",
    "effective",
    "load",
]

DEFAULT_FILE = Path("/etc/pgkeep/pgkeep.toml")
FILE_VARIABLE = "PGKEEP_CONFIG"
# Read where programs are looked for, by adapters.pgbinaries: of the environment only, as PATH is.
PROGRAMS_VARIABLE = "PGKEEP_PG_BIN"


_DAYS = optional("forever", integer(1, 36500))
_CRON = optional("off", cron())


def _kept(tier: Tier, *more: str) -> Setting:
    variable = f"BACKUP_RETENTION_{tier.name}_DAYS"
    return Setting(
        f"retention.{tier.value}_days", (variable, *more), _DAYS, f"Days that {tier.value} backups are kept."
    )


def _due(tier: Tier, variable: str) -> Setting:
    return Setting(f"schedule.{tier.value}", (variable,), _CRON, f"When {tier.value} backups are due.")


SETTINGS: tuple[Setting, ...] = (
    Setting("root", ("PGKEEP_ROOT",), path(), "Directory of `staging/`, `active/`, `logs/`; option `--root`."),
    Setting("database.host", ("DB_HOST",), text(), "Host, or the directory of the server's socket."),
    Setting("database.port", ("DB_PORT",), integer(1, 65535), "Port."),
    Setting("database.name", ("DB_NAME",), text(), "The one database to back up."),
    Setting("database.names", ("DB_NAMES",), names(), "Several databases to back up."),
    Setting("database.all_databases", ("DB_ALL_DATABASES",), boolean(), "Back up every database of the server."),
    Setting("database.user", ("DB_USER",), text(), "Role to connect as."),
    Setting("database.password", ("DB_PASSWORD",), secret(), "That role's password.", is_secret=True),
    Setting("database.passfile", ("DB_PASSFILE",), path(), "A libpq passfile, mode 0600."),
    Setting("database.service", ("DB_SERVICE",), text(), "A section of libpq's service file."),
    Setting(
        "database.sslmode",
        ("DB_SSLMODE",),
        choice("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
        "libpq's sslmode; only `verify-full` knows whom it talks to.",
    ),
    Setting("database.sslrootcert", ("DB_SSLROOTCERT",), text(), "File of trusted certificates, or `system`."),
    Setting(
        "database.connect_timeout_seconds",
        ("DB_CONNECT_TIMEOUT", "PGCONNECT_TIMEOUT"),
        integer(0, 3600),
        "Wait for a connection; 0 waits without end.",
    ),
    Setting(
        "database.globals",
        ("BACKUP_GLOBALS",),
        choice("auto", "off"),
        "Roles and tablespaces; `auto` leaves passwords out where they may not be read.",
    ),
    Setting(
        "dump.jobs", ("BACKUP_JOBS",), optional("auto", integer(1, 64)), "Tables dumped and restored at the same time."
    ),
    Setting(
        "dump.spool_compression",
        ("BACKUP_SPOOL_COMPRESSION",),
        choice("auto", "never", "always"),
        "Compress the dump while it waits in staging; `auto` decides by the free space.",
    ),
    Setting(
        "dump.lock_timeout_seconds", ("BACKUP_LOCK_TIMEOUT",), integer(1, 86400), "How long pg_dump waits for locks."
    ),
    Setting("dump.retries", ("BACKUP_RETRIES",), integer(0, 10), "Further tries after a failure that may pass."),
    Setting("dump.verify_after", ("BACKUP_VERIFY",), boolean(), "Read the sealed backup back in full."),
    _kept(Tier.HOURLY),
    _kept(Tier.DAILY, "BACKUP_RETENTION_DAYS"),
    _kept(Tier.WEEKLY),
    _kept(Tier.MONTHLY),
    _kept(Tier.YEARLY),
    _kept(Tier.MANUAL),
    Setting(
        "retention.keep_minimum",
        ("BACKUP_RETENTION_KEEP_MINIMUM",),
        integer(1, 1000),
        "Good backups that stay however old they are.",
    ),
    Setting(
        "storage.protection",
        ("PGKEEP_PROTECTION",),
        choice("auto", "chattr", "mode", "none"),
        "Protection to insist on; `auto` takes the best that works.",
    ),
    Setting("storage.reserve_bytes", ("PGKEEP_RESERVE",), size(0, 2**50), "Free space that a backup must leave."),
    Setting(
        "storage.dump_limit_bytes",
        ("PGKEEP_DUMP_LIMIT",),
        optional("none", size(1, 2**60)),
        "The largest dump that the vault takes.",
    ),
    _due(Tier.HOURLY, "BACKUP_SCHEDULE"),
    _due(Tier.DAILY, "BACKUP_SCHEDULE_DAILY"),
    _due(Tier.WEEKLY, "BACKUP_SCHEDULE_WEEKLY"),
    _due(Tier.MONTHLY, "BACKUP_SCHEDULE_MONTHLY"),
    _due(Tier.YEARLY, "BACKUP_SCHEDULE_YEARLY"),
    Setting("schedule.timezone", ("BACKUP_TIMEZONE",), timezone(), "Time zone of the schedule."),
    Setting(
        "agent.vault_timeout_seconds",
        ("BACKUP_VAULT_TIMEOUT",),
        integer(1, 86400),
        "How long the agent waits for the vault to seal a dump.",
    ),
    Setting(
        "vault.user", ("PGKEEP_VAULT_USER",), text(), "Whom pgkeep becomes before it touches the vault, if it is root."
    ),
    Setting(
        "vault.subjects",
        ("PGKEEP_VAULT_SUBJECTS",),
        integer(1, 100000),
        "Different databases (and servers' globals) that the vault takes.",
    ),
    Setting(
        "vault.required_destinations",
        ("PGKEEP_REQUIRED_DESTINATIONS",),
        names(),
        "Destinations that must have the newest backups before those may expire.",
    ),
    Setting(
        "extractor.check_interval_seconds",
        ("CHECK_INTERVAL",),
        integer(1, 86400),
        "Pause between two looks for backups to copy.",
    ),
    Setting("log.format", ("PGKEEP_LOG_FORMAT",), choice("text", "json"), "How services write their log to stdout."),
)

_ROWS = (*SETTINGS, *destinations.known_rows())
_KEYS = {key for row in SETTINGS for key in row.all_keys()}
_KNOWN_KEYS = {key for row in _ROWS for key in row.all_keys()}
_TABLES = (*dict.fromkeys(row.key.partition(".")[0] for row in SETTINGS if "." in row.key), destinations.TABLE)
_VARIABLES = {FILE_VARIABLE, PROGRAMS_VARIABLE} | {variable for row in _ROWS for variable in row.all_variables()}
_NAMESPACES = ("PGKEEP_", "BACKUP_RETENTION_", "S3_OBJECT_LOCK_")
# Kubernetes sets these in every container beside a service whose name begins with pgkeep.
_SERVICE_LINK = re.compile(
    r"PGKEEP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)", re.ASCII
)
_SELECTION = ("database.name", "database.names", "database.all_databases")


@dataclass(frozen=True)
class Loaded:
    """The settings; each key's origin ("default", "file …", "environment DB_HOST", "option --root");
    libpq's own variables that are in force, secrets masked; and the directory that PGKEEP_PG_BIN names."""

    settings: Settings
    origins: dict[str, str]
    libpq: dict[str, str]
    programs: str | None = None


class Row(NamedTuple):
    """One setting for people, all in words; ``key`` and ``variable`` hold all that set it, with commas."""

    key: str
    variable: str
    default: str
    allowed: str
    meaning: str


class Effective(NamedTuple):
    """One setting in force. ``value`` is fit for JSON and masked; ``literal`` is it in TOML, None if there is none."""

    key: str
    value: Any
    literal: str | None
    origin: str


class _Parsed(NamedTuple):
    value: object
    origin: str
    rank: int


def load(file: Path | None, environment: Mapping[str, str], overrides: Mapping[str, object]) -> Loaded:
    """Read everything. ``overrides`` are options by TOML key, e.g. ``{"root": Path("/srv/backups")}``.

    Without ``file``, PGKEEP_CONFIG names it, or the default file is read if there is one.
    Raises ``ConfigurationError`` that lists all that is wrong, and ``KeyError`` for an override of no setting.
    """
    if unknown := set(overrides) - _KEYS:
        raise KeyError(*unknown)
    problems: list[str] = []
    file = _file(file, environment)
    document, kinds = _document(file, problems)
    variables = environment_source(environment)
    _check_variables(variables.values, problems)
    sources = (option_source(overrides), variables, file_source(file, document))
    places = [row for name, kind in {**destinations.KIND_OF, **kinds}.items() for row in destinations.rows(name, kind)]
    parsed = _parse_all((*SETTINGS, *places), sources, problems)
    _select(parsed, problems)
    settings = _build(parsed, kinds, problems)
    if problems:
        raise _error(problems)
    origins = {row.key: parsed[row.key].origin if row.key in parsed else "default" for row in (*SETTINGS, *places)}
    origins |= {f"{destinations.TABLE}.{name}.kind": f"file {file}" for name in kinds}
    in_force = {key for key, found in parsed.items() if found.value}  # `all_databases = false` picks nothing
    programs = environment.get(PROGRAMS_VARIABLE) or None
    return Loaded(settings, origins, libpq_variables(environment, in_force), programs)


def describe() -> list[Row]:
    """Every setting, in the order of the tables; of destinations those of the names that need no file."""
    defaults = {row.key: _value(Settings(), row.key) for row in SETTINGS}
    defaults |= {row.key: destinations.default(row) for row in destinations.known_rows()}
    return [
        Row(
            key=", ".join(row.all_keys()),
            variable=", ".join(row.all_variables()),
            default=_literal(row.rule, defaults[row.key]) or "",
            allowed=row.rule.allowed,
            meaning=row.meaning,
        )
        for row in _ROWS
    ]


def effective(loaded: Loaded) -> list[Effective]:
    """Every setting's value and origin, secrets masked, in the order of the tables."""
    found = [_effective(row, row.key, _value(loaded.settings, row.key), loaded) for row in SETTINGS]
    places = destinations.in_force(loaded.settings.extractor)
    return found + [_effective(row, key, value, loaded) for row, key, value in places]


def _effective(row: Setting | None, key: str, value: object, loaded: Loaded) -> Effective:
    plain = str(value) if isinstance(value, Path | Secret) else value
    literal = _literal(row.rule, value) if row is not None else json.dumps(value)
    return Effective(key, plain, literal, loaded.origins.get(key, "default"))


def _file(file: Path | None, environment: Mapping[str, str]) -> Path | None:
    if file is None and (named := environment.get(FILE_VARIABLE)):
        return Path(named)
    return file or _default_file()


def _default_file() -> Path | None:
    try:
        DEFAULT_FILE.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return DEFAULT_FILE  # reading it will say what is in the way
    return DEFAULT_FILE


def _document(file: Path | None, problems: list[str]) -> tuple[dict[str, object], dict[str, str]]:
    """A file's values by full key, and the kinds of the destinations that it has tables for."""
    if file is None:
        return {}, {}
    try:
        found = dict(flatten(read_toml(file), _TABLES))
    except ConfigurationError as error:
        problems.append(f"{error.message}; {error.hint}")
        return {}, {}
    for key, value in found.items():
        if key in _TABLES:
            problems.append(f"{key} (file {file}): must be a table: write [{key}] on a line of its own")
        elif key not in _KEYS and not key.startswith(f"{destinations.TABLE}."):
            kind = "table" if isinstance(value, dict) else "key"
            problems.append(f"{key} (file {file}): unknown {kind}{_suggestion(key, [*_TABLES, *_KNOWN_KEYS])}")
    kinds = destinations.open_tables(found, f"file {file}", _suggestion, problems)
    return found, kinds


def _check_variables(given: Mapping[str, object], problems: list[str]) -> None:
    """Only names in pgkeep's own namespaces can be called typing errors."""
    for name in sorted(set(given) - _VARIABLES):
        if name.startswith(_NAMESPACES) and not _SERVICE_LINK.fullmatch(name):
            problems.append(f"{name} (environment): unknown variable{_suggestion(name, list(_VARIABLES))}")


def _suggestion(name: str, known: Sequence[str]) -> str:
    """The nearest name, or a key of the same name in another table. The value is never shown: it may be a secret."""
    import difflib

    same = [key for key in sorted(known) if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6) or same
    return f"; did you mean {near[0]}?" if near else ""


def _parse_all(rows: Sequence[Setting], sources: Sequence[Source], problems: list[str]) -> dict[str, _Parsed]:
    found: dict[str, _Parsed] = {}
    for row in rows:
        try:
            for rank, source in enumerate(sources):
                if given := source.find(row):
                    found[row.key] = _parse(row, given, rank)
                    break
        except RefusedSettingError as error:
            problems.append(f"{row.key} {error}")
    return found


def _parse(row: Setting, given: Given, rank: int) -> _Parsed:
    """Raises ``RefusedSettingError``."""
    value, origin = given.value, given.origin
    try:
        if given.in_file:
            file = as_path(value)
            value, origin = read_secret(file), f"{origin}: {file}"
        return _Parsed(row.rule.parse(value), origin, rank)
    except ConfigurationError as error:
        raise RefusedSettingError(f"({origin}): {error.message}; {error.hint}") from None
    except InvalidValueError as error:
        reason = f" ({error})" if str(error) else ""
        what = "the value" if row.is_secret else shown(value)
        raise RefusedSettingError(f"({origin}): {what} is not allowed{reason}; allowed: {row.rule.allowed}") from None


def _select(parsed: dict[str, _Parsed], problems: list[str]) -> None:
    """The strongest source that picks databases decides alone; within one source only one way may be used."""
    picks = {key: parsed[key] for key in _SELECTION if key in parsed and parsed[key].value}
    strongest = min((pick.rank for pick in picks.values()), default=0)
    chosen = [f"{key} ({pick.origin})" for key, pick in picks.items() if pick.rank == strongest]
    if len(chosen) > 1:
        problems.append(f"{' and '.join(chosen)} exclude each other: keep one")
    for key, pick in picks.items():
        if pick.rank != strongest:
            del parsed[key]


def _error(problems: Sequence[str]) -> ConfigurationError:
    count = "a setting is wrong" if len(problems) == 1 else f"{len(problems)} settings are wrong"
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigurationError(f"{count}:{lines}", "`pgkeep config show` prints what is in force once all are mended")


def _build(parsed: Mapping[str, _Parsed], kinds: Mapping[str, str], problems: list[str]) -> Settings:
    tree: dict[str, Any] = {}
    for row in SETTINGS:
        if (found := parsed.get(row.key)) is not None:
            table, _, field = row.key.rpartition(".")
            (tree.setdefault(table, {}) if table else tree)[field] = found.value
    settings = msgspec.convert(tree, Settings)
    # After other problems, what is missing may only be what could not be read.
    if not problems:
        values = {key: found.value for key, found in parsed.items()}
        chosen = destinations.build(kinds, values, problems)
        settings = msgspec.structs.replace(settings, extractor=msgspec.structs.replace(settings.extractor, **chosen))
    return settings


def _value(settings: Settings, key: str) -> object:
    found: object = settings
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _literal(rule: Rule, value: object) -> str | None:
    """A value in TOML. JSON's strings are TOML's but for DEL, which TOML wants escaped."""
    if value is None or value == ():
        return json.dumps(rule.absent) if rule.absent else None
    if isinstance(value, Secret):
        return None
    plain = str(value) if isinstance(value, Path) else value
    return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")
