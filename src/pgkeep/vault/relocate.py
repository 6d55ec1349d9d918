"""Move a vault to another root, on any filesystem: copied and read back in full before the old place gives way.

The order is the safety. The new place is marked as half-made first, under another name than the identity's; then come
the copies, their protection, a closing record in the old log, the log itself and its first record there, the mark
``moved.json`` in the old place (**from there on the vault is no longer here**), and last the new place's identity. Cut
off before the mark, the old vault goes on as if nothing had been; cut off after it, neither is written to until a
second run has done the last step. At no point are there two.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pgkeep.adapters import clock, durable, fsflags, lock, protection
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain import names
from pgkeep.domain.mailbox import OUTCOMES_DIRECTORY
from pgkeep.errors import FormatError, NotFoundError, PgkeepError, ProtectionError, RefusedError
from pgkeep.progress import Progress
from pgkeep.vault import audit_log, moved, store, unseal
from pgkeep.vault.layout import (
    IDENTITY_NAME,
    SEALED_DIRECTORIES,
    Identity,
    Layout,
    Vault,
    keep_reserve,
    prepare_root,
    read_identity,
)
from pgkeep.vault.moved import Moved
from pgkeep.vault.receive import DUMP_MODE
from pgkeep.vault.seal import SIDECAR_MODE
from pgkeep.vault.transfer import Transfer, Tree

# Holds the vault's identity under a name that makes no vault: the last step is to rename it.
MARK_NAME = ".pgkeep-move"
_STRENGTH = ("none", "mode", "chattr")
_MARK_LIMIT_BYTES = 4096
_OPEN_MODE = 0o755
_NAMED_AT_MOST = 10
_LEFT_BEHIND_LIMIT = 100
_BEGINNINGS = frozenset({*SEALED_DIRECTORIES, ".quarantine", OUTCOMES_DIRECTORY})
_STAYS_IN_ACTIVE = frozenset({IDENTITY_NAME, ".incoming", MARK_NAME, unseal.LOST_AND_FOUND})
_STAYS_IN_STATE = frozenset({"lock", "health.json", moved.NAME, unseal.LOST_AND_FOUND})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How to move. ``protection``: what to insist on at the new place, as in the configuration."""

    protection: protection.Wanted = "auto"
    allow_weaker: bool = False
    remove_old: bool = False
    reserve_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Relocation:
    """What was done. ``left``: what stays of the old place, and why; empty where it is gone or was to stay."""

    id: str
    origin: Path
    to: Path
    protection: str
    left_behind: tuple[str, ...]
    removed: bool
    left: tuple[str, ...] = ()


def move(vault: Vault, new_root: Path, wishes: Wishes, progress: Progress) -> Relocation:
    """Move the vault, whose lock the caller holds, to ``new_root``; afterwards it is there and not here.

    Raises ``RefusedError`` (something else lives there), ``ProtectionError`` (weaker there, and not allowed),
    ``StorageError`` (no room, no right), ``IntegrityError`` (it reads back otherwise), ``BusyError``.
    """
    target = _target(vault.layout, new_root)
    if wishes.remove_old:
        unseal.require_own(vault.layout)
    identity = read_identity(vault.layout)
    _require_usable(target, identity)
    prepare_root(target)
    with durable.explain(target.active, "making the directory"):
        target.active.mkdir(mode=_OPEN_MODE, exist_ok=True)
        for directory in (target.root, target.root.parent):
            durable.fsync_directory(directory)
    with lock.locked(target.lock):
        return _Move(vault, target, identity, wishes, progress).run()


def finish(layout: Layout, new_root: Path, wishes: Wishes, progress: Progress) -> Relocation:
    """What is left to do for a vault that is marked as moved, whose lock the caller holds. Idempotent.

    Raises ``RefusedError`` where it was moved elsewhere or the new place is not what it was, and as :func:`move`.
    """
    mark = moved.read(layout.state)
    if mark is None:
        raise NotFoundError(f"the vault under {layout.root} has not moved", "give it a new root")
    target = _target(layout, new_root)
    if Path(mark.to) != target.root:
        raise RefusedError(f"the vault {mark.id} was moved to {mark.to}, not to {target.root}", f"name {mark.to}")
    place = _whose(target)
    if place is None or place.id != mark.id:
        hint = f"is it mounted? Here the backups are whole still; {layout.state / moved.NAME} keeps them closed"
        raise RefusedError(f"{target.root} does not hold the vault {mark.id}", hint)
    moved.refuse(target.state)
    if wishes.remove_old:
        unseal.require_own(layout)
    with lock.locked(target.lock):
        new = Vault(target, _choose(target, wishes).protection)
        _open_at_last(new, progress)
        return _end(layout, new, mark, wishes, progress, asked_again=True)


