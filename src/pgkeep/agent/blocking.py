"""Who waits for the dump's locks: looked at once a second while pg_dump runs, on a connection of its own.

pg_dump locks every table against changes of its definition. An ``ALTER TABLE`` that waits for that makes everybody
who comes after it wait too, readers included.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from pgkeep.adapters import postgres
from pgkeep.errors import PgkeepError

SAMPLE_SECONDS = 1.0
WARNING_SECONDS = 5.0
_STATEMENT_TIMEOUT = "5s"
_LEAVING_SECONDS = 2.0
# pg_locks and application_name may be read by every role; what others' sessions do may not. To the one who waits behind
# somebody who waits for us, pg_blocking_pids names that somebody: so the chain is followed.
_QUERY = """
    WITH RECURSIVE waiting AS MATERIALIZED (
        SELECT pid, pg_blocking_pids(pid) AS blockers
        FROM (SELECT DISTINCT pid FROM pg_locks WHERE NOT granted) AS ungranted
    ), ours AS (
        SELECT pid FROM pg_stat_activity WHERE application_name = %s
    ), blocked AS (
        SELECT pid FROM ours
        UNION
        SELECT waiting.pid FROM waiting JOIN blocked ON blocked.pid = ANY (waiting.blockers)
    )
    SELECT pid FROM blocked EXCEPT SELECT pid FROM ours
"""


class Sampler:
    """What was seen so far. ``sessions``: how many waited; ``longest_seconds``: the longest that one was seen to.

    ``failure``: why nothing (more) can be seen, or "".
    """

    def __init__(self, target: postgres.Target, application_name: str) -> None:
        self.sessions = 0
        self.longest_seconds = 0.0
        self.failure = ""
        self._target = target
        self._application_name = application_name
        self._ended = threading.Event()
        self._waiting_since: dict[int, float] = {}
        self._alarmed = False

    def alarm(self) -> str:
        """A sentence, once, as soon as somebody waits for too long; else ""."""
        if self._alarmed or self.longest_seconds <= WARNING_SECONDS:
            return ""
        self._alarmed = True
        return f"the dump's locks hold up other sessions: one has waited for {self.longest_seconds:.0f} s"

    def notes(self) -> list[str]:
        """What is worth keeping with the backup, once the dump is over."""
        found = []
        if self.longest_seconds > WARNING_SECONDS:
            whom = f"other sessions ({self.sessions}), one of them for {self.longest_seconds:.0f} s"
            found.append(f"the dump's locks held up {whom}")
        if self.failure:
            found.append(f"whether the dump held up other sessions was not measured to its end: {self.failure}"[:1000])
        return found

    def sample_until_ended(self) -> None:
        """A thread's work."""
        try:
            with postgres.connect(self._target) as connection:
                connection.execute(f"SET statement_timeout = '{_STATEMENT_TIMEOUT}'")
                while not self._ended.wait(SAMPLE_SECONDS):
                    rows = connection.execute(_QUERY, (self._application_name,)).fetchall()
                    self._take({pid for (pid,) in rows})
        except PgkeepError as error:
            # A dump is worth more than a measurement of it; the reason goes into the notes.
            self.failure = error.message

    def end(self) -> None:
        self._ended.set()

    def _take(self, waiting: set[int]) -> None:
        now = time.monotonic()
        self.sessions += len(waiting - self._waiting_since.keys())
        self._waiting_since = {pid: self._waiting_since.get(pid, now) for pid in waiting}
        longest = max((now - since for since in self._waiting_since.values()), default=0.0)
        self.longest_seconds = max(self.longest_seconds, longest)


@contextlib.contextmanager
def sampled(target: postgres.Target, application_name: str) -> Iterator[Sampler]:
    """Sample during the block. ``application_name``: of the dump's own sessions. Raises nothing of its own."""
    sampler = Sampler(target, application_name)
    # A server that does not answer any more must not keep the process from ending.
    thread = threading.Thread(target=sampler.sample_until_ended, name="blocking", daemon=True)
    thread.start()
    try:
        yield sampler
    finally:
        sampler.end()
        thread.join(_LEAVING_SECONDS)
