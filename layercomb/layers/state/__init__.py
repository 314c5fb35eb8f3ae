"""What stands in a state: parts that say by their type what they are."""
