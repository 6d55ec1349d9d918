"""``pgkeep config show``: the settings in force and where each came from."""

from __future__ import annotations

import json
from typing import Protocol

import click

from pgkeep.config import MASK, PROGRAMS_VARIABLE, Effective, Loaded, effective


class Context(Protocol):
    """What the main command hands down. ``loaded`` raises ``ConfigurationError``."""

    @property
    def loaded(self) -> Loaded: ...
    @property
    def json(self) -> bool: ...


@click.group("config")
def command() -> None:
    """Look at the configuration."""


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def show(context: Context, as_json: bool) -> None:
    """Print every setting's value and origin; secrets are masked.

    The text is valid TOML: it can be saved as a configuration file, to which only secrets have to be added.

    \b
    Examples:
      pgkeep config show
      DB_HOST=db pgkeep config show --json
    """
    click.echo(_as_json(context.loaded) if as_json or context.json else _as_text(context.loaded))


def _as_json(loaded: Loaded) -> str:
    settings = {row.key: {"value": row.value, "origin": row.origin} for row in effective(loaded)}
    return json.dumps({"settings": settings, "libpq": loaded.libpq, PROGRAMS_VARIABLE: loaded.programs}, indent=2)


def _as_text(loaded: Loaded) -> str:
    libpq = [f"# libpq reads {name} = {json.dumps(value)}" for name, value in loaded.libpq.items()]
    programs = [f"# {PROGRAMS_VARIABLE} = {json.dumps(loaded.programs)}"] if loaded.programs else []
    return "\n".join([_line(row) for row in effective(loaded)] + libpq + programs)


def _line(row: Effective) -> str:
    origin = repr(row.origin)[1:-1]  # a path may hold a line's end
    if row.literal is None:
        return f"# {row.key} = {MASK if row.value == MASK else 'unset'}  # {origin}"
    return f"{row.key} = {row.literal}  # {origin}"
