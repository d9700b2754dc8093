"""Ours beside the textbook: how far they agree and what each takes."""
