"""Builds the services from the configuration; and agent and vault in one process, for where no boundary is wanted."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from pgkeep.adapters import clock, durable, lock, postgres
from pgkeep.adapters import destinations as adapter
from pgkeep.agent import dump, handover
from pgkeep.agent import run as agent_run
from pgkeep.agent import service as agent_service
from pgkeep.config import Settings
from pgkeep.domain import catalog, names, retention
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.names import Tier
from pgkeep.domain.request import Request
from pgkeep.errors import NotFoundError, PgkeepError, StorageError
from pgkeep.extractor import extract
from pgkeep.progress import Progress
from pgkeep.restore import recover
from pgkeep.settings import Destination
from pgkeep.vault import audit_log, expire, inbox, receive, relocate, seal, service, store, unseal
from pgkeep.vault.condition import Pulse
from pgkeep.vault.confirmations import Confirmations
from pgkeep.vault.inspector import Inspector
from pgkeep.vault.layout import Layout, Vault, give_up_reserve, keep_reserve, open_vault, prepare_root, read_identity
from pgkeep.wiring import places

_Dump = Callable[[handover.Staged], Request]


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """One database whose backup failed, while others may have gone well."""

    subject: str
    error: PgkeepError


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What a backup run brought: sealed backups, failures, and what expired on the way."""

    sealed: tuple[SealedBackup, ...]
    failures: tuple[Failure, ...]
    expired: tuple[SealedBackup, ...]