def moved_to(layout: Layout) -> Path | None:
    """Where the vault was moved to, if it was. Raises ``FormatError``, ``StorageError``."""
    mark = moved.read(layout.state)
    return None if mark is None else Path(mark.to)


class _Move:
    """One move under way; its methods in the order in which they are called."""

    def __init__(self, vault: Vault, target: Layout, identity: Identity, wishes: Wishes, progress: Progress) -> None:
        self._vault = vault
        self._source = vault.layout
        self._target = target
        self._identity = identity
        self._wishes = wishes
        self._progress = progress
        self._links = False

    def run(self) -> Relocation:
        choice = self._begin()
        new = Vault(self._target, choice.protection, choice.warning)
        transfer = Transfer(
            links=self._links,
            true_modes=self._vault.protection != "none",
            modes=choice.protection != "none",
            progress=self._progress,
        )
        self._adopt_owners(transfer)
        active, state, logs = self._trees()
        transfer.require_room((active, state, logs), self._wishes.reserve_bytes)
        self._progress.note(f"copying the vault {self._identity.id} to {self._target.root}")
        digests = transfer.copy(active)
        transfer.copy(state)
        self._progress.step("move.copied")
        self._compare(digests)
        self._protect(new)
        mark = self._hand_over(new, transfer, logs)
        _open_at_last(new, self._progress)
        _say_whose(transfer.foreign, self._progress)
        return _end(self._source, new, mark, self._wishes, self._progress, asked_again=False)

    def _begin(self) -> protection.Choice:
        """Mark the new place as half-made, find out how it protects, and open what an earlier run closed there."""
        target = self._target
        self._progress.step("move.begun")
        unseal.clear(target.active, self._progress)
        unseal.clear(target.logs, self._progress)
        with durable.explain(target.active, "making the directories"):
            data = (self._source.active / IDENTITY_NAME).read_bytes()
            durable.write_atomically(target.active, MARK_NAME, data, 0o444)
            self._progress.step("move.marked")
            target.incoming.mkdir(mode=0o700, exist_ok=True)
            for name in SEALED_DIRECTORIES:
                (target.active / name).mkdir(mode=_OPEN_MODE, exist_ok=True)
        found = protection.probe(target.incoming)
        self._links = found.hard_links
        choice = _choose(target, self._wishes, found)
        if _STRENGTH.index(choice.protection) < _STRENGTH.index(self._vault.protection):
            self._accept_weaker(choice, found)
        return choice

    def _accept_weaker(self, choice: protection.Choice, found: protection.Probe) -> None:
        message = f"{self._target.root} protects by {choice.protection!r}, here it is {self._vault.protection!r}"
        if not self._wishes.allow_weaker:
            raise ProtectionError(f"{message}: {found.why}", "choose ext4, xfs or btrfs, or accept it: --allow-weaker")
        self._progress.warn(message)

    def _adopt_owners(self, transfer: Transfer) -> None:
        """The root's directories and the identity belong to whom they belonged to."""
        if self._vault.protection == "none":
            return
        source, target = self._source, self._target
        pairs = ((source.staging, target.staging), (source.logs, target.logs), (source.state, target.state))
        with durable.explain(target.root, "setting the owners"):
            for old, new in (*pairs, (source.active, target.active)):
                with fsflags.opened(new) as descriptor:
                    transfer.adopt(descriptor, old.stat(), new)
            target.active.chmod(_OPEN_MODE)
            with unseal.opened_path(target.active / MARK_NAME) as descriptor:
                transfer.adopt(descriptor, (source.active / IDENTITY_NAME).stat(), target.active / IDENTITY_NAME)

    def _trees(self) -> tuple[Tree, Tree, Tree]:
        source, target = self._source, self._target
        return (
            Tree(source.active, target.active, _STAYS_IN_ACTIVE, optional=".quarantine"),
            Tree(source.state, target.state, _STAYS_IN_STATE),
            Tree(source.logs, target.logs, frozenset({unseal.LOST_AND_FOUND}), prune=False),
        )

    def _compare(self, digests: Mapping[str, str]) -> None:
        """What was damaged before is copied as it is, and said: the new place must not be blamed for it."""
        catalog = store.read_catalog(self._source)
        remarks = [f"{defect} (as it was)" for defect in catalog.defects]
        for backup in catalog.backups:
            if digests.get(backup.path_in_vault) != backup.manifest.sha256:
                remarks.append(f"{backup.path_in_vault} was damaged before the move: its digest is not the manifest's")
            remarks += [f"{backup.path_in_vault} was {backup.state} before the move: {p}" for p in backup.problems]
        for remark in remarks[:_NAMED_AT_MOST]:
            self._progress.warn(remark)
        if len(remarks) > _NAMED_AT_MOST:
            self._progress.warn(f"and {len(remarks) - _NAMED_AT_MOST} more like these")

    def _protect(self, new: Vault) -> None:
        with durable.explain(self._target.active, "protecting the copies"):
            for name in SEALED_DIRECTORIES if new.protection != "none" else ():
                with fsflags.opened(self._target.active / name) as directory:
                    _protect_directory(directory, flags=new.protection == "chattr")
                self._progress.step("move.directory-protected")
        self._progress.step("move.protected")

    def _hand_over(self, new: Vault, transfer: Transfer, logs: Tree) -> Moved:
        details = {"id": self._identity.id, "origin": str(self._source.root), "to": str(self._target.root)}
        left_behind = tuple(transfer.left_behind[:_LEFT_BEHIND_LIMIT])
        mark = Moved(id=self._identity.id, to=str(self._target.root), at=clock.now(), left_behind=left_behind)
        audit_log.record(self._vault, "vault moved", **details, left_behind=left_behind)
        try:
            self._progress.step("move.closing-recorded")
            transfer.copy(logs)
            self._progress.step("move.logs-copied")
            audit_log.record(new, "vault moved", **details, protection=new.protection)
            self._progress.step("move.opening-recorded")
            moved.write(self._source.state, mark)
        except BaseException as error:
            self._take_back(error)
            raise
        self._progress.step("move.handed-over")
        return mark

    def _take_back(self, error: BaseException) -> None:
        """The old vault goes on; its log must not end with a record that says otherwise."""
        try:
            if moved.read(self._source.state) is None:
                audit_log.record(
                    self._vault, "vault move undone", id=self._identity.id, reason=str(error) or type(error).__name__
                )
        except PgkeepError as second:
            # The first failure is what the caller must hear of.
            self._progress.warn(f"that the move was cut off could not be recorded: {second.message}")


