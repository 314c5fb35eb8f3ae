"""The parts of a state, whose types say what they are."""
