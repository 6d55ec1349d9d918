"""Which destinations there are, and what may be set for each: a table for every kind.

Three names are known without a file, and have variables: ``external``, ``s3`` and ``rsync``. Any others come from
tables ``[destinations.NAME]`` of a file, with ``kind``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec

from pgkeep.configuration_sources import (
    InvalidValueError,
    Rule,
    Setting,
    boolean,
    choice,
    integer,
    optional,
    path,
    secret,
    size,
    text,
)
from pgkeep.domain.names import Tier
from pgkeep.settings import Destination, DirectoryDestination, Extractor, Retention, RsyncDestination, S3Destination

TABLE: Final = "destinations"
KIND_OF: Final = {"external": "directory", "s3": "s3", "rsync": "rsync"}
"""The names that need no file, and what they are."""
_STRUCTS: Final[dict[str, type[Destination]]] = {
    "directory": DirectoryDestination,
    "s3": S3Destination,
    "rsync": RsyncDestination,
}
_PLACE_OF: Final = {"directory": "path", "s3": "bucket", "rsync": "target"}
"""What says where; the names that need no file are no destinations without it."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}", re.ASCII)
_URL = re.compile(r"https?://[^\s/]+(/\S*)?", re.ASCII)
_SSH_TARGET = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):/[^\0-\x1f]*")
_DAYS = optional("forever", integer(1, 36500))
_RECHECK = optional("never", integer(1, 365))


def _matching(pattern: re.Pattern[str], allowed: str) -> Rule:
    def parse(value: object) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise InvalidValueError
        return value

    return Rule(allowed, parse)


def _prefix() -> Rule:
    def parse(value: object) -> str:
        if not isinstance(value, str) or not value.isprintable():
            raise InvalidValueError
        found = value.strip("/")
        if found and any(part in {"", ".", ".."} for part in found.split("/")):
            raise InvalidValueError
        return found

    return Rule("names with `/` between them, or nothing", parse)


def _of_every_kind(prefix: str) -> tuple[Setting, ...]:
    return (
        Setting(
            "required",
            (f"{prefix}_REQUIRED",),
            boolean(),
            "Trouble with it makes the extractor unhealthy at once; else after a day.",
        ),
        Setting(
            "interval_seconds",
            (f"{prefix}_INTERVAL",),
            integer(1, 86400),
            "Pause between two looks; the extractor's if unset.",
        ),
        Setting(
            "recheck_days",
            (f"{prefix}_RECHECK_DAYS",),
            _RECHECK,
            "Days within which every copy is read again in full.",
        ),
    )


_DIRECTORY: Final = (
    Setting("path", ("EXTERNAL_DIRECTORY",), optional("off", path()), "Where the copies go; `off`: nowhere."),
    Setting(
        "mode",
        ("EXTERNAL_MODE",),
        choice("0444", "0440", "0400"),
        "Who may read the copies: everybody, the group, or the extractor's user alone.",
    ),
    *_of_every_kind("EXTERNAL"),
)
_S3: Final = (
    Setting("bucket", ("S3_BUCKET",), text(), "The bucket; without it there is no such destination."),
    Setting("prefix", ("S3_PREFIX",), _prefix(), "The folder in the bucket."),
    Setting(
        "endpoint",
        ("S3_ENDPOINT",),
        _matching(_URL, "a URL, `http://` or `https://`"),
        "The server, where it is not Amazon's.",
    ),
    Setting("region", ("S3_REGION",), text(), "Region."),
    Setting("access_key_id", ("S3_ACCESS_KEY_ID",), secret(), "Key; unset: environment, role.", is_secret=True),
    Setting("secret_access_key", ("S3_SECRET_ACCESS_KEY",), secret(), "That key's secret.", is_secret=True),
    Setting("session_token", ("S3_SESSION_TOKEN",), secret(), "Of a key that lasts for hours.", is_secret=True),
    Setting("profile", ("S3_PROFILE",), text(), "A section of the AWS client's own files."),
    Setting("path_style", ("S3_PATH_STYLE",), boolean(), "The bucket stands in the path, not in the host's name."),
    Setting("ca_file", ("S3_CA_FILE",), path(), "Certificates that vouch for the server."),
    Setting(
        "lock_mode",
        ("S3_OBJECT_LOCK_MODE",),
        optional("off", choice("COMPLIANCE", "GOVERNANCE")),
        "How copies are locked.",
    ),
    Setting(
        "lock_days",
        ("S3_OBJECT_LOCK_DAYS",),
        integer(1, 36500),
        "Days that copies are locked; unset: as long as the vault keeps the backup.",
    ),
    Setting(
        "lock_days_maximum",
        ("S3_OBJECT_LOCK_DAYS_MAXIMUM",),
        integer(1, 36500),
        "Nothing is ever locked for longer.",
    ),
    Setting(
        "prolong_locks", ("S3_PROLONG_LOCKS",), boolean(), "Extend the locks of what the vault keeps beyond their end."
    ),
    Setting("storage_class", ("S3_STORAGE_CLASS",), text(), "Storage class of the copies, as the server calls it."),
    Setting(
        "encryption",
        ("S3_ENCRYPTION",),
        optional("none", choice("AES256", "aws:kms")),
        "Encryption that the server is asked for.",
    ),
    Setting("kms_key", ("S3_KMS_KEY",), text(), "The key for `aws:kms`."),
    Setting(
        "checksums",
        ("S3_CHECKSUMS",),
        choice("when_supported", "when_required"),
        "Checksums of the protocol's; older servers want `when_required`.",
    ),
    Setting("part_size_bytes", ("S3_PART_SIZE",), size(5 * 2**20, 5 * 2**30), "Parts that large files are sent in."),
    *_of_every_kind("S3"),
)
_RSYNC: Final = (
    Setting(
        "target",
        ("RSYNC_TARGET",),
        _matching(_SSH_TARGET, "`[user@]host:/path`"),
        "Server and directory; without it there is no such destination.",
    ),
    Setting("port", ("RSYNC_PORT",), integer(1, 65535), "The server's SSH port."),
    Setting("key_file", ("RSYNC_KEY_FILE",), path(), "Private key of an SSH account, without a passphrase."),
    Setting("known_hosts_file", ("RSYNC_KNOWN_HOSTS_FILE",), path(), "The server's public key, as `ssh-keyscan` says."),
    Setting(
        "bandwidth_limit_kib",
        ("RSYNC_BANDWIDTH_LIMIT",),
        optional("none", integer(1, 10_000_000)),
        "KiB in a second, at the most.",
    ),
    *_of_every_kind("RSYNC"),
)
_RETENTION: Final = (
    *(
        Setting(f"retention.{tier.value}_days", (), _DAYS, f"Days after which copies of {tier.value} backups leave it.")
        for tier in Tier
    ),
    Setting("retention.keep_minimum", (), integer(1, 1000), "Copies of good backups that stay however old they are."),
)
_ROWS: Final[dict[str, tuple[Setting, ...]]] = {
    "directory": (*_DIRECTORY, *_RETENTION),
    "s3": (*_S3, *_RETENTION),
    "rsync": _RSYNC,
}


