"""The demonstration: a database that is awkward on purpose, and proofs of equality between two databases."""
