"""Processes, folders and texts of settings: what every command leans on."""
