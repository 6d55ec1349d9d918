"""What agent and vault tell each other beside the dumps: strictly read, because either may be in other hands.

The agent leaves ``staging/<id>.ready/`` (a dump, see :mod:`pgkeep.domain.request`), ``<id>.failed/`` or
``<id>.asked/``; the vault answers each with ``active/.outcomes/<id>.json``, after which the agent removes its entry.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from pgkeep.domain.manifest import Moment
from pgkeep.domain.names import Tier
from pgkeep.errors import FormatError

PARTIAL_SUFFIX = ".partial"
READY_SUFFIX = ".ready"
FAILED_SUFFIX = ".failed"
ASKED_SUFFIX = ".asked"
FAILURE_NAME = "failure.json"
ASK_NAME = "ask.json"
OUTCOMES_DIRECTORY = ".outcomes"
SIZE_LIMIT_BYTES = 64 * 1024

Identifier = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}\Z")]
_Message = TypeVar("_Message")
_Text = Annotated[str, msgspec.Meta(max_length=4096)]


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A backup that did not come about, for the audit log. ``subject`` is the database or "globals"."""

    id: Identifier
    tiers: Annotated[tuple[Tier, ...], msgspec.Meta(min_length=1, max_length=len(Tier))]
    subject: _Text
    reason: _Text
    failed_at: Moment
    interrupted: bool = False


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A wish that is not a dump. What it may be is the vault's to say."""

    id: Identifier
    command: Literal["cleanup"]
    asked_at: Moment


class SealedName(msgspec.Struct, frozen=True, kw_only=True):
    """One name that a dump got: ``path`` below ``active/``."""

    id: str
    path: str
    tier: Tier


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The vault's answer to one entry.

    ``sealed``: see ``names``. ``refused``: the dump itself, or the quota: another try of the same won't help.
    ``failed``: the vault's own trouble (disk full): a later try may. ``noted``, ``done``: a failure, a wish.
    """

    id: str
    state: Literal["sealed", "refused", "failed", "noted", "done"]
    time: Moment
    message: str = ""
    hint: str = ""
    names: tuple[SealedName, ...] = ()


def encode(message: Failure | Ask | Outcome) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def decode_failure(data: bytes) -> Failure:
    """Raises ``FormatError``."""
    return _decode(data, Failure, "failure report")


def decode_ask(data: bytes) -> Ask:
    """Raises ``FormatError``."""
    return _decode(data, Ask, "wish")


def decode_outcome(data: bytes) -> Outcome:
    """Raises ``FormatError``."""
    return _decode(data, Outcome, "outcome")


def outcome_name(identifier: str) -> str:
    return f"{identifier}.json"


def _decode(data: bytes, kind: type[_Message], what: str) -> _Message:
    if len(data) > SIZE_LIMIT_BYTES:
        raise FormatError(f"the {what} is larger than {SIZE_LIMIT_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the {what} is malformed: {error}") from error