def _target(source: Layout, new_root: Path) -> Layout:
    """Raises ``RefusedError`` where one place is the other, or lies in it."""
    here, there = source.root.resolve(), new_root.resolve()
    same = source.active.exists() and (there / "active").exists() and source.active.samefile(there / "active")
    if same or there.is_relative_to(here) or here.is_relative_to(there):
        raise RefusedError(f"{there} and {here} are one place, or one lies in the other", "name a place apart from it")
    if not os.fspath(there).isprintable():
        raise RefusedError(
            f"{str(there)!r} can't be written down in the audit log", "choose a path of printable characters"
        )
    return Layout(there)


def _whose(target: Layout) -> Identity | None:
    """Whose vault is there, or is being made there. Raises ``FormatError``, ``RefusedError``."""
    if target.exists:
        return read_identity(target)
    try:
        return msgspec.json.decode(read_sidecar(target.active / MARK_NAME, _MARK_LIMIT_BYTES), type=Identity)
    except NotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{target.active / MARK_NAME} is unreadable: {error}", "give another place") from error


def _require_usable(target: Layout, identity: Identity) -> None:
    """Raises ``RefusedError`` unless nothing is there yet, or a copy of this very vault that was cut off."""
    place = _whose(target)
    if place is not None and (place.id != identity.id or target.exists):
        what = "this vault, and it is not marked as moved here" if place.id == identity.id else f"the vault {place.id}"
        raise RefusedError(f"{target.root} holds {what}", "give an empty directory")
    if place is None and (strange := _strange(target)):
        raise RefusedError(f"{strange} is in the way: the vault goes to an empty place", "give an empty directory")


