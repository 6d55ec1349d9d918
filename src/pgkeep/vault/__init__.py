"""The role that owns sealed backups: receive, check, seal, expire."""
