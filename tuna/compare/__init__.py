"""Tuna compared with the baseline: how far they agree and what each takes."""
