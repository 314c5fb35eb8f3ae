"""What the launcher is made of, but for gin, which `cli` alone imports."""
