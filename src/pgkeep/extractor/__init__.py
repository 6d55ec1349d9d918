"""One-way copies: reads the vault, writes to destinations outside, and looks after what it has put there."""
