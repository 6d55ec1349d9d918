"""What this machine and this process bring along: programs, clock, the boundary between the roles."""

from __future__ import annotations

import datetime as dt
import platform
import shutil
import time
from collections.abc import Iterator

from pgkeep import __version__
from pgkeep.adapters import pgbinaries, process
from pgkeep.watch.check import Check

# Before the first release, and past any certificate's and any file system's time: a clock that says so is wrong.
_PLAUSIBLE_YEARS = range(2025, 2100)
# The backup that was sealed last may be a moment ahead where two machines share a vault.
_CLOCK_TOLERANCE = dt.timedelta(minutes=1)
_SETPRIV_SECONDS = 10.0


def version() -> Iterator[Check]:
    yield Check("version", "ok", f"pgkeep {__version__}, Python {platform.python_version()}, {platform.platform()}")


def tools() -> Iterator[Check]:
    """Raises ``ToolError``."""
    found = pgbinaries.survey()
    for each in found.installations:
        lacking = [name for name in ("pg_dump", "pg_restore", "psql") if not each.has(name)]
        text = f"PostgreSQL {each.version} in {each.directory} ({each.source})"
        yield Check("tools", "ok", text + (f", without {', '.join(lacking)}" if lacking else ""))
    for text in found.rejected:
        yield Check("tools", "warn", f"not usable: {text}", "mend or remove it")
    if not any(each.has("pg_dump") for each in found.installations):
        remedy = f"install postgresql-client, or name its directory in {pgbinaries.CONFIGURED_VARIABLE}"
        yield Check("tools", "fail", "no pg_dump was found", remedy)


def setpriv() -> Iterator[Check]:
    """Without it a pg_dump outlives a pgkeep that was killed, and goes on writing."""
    path = shutil.which("setpriv")
    works = path is not None and _sets_death_signal(path)
    text = "children die with pgkeep" if works else "a pg_dump would outlive a pgkeep that is killed with -9"
    remedy = "" if works else "install util-linux (its setpriv knows --pdeathsig)"
    yield Check("setpriv", "ok" if works else "warn", text, remedy)


def _sets_death_signal(path: str) -> bool:
    completed = process.run([path, "--pdeathsig=KILL", "--", "true"], timeout_seconds=_SETPRIV_SECONDS)
    return completed.return_code == 0


def boundary() -> Iterator[Check]:
    yield Check(
        "boundary",
        "warn",
        "agent and vault are one process here: a captured agent process is a captured vault",
        "keep copies on a machine that this one can't write to",
    )


def clock(now: dt.datetime, newest_sealed_at: dt.datetime | None, schedule_zone: str) -> Check:
    """Pure but for the machine's own zone: retention lives by the clock."""
    zone = f"schedule in {schedule_zone}, this machine in {time.strftime('%Z (%z)')}"
    remedy = "set the clock (timedatectl, chrony): what has expired is decided by it"
    if now.year not in _PLAUSIBLE_YEARS:
        return Check("clock", "fail", f"the clock says {now:%Y-%m-%d %H:%M} UTC", remedy)
    if newest_sealed_at is not None and now + _CLOCK_TOLERANCE < newest_sealed_at:
        text = f"the clock says {now:%Y-%m-%d %H:%M} UTC, before the newest backup was sealed ({newest_sealed_at})"
        return Check("clock", "fail", text, remedy)
    return Check("clock", "ok", f"{now:%Y-%m-%d %H:%M:%S} UTC ({zone})")
