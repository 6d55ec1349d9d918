"""What every verb shares: the options that all have, and the services they ask for."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from pgkeep.config import Loaded
    from pgkeep.wiring import Services

# They may lift flags: the right to that is kept, all others are not.
_WRITING = frozenset({"backup", "cleanup", "vault", "uninstall"})
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Context:
    """``ctx.obj``: set by the common options wherever they stand on the command line."""

    def __init__(self) -> None:
        self.root: Path | None = None
        self.file: Path | None = None
        self.json = False
        self.debug = False

    @functools.cached_property
    def loaded(self) -> Loaded:
        """Raises ``ConfigurationError``."""
        from pgkeep import config

        return config.load(self.file, os.environ, {"root": self.root})

    @functools.cached_property
    def services(self) -> Services:
        """Raises ``ConfigurationError``, ``ProtectionError``."""
        from pgkeep.wiring import Services

        self._leave_root()
        return Services(self.loaded.settings)

    def _leave_root(self) -> None:
        """Beside a vault with a user of its own, root is nobody: `docker exec` must not do what the service may not."""
        user = self.loaded.settings.vault.user
        if user is None or os.geteuid() != 0:
            return
        from pgkeep.adapters import privileges

        command = click.get_current_context(silent=True)
        verb = command.find_root().invoked_subcommand if command else None
        (privileges.become if verb in _WRITING else privileges.step_down)(user)


def _store(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(context: click.Context, _: click.Parameter, value: Any) -> None:
        if value:
            setattr(context.ensure_object(Context), name, value)

    return store


_OPTIONS = (
    click.option(
        "--root",
        type=click.Path(path_type=Path),
        metavar="DIR",
        expose_value=False,
        callback=_store("root"),
        help="Where staging/, active/ and logs/ lie (PGKEEP_ROOT; default /backups).",
    ),
    click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        expose_value=False,
        callback=_store("file"),
        help="The configuration file (PGKEEP_CONFIG; default /etc/pgkeep/pgkeep.toml).",
    ),
    click.option(
        "--debug", is_flag=True, expose_value=False, callback=_store("debug"), help="Show where an error came from."
    ),
)
_JSON = click.option(
    "--json", is_flag=True, expose_value=False, callback=_store("json"), help="Print one JSON document to stdout."
)


def common_options(function: _Function) -> _Function:
    """``--root``, ``--config``, ``--debug`` and ``--json``."""
    for option in reversed((*_OPTIONS, _JSON)):
        function = option(function)
    return function


pass_context = click.make_pass_decorator(Context, ensure=True)
