"""pgkeep: PostgreSQL backups that are sealed, proven and leave the machine one way."""

__version__ = "0.1.0"
