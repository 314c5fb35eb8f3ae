"""What layers declare about themselves, and what follows from it."""
