"""The ranking loss in two phases: a few candidates in memory at a time."""