def rows(name: str, kind: str) -> tuple[Setting, ...]:
    """The settings of one destination, by their full keys; variables belong to the names in :data:`KIND_OF`."""
    known = KIND_OF.get(name) == kind
    return tuple(
        replace(row, key=f"{TABLE}.{name}.{row.key}", variables=row.variables if known else ()) for row in _ROWS[kind]
    )


def known_rows() -> tuple[Setting, ...]:
    """Those of the names that need no file, without what may leave them."""
    return tuple(row for name, kind in KIND_OF.items() for row in rows(name, kind) if row.variables)


def open_tables(
    document: dict[str, object], origin: str, suggest: Callable[[str, Sequence[str]], str], problems: list[str]
) -> dict[str, str]:
    """Put the keys of each ``destinations.NAME`` of a file's document in its place; what is wrong with them, told.

    ``suggest``: for an unknown key and all that are known, how an error ends. Returns names and their kinds.
    """
    kinds: dict[str, str] = {}
    for key in [key for key in document if key.startswith(f"{TABLE}.")]:
        value, name = document.pop(key), key.partition(".")[2]
        if not isinstance(value, dict):
            problems.append(f"{key} ({origin}): must be a table: write [{key}] on a line of its own")
        elif (problem := _wrong_name(name) or _wrong_kind(name, value.get("kind"))) is not None:
            problems.append(f"{key} ({origin}): {problem}")
        else:
            kinds[name] = str(value.get("kind", KIND_OF.get(name)))
            known = {each for row in rows(name, kinds[name]) for each in row.all_keys()}
            for inner, inner_value in _flat(value, key):
                if inner in known:
                    document[inner] = inner_value
                else:
                    problems.append(f"{inner} ({origin}): unknown key{suggest(inner, sorted(known))}")
    return kinds


def _wrong_name(name: str) -> str | None:
    if _NAME.fullmatch(name) is None:
        return "a destination's name has up to 32 small letters, digits, `-` and `_`, and begins with neither of these"
    return None


def _wrong_kind(name: str, kind: object) -> str | None:
    kinds = ", ".join(f'"{each}"' for each in _STRUCTS)
    if kind is None:
        return None if name in KIND_OF else f"has no kind: one of {kinds}"
    if not isinstance(kind, str) or kind not in _STRUCTS:
        return f"its kind is none of {kinds}"
    if kind != KIND_OF.get(name, kind):
        return f'the name {name} belongs to the kind "{KIND_OF[name]}": choose another'
    return None


