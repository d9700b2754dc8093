"""Processes, locks, atomic writing and settings files, used by every command."""
