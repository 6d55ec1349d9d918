"""Copies on a server with SSH and rsync (guide option 3), one way: nothing there is ever deleted or overwritten."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pgkeep.adapters.destinations import Probe
from pgkeep.adapters.destinations.rsync_command import Rsync, require_rsync
from pgkeep.adapters.destinations.rsync_errors import Server
from pgkeep.adapters.destinations.rsync_place import RsyncPlace
from pgkeep.adapters.destinations.rsync_ssh import Connection, private_directory
from pgkeep.errors import ConfigurationError
from pgkeep.progress import Progress

# Two colons would mean a daemon, a dash at the beginning an option, two slashes a URL.
_TARGET: Final = re.compile(
    r"(?:(?P<user>[^-@:/\s][^@:/\s]*)@)?(?:\[(?P<address>[0-9a-fA-F:.]+(?:%\w+)?)\]|(?P<host>[^-@:/\s\[][^@:/\s]*))"
    r":(?P<path>(?!:|//)[^\n]*)"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """``target``: ``[user@]host:/path``; an account that ``rrsync`` restricts has ``/`` for its directory."""

    target: str
    key_file: Path
    known_hosts_file: Path
    port: int = 22
    bandwidth_limit_kib: int | None = None


class RsyncDestination:
    """A directory on a server. Raises ``ConfigurationError`` for a target that names none."""

    kind = "rsync"

    def __init__(self, options: Options) -> None:
        found = _TARGET.fullmatch(options.target)
        if found is None:
            raise ConfigurationError(f"{options.target!r} names no directory on a server", "write [user@]host:/path")
        self._options = options
        self._user: str | None = found["user"]
        self._path: str = found["path"]
        self._server = Server(
            label=self.label,
            host=found["address"] or found["host"],
            port=options.port,
            key_file=str(options.key_file),
            known_hosts_file=str(options.known_hosts_file),
        )

    @property
    def label(self) -> str:
        return self._options.target.rstrip("/")

    @contextlib.contextmanager
    def opened(self, *, to_read: bool = False) -> Iterator[RsyncPlace]:
        """Logged in to the end of the block. Raises as the protocol says, and ``ToolError`` without rsync and ssh."""
        require_rsync()
        with private_directory() as directory:
            connection = Connection(self._server, self._user, directory)
            connection.prepare()
            with connection.shared():
                rsync = Rsync(connection, self._path, self._options.bandwidth_limit_kib, directory)
                place = RsyncPlace(rsync, self.label, directory, to_read=to_read)
                place.look()
                yield place

    def probe(self, progress: Progress) -> Probe:
        """What is tried stays in one small file, ``.pgkeep-probe/trial``: it can't be removed again."""
        with self.opened() as place:
            written, overwritten = place.try_out(progress)
            findings = (_WRITTEN if written else _THERE, _OVERWRITTEN if overwritten else _KEPT)
            return Probe(ok=True, lock="none", findings=(*findings, *place.warnings, _NO_LOCK))


_WRITTEN: Final = "a file was written, compared by both sides, and read back"
_THERE: Final = (
    "the file of an earlier trial was read back; this account can't write over it, so nothing new was written"
)
_OVERWRITTEN: Final = (
    "this account can overwrite what is there, and so can whoever has its key: "
    "restrict it on the server with `rrsync -no-del -no-overwrite`"
)
_KEPT: Final = "this account was refused when it tried to overwrite a file of its own: it can only add"
_NO_LOCK: Final = (
    "nothing locks copies here, and deleting was not tried (pgkeep never does it): "
    "what holds against a stolen key are snapshots that the server makes by itself"
)
