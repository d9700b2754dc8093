"""Paid calls to an OpenAI-compatible endpoint: validated, recorded in a journal, never paid twice."""