def _flat(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if name == "retention" and isinstance(value, dict):
            yield from ((f"{prefix}.{name}.{inner}", inner_value) for inner, inner_value in value.items())
        elif name != "kind":
            yield f"{prefix}.{name}", value


def build(kinds: Mapping[str, str], values: Mapping[str, object], problems: list[str]) -> dict[str, Any]:
    """The extractor's fields from parsed ``values`` by full key. ``kinds``: the names that a file has a table for."""
    found: list[Destination] = []
    fields = {name: _fields(name, values) for name in {**KIND_OF, **kinds}}
    for name, given in fields.items():
        kind = kinds.get(name) or KIND_OF[name]
        if name == "external":
            given = {"path": DirectoryDestination().path, **given}
        if name in KIND_OF and given.get(_PLACE_OF[kind]) is None and (name == "external" or name not in kinds):
            continue
        if missing := _missing(name, kind, given):
            problems.append(missing)
        else:
            found.append(_STRUCTS[kind](name=name, **given))
            problems += _contradictions(found[-1])
    problems += _same_places(found)
    chosen: dict[str, Any] = {"destinations": tuple(found)}
    if s3 := fields["s3"]:
        chosen["s3_defaults"] = S3Destination(**{"bucket": "", **s3})
    if {"key_file", "known_hosts_file"} <= fields["rsync"].keys():
        chosen["rsync_defaults"] = RsyncDestination(**{"target": "", **fields["rsync"]})
    return chosen


def _fields(name: str, values: Mapping[str, object]) -> dict[str, Any]:
    prefix = f"{TABLE}.{name}."
    given = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    policy = {key.partition(".")[2]: given.pop(key) for key in list(given) if key.startswith("retention.")}
    if policy:
        # What isn't mentioned never leaves: a copy is no cache.
        given["retention"] = msgspec.convert({**{f"{tier.value}_days": None for tier in Tier}, **policy}, Retention)
    return given


def _missing(name: str, kind: str, given: Mapping[str, object]) -> str | None:
    """What can't be left out and is."""
    needed = {"directory": ["path"], "s3": ["bucket"], "rsync": ["target", "key_file", "known_hosts_file"]}[kind]
    lacking = [f"{TABLE}.{name}.{key}" for key in needed if given.get(key) is None]
    if not lacking:
        return None
    variables = [row.variables[0] for row in rows(name, kind) if row.key in lacking and row.variables]
    ways = f" (or {', '.join(variables)})" if variables else ""
    return f"{TABLE}.{name}: {' and '.join(lacking)}{ways} must be given"


def _contradictions(made: Destination) -> Iterator[str]:
    if isinstance(made, S3Destination):
        at = f"{TABLE}.{made.name}"
        if "@" in (made.endpoint or ""):
            # Not shown: what stands before it may be a password.
            yield f"{at}: no user belongs into endpoint: give access_key_id and secret_access_key"
        if (made.access_key_id is None) != (made.secret_access_key is None):
            yield f"{at}: access_key_id and secret_access_key go together: give both or neither"
        if made.access_key_id is not None and made.profile is not None:
            yield f"{at}: access_key_id and profile exclude each other: keep one"
        if made.lock_days is not None and made.lock_days > made.lock_days_maximum:
            yield f"{at}: lock_days is more than lock_days_maximum ({made.lock_days_maximum}): lower it or raise that"
        if made.kms_key is not None and made.encryption != "aws:kms":
            yield f'{at}: kms_key counts with encryption = "aws:kms" only'


def _same_places(found: Sequence[Destination]) -> Iterator[str]:
    places: dict[tuple[object, ...], str] = {}
    for each in found:
        other = places.setdefault(_place(each), each.name)
        if other != each.name:
            yield f"{TABLE}.{other} and {TABLE}.{each.name} are the same place: keep one"


def _place(made: Destination) -> tuple[object, ...]:
    if isinstance(made, S3Destination):
        return "s3", made.endpoint, made.bucket, made.prefix
    if isinstance(made, RsyncDestination):
        return "rsync", made.target, made.port
    return "directory", made.path


def in_force(chosen: Extractor) -> Iterator[tuple[Setting | None, str, object]]:
    """Every destination's settings: the row (None: its kind, or that it is off), the full key and the value."""
    names = [each.name for each in chosen.destinations]
    if "external" not in names:
        yield None, f"{TABLE}.external.path", "off"
    for each in chosen.destinations:
        kind = str(each.__struct_config__.tag)
        yield None, f"{TABLE}.{each.name}.kind", kind
        for row in rows(each.name, kind):
            field = row.key.removeprefix(f"{TABLE}.{each.name}.")
            if not field.startswith("retention."):
                yield row, row.key, getattr(each, field)
            elif (policy := getattr(each, "retention", None)) is not None:
                yield row, row.key, getattr(policy, field.partition(".")[2])


def default(row: Setting) -> object:
    """What one of :func:`known_rows` is when nobody says anything; None for what has no default."""
    _, name, field = row.key.split(".", 2)
    fields = {each.name: each.default for each in msgspec.structs.fields(_STRUCTS[KIND_OF[name]])}
    found = fields[field]
    return None if found is msgspec.NODEFAULT else found
