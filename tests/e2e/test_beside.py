"""pgkeep's Compose file beside an application's own, with Compose V2, on schedule."""

from __future__ import annotations

import gzip
from pathlib import Path

from tests.e2e.conftest import NewStack
from tests.e2e.stack import SERVICES, wait_until
from tests.e2e.test_compose import APPLICATION

# A minute until the schedule's next, and some for dump and copy.
NEXT_MINUTE_SECONDS = 90.0
# The dump begins soon after the minute that it is due.
LATE_SECONDS = 20


def test_backups_are_made_on_schedule_beside_an_application(new_stack: NewStack) -> None:
    stack = new_stack("beside", {"BACKUP_SCHEDULE": "* * * * *"}, compose_file=APPLICATION, compose_version="2")
    stack.start_application()
    stack.start()
    networks = "{{range $name, $network := .NetworkSettings.Networks}}{{$name}} {{end}}"
    assert stack.inspect("backup-extractor", networks).split() == ["beside_backend_net"]
    assert stack.inspect("backup-agent", networks).split() == ["beside_data_net"]
    for service in SERVICES:
        assert stack.inspect(service, '{{index .Config.Labels "com.docker.compose.project"}}') == "beside"

    def after_the_first() -> list[Path]:
        """One is made at the start, because there is none; no command asks for the next."""
        return stack.extracted("hourly")[1:]

    due = wait_until(after_the_first, "the next hourly backup", NEXT_MINUTE_SECONDS)[0]
    assert int(due.name[17:19]) < LATE_SECONDS
    assert b"COPY public.users" in gzip.decompress(due.read_bytes())
