"""A cage for code that reads hostile bytes: bounded memory, time and files, and no way to another process.

setrlimit(2) and a seccomp(2) filter; both hold for good, for every thread started afterwards. A filter needs
``no_new_privs`` (:mod:`pgkeep.adapters.privileges`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterator, Mapping
from typing import Final

# linux/prctl.h, linux/seccomp.h, linux/audit.h, linux/filter.h, linux/sched.h
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000
_REFUSE: Final = 0x00050000
_LOAD_WORD: Final = 0x20
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_AT_LEAST: Final = 0x35
_JUMP_IF_ANY_BIT: Final = 0x45
_RETURN: Final = 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16
_X32_CALLS: Final = 0x40000000
_CLONE_THREAD: Final = 0x00010000


@dataclasses.dataclass(frozen=True, slots=True)
class _Calls:
    """One architecture's numbers. ``refused``: other processes, the network, more of the kernel than is needed."""

    audit: int
    clone: int
    clone3: int
    prlimit64: int
    refused: tuple[int, ...]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


# In this order: fork, vfork, execve, execveat, kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo,
# pidfd_send_signal, pidfd_open, pidfd_getfd, ptrace, process_vm_readv, process_vm_writev, socket, connect, bind,
# io_uring_setup, userfaultfd, bpf, unshare, setns, perf_event_open, mount, add_key, request_key, keyctl,
# open_by_handle_at, shmget, msgget, semget, mq_open. From the kernel's unistd.h of each.
_ARCHITECTURES: Final[Mapping[str, _Calls]] = {
    "x86_64": _Calls(
        audit=0xC000003E,
        clone=56,
        clone3=435,
        prlimit64=302,
        refused=_numbers(
            "57 58 59 322 62 200 234 129 297 424 434 438 101 310 311 41"
            " 42 49 425 323 321 272 308 298 165 248 249 250 304 29 68 64 240"
        ),
    ),
    # It has no fork or vfork.
    "aarch64": _Calls(
        audit=0xC00000B7,
        clone=220,
        clone3=435,
        prlimit64=261,
        refused=_numbers(
            "221 281 129 130 131 138 240 424 434 438 117 270 271 198 203"
            " 200 425 282 280 97 268 241 40 217 218 219 265 194 186 190 180"
        ),
    ),
}


def limit(memory_bytes: int, processor_seconds: int, processors: int) -> None:
    """Bound this process for good: address space, processor time, processors; and it writes into no file."""
    for what, amount, spare in (
        (resource.RLIMIT_AS, memory_bytes, 0),
        # At the first it is SIGXCPU, which says what happened; at the second SIGKILL.
        (resource.RLIMIT_CPU, processor_seconds, 1),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 0),
    ):
        _, most = resource.getrlimit(what)
        hard = amount + spare if most == resource.RLIM_INFINITY else min(amount + spare, most)
        resource.setrlimit(what, (min(amount, hard), hard))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])


def refuse_system_calls() -> bool:
    """No new process, no signal to another one, no network, for every thread from now on.

    False where the machine's call numbers are not known here, or the kernel has no filters: the other limits hold all
    the same.
    """
    calls = _ARCHITECTURES.get(platform.machine())
    if calls is None:
        return False
    program = b"".join(_program(calls))
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, and where they are.
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong)
    return int(library.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0)) == 0


def _program(calls: _Calls) -> Iterator[bytes]:
    """Classic BPF: jumps skip instructions that follow."""
    yield _instruction(_LOAD_WORD, _ARCHITECTURE_OFFSET)
    yield _instruction(_JUMP_IF_EQUAL, calls.audit, 1, 0)
    yield _instruction(_RETURN, _KILL)
    yield _instruction(_LOAD_WORD, _NUMBER_OFFSET)
    if platform.machine() == "x86_64":
        yield _instruction(_JUMP_IF_AT_LEAST, _X32_CALLS, 0, 1)
        yield _instruction(_RETURN, _REFUSE | errno.EPERM)
    for number in calls.refused:
        yield _instruction(_JUMP_IF_EQUAL, number, 0, 1)
        yield _instruction(_RETURN, _REFUSE | errno.EPERM)
    # The C library falls back to clone, whose flags a filter can read.
    yield _instruction(_JUMP_IF_EQUAL, calls.clone3, 0, 1)
    yield _instruction(_RETURN, _REFUSE | errno.ENOSYS)
    yield _instruction(_JUMP_IF_EQUAL, calls.clone, 0, 4)
    yield _instruction(_LOAD_WORD, _FIRST_ARGUMENT_OFFSET)
    yield _instruction(_JUMP_IF_ANY_BIT, _CLONE_THREAD, 0, 1)
    yield _instruction(_RETURN, _ALLOW)
    yield _instruction(_RETURN, _REFUSE | errno.EPERM)
    # Its own limits may be read; another's may not be lowered.
    yield _instruction(_JUMP_IF_EQUAL, calls.prlimit64, 0, 3)
    yield _instruction(_LOAD_WORD, _FIRST_ARGUMENT_OFFSET)
    yield _instruction(_JUMP_IF_EQUAL, 0, 1, 0)
    yield _instruction(_RETURN, _REFUSE | errno.EPERM)
    yield _instruction(_RETURN, _ALLOW)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("@HBBI", code, if_true, if_false, value)
