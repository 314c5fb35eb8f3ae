"""The parts of the launcher. Only `cli` imports gin."""