class Services:
    """Everything that the configuration decides, built on demand."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.layout = Layout(settings.root)

    @property
    def policy(self) -> retention.Policy:
        chosen = self.settings.retention
        return retention.Policy({tier: chosen.days(tier) for tier in Tier}, chosen.keep_minimum)

    @property
    def target(self) -> postgres.Target:
        """The server, and the database where only one is configured."""
        database = self.settings.database
        parameters = {
            "host": database.host,
            "port": database.port,
            "dbname": database.name,
            "user": database.user,
            "passfile": database.passfile,
            "service": database.service,
            "sslmode": database.sslmode,
            "sslrootcert": database.sslrootcert,
        }
        return postgres.Target.of(parameters, database.password.reveal() if database.password else None)

    @property
    def dump_options(self) -> dump.Options:
        chosen = self.settings.dump
        return dump.Options(
            jobs=chosen.jobs,
            spool_compression=chosen.spool_compression,
            lock_timeout_seconds=chosen.lock_timeout_seconds,
            retries=chosen.retries,
            connect_timeout_seconds=self.settings.database.connect_timeout_seconds,
        )

    def catalog(self) -> store.Catalog:
        """Raises ``NotFoundError`` where there is no vault."""
        return store.read_catalog(self.layout)

    def find(self, reference: str, database: str | None = None) -> SealedBackup:
        """The backup of the vault that a person means. Raises ``NotFoundError``, ``UsageError``."""
        return catalog.resolve(self.catalog().backups, reference, database=database)

    def locate(self, reference: str, database: str | None = None) -> tuple[Path, SealedBackup | None]:
        """As :meth:`find`, or a file anywhere: an existing path wins."""
        path = Path(reference)
        # With a slash it is meant as a path, whatever lies there: whoever opens it says what is wrong with it.
        if path.is_file() or ("/" in reference and os.path.lexists(path)):
            return path, None
        if "/" in reference and (path.is_absolute() or not self.layout.exists):
            raise NotFoundError(f"{reference} does not exist", "check the path; `pgkeep list` shows what there is")
        backup = self.find(reference, database)
        return self.layout.active / backup.path_in_vault, backup

    @contextlib.contextmanager
    def vault(self, progress: Progress, wait_seconds: float, *, to_make_room: bool = False) -> Iterator[Vault]:
        """The vault, ours alone until the end of the block, recovered from whatever happened before.

        ``to_make_room``: a full disk must not stand in the way; the reserve is there for this.
        Raises ``BusyError`` after ``wait_seconds``, ``ProtectionError``, ``StorageError``, ``RefusedError``.
        """
        prepare_root(self.layout)
        with lock.locked(self.layout.lock, wait_seconds, lambda holder: progress.note(f"waiting for {holder}")):
            with durable.explain(self.layout.root, "opening the vault"):
                if to_make_room:
                    give_up_reserve(self.layout)
                vault = open_vault(self.layout, self.settings.storage.protection)
                for warning in filter(None, (vault.warning, audit_log.weakness(vault))):
                    progress.warn(warning)
                store.recover(vault, progress)
            if not to_make_room:
                self._keep_reserve(progress)
            try:
                yield vault
            finally:
                if to_make_room:
                    self._keep_reserve(progress)

    def backup(self, tiers: Sequence[Tier], progress: Progress, wait_seconds: float) -> Run:
        """Dump every configured database once, seal it under each tier, then the globals, then expire.

        Raises where nothing can begin.
        A database that fails does not keep the others from being backed up: it is in ``failures``.
        """
        with self.vault(progress, wait_seconds) as vault:
            self._sweep(vault, progress)
            databases = self._databases()
            rules = self._rules(named_by_database=len(databases) > 1)
            runs: list[tuple[str, _Dump]] = [
                (name or "database", self._database_dump(name, tiers, progress)) for name in databases
            ]
            if self.settings.database.globals == "auto":
                runs.append(("globals", self._globals_dump(databases[0], tiers, progress)))
            outcomes = [self._run(vault, subject, make, rules, progress) for subject, make in runs]
            expired = self._expire(vault, progress)
        return Run(
            tuple(backup for each in outcomes if not isinstance(each, Failure) for backup in each),
            tuple(each for each in outcomes if isinstance(each, Failure)),
            tuple(expired),
        )

    def plan_cleanup(self) -> list[retention.Decision]:
        """What would expire now, with a reason for every backup. Raises ``NotFoundError``."""
        backups = self.catalog().backups
        awaited = Confirmations(self.layout, self.settings.vault.required_destinations).unconfirmed(backups)
        return retention.plan(backups, self.policy, clock.now(), awaited)

    def cleanup(self, progress: Progress, wait_seconds: float) -> list[retention.Decision]:
        """Carry :meth:`plan_cleanup` out; beside a vault that runs as a service, let that do it."""
        held = self.catalog().backups
        if inbox.is_served(self.layout):
            progress.note("the vault's service does it")
            return inbox.ask_to_clean_up(self.layout, held, wait_seconds)
        with self.vault(progress, wait_seconds, to_make_room=True) as vault:
            decisions = self.plan_cleanup()
            expire.carry_out(vault, decisions, progress)
        return decisions

    def extractors(self, names: Collection[str] = ()) -> list[extract.Extractor]:
        """What copies this vault's backups: for each destination, or those of these ``names``.

        Raises ``NotFoundError`` for an unknown name.
        """
        wanted = {places.find(self.settings, name).name for name in names}
        chosen = [each for each in self.settings.extractor.destinations if not names or each.name in wanted]
        return [self._extractor(each) for each in chosen]

    def _extractor(self, chosen: Destination) -> extract.Extractor:
        return extract.Extractor(
            extract.Settings(
                name=chosen.name,
                active=self.layout.active,
                state=places.state_of(self.layout.root, chosen),
                log=self.layout.extraction_audit,
                vault_log=self.layout.audit,
                recheck=None if chosen.recheck_days is None else dt.timedelta(days=chosen.recheck_days),
                policy=places.policy_of(chosen),
                prolong=places.longest_lock_of(chosen),
                required=chosen.required,
                interval_seconds=chosen.interval_seconds or self.settings.extractor.check_interval_seconds,
            ),
            places.build(self.layout.root, chosen),
            self._vault_id,
        )

    def destination(self, reference: str) -> adapter.Destination:
        """The configured destination of that name, or a place: ``s3://bucket/prefix``, ``ssh://[user@]host[:port]/path``
        or an absolute path. Raises ``NotFoundError``, ``UsageError``, ``ConfigurationError``."""
        return places.resolve(self.settings, reference)

    def agent(self) -> agent_run.Setup:
        """What a run of the agent needs, for :func:`pgkeep.agent.run.back_up` and its neighbours."""
        return agent_run.Setup(
            staging=self.layout.staging,
            active=self.layout.active,
            target=self.target,
            databases=self._databases,
            with_globals=self.settings.database.globals == "auto",
            options=self.dump_options,
            schedule=self.settings.schedule.expressions(),
            zone=self.settings.schedule.timezone,
            vault_timeout_seconds=self.settings.agent.vault_timeout_seconds,
        )

    def agent_service(self, command: Sequence[str], environment: Mapping[str, str]) -> agent_service.Setup:
        """What the agent as a service needs. ``command``: how it starts this program for a run of its own."""
        return agent_service.Setup(
            staging=self.layout.staging,
            active=self.layout.active,
            schedule=self.settings.schedule.expressions(),
            zone=self.settings.schedule.timezone,
            vault_timeout=dt.timedelta(seconds=self.settings.agent.vault_timeout_seconds),
            command=command,
            environment=environment,
        )

    @contextlib.contextmanager
    def vault_service(self, inspector: Inspector, progress: Progress, wait_seconds: float) -> Iterator[service.Service]:
        """The vault's service, with the vault's lock held until the end of the block. Raises as :meth:`vault`."""
        settings = self.settings
        pulse = Pulse(progress)
        inspector.alive = pulse.alive
        several = settings.database.all_databases or len(settings.database.names) > 1
        limit_bytes = settings.storage.dump_limit_bytes or seal.UNLIMITED_BYTES
        rules = dataclasses.replace(
            self._rules(named_by_database=several), inspect=inspector.inspect, limit_bytes=limit_bytes
        )
        chosen = service.Options(
            rules,
            settings.schedule.expressions(),
            settings.schedule.timezone,
            settings.vault.subjects,
            settings.vault.required_destinations,
        )
        service.require_known(self.layout)
        with self.vault(pulse, wait_seconds, to_make_room=True) as vault:
            # Who chose a weaker protection knows of it.
            wants_best = settings.storage.protection in ("auto", "chattr")
            weak = (vault.warning, audit_log.weakness(vault)) if wants_best else ()
            yield service.Service(vault, chosen, pulse, tuple(filter(None, weak)))

    def _vault_id(self) -> str:
        if not self.layout.exists:
            raise NotFoundError(f"there is no vault under {self.layout.root} yet", "the vault makes it when it starts")
        return read_identity(self.layout).id

    def move_vault(
        self, new_root: Path, *, allow_weaker: bool, remove_old: bool, progress: Progress, wait_seconds: float
    ) -> relocate.Relocation:
        """Move the vault to another root, or finish a move that was cut off. Raises as ``relocate.move``."""
        storage = self.settings.storage
        wishes = relocate.Wishes(
            protection=storage.protection,
            allow_weaker=allow_weaker,
            remove_old=remove_old,
            reserve_bytes=storage.reserve_bytes,
        )
        if relocate.moved_to(self.layout) is not None:
            with lock.locked(self.layout.lock, wait_seconds, lambda holder: progress.note(f"waiting for {holder}")):
                return relocate.finish(self.layout, new_root, wishes, progress)
        self.catalog()
        with self.vault(progress, wait_seconds) as vault:
            return relocate.move(vault, new_root, wishes, progress)

    def uninstall(self, identifier: str, *, delete: bool, progress: Progress, wait_seconds: float) -> unseal.Removal:
        """Lift every flag of the vault with that id, and remove it if so wished. Raises as ``unseal.uninstall``."""
        return unseal.uninstall(self.layout, identifier, delete=delete, wait_seconds=wait_seconds, progress=progress)

    def _keep_reserve(self, progress: Progress) -> None:
        """What keeps it from being held must not hide how the work itself ended."""
        try:
            if keep_reserve(self.layout):
                return
        except StorageError as error:
            progress.warn(f"nothing can be held in reserve for `pgkeep cleanup`: {error.message}")
            return
        progress.warn(f"the disk is so full that nothing is in reserve for `pgkeep cleanup`: {self.layout.active}")

    def _rules(self, *, named_by_database: bool) -> seal.Rules:
        return seal.Rules(self.policy, self.settings.storage.reserve_bytes, named_by_database=named_by_database)

    def _databases(self) -> Sequence[str | None]:
        database = self.settings.database
        if database.all_databases:
            with postgres.connect(self.target, timeout_seconds=database.connect_timeout_seconds) as connection:
                return postgres.list_databases(connection)
        return database.names or (database.name,)

    def _database_dump(self, name: str | None, tiers: Sequence[Tier], progress: Progress) -> _Dump:
        target = self.target.database(name) if name else self.target
        return lambda staged: dump.dump_database(staged, target, tiers, self.dump_options, progress)

    def _globals_dump(self, name: str | None, tiers: Sequence[Tier], progress: Progress) -> _Dump:
        target = self.target.database(name) if name else self.target
        return lambda staged: dump.dump_globals(staged, target, tiers, self.dump_options, progress)

    def _sweep(self, vault: Vault, progress: Progress) -> None:
        with durable.explain(self.layout.staging, "clearing what a run before this one left"):
            for name in (*handover.sweep(self.layout.staging), *recover.sweep(self.layout.staging)):
                progress.warn(f"a run before this one was cut off: its {name} was removed from staging")
                audit_log.record(vault, "staging cleared", id=name.partition(".")[0], removed=name)
            progress.step("backup.started")

    def _run(
        self, vault: Vault, subject: str, make: _Dump, rules: seal.Rules, progress: Progress
    ) -> tuple[SealedBackup, ...] | Failure:
        identifier = names.new_identifier(clock.now())
        try:
            return self._dump_and_seal(vault, identifier, subject, make, rules, progress)
        except PgkeepError as error:
            self._record_end(vault, "backup failed", identifier, subject, error.message, progress)
            return Failure(subject, error)
        except BaseException as error:
            self._record_end(vault, "backup interrupted", identifier, subject, type(error).__name__, progress)
            raise

    def _dump_and_seal(
        self, vault: Vault, identifier: str, subject: str, make: _Dump, rules: seal.Rules, progress: Progress
    ) -> tuple[SealedBackup, ...]:
        staged = handover.Staged(self.layout.staging, identifier)
        try:
            progress.note(f"dumping {subject}")
            with durable.explain(self.layout.staging, f"dumping {subject}"):
                make(staged)
            progress.note(f"sealing {subject}")
            with durable.explain(self.layout.active, f"sealing {subject}"):
                request = receive.read_request(self.layout, staged.ready.name)
                return seal.seal(vault, staged.ready.name, request, request.tiers, rules, progress)
        finally:
            staged.remove()

    def _record_end(
        self, vault: Vault, event: str, identifier: str, subject: str, reason: str, progress: Progress
    ) -> None:
        try:
            audit_log.record(vault, event, id=identifier, of=subject, reason=reason)
        except StorageError as error:
            # The failure itself is what the caller must hear of; a full disk often causes both.
            progress.warn(f"the failure could not be written to the audit log: {error.message}")

    def _expire(self, vault: Vault, progress: Progress) -> list[SealedBackup]:
        return expire.carry_out(vault, self.plan_cleanup(), progress)
