"""Everything that touches the outside: processes, PostgreSQL, filesystems."""
