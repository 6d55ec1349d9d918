"""How commands that are run beside the service reach it: it alone has the lock, and the right to lift flags.

``state/inbox/<id>.ask.json`` is a wish, ``<id>.answer.json`` what came of it. Only the vault's own user can get there.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence

import msgspec

from pgkeep.adapters import clock, durable
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain import health, mailbox, names
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.mailbox import Ask
from pgkeep.domain.retention import Decision, Rule
from pgkeep.errors import BusyError, FormatError, NotFoundError, PgkeepError
from pgkeep.vault.layout import Layout

_ASK_SUFFIX = ".ask.json"
_ANSWER_SUFFIX = ".answer.json"
_ANSWER_LIMIT_BYTES = 64 * 1024 * 1024
_ASKS_AT_ONCE = 16
# Whoever asked has left by then.
_ANSWER_KEPT_SECONDS = 3600.0
_POLL_SECONDS = 0.1
_LOCK_RECORD_BYTES = 4096


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A decision on one backup, named by its path below ``active/``."""

    path: str
    keep: bool
    reason: str
    rule: Rule


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a wish. ``error`` empty: it was fulfilled."""

    id: str
    error: str = ""
    hint: str = ""
    exit_code: int = 0
    decisions: tuple[Line, ...] = ()


class RemoteError(PgkeepError):
    """The service tried, and says why it could not; with the exit code of its own error."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.error, answer.hint)
        self.exit_code = answer.exit_code  # type: ignore[misc]


# ---------------------------------------------------------------- whoever asks


def is_served(layout: Layout) -> bool:
    """Is the lock held by a service that reads the inbox? Its health file names the process that the lock names."""
    try:
        told = health.decode(read_sidecar(layout.health, health.SIZE_LIMIT_BYTES))
        descriptor = os.open(layout.lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FormatError, NotFoundError, FileNotFoundError):
        return False
    try:
        return _holder(descriptor) == told.pid and _is_locked(descriptor)
    finally:
        os.close(descriptor)


def ask_to_clean_up(layout: Layout, held: Sequence[SealedBackup], wait_seconds: float) -> list[Decision]:
    """Post the wish and wait for what comes of it. ``held``: the backups that the answer may speak of.

    Raises ``RemoteError`` (the service's own error), ``BusyError`` when the time is up: the wish is taken back.
    """
    wish = mailbox.Ask(id=names.new_identifier(clock.now()), command="cleanup", asked_at=clock.now())
    durable.write_atomically(layout.inbox, wish.id + _ASK_SUFFIX, mailbox.encode(wish), 0o600)
    try:
        answer = _wait(layout, wish.id, wait_seconds)
    finally:
        for suffix in (_ASK_SUFFIX, _ANSWER_SUFFIX):
            (layout.inbox / f"{wish.id}{suffix}").unlink(missing_ok=True)
    if answer.error:
        raise RemoteError(answer)
    by_path = {backup.path_in_vault: backup for backup in held}
    return [
        Decision(by_path[line.path], line.keep, line.reason, line.rule)
        for line in answer.decisions
        if line.path in by_path
    ]


def _wait(layout: Layout, identifier: str, wait_seconds: float) -> Answer:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return _decode(read_sidecar(layout.inbox / f"{identifier}{_ANSWER_SUFFIX}", _ANSWER_LIMIT_BYTES))
        except NotFoundError:
            if time.monotonic() >= deadline:
                hint = "is it at work on a large dump? `pgkeep health vault` says more"
                raise BusyError("the vault's service has not answered in time", hint) from None
        time.sleep(_POLL_SECONDS)


def _holder(descriptor: int) -> int | None:
    try:
        record = json.loads(os.pread(descriptor, _LOCK_RECORD_BYTES, 0))
        return int(record["pid"])
    except (ValueError, KeyError, TypeError):
        return None


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


# ---------------------------------------------------------------- the service


def prepare(layout: Layout) -> None:
    """Raises ``StorageError``."""
    with durable.explain(layout.inbox, "making the inbox"):
        layout.inbox.mkdir(mode=0o700, exist_ok=True)


def pending(layout: Layout) -> Iterator[Ask]:
    """The oldest wishes; what is none is removed. Old answers go, too. Raises ``StorageError``."""
    with durable.explain(layout.inbox, "reading the inbox"):
        present = sorted(os.listdir(layout.inbox))
        wishes = [name for name in present if name.endswith(_ASK_SUFFIX)]
        for name in set(present) - set(wishes):
            _remove_if_old(layout, name)
    for name in wishes[:_ASKS_AT_ONCE]:
        try:
            wish = mailbox.decode_ask(read_sidecar(layout.inbox / name, mailbox.SIZE_LIMIT_BYTES))
        except NotFoundError:
            continue
        except FormatError:
            (layout.inbox / name).unlink(missing_ok=True)
            continue
        yield wish


def answer(layout: Layout, given: Answer) -> None:
    """Raises ``StorageError``."""
    durable.write_atomically(layout.inbox, given.id + _ANSWER_SUFFIX, msgspec.json.encode(given), 0o600)
    (layout.inbox / f"{given.id}{_ASK_SUFFIX}").unlink(missing_ok=True)


def lines(decisions: Sequence[Decision]) -> tuple[Line, ...]:
    return tuple(
        Line(path=each.backup.path_in_vault, keep=each.keep, reason=each.reason, rule=each.rule) for each in decisions
    )


def _remove_if_old(layout: Layout, name: str) -> None:
    path = layout.inbox / name
    try:
        age_seconds = time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return
    if age_seconds > _ANSWER_KEPT_SECONDS or age_seconds < -_ANSWER_KEPT_SECONDS:
        path.unlink(missing_ok=True)


def _decode(data: bytes) -> Answer:
    try:
        return msgspec.json.decode(data, type=Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the service's answer is malformed: {error}") from error
