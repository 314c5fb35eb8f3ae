"""What layers declare about themselves, and what is derived from it."""
