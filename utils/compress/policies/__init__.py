"""How pieces of a memory are scored: one policy a file."""
