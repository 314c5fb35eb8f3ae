"""What decoding keeps between steps."""
