"""The plainest leaves."""
