"""What a service's process may, and root beside it in the same container: its capabilities, its mounts, its network.

The bounding set counts, not what an ordinary user has: ``docker exec -u 0`` gets all of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from pgkeep.adapters import fsflags, privileges
from pgkeep.adapters.privileges import CAP_LINUX_IMMUTABLE, Standing
from pgkeep.adapters.protection import Wanted
from pgkeep.errors import ProtectionError
from pgkeep.vault.layout import is_flagged
from pgkeep.watch.check import Check, some

Reader = Literal["agent", "extractor"]

# linux/capability.h, from 0 on
# fmt: off
_NAMES: Final = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)
# fmt: on
_OF_THE_VAULT: Final = frozenset({"SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE"})
_ROUTES: Final = Path("/proc/net/route")


def of_reader(role: Reader, active: Path) -> Iterator[Check]:
    """What agent and extractor must not be able to do to the backups. Raises ``ProtectionError`` without /proc."""
    standing = privileges.standing()
    given = capability_names(standing.bounding | standing.permitted)
    read_only = is_mounted_read_only(active)
    danger = _danger(given, read_only)
    if danger:
        remedy = (
            f"in the Compose file: `cap_drop: [ALL]`, no `cap_add` and no `privileged` for backup-{role}; "
            "under systemd: CapabilityBoundingSet="
        )
        text = f"{danger}: root here can lift the protection of every backup in {active}"
        yield Check("capabilities", "fail", text, remedy)
    elif given:
        text = f"the {role} needs none of its capabilities: {some(given)}"
        yield Check("capabilities", "warn", text, f"`cap_drop: [ALL]` for backup-{role} in the Compose file")
    else:
        yield Check("capabilities", "ok", "none, for root neither")
    yield _mount(role, active, read_only=read_only)


def _danger(given: list[str], read_only: bool) -> str:
    """What is wrong, or nothing."""
    if "LINUX_IMMUTABLE" in given and not read_only:
        return "the capability LINUX_IMMUTABLE was given, and the backups are mounted read-write"
    if {"LINUX_IMMUTABLE", "SYS_ADMIN"} <= set(given):
        return "the capabilities LINUX_IMMUTABLE and SYS_ADMIN were given, which together undo a read-only mount"
    return ""


def _mount(role: Reader, active: Path, *, read_only: bool) -> Check:
    if not active.is_dir():
        return Check("backups' mount", "warn", f"{active} is not there", "mount the vault's volume there")
    if read_only:
        return Check("backups' mount", "ok", f"{active} is mounted read-only")
    if os.access(active, os.W_OK):
        remedy = "only the vault's user owns it: chown 10002:10002, or mount it read-only here"
        return Check("backups' mount", "fail", f"user id {os.geteuid()} may write in {active}", remedy)
    if role == "extractor":
        text = f"{active} is mounted read-write; the extractor only reads"
        return Check("backups' mount", "warn", text, "mount it `:ro` for backup-extractor in the Compose file")
    if not is_flagged(active):
        text = f"{active} carries no immutable flag and is mounted read-write"
        return Check("backups' mount", "warn", text, "add compose.no-flags.yaml, which mounts it read-only here")
    return Check("backups' mount", "ok", f"{active} is mounted read-write as the guide has it, and protected by flags")


def of_vault(started: Standing, wanted: Wanted) -> Iterator[Check]:
    """``started``: what this process was before it became the vault's own user."""
    given = capability_names(started.permitted)
    spare = [name for name in given if name not in _OF_THE_VAULT]
    if started.may_set_flags:
        yield Check("capabilities", "ok", "LINUX_IMMUTABLE, the right to set the immutable flag")
    elif started.uids[0] != 0:
        remedy = "as the container's root: `docker exec CONTAINER pgkeep doctor`"
        yield Check("capabilities", "warn", f"not known: run by user id {started.uids[0]}, who has none", remedy)
    else:
        status: Literal["warn", "fail"] = "fail" if wanted in ("auto", "chattr") else "warn"
        yield Check("capabilities", status, "LINUX_IMMUTABLE is missing: no flag can be set", fsflags.CAPABILITY_HINT)
    if spare:
        text = f"the vault needs none of these capabilities: {some(spare)}"
        yield Check("capabilities", "warn", text, "`cap_drop: [ALL]` beside `cap_add` for backup-vault")


def network() -> Iterator[Check]:
    """The vault needs none. By the kernel's routes, of which the first line is a heading."""
    try:
        routes = _ROUTES.read_text().splitlines()[1:]
    except FileNotFoundError:
        routes = []
    if routes:
        text = "this process has a way to a network; a vault needs none"
        yield Check("network", "warn", text, "`network_mode: none` for backup-vault in the Compose file")
    else:
        yield Check("network", "ok", "none")


def warnings(role: Reader, active: Path) -> Iterator[str]:
    """What a service says when it starts: what would cost the backups, not what is merely more than it needs."""
    try:
        for check in of_reader(role, active):
            if check.status == "fail":
                yield f"{check.message}; {check.remedy}"
    except (ProtectionError, PermissionError) as error:
        yield f"what this process may is not known: {error}"


def capability_names(mask: int) -> list[str]:
    """As the Compose file spells them; what is newer than this list by its number."""
    named = [_NAMES[number] if number < len(_NAMES) else f"CAP_{number}" for number in range(64) if mask >> number & 1]
    return sorted(named, key=lambda name: name != _NAMES[CAP_LINUX_IMMUTABLE])


def is_mounted_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except FileNotFoundError:
        return False
