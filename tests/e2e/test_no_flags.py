"""Where the filesystem has no immutable flag: the agent gets the backups read-only, and nobody says "immutable"."""

from __future__ import annotations

import json

from tests.e2e.conftest import NewStack
from tests.e2e.stack import AGENT_UID, Stack

FILES = "docker-compose.yml:pgkeep/deploy/compose.no-flags.yaml"


def test_modes_and_a_read_only_mount_protect_without_flags(new_stack: NewStack) -> None:
    stack = new_stack("no-flags", {"COMPOSE_FILE": FILES})
    stack.start_application()
    stack.start()
    before = stack.digests()
    (dump,) = stack.sealed("daily")
    path = f"/backups/active/daily/{dump}"

    for user in (AGENT_UID, 0):
        # The owner forbids the first before the mount is asked.
        assert "Permission denied" in _refusal(stack, user, f"echo hack >> {path}")
        for attempt in (f"rm -f {path}", f"mv {path} {path}.old", "touch /backups/active/x", f"chmod 777 {path}"):
            assert "Read-only file system" in _refusal(stack, user, attempt)
    stack.assert_untouched(before)

    manifest = stack.execute("backup-agent", "cat", f"{path}.manifest.json").stdout
    assert json.loads(manifest)["protection"] == "mode"
    assert json.loads(manifest)["immutable"] is False
    flags = stack.engine.output("run", "--rm", "--volumes-from", stack.container("backup-vault"), "--user", "0",
                                "--entrypoint", "lsattr", "pgkeep-vault:local", path)  # fmt: skip
    assert "i" not in flags.split()[0]
    # The agent hears from the vault all the same.
    assert b"0 removed" in stack.execute("backup-agent", "backup.py", "cleanup").stdout


def _refusal(stack: Stack, user: int, attempt: str) -> str:
    done = stack.execute("backup-agent", "sh", "-c", attempt, user=user, check=False)
    assert done.return_code != 0
    return done.stderr
