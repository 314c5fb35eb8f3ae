"""What tells positions apart."""
