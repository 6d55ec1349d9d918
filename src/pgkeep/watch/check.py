"""One line of ``pgkeep doctor``, and how an error becomes one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Literal

from pgkeep.errors import PgkeepError

Status = Literal["ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it stands, what was seen, and what to do about it (empty where it is ok)."""

    name: str
    status: Status
    message: str
    remedy: str = ""


def guarded(name: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """All that ``look`` finds; an error on the way is its last finding, so that the other checks still run.

    What another role's user keeps to itself is no failure of this one's.
    """
    found: list[Check] = []
    try:
        found.extend(look())
    except PgkeepError as error:
        found.append(failed(name, error))
    except PermissionError as error:
        text = f"{error.filename} can't be looked at by user id {os.geteuid()}"
        found.append(Check(name, "warn", text, "run doctor as the user that it belongs to"))
    return found


def failed(name: str, error: PgkeepError) -> Check:
    return Check(name, "fail", error.message, error.hint)


def some(names: list[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