def _strange(target: Layout) -> Path | None:
    """What stands where the vault is to go, beside what images and mkfs make beforehand."""
    for path in _content(target.active):
        begun = path.name in _BEGINNINGS and path.is_dir() and not path.is_symlink() and not _content(path)
        canary = path.name == ".incoming" and not path.is_symlink()
        if not (begun or canary or path.name == unseal.LOST_AND_FOUND or durable.is_temporary(path.name)):
            return path
    for path in _content(target.state):
        if path.name not in ("lock", unseal.LOST_AND_FOUND) and not (path == target.journal and not _content(path)):
            return path
    for path in _content(target.logs):
        if path.name != unseal.LOST_AND_FOUND and not (path.is_file() and path.stat().st_size == 0):
            return path
    return None


def _content(directory: Path) -> list[Path]:
    with durable.explain(directory, "looking at what is there"):
        return sorted(directory.iterdir()) if directory.is_dir() else []


def _choose(target: Layout, wishes: Wishes, found: protection.Probe | None = None) -> protection.Choice:
    wanted = "auto" if wishes.allow_weaker else wishes.protection
    return protection.choose(found or protection.probe(target.incoming), wanted, os.geteuid() == 0)


def _protect_directory(directory: int, *, flags: bool) -> None:
    """Its files first. A name that a link or a FIFO has is no backup's, and is left alone."""
    for name in os.listdir(directory):
        if stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            with unseal.opened_regular(directory, name) as descriptor:
                mode = DUMP_MODE if name.endswith(names.DUMP_SUFFIX) else SIDECAR_MODE
                if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:  # another tier's name may have closed it already
                    os.fchmod(descriptor, mode)
                if flags:
                    fsflags.set_flag(descriptor, fsflags.IMMUTABLE, on=True)
                os.fsync(descriptor)
    # Closed by its mode where it came from, maybe; where the flag does that, the mode would lock the vault out.
    os.fchmod(directory, _OPEN_MODE)
    if flags:
        fsflags.set_flag(directory, fsflags.IMMUTABLE, on=True)
    os.fsync(directory)


def _open_at_last(new: Vault, progress: Progress) -> None:
    """Give the new place its identity: it is a vault from here on. Idempotent."""
    active = new.layout.active
    with durable.explain(active, "giving the new place its identity"):
        if not new.layout.exists:
            if not keep_reserve(new.layout):
                progress.warn(f"the disk is so full that nothing is in reserve for `pgkeep cleanup`: {active}")
            (active / MARK_NAME).rename(active / IDENTITY_NAME)
            durable.fsync_directory(active)
            progress.step("move.opened")
        new.close_directories()
    progress.step("move.closed")


def _say_whose(foreign: Mapping[tuple[int, int], list[str]], progress: Progress) -> None:
    for (uid, gid), paths in foreign.items():
        named = " ".join(shlex.quote(path) for path in paths[:_NAMED_AT_MOST])
        more = f" (and {len(paths) - _NAMED_AT_MOST} more)" if len(paths) > _NAMED_AT_MOST else ""
        progress.warn(
            f"pgkeep may not give files away, and these have another owner here: chown {uid}:{gid} {named}{more}"
        )


def _end(
    source: Layout, new: Vault, mark: Moved, wishes: Wishes, progress: Progress, *, asked_again: bool
) -> Relocation:
    """Remove the old place if that is wished. What was left behind there is removed only when asked once more."""
    done = Relocation(
        id=mark.id,
        origin=source.root,
        to=new.layout.root,
        protection=new.protection,
        left_behind=mark.left_behind,
        removed=False,
    )
    if not wishes.remove_old:
        return done
    if mark.left_behind and not asked_again:
        progress.warn("the old place stays, because something was left behind there; to remove it too, run this again")
        return done
    audit_log.record(new, "old place removed", id=mark.id, origin=str(source.root), left_behind=mark.left_behind)
    progress.step("move.removing")
    for directory in (source.active, source.logs, source.state):
        if directory.exists():
            unseal.clear(directory, progress)
    left = unseal.remove_vault(source, progress, logs=True)
    return dataclasses.replace(done, removed=True, left=tuple(left))
