"""Give rights up for good: root becomes an ordinary user who keeps, at most, the right to set inode flags.

By setresuid(2), capset(2) and prctl(2) (capabilities(7)). They change the calling thread only, so this comes before
any thread is started. The kernel's word in /proc/self/status decides whether it worked, not the calls' results.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import pwd
import signal
from pathlib import Path
from typing import Final

from pgkeep.errors import ConfigurationError, ProtectionError

CAP_LINUX_IMMUTABLE: Final = 9
CAP_LAST_PROBED: Final = 63
NOBODY: Final = 65534

# linux/prctl.h, linux/capability.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION: Final = 0x20080522

_ADDED_HINT: Final = "start the service as root with `cap_add: [LINUX_IMMUTABLE, SETUID, SETGID, SETPCAP]`"


@dataclasses.dataclass(frozen=True, slots=True)
class User:
    """Whom to become: ids, and every group that the user is in."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """What a process may, as /proc/PID/status shows it. The capability sets are bit masks."""

    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    no_new_privileges: bool

    @property
    def may_set_flags(self) -> bool:
        return bool(self.effective >> CAP_LINUX_IMMUTABLE & 1)


def find_user(name: str) -> User:
    """By name or number. Raises ``ConfigurationError`` where there is no such user."""
    try:
        found = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        hint = "make it (useradd --system), or leave PGKEEP_VAULT_USER unset"
        raise ConfigurationError(f"there is no user {name!r} to become", hint) from None
    return User(found.pw_name, found.pw_uid, found.pw_gid, tuple(sorted(os.getgrouplist(found.pw_name, found.pw_gid))))


def become(name: str) -> bool:
    """From root to that user for good, keeping CAP_LINUX_IMMUTABLE alone: not for children, not across an exec.

    False where the capability was not there to keep. Nothing happens where we are that user already.
    Raises ``ConfigurationError`` (no such user), ``ProtectionError`` (not root, or a right could not be given up).
    """
    user = find_user(name)
    if os.geteuid() == user.uid:
        return standing().may_set_flags
    _give_up(user, standing().permitted & 1 << CAP_LINUX_IMMUTABLE)
    return standing().may_set_flags


def step_down(name: str) -> None:
    """From root to that user without any capability. Raises as :func:`become`."""
    user = find_user(name)
    if os.geteuid() != user.uid:
        _give_up(user, 0)


def renounce(uid: int = NOBODY) -> None:
    """Without any capability, and as root also with the user and group ``uid`` and no other group.

    Whoever is not root stays who he is. Raises ``ProtectionError``.
    """
    if os.geteuid() == 0:
        _give_up(User(str(uid), uid, uid, ()), 0)
    else:
        _confine(0)
        _require(standing(), None, 0)


def standing(process: int | str = "self") -> Standing:
    """What a process may. Raises ``ProtectionError`` without /proc."""
    try:
        lines = Path("/proc", str(process), "status").read_text().splitlines()
    except OSError as error:
        raise ProtectionError(f"what process {process} may can't be read: {error.strerror}", "mount /proc") from error
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}

    def mask(key: str) -> int:
        return int(fields[key][0], 16)

    return Standing(
        uids=tuple(map(int, fields["Uid"])),
        gids=tuple(map(int, fields["Gid"])),
        groups=tuple(map(int, fields["Groups"])),
        inheritable=mask("CapInh"),
        permitted=mask("CapPrm"),
        effective=mask("CapEff"),
        bounding=mask("CapBnd"),
        ambient=mask("CapAmb"),
        no_new_privileges=fields["NoNewPrivs"] == ["1"],
    )


def hide_from_own_user() -> None:
    """Others of the same user may neither trace this process nor read its memory, descriptors or environment."""
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Get this signal when the parent's thread ends. Forgotten by the kernel whenever the user changes."""
    _prctl(_PR_SET_PDEATHSIG, number)


def _give_up(user: User, kept: int) -> None:
    try:
        _prctl(_PR_SET_KEEPCAPS, 1)
        _empty_bounding_set()
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        _prctl(_PR_SET_KEEPCAPS, 0)
        _confine(kept)
    except OSError as error:
        message = f"this process (uid {os.geteuid()}) can't become {user.name}: {error.strerror}"
        raise ProtectionError(message, _ADDED_HINT) from error
    _require(standing(), user, kept)


def _confine(kept: int) -> None:
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _set_capabilities(kept)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _require(now: Standing, user: User | None, kept: int) -> None:
    """Raises ``ProtectionError`` unless the kernel says that all else is gone."""
    capabilities = (now.permitted, now.effective, now.inheritable, now.ambient) == (kept, kept, 0, 0)
    identity = user is None or (
        set(now.uids) == {user.uid} and set(now.gids) == {user.gid} and set(now.groups) <= {user.gid, *user.groups}
    )
    if not (capabilities and identity and now.no_new_privileges):
        raise ProtectionError(f"rights were given up, and the kernel shows others: {now}", "report this")


def _empty_bounding_set() -> None:
    """As far as we may: without SETPCAP it stays, and ``no_new_privs`` alone keeps an exec from gaining anything."""
    for number in range(CAP_LAST_PROBED + 1):
        if _libc().prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
            _libc().prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)


def _set_capabilities(mask: int) -> None:
    """Permitted and effective; nothing inheritable."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _check(_libc().capset(ctypes.byref(header), ctypes.byref(data)))


def _prctl(option: int, argument: int, third: int = 0) -> None:
    _check(_libc().prctl(option, argument, third, 0, 0))


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
    return library
