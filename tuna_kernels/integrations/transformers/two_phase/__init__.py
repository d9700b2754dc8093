"""The ranking loss in two passes: memory of one candidate at a time."""
