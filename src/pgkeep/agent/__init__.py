"""The role that reads the database: dump, assemble, hand over."""
