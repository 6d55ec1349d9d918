"""Everything that can be set, as frozen structs. What may be given for each, and where, is the table in ``config``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from pgkeep.configuration_sources import Secret
from pgkeep.domain.names import Tier

_MIB = 1024 * 1024


class Database(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach the server and what to dump. None leaves the matter to libpq and its PG* variables.

    At most one of ``name``, ``names`` and ``all_databases`` is set.
    """

    host: str | None = None
    port: int | None = None
    name: str | None = None
    names: tuple[str, ...] = ()
    all_databases: bool = False
    user: str | None = None
    password: Secret | None = None
    passfile: Path | None = None
    service: str | None = None
    sslmode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] | None = None
    sslrootcert: str | None = None
    connect_timeout_seconds: int = 10
    globals: Literal["auto", "off"] = "auto"


class Dump(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How pg_dump is run. ``jobs`` None: chosen from the machine."""

    jobs: int | None = None
    spool_compression: Literal["auto", "never", "always"] = "auto"
    lock_timeout_seconds: int = 60
    retries: int = 2
    verify_after: bool = False


class Retention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Days that a tier's backups are kept (None: for ever) and how many good ones always stay."""

    hourly_days: int | None = 2
    daily_days: int | None = 7
    weekly_days: int | None = 28
    monthly_days: int | None = 365
    yearly_days: int | None = None
    manual_days: int | None = 30
    keep_minimum: int = 3

    def days(self, tier: Tier) -> int | None:
        found: int | None = getattr(self, f"{tier.value}_days")
        return found


class Storage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The protection to insist on (``auto``: the best that the filesystem has), the space to leave free, and how large
    a dump may be (None: as large as there is room)."""

    protection: Literal["auto", "chattr", "mode", "none"] = "auto"
    reserve_bytes: int = 256 * _MIB
    dump_limit_bytes: int | None = None


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cron expressions (None: off), read in ``timezone``, a name that ``zoneinfo`` knows."""

    hourly: str | None = "0 */1 * * *"
    daily: str | None = "0 0 * * *"
    weekly: str | None = "0 0 * * 0"
    monthly: str | None = None
    yearly: str | None = None
    timezone: str = "UTC"

    def expressions(self) -> dict[Tier, str]:
        """The tiers that run by themselves."""
        found = {tier: getattr(self, tier.value) for tier in Tier if tier is not Tier.MANUAL}
        return {tier: expression for tier, expression in found.items() if expression is not None}


class Agent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The agent as a service: how long it waits for the vault to seal what it handed over."""

    vault_timeout_seconds: int = 3600


class Vault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The vault as a service: whom it becomes when it is started as root (None: nobody else), how many different
    databases it takes from its agent, and which destinations must hold the newest backups before those may expire."""

    user: str | None = None
    subjects: int = 64
    required_destinations: tuple[str, ...] = ()


class DirectoryDestination(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="directory"
):
    """A directory or mounted share.

    Of every kind: ``required``: trouble with it is trouble at once, else after a day; ``interval_seconds`` between two
    looks (None: the extractor's); ``recheck_days``: within which every copy is read in full again (None: never);
    ``retention``: what may leave it (None: nothing ever does).
    """

    name: str = "external"
    path: Path = Path("/external")
    mode: Literal["0444", "0440", "0400"] = "0444"
    required: bool = True
    interval_seconds: int | None = None
    recheck_days: int | None = 7
    retention: Retention | None = None


class S3Destination(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="s3"):
    """A bucket, and the folder in it. Without keys the client's own ways are used (environment, role).

    ``lock_mode`` None: objects are not locked by us. A lock lasts as long as the vault keeps the backup, or
    ``lock_days`` if that is set; never longer than ``lock_days_maximum``.
    """

    name: str = "s3"
    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    access_key_id: Secret | None = None
    secret_access_key: Secret | None = None
    session_token: Secret | None = None
    profile: str | None = None
    path_style: bool = False
    ca_file: Path | None = None
    lock_mode: Literal["COMPLIANCE", "GOVERNANCE"] | None = "COMPLIANCE"
    lock_days: int | None = None
    lock_days_maximum: int = 400
    prolong_locks: bool = False
    storage_class: str | None = None
    encryption: Literal["AES256", "aws:kms"] | None = None
    kms_key: str | None = None
    checksums: Literal["when_supported", "when_required"] = "when_supported"
    part_size_bytes: int = 16 * _MIB
    required: bool = True
    interval_seconds: int | None = None
    recheck_days: int | None = None
    retention: Retention | None = None


class RsyncDestination(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="rsync"
):
    """A directory on a server with SSH and rsync: ``target`` is ``[user@]host:/path``. Nothing ever leaves it."""

    name: str = "rsync"
    target: str
    port: int = 22
    key_file: Path
    known_hosts_file: Path
    bandwidth_limit_kib: int | None = None
    required: bool = True
    interval_seconds: int | None = None
    recheck_days: int | None = 30


Destination = DirectoryDestination | S3Destination | RsyncDestination


class Extractor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one-way copies: where to, and how often the vault is looked at for new backups.

    ``s3_defaults`` and ``rsync_defaults`` are what a place that is named on the command line alone (``s3://``,
    ``ssh://``) is opened with; None where no keys are given for it.
    """

    check_interval_seconds: int = 300
    destinations: tuple[Destination, ...] = (DirectoryDestination(),)
    s3_defaults: S3Destination = S3Destination(bucket="")
    rsync_defaults: RsyncDestination | None = None


class Log(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What services write to stdout."""

    format: Literal["text", "json"] = "text"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set."""

    root: Path = Path("/backups")
    database: Database = Database()
    dump: Dump = Dump()
    retention: Retention = Retention()
    storage: Storage = Storage()
    schedule: Schedule = Schedule()
    agent: Agent = Agent()
    vault: Vault = Vault()
    extractor: Extractor = Extractor()
    log: Log = Log()
