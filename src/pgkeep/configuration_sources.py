"""What a setting accepts, and the places that may give it: options, variables, a TOML file, secret files."""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pgkeep.errors import ConfigurationError

MASK = "********"
SECRET_LIMIT_BYTES = 64 * 1024
_SHOWN_CHARACTERS = 100
_CRON_FIELDS = 5

# `docker run --env-file` and quoted YAML hand a trailing "  # remark" over as part of the value.
_REMARK = re.compile(r"\s+#.*\Z", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_SIZE = re.compile(r"([0-9]{1,30})\s*([KMGT]i?B|B)?", re.IGNORECASE | re.ASCII)
_SIZE_FACTORS = {"b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("b", 1000), ("ib", 1024))
}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

# Variables that libpq reads by itself (PostgreSQL documentation, "libpq: Environment Variables") and the
# settings that take their place.
_LIBPQ_REPLACED = {
    "PGHOST": {"database.host"},
    "PGPORT": {"database.port"},
    "PGDATABASE": {"database.name", "database.names", "database.all_databases"},
    "PGUSER": {"database.user"},
    "PGPASSWORD": {"database.password"},
    "PGPASSFILE": {"database.passfile", "database.password"},
    "PGSERVICE": {"database.service"},
    "PGSSLMODE": {"database.sslmode"},
    "PGSSLROOTCERT": {"database.sslrootcert"},
}
_LIBPQ = (
    *_LIBPQ_REPLACED,
    *("PGHOSTADDR", "PGSERVICEFILE", "PGOPTIONS", "PGAPPNAME", "PGSYSCONFDIR", "PGLOCALEDIR"),
    *("PGCLIENTENCODING", "PGDATESTYLE", "PGTZ", "PGGEQO", "PGTARGETSESSIONATTRS", "PGLOADBALANCEHOSTS"),
    *("PGREQUIREAUTH", "PGCHANNELBINDING", "PGREQUIREPEER", "PGREQUIRESSL", "PGSSLNEGOTIATION", "PGSSLCOMPRESSION"),
    *("PGSSLCERT", "PGSSLKEY", "PGSSLCERTMODE", "PGSSLCRL", "PGSSLCRLDIR", "PGSSLSNI", "PGKRBSRVNAME"),
    *("PGSSLMINPROTOCOLVERSION", "PGSSLMAXPROTOCOLVERSION", "PGMINPROTOCOLVERSION", "PGMAXPROTOCOLVERSION"),
    *("PGGSSENCMODE", "PGGSSDELEGATION", "PGGSSLIB"),
)


class Secret:
    """A value that shows only in :meth:`reveal`: not in str, repr or format, and it can't be pickled or encoded."""

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def reveal(self) -> str:
        return self.__value

    def __repr__(self) -> str:
        return f"Secret('{MASK}')"

    def __str__(self) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.__value == self.__value

    def __hash__(self) -> int:
        return hash((Secret, self.__value))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret can't be pickled or copied")


class InvalidValueError(Exception):
    """A rule refuses a value. The text, which may be empty, says why; it never holds the value."""


class RefusedSettingError(Exception):
    """What is given for one setting won't do. The text is complete but for the setting's key."""


@dataclass(frozen=True)
class Rule:
    """What a setting accepts: in words, and as a function that raises ``InvalidValueError``.

    ``absent`` is the word that stands for None where None can be asked for.
    """

    allowed: str
    parse: Callable[[object], object]
    absent: str | None = None


def optional(absent: str, rule: Rule) -> Rule:
    """``rule``, or the word ``absent`` for None."""

    def parse(value: object) -> object:
        return None if _trimmed(value) == absent else rule.parse(value)

    return Rule(f"{rule.allowed}, or `{absent}`", parse, absent)


def integer(low: int, high: int) -> Rule:
    def parse(value: object) -> int:
        value = _trimmed(value)
        if isinstance(value, str) and _INTEGER.fullmatch(value):
            value = int(value)
        return _within(value, low, high)

    return Rule(f"{low} to {high}", parse)


def size(low: int, high: int) -> Rule:
    """Bytes, as a number or with a unit: 512MiB, 2 GB."""

    def parse(value: object) -> int:
        value = _trimmed(value)
        if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
            value = int(match[1]) * _SIZE_FACTORS[(match[2] or "B").lower()]
        return _within(value, low, high)

    units = "bytes, or with a unit: kB, MB, GB, TB (thousands), KiB, MiB, GiB, TiB (1024s)"
    return Rule(f"{low} to {high} {units}", parse)


def choice(*words: str) -> Rule:
    def parse(value: object) -> str:
        value = _trimmed(value)
        if not isinstance(value, str) or value not in words:
            raise InvalidValueError
        return value

    return Rule(", ".join(f"`{word}`" for word in words), parse)


def boolean() -> Rule:
    def parse(value: object) -> bool:
        value = _trimmed(value)
        if isinstance(value, bool):
            return value
        if not isinstance(value, str) or value.lower() not in _BOOLEANS:
            raise InvalidValueError
        return _BOOLEANS[value.lower()]

    return Rule("`true` or `false` (a variable also: yes, no, on, off, 1, 0)", parse)


def text() -> Rule:
    return Rule("text", _text)


def path() -> Rule:
    return Rule("a path", as_path)


def as_path(value: object) -> Path:
    return Path(_text(str(value) if isinstance(value, Path) else value))


def secret() -> Rule:
    """One line, because a libpq passfile can hold no more."""

    def parse(value: object) -> Secret:
        checked = _text(value)
        if "\n" in checked or "\r" in checked:
            raise InvalidValueError("it has more than one line")
        return Secret(checked)

    return Rule("one line of UTF-8", parse)


def names() -> Rule:
    """Distinct names: a list, a JSON array, or text with commas."""

    def parse(value: object) -> tuple[str, ...]:
        found = tuple(_text(item) for item in _items(value))
        if not found:
            raise InvalidValueError("it is empty")
        if len(set(found)) != len(found):
            raise InvalidValueError("a name is there twice")
        return found

    return Rule("a list of names (a variable: with commas, or a JSON array)", parse)


def cron() -> Rule:
    """Five cron fields as cronsim reads them. A sixth would mean seconds there: refused."""

    def parse(value: object) -> str:
        from datetime import UTC, datetime

        from cronsim import CronSim, CronSimError

        expression = _text(_trimmed(value))
        if len(expression.split()) != _CRON_FIELDS:
            raise InvalidValueError("it needs exactly five fields")
        try:
            CronSim(expression, datetime(2024, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            raise InvalidValueError(str(error)) from None
        return expression

    return Rule("five cron fields: minute hour day month weekday (0 or 7 is Sunday)", parse)


def timezone() -> Rule:
    """UTC is always known, others only where the system has its time zone files."""

    def parse(value: object) -> str:
        import zoneinfo

        name = _text(_trimmed(value))
        try:
            return name if name == "UTC" else zoneinfo.ZoneInfo(name).key
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise InvalidValueError("this system's time zone files (package tzdata) don't have it") from None

    return Rule("a name of the time zone database, e.g. `UTC` or `Europe/Berlin`", parse)


def _trimmed(value: object) -> object:
    return _REMARK.sub("", value).strip() if isinstance(value, str) else value


def _within(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidValueError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidValueError("it is not text")
    if not value:
        raise InvalidValueError("it is empty")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidValueError("it is not UTF-8 without NUL")
    return value


def _items(value: object) -> Sequence[object]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidValueError("it starts like a JSON array and is none") from None
    elif isinstance(value, str):
        value = [item.strip() for item in value.split(",")]
    if not isinstance(value, list | tuple):
        raise InvalidValueError
    return value


@dataclass(frozen=True)
class Setting:
    """One row of the table in ``config.py``: the TOML key, its variables (the first given wins), rule and meaning."""

    key: str
    variables: tuple[str, ...]
    rule: Rule
    meaning: str
    is_secret: bool = False

    def all_keys(self) -> tuple[str, ...]:
        return (self.key, f"{self.key}_file") if self.is_secret else (self.key,)

    def all_variables(self) -> tuple[str, ...]:
        return self.variables + tuple(f"{variable}_FILE" for variable in self.variables if self.is_secret)


@dataclass(frozen=True)
class Given:
    """A value before any rule looked at it. ``in_file``: ``value`` is the path of the file that holds it."""

    value: object
    origin: str
    in_file: bool = False


@dataclass(frozen=True)
class Source:
    """A place that gives values: by which names, and how an error calls the place."""

    values: Mapping[str, object]
    names_of: Callable[[Setting], Sequence[str]]
    origin_of: Callable[[str], str]
    file_suffix: str

    def find(self, setting: Setting) -> Given | None:
        """What this place gives for the setting. Raises ``RefusedSettingError`` for a value and a file at once."""
        for name in self.names_of(setting):
            in_file = name + self.file_suffix
            if setting.is_secret and in_file in self.values:
                if name in self.values:
                    raise RefusedSettingError(f"({self.origin_of(name)}): {in_file} is given too: keep one")
                return Given(self.values[in_file], self.origin_of(in_file), in_file=True)
            if name in self.values:
                return Given(self.values[name], self.origin_of(name))
        return None


def environment_source(environment: Mapping[str, str]) -> Source:
    """Variables; an empty one counts as unset, as Compose passes an undefined one on."""
    given = {name: value for name, value in environment.items() if value}
    return Source(given, lambda setting: setting.variables, lambda name: f"environment {name}", "_FILE")


def option_source(overrides: Mapping[str, object]) -> Source:
    """Options of the command line, by TOML key; None counts as not given."""
    given = {key: value for key, value in overrides.items() if value is not None}
    return Source(given, lambda setting: (setting.key,), _option, "_file")


def file_source(file: Path | None, document: Mapping[str, object]) -> Source:
    """Values of a TOML file, by dotted key."""
    return Source(document, lambda setting: (setting.key,), lambda name: f"file {file}", "_file")


def _option(key: str) -> str:
    return "option --" + key.rpartition(".")[2].replace("_", "-")


def read_toml(file: Path) -> dict[str, object]:
    """The document. Raises ``ConfigurationError``; neither it nor its cause holds any of the file's text."""
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigurationError(f"{file} can't be read: {error.strerror}", _remedy(file, error)) from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file} is not UTF-8", "save it as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{file} is not valid TOML: {error}", "put text between quotes") from None


def flatten(document: Mapping[str, object], tables: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Dotted keys and values; only what is a table by name is opened. A quoted key with a dot stays quoted."""
    for name, value in document.items():
        key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
        if key in tables and isinstance(value, dict):
            for inner, inner_value in flatten(value, ()):
                yield f"{key}.{inner}", inner_value
        else:
            yield key, value


def read_secret(file: Path) -> str:
    """A secret file's text without its final newline. Raises ``ConfigurationError`` that names path and remedy."""
    try:
        with file.open("rb") as stream:
            data = stream.read(SECRET_LIMIT_BYTES + 1)
        value = data.decode()
    except OSError as error:
        raise ConfigurationError(f"{file} can't be read: {error.strerror}", _remedy(file, error)) from None
    except UnicodeDecodeError:
        # Not chained: the cause carries the bytes.
        raise ConfigurationError(f"{file} is not UTF-8", "write the secret as one line of UTF-8") from None
    if len(data) > SECRET_LIMIT_BYTES:
        raise ConfigurationError(f"{file} is larger than {SECRET_LIMIT_BYTES} bytes", "name the file of the secret")
    return value.removesuffix("\n").removesuffix("\r")


def libpq_variables(environment: Mapping[str, str], replaced: Set[str]) -> dict[str, str]:
    """libpq's own variables that are in force beside the settings whose keys are ``replaced``; the password masked."""
    return {
        name: MASK if name == "PGPASSWORD" else environment[name].encode(errors="backslashreplace").decode()
        for name in _LIBPQ
        if environment.get(name) and not _LIBPQ_REPLACED.get(name, set()) & replaced
    }


def shown(value: object) -> str:
    """A value for a message: short, on one line, tables left closed."""
    if isinstance(value, dict):
        return "a table"
    found = repr(str(value) if isinstance(value, Path) else value)
    return found if len(found) <= _SHOWN_CHARACTERS else found[:_SHOWN_CHARACTERS] + "…"


def _remedy(file: Path, error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return "Docker makes a directory where the file to mount is missing: remove it and create the file on the host"
    if isinstance(error, PermissionError):
        return _owner_remedy(file)
    return "create it, or name the right file"


def _owner_remedy(file: Path) -> str:
    user = os.geteuid()
    try:
        facts = file.stat()
    except OSError:
        return f"pgkeep runs as uid {user}, which may not pass a directory above it: chmod o+x that directory"
    mode = stat.S_IMODE(facts.st_mode)
    return (
        f"it belongs to uid {facts.st_uid}, gid {facts.st_gid}, mode {mode:04o}, and pgkeep runs as uid {user}: "
        f"chown {user} {file}, or let a group of that user read it (chgrp, chmod g+r)"
    )
