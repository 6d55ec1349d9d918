"""What went wrong, from what rsync and ssh say: the cause, and what to do about it."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from typing import Final

from pgkeep.adapters.process import Completed
from pgkeep.errors import PgkeepError, RefusedError, StorageError, ToolError

# Of a program's own words so much is shown.
_SHOWN_LINES: Final = 3
_SHOWN_CHARACTERS: Final = 400
# rsync(1), EXIT VALUES.
_OLD_PROTOCOL: Final = 2
_TIMEOUTS: Final = frozenset({30, 35})
_NOT_FOUND_BY_SHELL: Final = 127
_SSH_FAILED: Final = 255


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """How errors name the server and the files that say whom to trust and who we are."""

    label: str
    host: str
    port: int
    key_file: str
    known_hosts_file: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Cause:
    """``pattern`` in the messages; ``message`` follows the label; ``code``: the errno that it amounts to."""

    pattern: str
    message: str
    hint: str
    kind: type[PgkeepError] = StorageError
    code: int = 0


_KEYSCAN = "`ssh-keyscan -p {port} {host}` shows its keys: compare them with `ssh-keygen -lf` on the server itself"
_REACH = "is the name right, is the server up, does a firewall let port {port} through?"
_FULL = "make room there: nothing is ever deleted at this kind of place"
# The first that fits is it: what names the cause comes before what only follows from it.
_CAUSES: Final = (
    _Cause(
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "shows another host key than the one in {known_hosts_file}: somebody may be in between",
        f"if the server was really set up anew, put its new key there; {_KEYSCAN}",
        RefusedError,
    ),
    _Cause(
        r"Host key verification failed|host key is known for",
        "has no host key in {known_hosts_file}, and nothing is sent to a server that is not known",
        f"add it; {_KEYSCAN}",
    ),
    _Cause(
        r"Load key .*(invalid format|error in libcrypto|not a)",
        "can't be logged in to: {key_file} is no private key that ssh understands",
        "the file must hold the private key as `ssh-keygen` wrote it",
    ),
    _Cause(
        r"Permission denied \([a-z,-]+\)|Too many authentication failures",
        "refuses the key {key_file}",
        "put its public half into ~/.ssh/authorized_keys of that account, which only its owner may be able to write",
    ),
    _Cause(
        r"No user exists for uid",
        "can't be logged in to: ssh wants our own user to have a name",
        "add a line for it to /etc/passwd of the container",
        ToolError,
    ),
    _Cause(r"Could not resolve hostname", "has a name that can't be resolved", _REACH),
    _Cause(r"Connection refused", "refuses the connection to port {port}", _REACH),
    _Cause(r"No route to host|Network is unreachable", "can't be reached", _REACH),
    _Cause(
        r"[Cc]onnection timed out|Operation timed out|banner exchange|Timeout, server .* not responding",
        "does not answer",
        _REACH,
    ),
    _Cause(
        r"Another instance of rrsync",
        "is busy: another rsync is under way there",
        "if none is, it ends by itself in a moment; `rrsync -no-lock` allows several",
    ),
    _Cause(
        r"option -\w*b\w* has been disabled|option --backup\S* has been disabled",
        "lets nothing be set aside: what stands there is never overwritten",
        "this account may only add: rename the damaged file on the server, and the copy is made again",
        RefusedError,
    ),
    _Cause(
        r"to read-only server is not allowed|from write-only server is not allowed",
        "lets this account do only half of what is needed",
        "copies are written and read back: `rrsync` without -wo, and with -ro for reading only",
    ),
    _Cause(
        r"rsync: (command )?not found|rsync: No such file|command not found.*rsync",
        "has no rsync",
        "install rsync there (3.2.4 or newer is best), so that the account finds it in its PATH",
    ),
    _Cause(r"No space left on device", "is full", _FULL, code=errno.ENOSPC),
    _Cause(r"[Qq]uota exceeded", "has no quota left for this account", _FULL, code=errno.EDQUOT),
    _Cause(r"Read-only file system", "is read-only", "mount the filesystem there read-write", code=errno.EROFS),
    _Cause(
        r"Input/output error|read errors mapping",
        "reports an input/output error",
        "check the disk there (dmesg, smartctl) before anything else",
        code=errno.EIO,
    ),
    _Cause(
        r"protocol version mismatch|is your shell clean",
        "answers with something else than rsync's protocol",
        "an account's login must print nothing: try `ssh {host} true`; and rsync must be there, 3.2.4 or newer at best",
    ),
    _Cause(
        r"unknown option|invalid rsync-command syntax|has been disabled on this server",
        "does not know, or not allow, an option that is needed",
        "install rsync 3.2.4 or newer there, and of rrsync the one that comes with it",
    ),
    _Cause(
        r"change_dir .*failed: No such file|Restricted directory does not exist|unable to chdir to restricted dir",
        "does not exist",
        "make it on the server, closed to others: `mkdir -m 700 DIRECTORY`; is its disk mounted?",
        code=errno.ENOENT,
    ),
    _Cause(r"failed: Not a directory", "is not a directory", "name a directory for the copies", code=errno.ENOTDIR),
    _Cause(
        r"Permission denied \(13\)|Operation not permitted \(1\)",
        "lets this account not read or write there",
        "on the server: `chown` the directory to the account",
        code=errno.EACCES,
    ),
    _Cause(
        r"Connection (closed|reset)|kex_exchange_identification|Broken pipe|connection unexpectedly closed|"
        r"Control socket connect|mux_client",
        "has cut the connection",
        "the next pass goes on where this one stopped; the server's log (`journalctl -u ssh`) may say why",
    ),
)
_BY_CODE: Final = {
    _NOT_FOUND_BY_SHELL: next(cause for cause in _CAUSES if cause.message == "has no rsync"),
    _OLD_PROTOCOL: next(cause for cause in _CAUSES if "rsync's protocol" in cause.message),
    **dict.fromkeys(_TIMEOUTS, _Cause("", "does not answer any more", "the next pass tries again")),
}


def error_of(server: Server, completed: Completed, doing: str) -> PgkeepError:
    """The error for a program that failed; its cause is an ``OSError`` where the server's trouble has an errno."""
    cause = _cause(completed)
    said = _last_words(completed.stderr)
    if cause is None:
        program = "ssh" if completed.return_code == _SSH_FAILED else "rsync"
        return StorageError(f"{doing}: {program} failed with code {completed.return_code} at {server.label}: {said}")
    facts = dataclasses.asdict(server)
    message = f"{doing}: {server.label} {cause.message.format(**facts)}"
    error = cause.kind(message, cause.hint.format(**facts))
    if cause.code:
        error.__cause__ = OSError(cause.code, os.strerror(cause.code), said)
    return error


def _cause(completed: Completed) -> _Cause | None:
    for cause in _CAUSES:
        if re.search(cause.pattern, completed.stderr):
            return cause if completed.return_code not in _TIMEOUTS else _BY_CODE[completed.return_code]
    return _BY_CODE.get(completed.return_code)


def _last_words(messages: str) -> str:
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    return "; ".join(lines[:_SHOWN_LINES])[:_SHOWN_CHARACTERS] or "it said nothing"
