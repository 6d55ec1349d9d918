"""What rsync and ssh say, and what is made of it. What can be had for real is in ``test_rsync_server``."""

from __future__ import annotations

import errno

import pytest

from pgkeep.adapters.destinations.rsync_errors import Server, error_of
from pgkeep.adapters.process import Completed
from pgkeep.errors import StorageError, ToolError

SERVER = Server("me@host:/copies", "host", 2222, "/run/key", "/run/known")
CUT = "rsync: connection unexpectedly closed (0 bytes received so far) [sender]\n"
CODE = "rsync error: error in rsync protocol data stream (code 12) at io.c(285) [sender=3.5.0]"


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (255, "ssh: connect to host host port 2222: No route to host", "can't be reached"),
        (255, "ssh: connect to host host port 2222: Connection timed out", "does not answer"),
        (255, "Connection timed out during banner exchange", "does not answer"),
        (12, f"Timeout, server host not responding.\n{CUT}{CODE}", "does not answer"),
        (30, "[sender] io timeout after 300 seconds -- exiting", "does not answer any more"),
        (255, "me@host: Permission denied (publickey,password).", "refuses the key /run/key"),
        (255, "kex_exchange_identification: Connection closed by remote host", "has cut the connection"),
        (12, f"client_loop: send disconnect: Broken pipe\n{CUT}{CODE}", "has cut the connection"),
        (12, f"/usr/bin/rrsync error: Another instance of rrsync is already\n{CUT}{CODE}", "is busy"),
        (12, f"bash: line 1: rsync: command not found\n{CUT}{CODE}", "has no rsync"),
        (127, "", "has no rsync"),
        (2, "protocol version mismatch -- is your shell clean?", "something else than rsync's protocol"),
        (12, f"rsync: --mkpath: unknown option\n{CUT}{CODE}", "3.2.4 or newer"),
        (99, "\n", "rsync failed with code 99 at me@host:/copies: it said nothing"),
        (255, "something new", "ssh failed with code 255 at me@host:/copies: something new"),
    ],
)
def test_causes_are_named(code: int, said: str, words: str) -> None:
    error = error_of(SERVER, Completed(code, b"", said), "sending x")
    assert isinstance(error, StorageError)
    assert error.message.startswith("sending x: ")
    assert SERVER.label in error.message
    assert words in f"{error.message} {error.hint}"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ('rsync: [receiver] write failed on "/copies/x": No space left on device (28)', errno.ENOSPC),
        ('rsync: [receiver] write failed on "/copies/x": Disk quota exceeded (122)', errno.EDQUOT),
        ('rsync: [receiver] mkstemp "/copies/.x" failed: Read-only file system (30)', errno.EROFS),
        ('rsync: [receiver] mkstemp "/copies/.x" failed: Permission denied (13)', errno.EACCES),
        ('rsync: [sender] read errors mapping "/copies/x": Input/output error (5)', errno.EIO),
    ],
)
def test_what_has_a_number_keeps_it(said: str, code: int) -> None:
    error = error_of(SERVER, Completed(11, b"", f"{said}\n{CUT}"), "sending x")
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == code


def test_a_user_without_a_name_is_our_own_affair() -> None:
    error = error_of(SERVER, Completed(255, b"", "No user exists for uid 4711"), "connecting")
    assert isinstance(error, ToolError)
    assert "/etc/passwd" in error.hint
