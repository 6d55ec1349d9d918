"""Pure formats and decisions: no input or output."""
